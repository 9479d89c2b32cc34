//! The hypervisor of one host: a runner process per VM, in which the guest runs on a machine of our own on KVM, or which
//! supervises a QEMU; and that machine by itself, to be embedded.
//!
//! ```no_run
//! use iaas_core::process::{Roles, init};
//! use iaas_vmm::{HypervisorConfig, KvmHypervisor, vmm::Kvm};
//!
//! // With the openers of your pools and ports: `.with_block(..)`, `.with_port(..)`.
//! let roles = Roles::new().with_role(iaas_vmm::runner());
//! init(&roles); // The first line of `main`: a runner never comes back from it.
//!
//! let vms = KvmHypervisor::open(HypervisorConfig {
//!     state: "/var/lib/cloud".into(),
//!     runtime: "/run/cloud".into(),
//!     cloud: iaas_core::Id::from_uuid(uuid::Uuid::from_u128(1)),
//!     host: iaas_core::Id::from_uuid(uuid::Uuid::from_u128(2)),
//!     roles,
//!     role_binary: None,
//!     vmm: Kvm, // `vmm::Qemu::default()` makes it a `QemuHypervisor`, for machines without KVM.
//! })?;
//! println!("guests run on {:?}; {}", vms.vmm(), iaas_vmm::probe());
//! # Ok::<(), iaas_core::Error>(())
//! ```
//!
//! # Core concepts
//! * [`HostHypervisor`]: the provider, as [`KvmHypervisor`] or [`QemuHypervisor`]. It stores what it accepts, starts a runner
//!   per boot, and reads what runners leave in files; it holds no VM, so dropping or killing its process changes nothing for
//!   guests. Cheap to clone, callable from any task.
//! * [`runner()`]: the role. One process per boot of a VM, for as long as that boot lasts. It opens the VM's volumes and
//!   ports. On KVM the guest runs inside it; a QEMU under it has everything from it as a descriptor, and dies with it.
//! * [`Vm`]: a machine on KVM in this process, without runner or control plane; see [`vm`]. A thread per processor and one
//!   for its devices; [`Vm::wait`] returns at every end of the guest. As many per process as it has room for.
//! * [`virtio`]: devices written once, for QEMU over vhost-user and for our own machines over PCI. A malformed request fails
//!   that device, never a process.
//! * [`HostArtifacts`]: kernels and initrds by digest. [`MachineInventory`]: what this machine is made of. [`probe()`]:
//!   whether its KVM is real.
//!
//! # What it does not do yet
//! The runner is not a jail: QEMU has its own sandbox and no network, the runner has what its user has. No checkpoints, no
//! migration, no leases, no firmware of your own, one queue per device. Our own machines start kernels only, take and give no
//! devices while they run, and have no segmentation offloads.
//!
//! # Features
//! | feature | adds | pulls in | default |
//! |---|---|---|---|
//! | `qemu` | [`QemuHypervisor`]: runners that supervise QEMU | nothing | yes |
//! | `kvm` | [`KvmHypervisor`]: runners on our own VMM ([`vm`]); the self-test of this machine's KVM | `kvm-ioctls`, `kvm-bindings`, `linux-loader`, `acpi_tables`, `vm-superio` | yes |

#[cfg(feature = "kvm")]
mod acpi;
#[cfg(feature = "kvm")]
mod arch;
pub mod artifacts;
#[cfg(feature = "kvm")]
mod boot;
#[cfg(any(feature = "kvm", feature = "qemu"))]
mod check;
#[cfg(feature = "kvm")]
mod device;
#[cfg(any(feature = "kvm", feature = "qemu"))]
mod feed;
mod files;
#[cfg(all(feature = "kvm", any(test, fuzzing)))]
pub mod fuzz;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub mod hypervisor;
pub mod inventory;
pub mod jail;
#[cfg(feature = "kvm")]
mod kvm;
pub mod memory;
#[cfg(feature = "kvm")]
mod pci;
pub mod probe;
#[cfg(feature = "qemu")]
pub mod qemu;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub mod runner;
pub mod virtio;
#[cfg(feature = "kvm")]
pub mod vm;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub mod vmm;

pub use artifacts::HostArtifacts;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub use hypervisor::HostHypervisor;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub use hypervisor::HypervisorConfig;
#[cfg(feature = "kvm")]
pub use hypervisor::KvmHypervisor;
#[cfg(feature = "qemu")]
pub use hypervisor::QemuHypervisor;
pub use inventory::MachineInventory;
pub use probe::Capability;
pub use probe::probe;
#[cfg(any(feature = "kvm", feature = "qemu"))]
pub use runner::runner;
#[cfg(feature = "kvm")]
pub use vm::Vm;
/// The one `vm-memory` of this crate.
pub use vm_memory;
