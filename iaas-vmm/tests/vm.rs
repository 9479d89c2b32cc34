//! Machines of a few instructions, on whatever KVM there is: a real one, or one that interprets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(feature = "kvm")]

use std::io::Write;
use std::time::Duration;
use std::time::Instant;

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
    let mut kicks: Vec<Duration> = (0..20)
        .map(|_| {
            vm.start().unwrap();
            spins(&vm);
            let kicked = Instant::now();
            vm.pause().unwrap();
            kicked.elapsed()
        })
        .collect();
    vm.start().unwrap();
    spins(&vm);
    assert_eq!(vm.kill(), End::Forced);
    kicks.sort();
    println!("NOTE from kick to standstill: median {:?}, worst {:?}", kicks[10], kicks[19]);
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

/// The first slot ends below the hole for devices, the second begins at 4 GiB; page tables reach only up to there at first.
///
/// `mov rax, 4 GiB | 0x83` · `mov [0x18000], rax` (a large page) · `mov rax, 0x18003` · `mov [0xa020], rax` (the fifth entry of
/// level 3) · `mov rbx, 4 GiB` · `mov byte [rbx], 'm'` · `mov al, [rbx]` · `mov dx, 0x3f8` · `out dx, al`, then off.
#[test]
fn a_guest_uses_memory_above_four_gib() {
    need_kvm!("a_guest_uses_memory_above_four_gib");
    let store = |value: u64, at: u64| {
        [&[0x48, 0xb8][..], &value.to_le_bytes(), &[0x48, 0xa3], &at.to_le_bytes()].concat()
    };
    let mut code = [store(1 << 32 | 0x83, 0x1_8000), store(0x1_8003, 0xa020)].concat();
    code.extend([&[0x48, 0xbb][..], &(1_u64 << 32).to_le_bytes()].concat());
    code.extend([0xc6, 0x03, b'm', 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    code.extend(power_off());
    let vm = Vm::builder().with_memory(5 << 30).with_boot(Boot::flat(code, AT)).build().unwrap();
    vm.start().unwrap();
    assert_eq!((vm.wait(LONG), console(&vm)), (Some(End::GuestOff), "m".to_owned()));
}

/// `mov ebx, 0xe0000000` · `mov eax, [rbx]` · `mov dx, 0x3f8` · `out dx, al` · `mov al, ah` · `out dx, al`, then off.
#[test]
fn a_load_from_no_memory_is_answered_by_the_device_there() {
    need_kvm!("a_load_from_no_memory_is_answered_by_the_device_there");
    let code = [0xbb, 0, 0, 0, 0xe0, 0x8b, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee, 0x88, 0xe0, 0xee];
    let (vm, end) = run(&[&code[..], &power_off()].concat());
    let vendor = vm.read_console(0, 10, Duration::ZERO).bytes;
    // The vendor of the host bridge, in the memory-mapped configuration space.
    assert_eq!((end, vendor), (End::GuestOff, 0x1b36_u16.to_le_bytes().to_vec()));
}

/// The serial port's line rises through an irqfd and comes to pin 4 of the interrupt controller.
///
/// After an `r`: loop: `mov al, 0x0a` · `out 0x20, al` (what was requested?) · `in al, 0x20` · `test al, 0x10` · `jz loop`, then off.
#[test]
fn what_is_typed_interrupts() {
    need_kvm!("what_is_typed_interrupts");
    let asked = [0xb0, 0x0a, 0xe6, 0x20, 0xe4, 0x20, 0xa8, 0x10, 0x74, 0xf6];
    let code = [&out(0x3f9, 1)[..], &print("r"), &asked, &power_off()].concat();
    let vm = machine(&code).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.read_console(0, 10, LONG).bytes, b"r");
    assert_eq!(vm.wait(Duration::from_millis(50)), None, "nobody has typed yet");
    assert_eq!(vm.write_console(b"k"), 1);
    assert_eq!(vm.wait(LONG), Some(End::GuestOff));
}

/// An ELF image of one segment, which begins in protected mode where its note says.
///
/// Source: System V ABI, ELF-64; Xen `docs/misc/pvh.pandoc`.
#[test]
fn a_kernel_with_a_pvh_entry_begins_there() {
    need_kvm!("a_kernel_with_a_pvh_entry_begins_there");
    // What stands at the image's own entry must not run.
    let code = [out(0xcf9, 6), print("pvh"), power_off()].concat();
    let entry = AT + out(0xcf9, 6).len() as u64;
    let header = |kind: u32, flags: u32, offset: u64, at: u64, len: u64| {
        let words = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        let longs = [offset, at, at, len, len, 4].map(u64::to_le_bytes).concat();
        [words, longs].concat()
    };
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2_u16.to_le_bytes(), 62_u16.to_le_bytes()].concat());
    image.extend(1_u32.to_le_bytes());
    image.extend([AT, 64, 0].map(u64::to_le_bytes).concat());
    image.extend(0_u32.to_le_bytes());
    image.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    image.extend(header(1, 5, 0x1000, AT, code.len() as u64));
    image.extend(header(4, 4, 176, 0, 24));
    image.extend([4_u32, 8, 18].map(u32::to_le_bytes).concat());
    image.extend(b"Xen\0");
    image.extend(entry.to_le_bytes());
    image.resize(0x1000, 0);
    image.extend(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    let vm = Vm::builder().with_memory(16 << 20).with_boot(Boot::kernel(file)).build().unwrap();
    vm.start().unwrap();
    assert_eq!((vm.wait(LONG), console(&vm)), (Some(End::GuestOff), "pvh".to_owned()));
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
