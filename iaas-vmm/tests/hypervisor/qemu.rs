//! Real guests under real QEMU. The program is its own role binary, so it has no test harness: it runs what its arguments
//! name, one after the other.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

mod both;
mod disk;
mod port;
mod rig;
mod suite;

use std::time::Duration;

use iaas_core::Boot;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Vm;
use iaas_vmm::qemu::command::Accel;
use iaas_vmm::vmm::Qemu;

use both::VM;
use both::kill;
use rig::Rig;
use rig::on;

tests![
    both::a_guest_boots_to_its_console_and_goes_by_the_power_button,
    both::a_guest_that_ignores_the_button_is_forced,
    both::a_vm_outlives_control_and_is_adopted,
    a_killed_vmm_and_a_killed_runner_are_seen,
    both::a_boot_number_is_used_once_and_a_higher_one_reboots,
    both::a_paused_guest_stands_still,
    both::a_file_system_on_a_served_disk_survives_its_vm,
    qemu_holds_nothing_but_what_the_runner_gave_it,
    a_disk_comes_and_goes_while_the_guest_runs,
    a_guest_talks_through_its_port_and_its_bytes_are_counted,
    a_vm_that_is_starting_keeps_the_ports_it_was_started_with,
    both::the_hypervisor_keeps_its_contract,
    both::the_hypervisor_keeps_its_contract_over_a_wire,
];

fn main() {
    both::main(TESTS);
}

/// Why nothing can run here.
pub(crate) fn missing() -> Option<String> {
    iaas_vmm::qemu::find().err().map(|e| e.to_string())
}

/// What the rig runs guests on.
pub(crate) type Vmm = Qemu;

pub(crate) fn vmm() -> Vmm {
    Qemu { binary: None, accel: Some(Accel::Tcg) }
}

/// What to kill so that a VMM dies under its runner.
pub(crate) fn vmm_of(runner: u32) -> Option<u32> {
    match children(runner)[..] {
        [qemu] => Some(qemu),
        _ => None,
    }
}

async fn a_killed_vmm_and_a_killed_runner_are_seen() {
    let rig = Rig::new().await;
    let crashed =
        |seen: &iaas_core::spi::Seen<Vm>| matches!(seen.is.life, Life::Ended { why: End::Crashed(_), .. });
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    rig.until(VM, |seen| seen.is.life == Life::On(Boot(1))).await;
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    let [qemu] = children(runner)[..] else { panic!("no QEMU") };
    kill(qemu);
    let seen = rig.until(VM, crashed).await;
    assert_eq!(seen.final_usage.len(), 1);
    rig.ensure(VM, 2, &rig.spec(on(2))).await;
    rig.until(VM, |seen| seen.is.life == Life::On(Boot(2))).await;
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    let [qemu] = children(runner)[..] else { panic!("no QEMU") };
    kill(runner);
    let seen = rig.until(VM, crashed).await;
    assert_eq!(seen.final_usage.iter().map(|r| (r.life, r.fin)).collect::<Vec<_>>(), [(1, true), (2, true)]);
    for _ in 0..1000 {
        if !std::path::Path::new(&format!("/proc/{qemu}/fd/0")).exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(rig.qemus(), Vec::<u32>::new(), "no QEMU outlives its runner");
    rig.remove(VM).await;
}

async fn qemu_holds_nothing_but_what_the_runner_gave_it() {
    let rig = Rig::new().await;
    let path = rig.dir.path().join("volume");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let mut spec = rig.spec(on(1));
    let (attachment, device) = rig::disk(5, &path);
    spec.devices.insert(attachment, device);
    rig.ensure(VM, 1, &spec).await;
    rig.until(VM, |seen| seen.is.life == Life::On(Boot(1))).await;
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    let [qemu] = children(runner)[..] else { panic!("no QEMU") };
    let (theirs, ours) = (rig::fds(qemu), rig::fds(runner));
    assert!(ours.values().any(|to| *to == path), "the runner has the volume open: {ours:?}");
    assert!(!theirs.values().any(|to| *to == path), "QEMU has the volume open: {theirs:?}");
    let peers = socket_peers();
    let sockets = |fds: &std::collections::BTreeMap<u32, std::path::PathBuf>| -> Vec<String> {
        fds.values()
            .filter_map(|to| Some(to.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned()))
            .collect()
    };
    let (theirs, ours) = (sockets(&theirs), sockets(&ours));
    assert!(theirs.len() >= 3, "monitor, console and a disk: {theirs:?}");
    if let Some(peers) = peers {
        for socket in &theirs {
            let peer = peers.get(socket);
            assert!(peer.is_some_and(|peer| ours.contains(peer)), "socket {socket} leads to {peer:?}");
        }
    }
    rig.remove(VM).await;
}

async fn a_disk_comes_and_goes_while_the_guest_runs() {
    let rig = Rig::new().await;
    let path = rig.dir.path().join("volume");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let mut spec = rig.spec(on(1));
    rig.ensure(VM, 1, &spec).await;
    rig.line(VM, 0, "ALIVE").await;
    let (attachment, device) = rig::disk(5, &path);
    spec.devices.insert(attachment, device);
    rig.ensure(VM, 2, &spec).await;
    let seen = rig.settled(VM).await;
    assert_eq!(seen.is.devices[&attachment], DeviceState::Present);
    let wait = "for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /dev/vda ] && break; sleep 1; done; dd if=/dev/vda of=/dev/null 2>/dev/null";
    assert_eq!(rig.shell(VM, wait).await, "RESULT 0");
    spec.devices.clear();
    rig.ensure(VM, 3, &spec).await;
    let seen = rig.settled(VM).await;
    assert!(seen.is.devices.is_empty(), "{:?}", seen.is.devices);
    assert_eq!(rig.shell(VM, "[ ! -e /dev/vda ]").await, "RESULT 0");
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    assert!(!rig::fds(runner).values().any(|to| *to == path), "the runner has let go");
    rig.remove(VM).await;
}

/// Control may die between starting a runner and hearing that it has started; the next one must not prepare its port again.
async fn a_vm_that_is_starting_keeps_the_ports_it_was_started_with() {
    let mut rig = Rig::new().await;
    let (slow, go) = (rig.dir.path().join("slow-qemu"), rig.dir.path().join("go"));
    let wait = format!("while [ ! -e {} ]; do sleep 0.02; done", go.display());
    std::fs::write(&slow, format!("#!/bin/sh\n{wait}\nexec qemu-system-x86_64 \"$@\"\n")).unwrap();
    std::fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    rig.hypervisor = rig::open_with(rig.dir.path(), Qemu { binary: Some(slow), ..vmm() }).unwrap();
    let mut spec = rig.spec(on(1));
    let (attachment, device) = port::nic(8);
    spec.devices.insert(attachment, device);
    let before = port::cables();
    rig.ensure(VM, 1, &spec).await;
    assert_eq!(port::cables(), before + 1);
    rig.cx.call.budget = Duration::from_millis(200);
    let seen = rig.ensure(VM, 2, &spec).await;
    assert!(matches!(seen.phase, iaas_core::spi::Phase::Blocked(_)), "its runner is busy: {:?}", seen.phase);
    assert_eq!(port::cables(), before + 1, "a second cable for a port that has one");
    std::fs::write(&go, "").unwrap();
    let seen = rig.settled(VM).await;
    assert_eq!(seen.is.devices[&attachment], DeviceState::Present);
    assert_eq!(port::cables(), before + 1);
    rig.remove(VM).await;
}

async fn a_guest_talks_through_its_port_and_its_bytes_are_counted() {
    let (rig, mut spec) = both::a_guest_that_talks().await;
    spec.devices.clear();
    rig.ensure(VM, 2, &spec).await;
    assert!(rig.settled(VM).await.is.devices.is_empty());
    assert_eq!(rig.shell(VM, "[ ! -e /sys/class/net/eth0 ]").await, "RESULT 0");
    let (attachment, device) = port::nic(7);
    spec.devices.insert(attachment, device);
    rig.ensure(VM, 3, &spec).await;
    assert_eq!(rig.settled(VM).await.is.devices[&attachment], DeviceState::Present);
    let again = "sleep 1; ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 10 10.0.0.1 > /dev/null";
    assert_eq!(rig.shell(VM, again).await, "RESULT 0");
    rig.remove(VM).await;
}

/// The children of a process.
fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The peer of each unix socket by inode, from `ss`, if that is there.
fn socket_peers() -> Option<std::collections::BTreeMap<String, String>> {
    let output = std::process::Command::new("ss").args(["-xnH"]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let pair = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        Some(((*words.get(5)?).to_owned(), (*words.get(7)?).to_owned()))
    };
    Some(text.lines().filter_map(pair).collect())
}
