//! Whether this machine's KVM runs unmodified kernels: found out by running a guest, not by asking.
//!
//! A KVM that interprets guest code answers the whole API and boots nothing: it does not know SSE, which every kernel's
//! decompressor uses. So the probe starts a 64-bit guest of a few instructions, one of them SSE, and looks at its result.

use std::fmt;
use std::io;

/// What `/dev/kvm` is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// It runs guests on the processor.
    Hardware,
    /// It is there, but interprets guest code: no unmodified kernel boots. Says what the test guest ended with.
    Emulated(String),
    /// This user may not open it.
    NoPermission,
    /// There is none.
    Absent,
    /// It is there and did not work. Says at what.
    Broken(String),
    /// This program was built without the feature `kvm`.
    NotBuilt,
}

impl Capability {
    /// What to do about it; `None` if there is nothing to do.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Hardware => None,
            Self::Emulated(_) => {
                Some("use a machine with hardware virtualization; until then guests run translated")
            }
            Self::NoPermission => Some("add this user to the group `kvm`, or run as root"),
            Self::Absent => Some("turn on virtualization in the firmware, and load `kvm_intel` or `kvm_amd`"),
            Self::Broken(_) => Some("see the kernel's log; until then guests run translated"),
            Self::NotBuilt => Some("build with the feature `kvm`"),
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware => f.write_str("KVM works in hardware"),
            Self::Emulated(how) => {
                write!(f, "KVM present but emulated: cannot run an unmodified kernel ({how})")
            }
            Self::NoPermission => f.write_str("KVM present but this user may not use /dev/kvm"),
            Self::Absent => f.write_str("there is no /dev/kvm"),
            Self::Broken(how) => write!(f, "KVM present but does not work ({how})"),
            Self::NotBuilt => f.write_str("KVM was left out of this program"),
        }
    }
}

/// Tests this machine's KVM. Blocks for milliseconds; for two seconds at most.
pub fn probe() -> Capability {
    let open = std::fs::OpenOptions::new().read(true).write(true).open(KVM);
    match open {
        Ok(_) => self_test(),
        Err(error) => closed(&error),
    }
}

/// What it means that the device cannot be opened.
fn closed(error: &io::Error) -> Capability {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Capability::NoPermission,
        io::ErrorKind::NotFound => Capability::Absent,
        // ENODEV and ENXIO: a node without a driver behind it.
        _ if matches!(error.raw_os_error(), Some(nix::libc::ENODEV | nix::libc::ENXIO)) => Capability::Absent,
        _ => Capability::Broken(error.to_string()),
    }
}

#[cfg(not(feature = "kvm"))]
fn self_test() -> Capability {
    Capability::NotBuilt
}

/// On a thread of its own: a KVM that never comes back must not take the caller with it.
#[cfg(feature = "kvm")]
fn self_test() -> Capability {
    let (tell, hear) = std::sync::mpsc::channel();
    let test = move || {
        // Nobody hears any more after the limit.
        let _ = tell.send(crate::kvm::run_test_guest());
    };
    let started = std::thread::Builder::new().name("kvm-probe".into()).spawn(test);
    if let Err(error) = started {
        return Capability::Broken(error.to_string());
    }
    match hear.recv_timeout(LIMIT) {
        Ok(Ok(crate::kvm::Ended::AsItShould)) => Capability::Hardware,
        Ok(Ok(crate::kvm::Ended::Otherwise(how))) => Capability::Emulated(how),
        Ok(Err(error)) => Capability::Broken(error.to_string()),
        Err(_) => Capability::Emulated("the test guest did not end".into()),
    }
}

const KVM: &str = "/dev/kvm";
#[cfg(feature = "kvm")]
const LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_says_why_and_what_to_do() {
        let of = |code| closed(&io::Error::from_raw_os_error(code));
        assert_eq!(of(nix::libc::EACCES), Capability::NoPermission);
        assert_eq!(of(nix::libc::ENOENT), Capability::Absent);
        assert_eq!(of(nix::libc::ENODEV), Capability::Absent);
        assert!(matches!(of(nix::libc::EBUSY), Capability::Broken(_)));
        for capability in [of(nix::libc::EACCES), of(nix::libc::ENOENT), of(nix::libc::EBUSY)] {
            assert!(capability.remedy().is_some());
        }
    }

    /// The kernel's own flag of the processor is the oracle: a KVM is in hardware only where that is.
    #[test]
    fn the_probe_agrees_with_the_processor() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has_hardware = info.split_whitespace().any(|word| word == "vmx" || word == "svm");
        let found = probe();
        assert!(has_hardware || found != Capability::Hardware, "{found}");
        if !std::path::Path::new(KVM).exists() {
            assert_eq!(found, Capability::Absent);
        }
    }
}
