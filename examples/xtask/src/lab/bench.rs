//! What `cargo xtask bench vmm` packs into the lab beside the kernel: the harness, and the VMMs that it measures.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::Cmd;
use crate::crash::executable;
use crate::failure::{Context, Failure, Result};
use crate::report::step;
use crate::workspace::{cargo, root, which};

use super::image::Extra;

/// Another VMM to measure ours against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    name: String,
    /// Its program on this machine.
    program: PathBuf,
    /// Its arguments, with placeholders.
    arguments: String,
}

impl Peer {
    /// Reads `NAME=COMMAND`. The command's first word is a program of this machine.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Failure::new(format!("`--peer {text}` {why}"))
                .remedy("use --peer 'NAME=PROGRAM --kernel {kernel} ...', see `cargo xtask help`")
        };
        let (name, command) = text.split_once('=').ok_or_else(|| bad("has no `=`"))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(bad("has a name of other things than letters, digits, `-` and `_`"));
        }
        let mut words = command.split_whitespace();
        let program = words.next().ok_or_else(|| bad("has no command"))?;
        let found = if program.contains('/') { Some(PathBuf::from(program)) } else { which(program) };
        let program =
            found.filter(|path| path.is_file()).ok_or_else(|| bad("names no program that is here"))?;
        let arguments = words.collect::<Vec<_>>().join(" ");
        Ok(Self { name: name.to_owned(), program, arguments })
    }

    /// Its line in the harness's list.
    fn line(&self) -> String {
        format!("{} /lab/bench/peer-{} {}\n", self.name, self.name, self.arguments)
    }
}

/// Builds the harness, and gathers what goes into the image.
pub(super) fn extra(qemu: PathBuf, peers: &[Peer]) -> Result<Extra> {
    let mut extra = Extra::default();
    extra.dirs.extend(["lab/bench", "lab/qemu"]);
    extra.programs.push(("lab/bench/vmm-lab".to_owned(), harness()?));
    extra.programs.push(("lab/bench/qemu".to_owned(), qemu));
    for name in FIRMWARE {
        let found = FIRMWARE_DIRS.iter().map(|dir| PathBuf::from(dir).join(name)).find(|path| path.is_file());
        let path = found.ok_or_else(|| {
            Failure::new(format!("QEMU's {name} is in none of {}", FIRMWARE_DIRS.join(", ")))
                .remedy("as root, run: apt-get install qemu-system-x86 qemu-system-data seabios")
        })?;
        extra.files.push((format!("lab/qemu/{name}"), fs::read(&path).at(&path)?));
    }
    let mut list = QEMU_MACHINES.map(qemu_line).concat();
    for peer in peers {
        extra.programs.push((format!("lab/bench/peer-{}", peer.name), peer.program.clone()));
        list.push_str(&peer.line());
    }
    extra.files.push(("lab/bench/contenders".to_owned(), list.into_bytes()));
    extra.files.push(("lab/bench/run".to_owned(), RUN.as_bytes().to_vec()));
    Ok(extra)
}

/// Name and command of QEMU's machine. What it does not need is off, and its firmware is not asked for a boot order.
fn qemu_line((name, machine): (&str, &str)) -> String {
    let words = [
        "/lab/bench/qemu -L /lab/qemu -nodefaults -no-user-config -no-reboot -display none -serial stdio",
        "-accel kvm -cpu host -smp 1 -m {mem}M -kernel {kernel} -initrd {initrd} -append {cmdline}",
        "-drive file={disk},if=none,id=disk,format=raw,cache=none,aio=io_uring",
        "-device virtio-blk-pci,drive=disk",
        "-netdev tap,id=net,ifname={tap},script=no,downscript=no",
        "-device virtio-net-pci,netdev=net,romfile=",
    ];
    format!("{name} {} -M {machine}\n", words.join(" "))
}

/// The optimized harness, which is our VMM too.
fn harness() -> Result<PathBuf> {
    let build = Cmd::new(cargo())
        .args(["build", "--release", "--package", "iaas-benches", "--bin", "vmm-lab"])
        .args(["--message-format", "json"])
        .dir(&root())
        .limit(BUILD_LIMIT);
    let messages = step("lab: build vmm-lab", || build.output())?;
    executable(&messages, "vmm-lab").map(PathBuf::from).ok_or_else(|| Failure::new("cargo built no vmm-lab"))
}

const QEMU_MACHINES: [(&str, &str); 2] = [("q35", "q35"), ("microvm", "microvm,pcie=on")];
const RUN: &str =
    "exec /lab/bench/vmm-lab /lab/guest/vmlinuz /lab/guest/initrd-tiny.cpio.gz /lab/bench/contenders\n";
/// What QEMU reads to boot a kernel on these machines.
const FIRMWARE: [&str; 7] = [
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "qboot.rom",
];
const FIRMWARE_DIRS: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];
const BUILD_LIMIT: Duration = Duration::from_secs(60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_and_a_program_of_this_machine() {
        let peer = Peer::parse("mine=sh -c {kernel} --cmdline={cmdline}").unwrap();
        assert!(peer.program.is_absolute());
        assert_eq!(peer.line(), "mine /lab/bench/peer-mine -c {kernel} --cmdline={cmdline}\n");
        for bad in ["sh", "=sh", "a b=sh", "mine=", "mine=/no/such/program"] {
            Peer::parse(bad).unwrap_err();
        }
    }

    #[test]
    fn the_machines_of_qemu_get_every_part() {
        for line in QEMU_MACHINES.map(qemu_line) {
            for part in ["{kernel}", "{initrd}", "{cmdline}", "{mem}", "{disk}", "{tap}"] {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
    }
}
