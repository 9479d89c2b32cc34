//! The hypervisor of one host: a runner process per VM, which supervises QEMU and serves the VM's disks and NICs itself.

pub mod artifacts;
#[cfg(feature = "qemu")]
mod check;
#[cfg(feature = "qemu")]
mod feed;
mod files;
#[cfg(feature = "qemu")]
pub mod hypervisor;
pub mod jail;
#[cfg(feature = "kvm")]
mod kvm;
pub mod memory;
pub mod probe;
#[cfg(feature = "qemu")]
pub mod qemu;
#[cfg(feature = "qemu")]
pub mod runner;
pub mod virtio;

pub use artifacts::HostArtifacts;
#[cfg(feature = "qemu")]
pub use hypervisor::QemuConfig;
#[cfg(feature = "qemu")]
pub use hypervisor::QemuHypervisor;
pub use probe::Capability;
pub use probe::probe;
#[cfg(feature = "qemu")]
pub use runner::runner;
/// The one `vm-memory` of this crate.
pub use vm_memory;
