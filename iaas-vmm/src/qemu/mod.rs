//! A QEMU process as one VM's machine: its command line, its monitor, and the child itself.
//!
//! QEMU opens no image and no network: kernel, disks, NICs, console and monitor are descriptors that the runner made.

pub mod command;
pub mod qmp;

use std::path::PathBuf;

use iaas_core::Error;
use iaas_core::Result;

/// The QEMU binary of this machine: `qemu-system-x86_64` from `PATH`.
///
/// # Errors
/// `Unavailable`: there is none.
pub fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(std::env::split_paths(&path).chain(["/usr/bin", "/usr/libexec"].map(PathBuf::from)))
}

fn find_in(folders: impl IntoIterator<Item = PathBuf>) -> Result<PathBuf> {
    folders.into_iter().map(|folder| folder.join(BINARY)).find(|file| file.is_file()).ok_or_else(|| {
        Error::unavailable(format!("there is no `{BINARY}` on this host"))
            .outcome_is(iaas_core::Outcome::NotDone)
            .remedy("install it, on Debian with `apt-get install --no-install-recommends qemu-system-x86`")
    })
}

const BINARY: &str = "qemu-system-x86_64";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_qemu_is_told_what_to_install() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_in([folder.path().to_owned()]).unwrap_err();
        assert_eq!(
            (error.kind(), error.outcome()),
            (iaas_core::ErrorKind::Unavailable, iaas_core::Outcome::NotDone)
        );
        assert!(error.public().contains(BINARY) && error.what_to_do().unwrap().contains("install"));
        std::fs::write(folder.path().join(BINARY), "").unwrap();
        assert_eq!(find_in([folder.path().to_owned()]).unwrap(), folder.path().join(BINARY));
    }
}
