//! What the control plane does by the way: it forgets what is old, and one site that fails holds up no other one.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use common::Rig;
use common::tenant;
use common::virtual_clock::VirtualClock;
use common::virtual_clock::in_virtual_time;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::model::*;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Provider;
use iaas_core::spi::Pull;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::host::HostProviders;
use iaas_core::spi::hypervisor::Handover;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmImage;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::meter::Usage;
use iaas_core::testing::fake::FakeHypervisor;
use iaas_core::testing::fake::FakeMeter;
use iaas_core::testing::fake::World;
use tokio::sync::watch;

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_answer_to_a_token_is_kept_for_a_day_and_then_forgotten() {
    in_virtual_time(async {
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let create = || root.organizations().create(Owner::Cloud, "acme", Empty {}).token("once");
        let first = create().await.unwrap();
        tokio::time::sleep(23 * HOUR).await;
        assert_eq!(create().await.unwrap().out, first.out);
        tokio::time::sleep(3 * HOUR).await;
        let (left, _) = rig.store.scan(b"t/", None, 10).await.unwrap();
        assert!(left.is_empty(), "{left:?}");
        // It is a new request now, and meets what the first one made.
        create().await.unwrap_err();
    });
}

#[test]
fn a_site_that_does_not_answer_a_sweep_holds_up_no_other_one() {
    in_virtual_time(async {
        let mut rig = Rig::on(Arc::new(VirtualClock::new()));
        rig.around = |world, host| Odd::around(world, host, Way::Silent);
        let cloud = rig.open().await.unwrap();
        // A volume that nobody knows, under our tag.
        let (stray, pool) = (Id::from_uuid(rig.clock.uuid()), rig.site.volumes());
        let hello = pool.hello().await.unwrap();
        let (incarnation, epoch, _) = hello.newest.unwrap();
        let op = Id::from_uuid(rig.clock.uuid());
        let call = Call { cloud: cloud.id(), incarnation, epoch, op, trace: None, budget: HOUR };
        let cx = Ctx { call, cancel: Cancel::new() };
        let spec = PoolVolumeSpec {
            size: 1 << 20,
            from: None,
            qos: Qos::default(),
            key: None,
            passport: bytes::Bytes::new(),
        };
        pool.ensure(&cx, stray, Rev(1), &spec).await.unwrap();
        tokio::time::sleep(HOUR).await;
        assert_eq!(cloud.quarantine(), [stray.object()].into());
        assert!(pool.observe(&cx, stray).await.unwrap().is_some(), "data is never removed by a sweep");
    });
}

#[test]
fn a_last_reading_that_comes_after_the_end_is_paid_for() {
    in_virtual_time(async {
        let mut rig = Rig::on(Arc::new(VirtualClock::new()));
        rig.around = |world, host| Odd::around(world, host, Way::Late);
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let tenant = tenant(&root, &rig, "acme").await.unwrap();
        let web = root.instances().launch(tenant.project, tenant.instance("web", vec![])).await.unwrap();
        let web = web.wait().await.unwrap();
        // Its end is seen and noted; only later does the host find a reading that was not in it.
        root.instances().stop(web, Duration::ZERO).await.unwrap().wait().await.unwrap();
        assert!(cloud.settled(HOUR).await);
        LATE.store(1, Ordering::SeqCst);
        root.instances().delete(web).await.unwrap().wait().await.unwrap();
        assert!(cloud.settled(HOUR).await);
        let late = FakeMeter::open(&rig.world).events().into_iter().any(
            |event| matches!(&event.what, Usage::Counted(reading) if reading.totals.contains_key("late")),
        );
        assert!(late, "the reading was lost");
    });
}

#[test]
fn an_operation_that_went_with_its_project_is_not_said_to_be_undone() {
    in_virtual_time(async {
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let organization = root.organizations().create(Owner::Cloud, "acme", Empty {}).await.unwrap().out;
        let spec = ProjectSpec { organization };
        let project = root.projects().create(organization, "main", spec).await.unwrap().out;
        let made = root.networks().create(project, "vpc", NetworkSpec::default()).await.unwrap();
        root.networks().delete(made.out).await.unwrap();
        root.projects().delete(project).await.unwrap();
        let told = made.wait().await.unwrap_err();
        assert_eq!((told.kind(), told.outcome()), (ErrorKind::NotFound, Outcome::Unknown), "{told:?}");
    });
}

#[test]
fn nothing_that_describes_a_project_outlives_it_however_much_it_is() {
    in_virtual_time(async {
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let organization = root.organizations().create(Owner::Cloud, "acme", Empty {}).await.unwrap().out;
        let project =
            root.projects().create(organization, "main", ProjectSpec { organization }).await.unwrap().out;
        // Each leaves an operation, too.
        for n in 0..130 {
            root.security_groups()
                .create(project, &format!("group-{n}"), SecurityGroupSpec::default())
                .await
                .unwrap();
        }
        for group in root.security_groups().list(project, None, 1000).await.unwrap() {
            root.security_groups().delete(group.meta.id).await.unwrap();
        }
        root.projects().delete(project).await.unwrap();
        root.organizations().delete(organization).await.unwrap();
        tokio::time::sleep(HOUR).await;
        let (records, _) = rig.store.scan(b"r/operation/", None, 1000).await.unwrap();
        assert!(records.len() < 100, "{} operations are left", records.len());
    });
}

#[test]
fn what_fails_is_not_tried_again_for_what_the_try_itself_has_changed() {
    in_virtual_time(async {
        let mut rig = Rig::on(Arc::new(VirtualClock::new()));
        rig.around = |world, host| Odd::around(world, host, Way::Full);
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let tenant = tenant(&root, &rig, "acme").await.unwrap();
        let launch = root.instances().launch(tenant.project, tenant.instance("web", vec![])).await.unwrap();
        tokio::time::sleep(60 * Duration::from_secs(1)).await;
        let tries = TRIES.load(Ordering::SeqCst);
        assert!((3..30).contains(&tries), "{tries} tries in a minute");
        // A change of the record does not wait for the next try.
        let gone = root.instances().delete(launch.out).await.unwrap();
        tokio::time::timeout(Duration::from_secs(1), gone.wait()).await.expect("at once").unwrap();
    });
}

/// How often the hypervisor without room was asked.
static TRIES: AtomicU64 = AtomicU64::new(0);

/// Whether the odd hypervisor has a late reading.
static LATE: AtomicU64 = AtomicU64::new(0);

/// A hypervisor that is odd in one way.
#[derive(Debug)]
struct Odd {
    inner: FakeHypervisor,
    way: Way,
    tried: watch::Sender<Option<ObjectRef>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// It does not tell what it has.
    Silent,
    /// It has a last reading that it did not tell at first.
    Late,
    /// It has no room for a thousand tries, and its feed names what was tried.
    Full,
}

/// Names what was tried last.
struct Tried(watch::Receiver<Option<ObjectRef>>);

#[async_trait]
impl Pull<ObjectRef> for Tried {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        self.0.changed().await.ok()?;
        self.0.borrow().clone().map(Ok)
    }
}

impl Odd {
    fn around(world: &World, mut host: HostProviders, way: Way) -> HostProviders {
        let (inner, tried) = (FakeHypervisor::open(world, host.id), watch::Sender::new(None));
        host.hypervisor = Arc::new(Self { inner, way, tried });
        host
    }
}

#[async_trait]
impl Provider for Odd {
    async fn hello(&self) -> Result<Hello> {
        self.inner.hello().await
    }
    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.inner.claim(cx).await
    }
    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>> {
        if self.way == Way::Full {
            return Ok(Box::new(Tried(self.tried.subscribe())));
        }
        self.inner.changes(cx).await
    }
    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        self.inner.usage(cx, after, limit).await
    }
}

#[async_trait]
impl Converge<Vm> for Odd {
    async fn ensure(&self, cx: &Ctx, id: Id<Vm>, rev: Rev, spec: &VmSpec) -> Result<Seen<Vm>> {
        if self.way == Way::Full && TRIES.fetch_add(1, Ordering::SeqCst) < 1000 {
            self.tried.send_replace(Some(id.object()));
            return Err(Error::unavailable("there is no room"));
        }
        self.inner.ensure(cx, id, rev, spec).await
    }
    async fn remove(&self, cx: &Ctx, id: Id<Vm>, upto: Rev) -> Result<()> {
        self.inner.remove(cx, id, upto).await
    }
    async fn observe(&self, cx: &Ctx, id: Id<Vm>) -> Result<Option<Seen<Vm>>> {
        let mut seen = self.inner.observe(cx, id).await?;
        if let Some(seen) = &mut seen
            && matches!(seen.is.life, Life::Ended { .. })
            && LATE.load(Ordering::SeqCst) == 1
            && let Some(last) = seen.final_usage.last().cloned()
        {
            let totals = [("late".to_owned(), 7)].into();
            seen.final_usage.push(Reading { seq: last.seq + 1, totals, ..last });
        }
        Ok(seen)
    }
    async fn inventory(&self, cx: &Ctx, after: Option<Id<Vm>>, limit: usize) -> Result<Vec<Found<Vm>>> {
        if self.way == Way::Silent {
            return Err(Error::unavailable("this host does not tell what it has"));
        }
        self.inner.inventory(cx, after, limit).await
    }
}

#[async_trait]
impl Hypervisor for Odd {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        self.inner.images()
    }
    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        self.inner.handovers()
    }
    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.inner.console(cx, vm, from).await
    }
}
