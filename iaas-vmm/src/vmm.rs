//! What a [`HostHypervisor`](crate::HostHypervisor) runs its guests on.

use std::fmt::Debug;

#[cfg(feature = "kvm")]
use iaas_core::Error;
use iaas_core::Result;
#[cfg(feature = "kvm")]
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::hypervisor::cap;

use crate::probe::Capability;
use crate::probe::probe;
use crate::runner::RunsOn;

/// What runs the guests of a [`HostHypervisor`](crate::HostHypervisor): [`Kvm`] or [`Qemu`].
pub trait Vmm: Clone + Debug + Send + Sync + sealed::Sealed + 'static {
    /// Its name, as `hello` tells it.
    const NAME: &'static str;
    /// What it can do beyond what every hypervisor does, of [`cap`].
    const CAPS: &'static [&'static str];

    /// Looks at this machine when a hypervisor is opened. Blocks for as long as [`probe`].
    ///
    /// # Errors
    /// `Unavailable`: this machine cannot run guests in this way; says what to do.
    fn ready(self) -> Result<Self>;

    /// Refuses a spec that it can never meet.
    ///
    /// # Errors
    /// `Invalid`: a number is out of its bounds. `Unsupported`: something that it does not do.
    fn check(&self, spec: &VmSpec) -> Result<()>;

    /// What a runner is told.
    ///
    /// # Errors
    /// `Unavailable`: a program is missing.
    fn runs_on(&self) -> Result<RunsOn>;
}

/// Machines of our own, each inside its runner. Needs a KVM that works in hardware; starts kernels, and neither takes nor
/// gives devices while a guest runs.
#[cfg(feature = "kvm")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kvm;

#[cfg(feature = "kvm")]
impl Vmm for Kvm {
    const NAME: &'static str = "kvm";
    const CAPS: &'static [&'static str] = &[cap::PAUSE, cap::ADOPT];

    fn ready(self) -> Result<Self> {
        match probe() {
            Capability::Hardware => Ok(self),
            other => Err(Error::unavailable(other.to_string())
                .outcome_is(iaas_core::Outcome::NotDone)
                .remedy(other.remedy().unwrap_or("use another hypervisor"))),
        }
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        if spec.vcpus > u32::from(crate::vm::VCPUS_MAX) {
            return Err(Error::invalid(format!("a VM of {} vCPUs", spec.vcpus))
                .remedy(format!("use at most {}", crate::vm::VCPUS_MAX)));
        }
        if spec.memory < MEMORY_MIN {
            return Err(Error::invalid(format!("a VM of {} bytes of memory", spec.memory))
                .remedy("use at least 32 MiB"));
        }
        // One is its source of randomness.
        let most = crate::vm::DEVICES_MAX - 1;
        if spec.devices.len() > most {
            return Err(Error::invalid("too many devices").remedy(format!("use at most {most}")));
        }
        match spec.origin {
            Origin::Kernel { .. } => Ok(()),
            _ => Err(Error::unsupported("this hypervisor starts kernels only")
                .remedy("give the VM a kernel, or use QEMU")),
        }
    }

    fn runs_on(&self) -> Result<RunsOn> {
        Ok(RunsOn::Kvm)
    }
}

/// QEMU under a runner. Works on every machine.
#[cfg(feature = "qemu")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Qemu {
    /// The QEMU binary; `None` to look for it in `PATH` when a VM starts.
    pub binary: Option<std::path::PathBuf>,
    /// What runs the guests' instructions; `None` to ask the self-test of KVM when the hypervisor is opened.
    pub accel: Option<crate::qemu::command::Accel>,
}

#[cfg(feature = "qemu")]
impl Vmm for Qemu {
    const NAME: &'static str = "qemu";
    const CAPS: &'static [&'static str] = &[cap::PAUSE, cap::ADOPT, cap::HOTPLUG];

    fn ready(self) -> Result<Self> {
        use crate::qemu::command::Accel;
        let accel = self.accel.unwrap_or_else(|| match probe() {
            Capability::Hardware => Accel::Kvm,
            _ => Accel::Tcg,
        });
        Ok(Self { accel: Some(accel), ..self })
    }

    fn check(&self, _: &VmSpec) -> Result<()> {
        Ok(())
    }

    fn runs_on(&self) -> Result<RunsOn> {
        let binary = self.binary.clone().map_or_else(crate::qemu::find, Ok)?;
        let accel = self.accel.unwrap_or(crate::qemu::command::Accel::Tcg);
        Ok(RunsOn::Qemu { binary, accel })
    }
}

mod sealed {
    /// What runs guests is told to runners, which know only ours.
    pub trait Sealed {}
    #[cfg(feature = "kvm")]
    impl Sealed for super::Kvm {}
    #[cfg(feature = "qemu")]
    impl Sealed for super::Qemu {}
}

/// Less than a kernel and its first file system take.
#[cfg(feature = "kvm")]
const MEMORY_MIN: u64 = 32 << 20;

#[cfg(all(test, feature = "kvm"))]
mod tests {
    use std::collections::BTreeMap;

    use iaas_core::Boot;
    use iaas_core::Digest;
    use iaas_core::ErrorKind;
    use iaas_core::Term;
    use iaas_core::spi::hypervisor::Run;

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            term: Term(1),
            run: Run::On(Boot(1)),
            vcpus: 1,
            memory: 64 << 20,
            origin: Origin::Kernel { kernel: Digest::of(b"k"), initrd: None, cmdline: String::new() },
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Default::default(),
        }
    }

    #[test]
    fn a_machine_of_ours_refuses_what_it_can_never_be() {
        Kvm.check(&spec()).unwrap();
        let refused = |spec: VmSpec| Kvm.check(&spec).unwrap_err().kind();
        assert_eq!(refused(VmSpec { vcpus: 65, ..spec() }), ErrorKind::Invalid);
        assert_eq!(refused(VmSpec { memory: 1 << 20, ..spec() }), ErrorKind::Invalid);
        assert_eq!(refused(VmSpec { origin: Origin::Disk, ..spec() }), ErrorKind::Unsupported);
    }

    #[test]
    fn a_host_without_hardware_says_so_when_it_is_opened() {
        match (probe(), Kvm.ready()) {
            (Capability::Hardware, ready) => assert_eq!(ready.unwrap(), Kvm),
            (other, ready) => {
                let error = ready.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                assert_eq!(error.what_to_do(), other.remedy());
            }
        }
    }
}
