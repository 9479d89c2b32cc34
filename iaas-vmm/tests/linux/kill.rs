//! The plug is pulled while a guest writes to its file system: what the guest was told to be safe is there.

use std::fs::OpenOptions;
use std::io::BufRead;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::hypervisor::End;
use iaas_core::testing::skip;
use iaas_vmm::vm::Vm;

use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::linux;
use crate::rig::need_guest;
use crate::rig::only;
use crate::rig::shell;
use crate::rig::volume;

#[test]
fn what_was_synced_survives_the_end_of_the_machine() {
    let folder = need_guest!("what_was_synced_survives_the_end_of_the_machine");
    let Some(e2fsck) = e2fsck() else {
        skip!("what_was_synced_survives_the_end_of_the_machine", NO_E2FSCK);
    };
    let disk = empty_disk();
    let volume = volume(disk.path());
    let vm = writer(&folder, &*volume);
    let mut console = writes(&vm);
    (0..FILES).for_each(|_| drop(console.line("SYNCED")));
    assert_eq!(vm.kill(), End::Forced);
    // Whatever it could say counts.
    let said = vm.read_console(0, usize::MAX, Duration::ZERO).bytes;
    let said = String::from_utf8_lossy(&said).into_owned();
    let (whole_lines, _) = said.rsplit_once('\n').unwrap();
    let last = whole_lines.lines().rfind(|line| line.contains("SYNCED")).map(synced).unwrap();
    is_all_there(&folder, &e2fsck, disk.path(), last);
}

#[test]
fn what_was_synced_survives_the_end_of_the_process() {
    let folder = need_guest!("what_was_synced_survives_the_end_of_the_process");
    if let Some(disk) = std::env::var_os(HOLDS) {
        hold(&folder, Path::new(&disk));
    }
    let Some(e2fsck) = e2fsck() else {
        skip!("what_was_synced_survives_the_end_of_the_process", NO_E2FSCK);
    };
    let disk = empty_disk();
    let mut program = only("kill::what_was_synced_survives_the_end_of_the_process");
    let holder = program.env(HOLDS, disk.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut holder = Holder(holder);
    let mut lines = BufReader::new(holder.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut told =
        lines.by_ref().filter(|line| line.contains("SYNCED")).take(FILES).map(|line| synced(&line));
    assert_eq!(told.by_ref().count(), FILES, "the process ended by itself: {:?}", holder.0.wait());
    holder.0.kill().unwrap();
    holder.0.wait().unwrap();
    let last = lines.filter(|line| line.contains("SYNCED")).map(|line| synced(&line)).last();
    is_all_there(&folder, &e2fsck, disk.path(), last.unwrap_or(FILES));
}

/// Another process; it goes with this value.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the machine until this process is killed, and repeats what its guest says.
fn hold(folder: &Path, disk: &Path) -> ! {
    let volume = volume(disk);
    let vm = writer(folder, &*volume);
    let mut console = writes(&vm);
    // The harness has begun a line.
    println!();
    loop {
        println!("{}", console.line("SYNCED"));
    }
}

/// A machine whose guest can make file systems.
fn writer(folder: &Path, volume: &dyn BlockDevice) -> Vm {
    linux(folder, "initrd.cpio.gz", "quiet guest.run=shell").with_disk(volume, "data").build().unwrap()
}

/// Starts a machine whose guest makes a file system and writes one file after the other, each with its number in each line.
/// It says of each when it is synced.
fn writes(vm: &Vm) -> Console<'_> {
    vm.start().unwrap();
    let mut console = Console::when_ready(vm);
    console.run("/bin/mke2fs -q -F -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt");
    console.send(
        "n=0; while n=$((n+1)); do seq $n 7 9000 > /tmp/f && dd if=/tmp/f of=/mnt/$n conv=fsync 2> /dev/null && \
         echo SYNCED $n || exit 1; done",
    );
    console
}

/// The number of a line `SYNCED n`.
fn synced(line: &str) -> usize {
    line.trim().strip_prefix("SYNCED ").and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

/// Judges the disk of a guest that was killed after it had said that files 1 to `last` are synced.
fn is_all_there(folder: &Path, e2fsck: &Path, disk: &Path, last: usize) {
    assert!(is_cut_off(disk), "the file system was not in use");
    // Once with the file system's own tools: the journal, and then nothing is left to repair.
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(disk, copy.path()).unwrap();
    check(e2fsck, &["-p", "-E", "journal_only"], copy.path(), &[0, 1]);
    check(e2fsck, &["-f", "-n"], copy.path(), &[0]);
    // And once with the next boot.
    let volume = volume(disk);
    let vm = shell(folder).with_disk(&*volume, "data").build().unwrap();
    vm.start().unwrap();
    let mut console = Console::when_ready(&vm);
    console.run("mount -t ext4 /dev/vda /mnt");
    let compare = "seq $n 7 9000 | busybox cmp - /mnt/$n || echo LOST $n";
    let lost = console.run(&format!("for n in $(seq 1 {last}); do {compare}; done"));
    assert!(lost.is_empty(), "of {last} files: {lost:#?}");
    println!("{last} synced files are all there");
    assert_eq!(vm.stop(LONG), End::Stopped);
    check(e2fsck, &["-f", "-n"], disk, &[0]);
}

/// Whether the file system must replay its journal (`EXT4_FEATURE_INCOMPAT_RECOVER` in its superblock).
fn is_cut_off(disk: &Path) -> bool {
    let mut features = [0; 4];
    OpenOptions::new().read(true).open(disk).unwrap().read_exact_at(&mut features, 1024 + 0x60).unwrap();
    u32::from_le_bytes(features) & 4 != 0
}

fn check(e2fsck: &Path, options: &[&str], disk: &Path, good: &[i32]) {
    let output = Command::new(e2fsck).args(options).arg(disk).output().unwrap();
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.code().is_some_and(|code| good.contains(&code)), "{}: {told}", output.status);
}

fn e2fsck() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/sbin".into(), "/usr/sbin".into()]);
    folders.map(|folder| folder.join("e2fsck")).find(|program| program.exists())
}

fn empty_disk() -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(64 << 20).unwrap();
    disk
}

/// The guest is killed when it has synced so many files and writes the next.
const FILES: usize = 20;
/// In the process that holds the machine: its disk.
const HOLDS: &str = "TEST_HOLDS_DISK";
const NO_E2FSCK: &str = "no e2fsck; install e2fsprogs, or run `cargo xtask setup`";
