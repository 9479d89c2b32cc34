//! Machines of a few instructions, on whatever KVM there is: a real one, or one that interprets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(feature = "kvm")]

use std::time::Duration;

use iaas_core::ErrorKind;
use iaas_core::spi::hypervisor::End;
use iaas_core::testing::skip;
use iaas_vmm::Capability;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;
use iaas_vmm::vm::VmBuilder;

/// Skips where there is no KVM at all.
macro_rules! need_kvm {
    ($name:literal) => {
        match iaas_vmm::probe() {
            Capability::Hardware | Capability::Emulated(_) => {}
            other => {
                let remedy = other.remedy().unwrap_or_default();
                skip!($name, &format!("{other}; {remedy}"))
            }
        }
    };
}

/// Where code goes.
const AT: u64 = 0x10_0000;
/// Long enough for any machine; whoever waits so long has failed.
const LONG: Duration = Duration::from_secs(60);
/// `jmp $`.
const SPIN: [u8; 2] = [0xeb, 0xfe];

/// `mov dx, port` · `mov al, value` · `out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `mov dx, 0x604` · `mov ax, 0x3400` · `out dx, ax`: sleep state "off", now.
fn power_off() -> Vec<u8> {
    vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe]
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

fn machine(code: &[u8]) -> VmBuilder {
    Vm::builder().with_memory(4 << 20).with_boot(Boot::flat(code, AT))
}

fn run(code: &[u8]) -> (Vm, End) {
    let vm = machine(code).build().unwrap();
    vm.start().unwrap();
    let end = vm.wait(LONG).unwrap();
    (vm, end)
}

fn console(vm: &Vm) -> String {
    String::from_utf8_lossy(&vm.read_console(0, 1 << 20, Duration::ZERO).bytes).into_owned()
}

#[test]
fn a_guest_prints_and_powers_off() {
    need_kvm!("a_guest_prints_and_powers_off");
    let (vm, end) = run(&[print("hello\n"), power_off()].concat());
    assert_eq!(end, End::GuestOff);
    assert_eq!(console(&vm), "hello\n");
    // The end stays the same, however often it is asked for.
    assert_eq!(vm.kill(), End::GuestOff);
    assert_eq!(vm.pause().unwrap_err().kind(), ErrorKind::Conflict);
    assert!(vm.usage().total() > Duration::ZERO);
}

#[test]
fn each_way_to_reset_is_a_reset() {
    need_kvm!("each_way_to_reset_is_a_reset");
    // Without an interrupt table, an undefined instruction is a triple fault.
    for code in [out(0xcf9, 6), out(0x64, 0xfe), vec![0x0f, 0x0b]] {
        assert_eq!(run(&[code, SPIN.to_vec()].concat()).1, End::GuestReset);
    }
}

/// A guest that prints for ever: `mov dx, 0x3f8` · `mov al, '.'` · loop: `out dx, al` · `jmp loop`.
#[test]
fn a_paused_guest_does_nothing_and_goes_on_where_it_was() {
    need_kvm!("a_paused_guest_does_nothing_and_goes_on_where_it_was");
    let vm = machine(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd]).build().unwrap();
    let printed = |from, patience| vm.read_console(from, usize::MAX, patience).next;
    let mut before = 0;
    for _ in 0..20 {
        vm.start().unwrap();
        let now = printed(before, LONG);
        assert!(now > before);
        vm.pause().unwrap();
        before = printed(now, Duration::ZERO);
        vm.pause().unwrap();
        assert_eq!(printed(before, Duration::ZERO), before);
    }
    vm.start().unwrap();
    assert_eq!(vm.wait(Duration::ZERO), None);
    assert_eq!(vm.kill(), End::Forced);
}

/// Waits until the guest's own code takes processor time: far more than its thread needs to get there.
fn spins(vm: &Vm) {
    let enough = vm.usage().total() + Duration::from_millis(5);
    while vm.usage().total() < enough {
        std::thread::yield_now();
    }
}

/// The guest makes no exit by itself: only the kick gets its processor back.
#[test]
fn a_guest_that_never_exits_is_paused_and_killed() {
    need_kvm!("a_guest_that_never_exits_is_paused_and_killed");
    let vm = machine(&SPIN).build().unwrap();
    for _ in 0..20 {
        vm.start().unwrap();
        spins(&vm);
        vm.pause().unwrap();
    }
    vm.start().unwrap();
    spins(&vm);
    assert_eq!(vm.kill(), End::Forced);
}

/// Also not the time that its threads need to lie down.
#[test]
fn a_paused_guest_uses_no_processor_time() {
    need_kvm!("a_paused_guest_uses_no_processor_time");
    let (vm, clock) = (machine(&SPIN).with_vcpus(2).build().unwrap(), machine(&SPIN).build().unwrap());
    clock.start().unwrap();
    for _ in 0..50 {
        vm.start().unwrap();
        spins(&vm);
        vm.pause().unwrap();
        let used = vm.usage();
        spins(&clock);
        assert_eq!(vm.usage(), used);
    }
}

#[test]
fn a_guest_does_not_run_before_it_is_started() {
    need_kvm!("a_guest_does_not_run_before_it_is_started");
    let vm = machine(&[print("x"), power_off()].concat()).build().unwrap();
    vm.pause().unwrap();
    assert_eq!(console(&vm), "");
    vm.start().unwrap();
    assert_eq!(vm.wait(LONG), Some(End::GuestOff));
    assert_eq!(console(&vm), "x");
}

/// `mov dx, 0x602` · `mov ax, 0x100` · `out dx, ax` (the button interrupts) · `mov dx, 0x600` · loop: `in ax, dx` ·
/// `test ah, 1` · `jz loop`, then off.
#[test]
fn the_power_button_reaches_the_guest() {
    need_kvm!("the_power_button_reaches_the_guest");
    let mut code = vec![0x66, 0xba, 0x02, 0x06, 0x66, 0xb8, 0x00, 0x01, 0x66, 0xef];
    code.extend([0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9]);
    let vm = machine(&[code, power_off()].concat()).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.stop(LONG), End::Stopped);
    let deaf = machine(&SPIN).build().unwrap();
    deaf.start().unwrap();
    assert_eq!(deaf.stop(Duration::ZERO), End::Forced);
}

/// `mov dx, 0x3fd` · loop: `in al, dx` · `test al, 1` · `jz loop` · `mov dx, 0x3f8` · `in al, dx` · `out dx, al`, then off.
#[test]
fn what_is_typed_is_echoed() {
    need_kvm!("what_is_typed_is_echoed");
    let code = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee];
    let vm = machine(&[&code[..], &power_off()].concat()).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.write_console(b"k"), 1);
    assert_eq!(vm.wait(LONG), Some(End::GuestOff));
    let output = vm.read_console(0, 10, LONG);
    assert_eq!((output.bytes, output.next), (b"k".to_vec(), 1));
}

#[test]
fn a_machine_has_memory_above_four_gib() {
    need_kvm!("a_machine_has_memory_above_four_gib");
    // Memory behind the hole is mapped; code that reaches it would need more page tables than the first 4 GiB.
    let vm = Vm::builder().with_memory(5 << 30).with_boot(Boot::flat(power_off(), AT)).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait(LONG), Some(End::GuestOff));
}

#[test]
fn a_machine_that_is_dropped_takes_its_threads_with_it() {
    need_kvm!("a_machine_that_is_dropped_takes_its_threads_with_it");
    let vm = machine(&SPIN).with_vcpus(4).build().unwrap();
    vm.start().unwrap();
    drop(vm);
    drop(machine(&SPIN).build().unwrap());
}

#[test]
fn a_hundred_machines_live_in_one_process() {
    need_kvm!("a_hundred_machines_live_in_one_process");
    let code = |n: usize| [print(&n.to_string()), power_off()].concat();
    let all: Vec<Vm> = (0..100).map(|n| machine(&code(n)).build().unwrap()).collect();
    all.iter().for_each(|vm| vm.start().unwrap());
    for (n, vm) in all.iter().enumerate() {
        assert_eq!(vm.wait(LONG), Some(End::GuestOff));
        assert_eq!(console(vm), n.to_string());
    }
}

#[test]
fn everything_that_is_wrong_is_named_at_once() {
    let error = Vm::builder().with_vcpus(0).with_memory(1).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    for part in ["vCPUs", "memory", "boot"] {
        assert!(error.public().contains(part), "{error}");
    }
}
