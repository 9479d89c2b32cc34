//! Real guests on machines of our own, under real runners. They need a KVM in hardware; `cargo xtask lab` has one.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

mod both;
mod disk;
mod port;
mod rig;
mod suite;

use iaas_core::Boot;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Vm;
use iaas_vmm::Capability;
use iaas_vmm::vmm::Kvm;

use both::VM;
use both::kill;
use rig::Rig;
use rig::on;

tests![
    both::a_guest_boots_to_its_console_and_goes_by_the_power_button,
    both::a_guest_that_ignores_the_button_is_forced,
    both::a_vm_outlives_control_and_is_adopted,
    both::a_boot_number_is_used_once_and_a_higher_one_reboots,
    both::a_paused_guest_stands_still,
    both::a_file_system_on_a_served_disk_survives_its_vm,
    a_runner_hears_that_its_guest_is_on_kvm,
    a_killed_runner_is_seen,
    a_guest_that_resets_has_ended,
    a_guest_talks_through_its_port_and_its_bytes_are_counted,
    devices_come_and_go_with_the_next_boot,
    both::the_hypervisor_keeps_its_contract,
    both::the_hypervisor_keeps_its_contract_over_a_wire,
];

fn main() {
    both::main(TESTS);
}

/// Why nothing can run here. Where a real KVM is promised it must be there.
pub(crate) fn missing() -> Option<String> {
    match iaas_vmm::probe() {
        Capability::Hardware => None,
        found if std::env::var_os("LAB_NONCE").is_some() => panic!("{found}"),
        found => Some(format!("{found}; run it in the lab: `cargo xtask lab`")),
    }
}

/// What the rig runs guests on.
pub(crate) type Vmm = Kvm;

pub(crate) fn vmm() -> Vmm {
    Kvm
}

/// What to kill so that a VMM dies: here it is the runner.
pub(crate) fn vmm_of(runner: u32) -> Option<u32> {
    Some(runner)
}

/// The evidence that this is what it seems: the guest's own word, on the console that the runner keeps.
async fn a_runner_hears_that_its_guest_is_on_kvm() {
    let nonce = std::env::var("LAB_NONCE").unwrap_or_default();
    let rig = Rig::new().await;
    let mut spec = rig.spec(on(1));
    let Origin::Kernel { cmdline, .. } = &mut spec.origin else { panic!("{:?}", spec.origin) };
    cmdline.push_str(&format!(" lab.nonce={nonce}"));
    rig.ensure(VM, 1, &spec).await;
    rig.line(VM, 0, "ALIVE").await;
    let found = rig.say(VM, "dmesg | grep -o 'Hypervisor detected: .*'", "Hypervisor detected").await;
    let line = rig.say(VM, "echo LINE $(cat /proc/cmdline)", "LINE").await;
    println!("EVIDENCE {found}\nEVIDENCE /proc/cmdline: {line}");
    assert_eq!(found, "Hypervisor detected: KVM");
    assert!(line.ends_with(&format!(" lab.nonce={nonce}")), "{line}");
    rig.remove(VM).await;
}

async fn a_killed_runner_is_seen() {
    let rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    rig.until(VM, |seen| seen.is.life == Life::On(Boot(1))).await;
    kill(rig.hypervisor.runner(VM).await.unwrap().unwrap().pid());
    let crashed =
        |seen: &iaas_core::spi::Seen<Vm>| matches!(seen.is.life, Life::Ended { why: End::Crashed(_), .. });
    let seen = rig.until(VM, crashed).await;
    assert_eq!(seen.final_usage.iter().map(|r| (r.life, r.fin)).collect::<Vec<_>>(), [(1, true)]);
    assert_eq!(rig.qemus(), Vec::<u32>::new(), "nothing of it is left");
    rig.remove(VM).await;
}

async fn a_guest_that_resets_has_ended() {
    let rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    rig.line(VM, 0, "ALIVE").await;
    let mut console = rig.hypervisor.console(&rig.cx, VM, 0).await.unwrap();
    console.write("sh reboot -f\n".into()).await.unwrap();
    let seen = rig.until(VM, |seen| matches!(seen.is.life, Life::Ended { .. })).await;
    assert_eq!(seen.is.life, Life::Ended { boot: Boot(1), why: End::GuestReset });
    rig.remove(VM).await;
}

async fn a_guest_talks_through_its_port_and_its_bytes_are_counted() {
    let (rig, _) = both::a_guest_that_talks().await;
    rig.remove(VM).await;
}

async fn devices_come_and_go_with_the_next_boot() {
    let rig = Rig::new().await;
    let path = rig.dir.path().join("volume");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let mut spec = rig.spec(on(1));
    rig.ensure(VM, 1, &spec).await;
    rig.settled(VM).await;
    let (attachment, device) = rig::disk(5, &path);
    spec.devices.insert(attachment, device);
    rig.ensure(VM, 2, &spec).await;
    let seen = rig.settled(VM).await;
    assert!(seen.is.devices.is_empty(), "{:?}", seen.is.devices);
    assert_eq!(seen.is.restart_for, [format!("device {attachment}")]);
    spec.run = on(2);
    rig.ensure(VM, 3, &spec).await;
    let seen = rig.until(VM, |seen| seen.is.life == Life::On(Boot(2))).await;
    assert_eq!(seen.is.devices[&attachment], DeviceState::Present);
    assert!(seen.is.restart_for.is_empty());
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    assert!(rig::fds(runner).values().any(|to| *to == path), "the runner has the volume open");
    spec.devices.clear();
    rig.ensure(VM, 4, &spec).await;
    assert_eq!(rig.settled(VM).await.is.restart_for, [format!("device {attachment}")]);
    rig.until(VM, |seen| seen.is.devices.len() == 1).await;
    rig.remove(VM).await;
}
