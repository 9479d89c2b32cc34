//! The lab's initramfs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::setup::{self, Archive, Guest, add_modules, add_program};
use crate::workspace::which;

use super::runs::Run;

/// What the first process reads.
#[derive(Debug)]
pub(super) struct Words<'a> {
    /// Goes on the command line of an inner kernel, and nowhere else.
    pub(super) nonce: &'a str,
    /// The test programs' filter, may be empty.
    pub(super) filter: &'a str,
    /// The test that is run again without KVM.
    pub(super) control: &'a str,
}

/// What else goes into the image. The lab's own tests need nothing of it.
#[derive(Debug, Default)]
pub(super) struct Extra {
    pub(super) dirs: Vec<&'static str>,
    /// Place in the image, and program of this machine, packed with its libraries.
    pub(super) programs: Vec<(String, PathBuf)>,
    /// Place and content.
    pub(super) files: Vec<(String, Vec<u8>)>,
}

/// Packs everything into `target`.
pub(super) fn pack(
    target: &Path,
    setup: &setup::Options,
    guest: &Guest,
    programs: &[(Run, Vec<(&'static str, PathBuf)>)],
    words: &Words<'_>,
    extra: &Extra,
) -> Result<()> {
    let packages = setup::guest_packages(setup)?;
    let mut archive = Archive::default();
    for dir in DIRS.iter().chain(&extra.dirs) {
        archive.dir(dir);
    }
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &read(&packages.busybox)?);
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.file("init", 0o755, include_str!("init.sh").as_bytes());
    for (name, word) in [("nonce", words.nonce), ("filter", words.filter), ("control", words.control)] {
        archive.file(&format!("lab/{name}"), 0o644, format!("{word}\n").as_bytes());
    }
    add_modules(&mut archive, &packages.kernel, "etc/modules", &MODULES)?;
    let mut have = BTreeSet::from(["lib".to_owned()]);
    for part in 0..super::PARTS {
        archive.dir(&format!("lab/runs/{part}"));
    }
    for (run, paths) in programs {
        for (name, program) in paths {
            // Without what only a debugger reads: it would be most of the image.
            let small = target.with_file_name(format!("{name}.stripped"));
            Cmd::new("strip").arg("-o").arg(&small).arg(program).limit(MINUTES_2).output()?;
            add_program(&mut archive, &small, &format!("lab/programs/{name}"), &mut have)?;
            fs::remove_file(&small).at(&small)?;
        }
        archive.file(&format!("lab/runs/{}/{}", run.part, run.name), 0o755, run.script().as_bytes());
    }
    for tool in ["mke2fs", "e2fsck"] {
        let program = which(tool).ok_or_else(|| {
            Failure::new(format!("{tool} is missing")).remedy("run `cargo xtask setup` as root")
        })?;
        add_program(&mut archive, &program, &format!("bin/{tool}"), &mut have)?;
    }
    for (inside, program) in &extra.programs {
        add_program(&mut archive, program, inside, &mut have)?;
    }
    for (inside, content) in &extra.files {
        archive.file(inside, 0o644, content);
    }
    archive.file("lab/guest/vmlinuz", 0o644, &read(&guest.kernel)?);
    for name in ["initrd.cpio.gz", "initrd-tiny.cpio.gz"] {
        archive.file(&format!("lab/guest/{name}"), 0o644, &read(&guest.initrd.with_file_name(name))?);
    }
    let raw = target.with_extension("");
    fs::write(&raw, archive.finish()).at(&raw)?;
    Cmd::new("gzip").args(["-n", "-1", "-f"]).arg(&raw).limit(MINUTES_2).output().map(drop)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).at(path)
}

/// Dependencies first. Everything that real guests on KVM, and the network between them, need of the outer kernel.
const MODULES: [&str; 10] = [
    "irqbypass",
    "kvm",
    "kvm-amd",
    "tun",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio",
    "virtio_pci",
    "virtio_blk",
];

const DIRS: [&str; 14] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "proc",
    "run",
    "sys",
    "tmp",
    "root",
    "state",
    "lab",
    "lab/guest",
    "lab/programs",
    "lab/runs",
];

const APPLETS: [&str; 28] = [
    "cat", "chmod", "cp", "cut", "date", "dd", "dmesg", "echo", "env", "grep", "head", "insmod", "ip",
    "kill", "ls", "mkdir", "mount", "poweroff", "ps", "rm", "rmmod", "sh", "sleep", "sync", "tail",
    "timeout", "true", "umount",
];
const MINUTES_2: Duration = Duration::from_secs(120);
