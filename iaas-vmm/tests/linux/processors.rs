//! Four processors: the kernel starts them all, and each does its own work.

use iaas_core::spi::hypervisor::End;

use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::need_guest;
use crate::rig::shell;

#[test]
fn four_processors_are_seen_and_all_of_them_work() {
    let folder = need_guest!("four_processors_are_seen_and_all_of_them_work");
    let vm = shell(&folder).with_vcpus(4).build().unwrap();
    vm.start().unwrap();
    let mut console = Console::when_ready(&vm);
    assert_eq!(console.ask("grep -c ^processor /proc/cpuinfo"), "4");
    assert_eq!(console.ask("busybox nproc"), "4");
    let (ticks, interrupts, host) = (ticks(&mut console), timer_interrupts(&mut console), vm.usage());
    let mut worked = console.run(WORK);
    worked.sort();
    assert_eq!(worked, ["WORKED on 0", "WORKED on 1", "WORKED on 2", "WORKED on 3"]);
    // What the guest's kernel counted for each of its processors,
    grew("user time", &ticks, &self::ticks(&mut console));
    grew("timer interrupts", &interrupts, &timer_interrupts(&mut console));
    // and what the host gave to each of their threads.
    let spent = |usage: iaas_vmm::vm::Usage| usage.vcpus.iter().map(|t| t.as_nanos()).collect::<Vec<_>>();
    grew("thread time", &spent(host), &spent(vm.usage()));
    assert_eq!(vm.stop(LONG), End::Stopped);
}

/// A loop on each processor, which it cannot leave. Field 39 is the processor that a process was last on.
const WORK: &str = "for c in 0 1 2 3; do busybox taskset -c $c sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; \
    echo WORKED on $(cut -d\" \" -f39 /proc/self/stat)' & done; wait";

/// The user time of each processor.
fn ticks(console: &mut Console<'_>) -> Vec<u128> {
    let lines = console.run("grep '^cpu[0-9]' /proc/stat");
    lines.iter().map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap()).collect()
}

/// The interrupts of the timer in each local APIC.
fn timer_interrupts(console: &mut Console<'_>) -> Vec<u128> {
    let line = console.ask("grep LOC: /proc/interrupts");
    line.split_whitespace().skip(1).map_while(|word| word.parse().ok()).collect()
}

fn grew(what: &str, before: &[u128], after: &[u128]) {
    assert_eq!((before.len(), after.len()), (4, 4), "{what}: {before:?}, {after:?}");
    assert!(before.iter().zip(after).all(|(b, a)| a > b), "{what}: {before:?}, then {after:?}");
}
