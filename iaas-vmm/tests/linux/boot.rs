//! The kernel comes up, sees what it is given, and ends in each way.

use std::time::Instant;

use iaas_core::spi::hypervisor::End;

use crate::rig::Console;
use crate::rig::IN_LAB;
use crate::rig::LONG;
use crate::rig::linux;
use crate::rig::need_guest;

#[test]
fn kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours() {
    let folder = need_guest!("kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours");
    let nonce = format!("lab.nonce={}", std::env::var(IN_LAB).unwrap_or_else(|_| "none".to_owned()));
    let vm = linux(&folder, "initrd.cpio.gz", &format!("guest.run=shell {nonce}")).build().unwrap();
    vm.start().unwrap();
    let mut console = Console::of(&vm);
    // What the guest's kernel says, on the serial port that this machine captures.
    println!("EVIDENCE {}", console.line("Hypervisor detected: KVM"));
    console.line("GUEST-READY");
    let line = console.ask("cat /proc/cmdline");
    assert!(line.split(' ').any(|word| word == nonce), "{line}");
    println!("EVIDENCE /proc/cmdline: {line}");
    assert!(console.ask("dmesg | grep 'Hypervisor detected'").contains("Hypervisor detected: KVM"));
    assert_eq!(vm.stop(LONG), End::Stopped);
}

#[test]
fn a_debian_kernel_boots_and_obeys_the_power_button() {
    let folder = need_guest!("a_debian_kernel_boots_and_obeys_the_power_button");
    let vm = linux(&folder, "initrd-tiny.cpio.gz", "guest.run=tiny quiet").with_vcpus(2).build().unwrap();
    let start = Instant::now();
    vm.start().unwrap();
    Console::when_ready(&vm);
    eprintln!("spawn to init: {:?}; processors: {:?}", start.elapsed(), vm.usage());
    assert_eq!(vm.stop(LONG), End::Stopped);
    assert_eq!(vm.device_faults(), []);
}

#[test]
fn a_panic_resets() {
    let folder = need_guest!("a_panic_resets");
    let vm = linux(&folder, "initrd-tiny.cpio.gz", "rdinit=/missing root=/dev/nothing").build().unwrap();
    vm.start().unwrap();
    Console::of(&vm).line("Kernel panic");
    assert_eq!(vm.wait(LONG), Some(End::GuestReset));
}
