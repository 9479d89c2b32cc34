//! What holds whatever runs the guests.

use std::time::Duration;

use iaas_core::Boot;
use iaas_core::Id;
use iaas_core::Rev;
use iaas_core::spi::Converge;
use iaas_core::spi::Provider;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use uuid::Uuid;

use super::rig;
use super::rig::Rig;
use super::rig::on;
use super::suite;

pub(crate) const VM: Id<Vm> = Id::from_uuid(Uuid::from_u128(77));

/// A test and its name.
pub(crate) type Test = (&'static str, fn(&tokio::runtime::Runtime));

/// The tests of a program, by their paths.
#[macro_export]
macro_rules! tests {
    ($($test:path),+ $(,)?) => {
        const TESTS: &[both::Test] = &[$((stringify!($test), |runtime| runtime.block_on($test()))),+];
    };
}

/// Runs what the arguments name, one after the other. A runner never comes back from the first line.
pub(crate) fn main(tests: &[Test]) {
    iaas_core::process::init(&rig::roles());
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|word| word == "--list") {
        return tests.iter().for_each(|(name, _)| println!("{name}: test"));
    }
    // Long suites tell how far they are, to whoever asks by RUST_LOG.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter).try_init();
    let filters: Vec<&String> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    for (name, test) in tests {
        let name = name.rsplit("::").next().unwrap_or(name).trim();
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        run(&runtime, name, *test);
    }
}

fn run(runtime: &tokio::runtime::Runtime, name: &str, test: fn(&tokio::runtime::Runtime)) {
    if let Some(missing) = super::missing().or_else(|| rig::guest_files().err()) {
        iaas_core::testing::skip!(name, &missing);
    }
    let start = std::time::Instant::now();
    test(runtime);
    println!("test {name} ... ok ({:.1} s)", start.elapsed().as_secs_f64());
}

pub(crate) fn kill(pid: u32) {
    nix::sys::signal::kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

pub(crate) async fn a_guest_boots_to_its_console_and_goes_by_the_power_button() {
    let rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    let (ready, offset) = rig.line(VM, 0, "GUEST-READY").await;
    assert!(ready.contains("boot_id="), "{ready}");
    let seen = rig.settled(VM).await;
    assert_eq!((seen.applied, seen.is.life), (Rev(1), Life::On(Boot(1))));
    // Its loop for the button starts with the first sign of life.
    rig.line(VM, offset.saturating_sub(1), "ALIVE").await;
    let found = rig.hypervisor.inventory(&rig.cx, None, 10).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].passport.as_deref(), Some(b"who am I".as_slice()));
    rig.ensure(VM, 2, &rig.spec(Run::Off { grace: Duration::from_secs(60) })).await;
    rig.line(VM, offset, "GUEST-OFF").await;
    let seen = rig.settled(VM).await;
    assert_eq!(seen.is.life, Life::Ended { boot: Boot(1), why: End::Stopped });
    let [last] = seen.final_usage.as_slice() else { panic!("{:?}", seen.final_usage) };
    assert!(last.fin && last.totals["vcpu-ns"] > 0 && last.totals["cpu-ns"] > 0, "{last:?}");
    // 192 MiB for as long as one vCPU ran, and a little longer.
    assert!(last.totals["memory-byte-ns"] >= last.totals["vcpu-ns"] * (192 << 20));
    assert_eq!(rig.hypervisor.usage(&rig.cx, None, 10).await.unwrap(), Vec::new());
    rig.remove(VM).await;
}

pub(crate) async fn a_guest_that_ignores_the_button_is_forced() {
    let rig = Rig::new().await;
    let mut spec = rig.spec(on(1));
    rig.ensure(VM, 1, &spec).await;
    rig.until(VM, |seen| seen.is.life == Life::On(Boot(1))).await;
    // The kernel has not come to its button yet, and is given no time for it.
    spec.run = Run::Off { grace: Duration::from_millis(1) };
    rig.ensure(VM, 2, &spec).await;
    let seen = rig.settled(VM).await;
    assert_eq!(seen.is.life, Life::Ended { boot: Boot(1), why: End::Forced });
    rig.remove(VM).await;
}

pub(crate) async fn a_vm_outlives_control_and_is_adopted() {
    let mut rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    let (ready, offset) = rig.line(VM, 0, "GUEST-READY").await;
    let qemus = rig.qemus();
    assert!(!qemus.is_empty());
    rig.reopen(2).await;
    let seen = rig.settled(VM).await;
    assert_eq!((seen.applied, seen.is.life), (Rev(1), Life::On(Boot(1))));
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    assert_eq!(rig.qemus(), qemus, "the same processes");
    let (alive, _) = rig.line(VM, offset, "ALIVE").await;
    let boot_id = |line: &str| line.split_whitespace().find(|w| w.starts_with("boot_id=")).map(str::to_owned);
    assert_eq!(boot_id(&alive), boot_id(&ready));
    let old = rig.hypervisor.usage(&rig.cx, None, 10).await.unwrap();
    rig.until(VM, |_| true).await;
    assert_eq!(old.len(), 1);
    rig.remove(VM).await;
}

pub(crate) async fn a_boot_number_is_used_once_and_a_higher_one_reboots() {
    let mut rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    let (first, offset) = rig.line(VM, 0, "GUEST-READY").await;
    rig.line(VM, offset.saturating_sub(1), "ALIVE").await;
    let spec = rig.spec(on(2));
    rig.ensure(VM, 2, &spec).await;
    let seen = rig.until(VM, |seen| seen.is.life == Life::On(Boot(2))).await;
    assert_eq!(seen.final_usage.len(), 1);
    let (second, _) = rig.line(VM, offset, "GUEST-READY").await;
    assert_ne!(first, second);
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap().pid();
    kill(super::vmm_of(runner).unwrap());
    rig.until(VM, |seen| matches!(seen.is.life, Life::Ended { boot: Boot(2), .. })).await;
    // Neither a repair nor a new leader starts it again.
    rig.ensure(VM, 2, &spec).await;
    rig.reopen(2).await;
    rig.ensure(VM, 2, &spec).await;
    assert!(matches!(rig.settled(VM).await.is.life, Life::Ended { boot: Boot(2), .. }));
    let lower = rig.hypervisor.ensure(&rig.cx, VM, Rev(3), &rig.spec(on(1))).await.unwrap_err();
    assert_eq!(lower.kind(), iaas_core::ErrorKind::Conflict);
    rig.remove(VM).await;
}

pub(crate) async fn a_paused_guest_stands_still() {
    let rig = Rig::new().await;
    rig.ensure(VM, 1, &rig.spec(on(1))).await;
    let (_, offset) = rig.line(VM, 0, "GUEST-READY").await;
    rig.line(VM, offset.saturating_sub(1), "ALIVE").await;
    rig.ensure(VM, 2, &rig.spec(Run::Paused(Boot(1)))).await;
    let paused = rig.settled(VM).await;
    assert_eq!(paused.is.life, Life::Paused(Boot(1)));
    let used = || async {
        let readings = rig.hypervisor.usage(&rig.cx, None, 10).await.unwrap();
        (readings[0].seq, readings[0].totals["vcpu-ns"], readings[0].totals["memory-byte-ns"])
    };
    let until = |seq: u64| async move { seq };
    let (seq, _, _) = used().await;
    // Two readings later than the pause, the first of which may have been taken before it.
    let mut readings = Vec::new();
    while readings.len() < 3 {
        let now = used().await;
        if now.0 > until(seq).await && readings.last().is_none_or(|last: &(u64, u128, u128)| last.0 < now.0) {
            readings.push(now);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(readings[1].1, readings[2].1, "no vCPU time while it is paused");
    assert!(readings[1].2 < readings[2].2, "but memory");
    rig.ensure(VM, 3, &rig.spec(on(1))).await;
    assert_eq!(rig.settled(VM).await.is.life, Life::On(Boot(1)));
    rig.remove(VM).await;
}

pub(crate) async fn a_file_system_on_a_served_disk_survives_its_vm() {
    let rig = Rig::new().await;
    let path = rig.dir.path().join("volume");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let mut spec = rig.spec(on(1));
    let (attachment, device) = rig::disk(5, &path);
    spec.devices.insert(attachment, device);
    rig.ensure(VM, 1, &spec).await;
    rig.line(VM, 0, "ALIVE").await;
    let make = "/bin/mke2fs -q -F -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt && echo kept > /mnt/a && dd if=/dev/urandom of=/mnt/b bs=1M count=8 2>/dev/null && md5sum /mnt/b > /mnt/sum && umount /mnt";
    assert_eq!(rig.shell(VM, make).await, "RESULT 0");
    let seen = rig.seen(VM).await;
    assert_eq!(seen.is.devices[&attachment], DeviceState::Present);
    rig.remove(VM).await;
    let other = Id::from_uuid(Uuid::from_u128(78));
    rig.ensure(other, 2, &spec).await;
    rig.line(other, 0, "ALIVE").await;
    let check = "mount -t ext4 /dev/vda /mnt && grep -q kept /mnt/a && md5sum -c /mnt/sum";
    assert_eq!(rig.shell(other, check).await, "RESULT 0");
    assert_eq!(rig.shell(other, "grep -q 000000000000000003ed /sys/block/vda/serial").await, "RESULT 0");
    rig.remove(other).await;
}

pub(crate) async fn the_hypervisor_keeps_its_contract_over_a_wire() {
    suite::run_over_a_wire().await.assert_clean();
}

pub(crate) async fn the_hypervisor_keeps_its_contract() {
    suite::run().await.assert_clean();
}

/// A guest that pings the far end of its port; and we have counted what it has counted.
pub(crate) async fn a_guest_that_talks() -> (Rig, VmSpec) {
    let rig = Rig::new().await;
    let mut spec = rig.spec(on(1));
    let (attachment, device) = super::port::nic(6);
    spec.devices.insert(attachment, device);
    let peer = super::port::Peer::answer();
    rig.ensure(VM, 1, &spec).await;
    rig.line(VM, 0, "ALIVE").await;
    assert_eq!(rig.shell(VM, "ping -c 5 -i 0.2 -s 1400 -W 10 10.0.0.1 > /dev/null").await, "RESULT 0");
    assert!(peer.pings() >= 5);
    // Everything is still when the interface is down; the guest's counters stay.
    assert_eq!(rig.shell(VM, "ip link set eth0 down").await, "RESULT 0");
    let words = "echo COUNT $(cat /sys/class/net/eth0/statistics/tx_bytes /sys/class/net/eth0/statistics/tx_packets /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/rx_packets)";
    let counts = rig.say(VM, words, "COUNT").await;
    let runner = rig.hypervisor.runner(VM).await.unwrap().unwrap();
    let nics = runner
        .call(iaas_vmm::runner::NICS, bytes::Bytes::new(), Vec::new(), Duration::from_secs(60))
        .await
        .unwrap();
    let nics: std::collections::BTreeMap<Uuid, [u64; 5]> = ciborium::from_reader(&nics[..]).unwrap();
    let [tx_packets, tx_bytes, rx_packets, rx_bytes, refused] = nics[&attachment];
    assert_eq!(counts, format!("COUNT {tx_bytes} {tx_packets} {rx_bytes} {rx_packets}"));
    assert!(tx_packets > 5 && rx_packets > 5 && refused == 0);
    (rig, spec)
}
