//! More memory than fits below the hole for devices.

use std::os::unix::fs::FileExt;

use iaas_core::spi::hypervisor::End;

use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::need_guest;
use crate::rig::shell;
use crate::rig::volume;

#[test]
fn memory_above_four_gib_is_used_by_the_guest_and_by_its_disk() {
    let folder = need_guest!("memory_above_four_gib_is_used_by_the_guest_and_by_its_disk");
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let volume = volume(file.path());
    // 3 GiB end at the hole, and the rest begins at 4 GiB.
    let vm = shell(&folder).with_memory(4608 << 20).with_disk(&*volume, "data").build().unwrap();
    vm.start().unwrap();
    let mut console = Console::when_ready(&vm);
    let total = console.ask("grep MemTotal /proc/meminfo");
    let kib: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib > 4 << 20, "{total}");
    // Linux' zone "Normal" is what lies above 4 GiB, and what programs and files get first.
    assert_eq!(high(&mut console, "start_pfn:"), (4 << 30) / PAGE);
    assert_eq!(high(&mut console, "present"), (1536 << 20) / PAGE);
    let free = high(&mut console, "nr_free_pages");
    console.run(&format!(
        "seq 1 {NUMBERS} > /tmp/c; for i in $(seq 1 {COPIES}); do echo copy $i; cat /tmp/c; done > /tmp/p"
    ));
    let pattern = pattern();
    let pages = u64::try_from(pattern.len()).unwrap() / PAGE;
    let used = free.saturating_sub(high(&mut console, "nr_free_pages"));
    assert!(used > pages * 9 / 10, "of {pages} pages only {used} lie above 4 GiB");
    // The disk reads from there, and what comes back is put there.
    console.run("dd if=/tmp/p of=/dev/vda bs=1M conv=fsync");
    let mut written = vec![0; pattern.len()];
    file.as_file().read_exact_at(&mut written, 0).unwrap();
    assert!(written == pattern, "the disk got something else");
    // Held open, or what was read would be forgotten at the end of the reader.
    let free = high(&mut console, "nr_free_pages");
    let size = pattern.len();
    let after = format!(
        "exec 3< /dev/vda; head -c {size} <&3 | busybox cmp - /tmp/p || exit 1; {}",
        see("nr_free_pages")
    );
    let used = free.saturating_sub(console.ask(&after).parse().unwrap());
    assert!(used > pages * 9 / 10, "of {pages} pages only {used} were read to above 4 GiB");
    assert_eq!(vm.device_faults(), []);
    assert_eq!(vm.stop(LONG), End::Stopped);
}

/// A number that the guest's kernel keeps for the zone above 4 GiB.
fn high(console: &mut Console<'_>, name: &str) -> u64 {
    console.ask(&see(name)).parse().unwrap()
}

/// The command that prints it.
fn see(name: &str) -> String {
    let zone = "$3 == \"zone\" {z = $4}";
    format!("awk '{zone} z == \"Normal\" && $1 == \"{name}\" {{print $2}}' /proc/zoneinfo")
}

/// What the guest writes: no two pages are equal.
fn pattern() -> Vec<u8> {
    let numbers: String = (1..=NUMBERS).map(|n| format!("{n}\n")).collect();
    (1..=COPIES).flat_map(|n| format!("copy {n}\n{numbers}").into_bytes()).collect()
}

const PAGE: u64 = 4096;
const NUMBERS: u32 = 50_000;
/// Together 37 MiB.
const COPIES: u32 = 128;
