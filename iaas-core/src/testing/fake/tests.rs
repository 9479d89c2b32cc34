//! The fakes' own peculiarities; that they keep the contracts is what the conformance suites say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::*;
use crate::Boot;
use crate::Clock;
use crate::Digest;
use crate::Epoch;
use crate::Error;
use crate::ErrorKind;
use crate::ManualClock;
use crate::Outcome;
use crate::Rev;
use crate::Term;
use crate::spi::Call;
use crate::spi::Cancel;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Provider;
use crate::spi::artifact::Artifacts;
use crate::spi::block::AccessSpec;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::Qos;
use crate::spi::hypervisor::Device;
use crate::spi::hypervisor::DeviceState;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::Origin;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::VmSpec;
use crate::spi::target::Mode;

struct Bench {
    clock: Arc<ManualClock>,
    world: World,
    site: Site,
    host: Id<Host>,
}

fn bench() -> Bench {
    let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
    let world = World::new(clock.clone());
    let site = Site::new(&world);
    let host = Id::from_uuid(world.clock().uuid());
    Bench { clock, world, site, host }
}

impl Bench {
    fn id<K>(&self) -> Id<K> {
        Id::from_uuid(self.clock.uuid())
    }
    fn vms(&self) -> FakeHypervisor {
        FakeHypervisor::open(&self.world, self.host)
    }
}

fn cx(epoch: u64) -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(1)),
        incarnation: Uuid::from_u128(2),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::from_u128(3)),
        trace: None,
        budget: Duration::from_secs(10),
    };
    Ctx { call, cancel: Cancel::new() }
}

fn vm(run: Run) -> VmSpec {
    VmSpec {
        term: Term(1),
        run,
        vcpus: 2,
        memory: 128 << 20,
        origin: Origin::Disk,
        devices: BTreeMap::new(),
        lease: None,
        metadata: None,
        passport: Bytes::new(),
    }
}

#[tokio::test]
async fn a_vm_that_runs_for_a_minute_on_two_vcpus_used_two_minutes() {
    let bench = bench();
    let (vms, id) = (bench.vms(), bench.id());
    vms.ensure(&cx(1), id, Rev(1), &vm(Run::On(Boot(1)))).await.unwrap();
    bench.clock.advance(Duration::from_secs(60));
    let read = vms.usage(&cx(1), None, 10).await.unwrap();
    // 2 vCPU × 60 s = 120 s
    assert_eq!(read[0].totals["vcpu-ns"], 120_000_000_000);
    vms.ensure(&cx(1), id, Rev(2), &vm(Run::Off { grace: Duration::ZERO })).await.unwrap();
    bench.clock.advance(Duration::from_secs(60));
    let seen = vms.observe(&cx(1), id).await.unwrap().unwrap();
    assert_eq!(seen.final_usage.len(), 1);
    assert!(seen.final_usage[0].fin);
    assert_eq!(seen.final_usage[0].totals["vcpu-ns"], 120_000_000_000);
}

#[tokio::test]
async fn a_guest_boots_when_its_time_has_come_and_says_so_on_its_console() {
    let bench = bench();
    let (vms, id) = (bench.vms(), bench.id());
    bench.world.set_settle(Duration::from_secs(5));
    let seen = vms.ensure(&cx(1), id, Rev(1), &vm(Run::On(Boot(1)))).await.unwrap();
    assert_eq!(seen.is.life, Life::Booting(Boot(1)));
    assert!(matches!(seen.phase, Phase::Working { .. }));
    bench.clock.advance(Duration::from_secs(5));
    let mut console = vms.console(&cx(1), id, 0).await.unwrap();
    let text = console.read().await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&text).contains("\nGUEST-READY\n"));
    assert_eq!(vms.observe(&cx(1), id).await.unwrap().unwrap().phase, Phase::Settled);
}

#[tokio::test]
async fn a_vm_without_its_kernel_is_refused_until_the_kernel_is_there() {
    let bench = bench();
    let vms = bench.vms();
    let kernel = Digest::of(b"kernel");
    let mut spec = vm(Run::On(Boot(1)));
    spec.origin = Origin::Kernel { kernel, initrd: None, cmdline: "quiet".into() };
    let error = vms.ensure(&cx(1), bench.id(), Rev(1), &spec).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::NotFound, Outcome::NotDone));

    let artifacts = FakeArtifacts::open(&bench.world, bench.host);
    let id = bench.id();
    artifacts.ensure(&cx(1), id, Rev(1), &kernel).await.unwrap();
    let mut upload = artifacts.upload(&cx(1), id).await.unwrap();
    upload.write(Bytes::from_static(b"ker")).await.unwrap();
    upload.write(Bytes::from_static(b"nel")).await.unwrap();
    upload.close().await.unwrap();
    vms.ensure(&cx(1), bench.id(), Rev(1), &spec).await.unwrap();
}

#[tokio::test]
async fn a_vm_opens_its_disk_and_becomes_its_writer() {
    let bench = bench();
    let (vms, pool) = (bench.vms(), bench.site.volumes());
    let (volume, access) = (bench.id(), FakeAccess::open(&bench.world, bench.host, bench.site.pool));
    let size =
        PoolVolumeSpec { size: 1 << 20, from: None, qos: Qos::default(), key: None, passport: Bytes::new() };
    pool.ensure(&cx(1), volume, Rev(1), &size).await.unwrap();
    let spec = AccessSpec { pool: bench.site.pool, volume, term: Term(7), mode: Mode::Write };
    let seen = access.ensure(&cx(1), bench.id(), Rev(2), &spec).await.unwrap();
    let mut wish = vm(Run::On(Boot(1)));
    let device = bench.clock.uuid();
    wish.devices.insert(device, Device::Disk { target: seen.is.target.unwrap(), boot: None });
    let seen = vms.ensure(&cx(1), bench.id(), Rev(3), &wish).await.unwrap();
    assert_eq!(seen.is.devices[&device], DeviceState::Present);
    assert_eq!(pool.observe(&cx(1), volume).await.unwrap().unwrap().is.writer, Term(7));
}

#[tokio::test]
async fn a_crash_after_the_effect_leaves_the_thing_and_no_answer() {
    let bench = bench();
    let id: Id<crate::spi::hypervisor::Vm> = bench.id();
    bench.world.fail_next(Fault::CrashAfter);
    let vms = bench.vms();
    let call = tokio::spawn(async move { vms.ensure(&cx(1), id, Rev(1), &vm(Run::On(Boot(1)))).await });
    bench.world.crashed().await;
    call.abort();
    bench.world.restart();
    assert_eq!(bench.world.things().len(), 1);
    assert!(bench.vms().observe(&cx(1), id).await.unwrap().is_some());
    assert_eq!(bench.vms().starts(id), 1);
}

#[tokio::test]
async fn half_an_effect_is_seen_broken_and_repaired_or_removed() {
    let bench = bench();
    let (vms, id) = (bench.vms(), bench.id());
    bench.world.fail_next(Fault::Half);
    let error: Error = vms.ensure(&cx(1), id, Rev(1), &vm(Run::On(Boot(1)))).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown);
    assert!(matches!(vms.observe(&cx(1), id).await.unwrap().unwrap().phase, Phase::Broken(_)));
    let seen = vms.ensure(&cx(1), id, Rev(1), &vm(Run::On(Boot(1)))).await.unwrap();
    assert_eq!(seen.phase, Phase::Settled);
    bench.world.fail_next(Fault::Half);
    vms.remove(&cx(1), id, Rev(1)).await.unwrap_err();
    assert!(vms.observe(&cx(1), id).await.unwrap().is_some());
    vms.remove(&cx(1), id, Rev(1)).await.unwrap();
    assert!(bench.world.things().is_empty());
}
