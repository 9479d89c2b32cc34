//! The programs that embed machines, run as programs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::Command;
use std::process::Output;

use iaas_core::testing::skip;
use iaas_vmm::Capability;

#[test]
fn many_vms_runs_a_hundred_guests_in_one_process() {
    match iaas_vmm::probe() {
        Capability::Hardware | Capability::Emulated(_) => {}
        other => {
            let remedy = other.remedy().unwrap_or_default();
            skip!("many_vms_runs_a_hundred_guests_in_one_process", &format!("{other}; {remedy}"))
        }
    }
    let (output, told) = run(&mut Command::new(env!("CARGO_BIN_EXE_many_vms")));
    assert!(output.status.success(), "{told}");
    assert!(told.starts_with("100 machines: built in "), "{told}");
}

#[test]
fn hello_vm_shows_the_console_of_a_guest_until_its_end() {
    const NAME: &str = "hello_vm_shows_the_console_of_a_guest_until_its_end";
    let named = std::env::var_os("IAAS_GUEST_DIR").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest").into());
    match iaas_vmm::probe() {
        Capability::Hardware => {}
        found => skip!(NAME, &format!("{found}; run it in the lab: `cargo xtask lab`")),
    }
    if !folder.join("vmlinuz").exists() {
        skip!(NAME, "no guest kernel; make it with `cargo xtask setup`, or set IAAS_GUEST_DIR");
    }
    let words = [folder.join("vmlinuz"), folder.join("initrd-tiny.cpio.gz")];
    let line = "console=ttyS0 panic=-1 guest.run=poweroff";
    let (output, told) = run(Command::new(env!("CARGO_BIN_EXE_hello_vm")).args(words).arg(line));
    assert!(output.status.success(), "{told}");
    for text in ["Hypervisor detected: KVM", "GUEST-READY", "GUEST-OFF", "GuestOff after"] {
        assert!(told.contains(text), "`{text}` is missing in:\n{told}");
    }
}

#[test]
fn hello_vm_says_what_it_needs() {
    let (output, told) = run(&mut Command::new(env!("CARGO_BIN_EXE_hello_vm")));
    assert!(!output.status.success());
    assert!(told.contains("hello_vm KERNEL"), "{told}");
    let (output, told) = run(Command::new(env!("CARGO_BIN_EXE_hello_vm")).arg("/no/such/kernel"));
    assert!(!output.status.success());
    assert!(told.contains("/no/such/kernel"), "{told}");
}

/// Runs a program to its end; gives all that it said, too.
fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let told = [&output.stdout[..], &output.stderr[..]].concat();
    (output, String::from_utf8_lossy(&told).into_owned())
}
