//! A guest that computes and writes is halted again and again. Nothing moves meanwhile, and nothing is lost.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use iaas_core::spi::hypervisor::End;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Usage;
use iaas_vmm::vm::Vm;
use sha2::Digest;
use sha2::Sha256;

use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::need_guest;
use crate::rig::shell;
use crate::rig::until;
use crate::rig::volume;

#[test]
fn a_guest_under_load_stands_still_in_each_of_many_pauses_and_computes_right() {
    let folder = need_guest!("a_guest_under_load_stands_still_in_each_of_many_pauses_and_computes_right");
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SLOTS * SLOT).unwrap();
    let volume = volume(file.path());
    let vm = shell(&folder).with_vcpus(2).with_disk(&*volume, "data").build().unwrap();
    let clock = spinning();
    vm.start().unwrap();
    let mut console = Console::when_ready(&vm);
    let sum = console.ask("md5sum < /bin/busybox");
    console.send(WRITE);
    console.send(COMPUTE);
    let mut before = look(&vm, file.as_file());
    let mut steps = 0;
    for round in 0..PAUSES {
        // Halted at another place each time, but never without having done something.
        runs(&vm, Duration::from_millis(30 + round * 7 % 40));
        vm.pause().unwrap();
        let halted = look(&vm, file.as_file());
        assert!(halted.usage.total() > before.usage.total());
        steps += u64::from(halted.console > before.console) + u64::from(halted.disk != before.disk);
        // As long as another machine has time to run, this one would have had it.
        clock.start().unwrap();
        runs(&clock, Duration::from_millis(10));
        clock.pause().unwrap();
        let still = look(&vm, file.as_file());
        assert_eq!(still.console, halted.console, "pause {round}: the console moved");
        assert_eq!(still.usage, halted.usage, "pause {round}: a processor moved");
        assert!(still.disk == halted.disk, "pause {round}: the disk moved");
        before = halted;
        vm.start().unwrap();
    }
    assert!(steps > 10, "the guest came no further between {PAUSES} pauses");
    let (writes, sums) = finish(&mut console);
    assert!(sums.iter().all(|other| *other == sum), "{sum}, but then {sums:#?}");
    let mut disk = vec![0; (SLOTS * SLOT).try_into().unwrap()];
    file.as_file().read_exact_at(&mut disk, 0).unwrap();
    assert!(disk == expected(writes), "the disk is not what {writes} writes make of it");
    let read = console.ask("echo 3 > /proc/sys/vm/drop_caches; busybox sha256sum < /dev/vda");
    let hex: String = Sha256::digest(&disk).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(read, format!("{hex}  -"));
    println!("{PAUSES} pauses, {writes} writes, {} sums", sums.len());
    assert_eq!(vm.device_faults(), []);
    assert_eq!(vm.stop(LONG), End::Stopped);
}

/// Writes numbers to one slot after the other, around and around; each write is synced and told.
const WRITE: &str = "n=0; while [ ! -e /tmp/stop ]; do seq ${n}000 ${n}999 > /tmp/w; \
    dd if=/tmp/w of=/dev/vda bs=16384 seek=$((n % 64)) conv=fsync 2> /dev/null || exit 1; n=$((n+1)); echo WROTE $n; done";
/// Computes the same again and again.
const COMPUTE: &str = "while [ ! -e /tmp/stop ]; do md5sum < /bin/busybox; done";
/// As in [`WRITE`].
const SLOTS: u64 = 64;
const SLOT: u64 = 16384;
const PAUSES: u64 = 60;

/// Lets both loops end; gives the number of writes, and all sums.
fn finish(console: &mut Console<'_>) -> (u64, Vec<String>) {
    console.send("echo > /tmp/stop");
    let lines: Vec<String> = (0..3).flat_map(|_| console.done()).collect();
    let writes = lines.iter().filter_map(|line| line.strip_prefix("WROTE ")).next_back().unwrap();
    let sums = lines.iter().filter(|line| line.ends_with("  -")).cloned().collect();
    (writes.parse().unwrap(), sums)
}

/// The disk after `writes` writes.
fn expected(writes: u64) -> Vec<u8> {
    let mut slots = BTreeMap::new();
    for n in 0..writes {
        let first = n * 1000;
        let text: String = (first..first + 1000).map(|number| format!("{number}\n")).collect();
        let slot: &mut Vec<u8> = slots.entry(n % SLOTS).or_insert_with(|| vec![0; SLOT.try_into().unwrap()]);
        slot[..text.len()].copy_from_slice(text.as_bytes());
    }
    (0..SLOTS).flat_map(|n| slots.remove(&n).unwrap_or_else(|| vec![0; SLOT.try_into().unwrap()])).collect()
}

/// All of a machine that moves while it runs.
struct Look {
    console: u64,
    usage: Usage,
    disk: Vec<u8>,
}

fn look(vm: &Vm, file: &std::fs::File) -> Look {
    let mut disk = vec![0; (SLOTS * SLOT).try_into().unwrap()];
    file.read_exact_at(&mut disk, 0).unwrap();
    Look { console: vm.read_console(u64::MAX, 0, Duration::ZERO).next, usage: vm.usage(), disk }
}

/// A machine that does nothing but run.
fn spinning() -> Vm {
    Vm::builder().with_memory(4 << 20).with_boot(Boot::flat([0xeb, 0xfe], 0x10_0000)).build().unwrap()
}

/// Waits until a machine has run for `time` more.
fn runs(vm: &Vm, time: Duration) {
    let enough = vm.usage().total() + time;
    until("the machine runs", || vm.usage().total() >= enough);
}
