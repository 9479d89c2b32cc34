//! What goes into the initramfs.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use super::archive::Archive;
use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::workspace::which;

/// The files that an initramfs is packed from.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// The unpacked kernel package.
    pub(super) kernel: &'a Path,
    /// A statically linked busybox.
    pub(super) busybox: &'a Path,
    /// Our statically linked guest program.
    pub(super) tool: &'a Path,
}

/// How much to pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contents {
    /// Every payload, and `mke2fs` with its libraries.
    All,
    /// Only what the payload `tiny` needs.
    Tiny,
}

impl Parts<'_> {
    /// Names the state of every part: equal stamps give equal archives.
    pub(super) fn stamp(&self) -> Result<String> {
        let mut hash = DefaultHasher::new();
        for (name, script) in SCRIPTS {
            hash.write(name.as_bytes());
            hash.write(script.as_bytes());
        }
        hash.write(format!("{MODULES:?}{LATE_MODULES:?}{APPLETS:?}").as_bytes());
        hash.write(&fs::read(self.tool).at(self.tool)?);
        hash.write(&fs::read(self.busybox).at(self.busybox)?);
        hash.write(self.kernel.to_string_lossy().as_bytes());
        Ok(format!("{:016x}\n", hash.finish()))
    }

    /// Packs an uncompressed archive.
    pub(super) fn archive(&self, contents: Contents) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for dir in DIRS {
            archive.dir(dir);
        }
        archive.device("dev/console", 5, 1);
        archive.file("bin/busybox", 0o755, &fs::read(self.busybox).at(self.busybox)?);
        archive.file("bin/guest-tool", 0o755, &fs::read(self.tool).at(self.tool)?);
        for applet in APPLETS {
            archive.symlink(&format!("bin/{applet}"), "busybox");
        }
        for (name, script) in SCRIPTS {
            archive.file(name, 0o755, script.as_bytes());
        }
        add_modules(&mut archive, self.kernel, "etc/modules", &MODULES)?;
        add_modules(&mut archive, self.kernel, "etc/modules.late", &LATE_MODULES)?;
        if contents == Contents::All {
            // busybox makes ext2 only.
            let program = which("mke2fs")
                .ok_or_else(|| Failure::new("mke2fs is missing").remedy("apt-get install e2fsprogs"))?;
            add_program(&mut archive, &program, "bin/mke2fs", &mut BTreeSet::new())?;
        }
        Ok(archive.finish())
    }
}

/// Adds modules of an unpacked kernel package, and the file `list` that says in which order to load them. A name that the
/// kernel has built in is left out.
pub(crate) fn add_modules(archive: &mut Archive, kernel: &Path, list: &str, names: &[&str]) -> Result<()> {
    let files = files_below(&kernel.join("lib/modules"))?;
    let mut order = String::new();
    for name in names {
        if let Some(file) = files.iter().find(|f| is_module(f, name)) {
            let inside = format!("lib/{}", file.file_name().unwrap_or_default().to_string_lossy());
            archive.file(&inside, 0o644, &fs::read(file).at(file)?);
            writeln!(order, "/{inside}").context("module list")?;
        }
    }
    archive.file(list, 0o644, order.as_bytes());
    Ok(())
}

/// Adds a program of this machine at `inside`, and the libraries that `ldd` lists; a static one has none. `have` names what is there already, folders
/// and libraries, and grows.
pub(crate) fn add_program(
    archive: &mut Archive,
    program: &Path,
    inside: &str,
    have: &mut BTreeSet<String>,
) -> Result<()> {
    let listing = Cmd::new("ldd").arg(program).env("LC_ALL", "C").finish()?;
    if !listing.status.success() && !listing.stderr.contains("not a dynamic executable") {
        return Err(Failure::new(format!("ldd {}: {}", program.display(), listing.stderr.trim())));
    }
    for library in parse_ldd(&listing.stdout) {
        for dir in parents(&library).into_iter().filter(|dir| !DIRS.contains(dir)) {
            if have.insert(dir.to_owned()) {
                archive.dir(dir);
            }
        }
        if have.insert(library.clone()) {
            let path = Path::new(&library);
            archive.file(library.trim_start_matches('/'), 0o755, &fs::read(path).at(path)?);
        }
    }
    archive.file(inside, 0o755, &fs::read(program).at(program)?);
    Ok(())
}

/// The paths of the libraries, the loader among them.
fn parse_ldd(listing: &str) -> Vec<String> {
    listing
        .lines()
        .filter_map(|l| l.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect()
}

/// The folders above `path`, outermost first, without the leading slash.
fn parents(path: &str) -> Vec<&str> {
    let path = path.trim_start_matches('/');
    path.match_indices('/').map(|(at, _)| &path[..at]).collect()
}

fn is_module(file: &Path, name: &str) -> bool {
    let found = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    found.strip_prefix(name).is_some_and(|rest| rest.starts_with(".ko"))
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).at(&dir)?.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                _ => files.push(entry.path()),
            }
        }
    }
    Ok(files)
}

const SCRIPTS: [(&str, &str); 9] = [
    ("init", include_str!("scripts/init.sh")),
    ("etc/udhcpc.sh", include_str!("scripts/udhcpc.sh")),
    ("etc/guest/web.sh", include_str!("scripts/web.sh")),
    ("etc/guest/client.sh", include_str!("scripts/client.sh")),
    ("etc/guest/tiny.sh", include_str!("scripts/tiny.sh")),
    ("etc/guest/bench.sh", include_str!("scripts/bench.sh")),
    ("etc/guest/shell.sh", include_str!("scripts/shell.sh")),
    ("etc/guest/poweroff.sh", include_str!("scripts/poweroff.sh")),
    ("etc/guest/off", include_str!("scripts/off.sh")),
];

/// Dependencies first: an unpacked kernel package has no `modules.dep`.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
];

/// For the power button; nothing waits for these.
const LATE_MODULES: [&str; 2] = ["button", "evdev"];

const DIRS: [&str; 10] = ["bin", "dev", "etc", "etc/guest", "lib", "mnt", "proc", "run", "sys", "tmp"];

const APPLETS: [&str; 49] = [
    "awk", "blkid", "cat", "chmod", "cp", "cut", "date", "dd", "dmesg", "echo", "env", "expr", "false",
    "grep", "head", "hexdump", "httpd", "insmod", "ip", "kill", "ln", "ls", "md5sum", "mkdir", "mount", "mv",
    "nc", "od", "ping", "ping6", "poweroff", "printf", "ps", "reboot", "rm", "sed", "seq", "sh", "sleep",
    "stty", "sync", "tail", "test", "timeout", "true", "udhcpc", "umount", "uname", "wget",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_the_libraries_and_the_loader_but_not_the_vdso() {
        let listing = "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(parse_ldd(listing), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }

    #[test]
    fn parents_come_outermost_first() {
        assert_eq!(parents("/lib/x86_64-linux-gnu/libc.so.6"), ["lib", "lib/x86_64-linux-gnu"]);
        assert!(parents("init").is_empty());
    }

    #[test]
    fn a_module_is_found_by_its_whole_name_compressed_or_not() {
        assert!(is_module(Path::new("/k/virtio.ko"), "virtio"));
        assert!(is_module(Path::new("/k/virtio.ko.xz"), "virtio"));
        assert!(!is_module(Path::new("/k/virtio_net.ko"), "virtio"));
    }

    #[test]
    fn an_archive_of_parts_unpacks_with_every_script() {
        let dir = std::env::temp_dir().join(format!("xtask-initrd-{}", std::process::id()));
        let modules = dir.join("lib/modules/6.1/kernel");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("virtio.ko"), b"module").unwrap();
        fs::write(dir.join("program"), b"program").unwrap();
        let program = dir.join("program");
        let parts = Parts { kernel: &dir, busybox: &program, tool: &program };
        let text = String::from_utf8_lossy(&parts.archive(Contents::Tiny).unwrap()).into_owned();
        for (name, _) in SCRIPTS {
            assert!(text.contains(&format!("{name}\0")), "{name}");
        }
        assert!(text.contains("/lib/virtio.ko\n"), "the load order lists it");
        let before = parts.stamp().unwrap();
        fs::write(&program, b"changed").unwrap();
        assert_ne!(parts.stamp().unwrap(), before, "a changed part changes the stamp");
        fs::remove_dir_all(&dir).unwrap();
    }
}
