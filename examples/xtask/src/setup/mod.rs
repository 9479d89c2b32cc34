//! `cargo xtask setup`: what this machine lacks, and the guest that the tests boot.
//!
//! The guest is Debian's cloud kernel and an initramfs of busybox, virtio modules, `mke2fs` and our scripts. It is kept under
//! `target/guest/`: `vmlinuz`, `initrd.cpio.gz` (all payloads) and `initrd-tiny.cpio.gz` (the payload `tiny` only, smaller and
//! so quicker to boot). Nothing here needs root but the installation of packages.

mod archive;
mod guest;
mod initrd;
mod packages;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::command::absolute;
use crate::failure::{Failure, Result};
use crate::report::line;

pub(crate) use archive::Archive;
pub(crate) use guest::Guest;
pub(crate) use guest::Packages;
pub(crate) use initrd::add_modules;
pub(crate) use initrd::add_program;
pub(crate) use packages::PROVIDED;

/// What the caller wants of the set-up.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Use only what is already here.
    pub(crate) offline: bool,
    /// Ask the archive again for the newest kernel and busybox.
    pub(crate) refresh: bool,
    /// A kernel to boot in place of Debian's.
    pub(crate) kernel: Option<PathBuf>,
    /// An initramfs to boot in place of ours.
    pub(crate) initrd: Option<PathBuf>,
}

impl Options {
    /// Takes `flag` if it is one of the set-up's, reading its value with `value`.
    pub(crate) fn take(&mut self, flag: &str, value: impl FnOnce() -> Result<OsString>) -> Result<bool> {
        match flag {
            "offline" => self.offline = true,
            "refresh" => self.refresh = true,
            "kernel" => self.kernel = Some(existing(&value()?)?),
            "initrd" => self.initrd = Some(existing(&value()?)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Installs the packages and makes the guest.
pub(crate) fn all(options: &Options) -> Result<Guest> {
    packages(options)?;
    let guest = guest(options)?;
    line(&format!("guest kernel:    {}", guest.kernel.display()));
    line(&format!("guest initramfs: {}", guest.initrd.display()));
    Ok(guest)
}

/// Installs the packages that are missing.
pub(crate) fn packages(options: &Options) -> Result<()> {
    packages::install(options.offline)?;
    packages::check_cargo_components()
}

/// The packages that guests are made of, fetched once.
pub(crate) fn guest_packages(options: &Options) -> Result<Packages> {
    guest::packages(options)
}

/// Makes the guest's kernel and initramfs where they are missing or older than their sources.
pub(crate) fn guest(options: &Options) -> Result<Guest> {
    guest::provide(options)
}

fn existing(path: &OsString) -> Result<PathBuf> {
    let path = absolute(path)?;
    match path.is_file() {
        true => Ok(path),
        false => Err(Failure::new(format!("no such file: {}", path.display()))
            .remedy("give the path of a kernel image or initramfs")),
    }
}
