//! A guest that reboots: each time a new machine comes up from the same volume, and nothing of the old one stays.

use std::fs;
use std::path::Path;

use iaas_core::spi::hypervisor::End;

use crate::devices::cable;
use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::alone;
use crate::rig::need_guest;
use crate::rig::shell;
use crate::rig::until;
use crate::rig::volume;

#[test]
fn a_guest_reboots_itself_and_leaves_nothing_behind() {
    let folder = need_guest!("a_guest_reboots_itself_and_leaves_nothing_behind");
    // Other tests open files and start threads, too.
    if !alone("reboot::a_guest_reboots_itself_and_leaves_nothing_behind") {
        return;
    }
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    boot(&folder, disk.path(), 1);
    // The first boot also fills what a process keeps for good, as its allocator does.
    let (fds, threads, memory) = (count("fd"), count("task"), resident());
    for number in 2..=BOOTS {
        boot(&folder, disk.path(), number);
        assert_eq!(count("fd"), fds, "descriptors after boot {number}");
        // The kernel takes a thread from its list shortly after that thread was joined.
        until("the threads are gone", || count("task") == threads);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains("anon_inode:kvm"), "after boot {number}:\n{maps}");
    }
    // Each guest touches more than this.
    let grown = resident().saturating_sub(memory);
    assert!(grown < 32 << 10, "{grown} KiB stayed");
}

/// Boot `number` of the guest, which reads on its disk what the boot before has left, and reboots.
fn boot(folder: &Path, disk: &Path, number: u32) {
    let volume = volume(disk);
    let (near, _far) = cable();
    let vm = shell(folder).with_vcpus(2).with_disk(&*volume, "boots").with_nic(near, [2, 0, 0, 0, 0, 1]);
    let vm = vm.with_entropy().build().unwrap();
    vm.start().unwrap();
    let mut console = Console::when_ready(&vm);
    let before =
        console.ask("echo last $(dd if=/dev/vda bs=64 count=1 2> /dev/null | busybox tr -d '\\000')");
    assert_eq!(before, if number == 1 { "last".to_owned() } else { format!("last {}", number - 1) });
    console.run(&format!("echo {number} | dd of=/dev/vda conv=fsync"));
    console.send("reboot -f");
    assert_eq!(vm.wait(LONG), Some(End::GuestReset));
    assert_eq!(vm.device_faults(), []);
}

/// Entries of a folder of this process.
fn count(folder: &str) -> usize {
    fs::read_dir(format!("/proc/self/{folder}")).unwrap().count()
}

/// KiB of memory that this process has.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

const BOOTS: u32 = 6;
