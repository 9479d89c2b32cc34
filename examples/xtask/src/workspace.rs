//! Where things are: the workspace's root and the folders under `target/` that these commands own.

use std::env;
use std::path::{Path, PathBuf};

/// The folder of the workspace's `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    // examples/xtask is two levels below the root; a test of this package sees the same variable.
    manifest.ancestors().nth(2).map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// The guest kernel, its initramfs and the package cache. `IAAS_GUEST_DIR` names another folder.
pub(crate) fn guest_dir() -> PathBuf {
    env::var_os("IAAS_GUEST_DIR").map_or_else(|| root().join("target/guest"), PathBuf::from)
}

/// Where tests that could not run leave one file each: in cargo's target folder, as the tests see it.
pub(crate) fn skips_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join("skips")
}

/// The cargo that started us, or the one in `PATH`.
pub(crate) fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// The first executable called `name` in `PATH` or in the system's `sbin` folders, which an ordinary user's `PATH` lacks.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("examples/xtask/Cargo.toml").is_file());
    }

    #[test]
    fn which_finds_a_program_and_no_folder() {
        assert!(which("sh").is_some());
        assert!(which("no-such-program-anywhere").is_none());
        assert!(which("..").is_none());
    }
}
