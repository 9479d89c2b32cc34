//! The control plane dies at every commit and at every effect of an instance's whole life, and nothing is left over.
//!
//! For each commit and each effect, and each way in which it can go wrong: a new world, the fault, a restart, then the
//! *same* create (same token) is finished, used and removed. A judge that reads the store and the world by itself says what
//! is left. Prints `where=fake points=<n> leaks=<m>`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use common::Rig;
use common::Tenant;
use common::faulty_store::CommitFault;
use common::faulty_store::FaultyStore;
use common::faulty_store::Plan;
use common::judge::judge;
use common::tenant;
use common::virtual_clock::VirtualClock;
use common::virtual_clock::in_virtual_time;
use iaas_core::ByteSize;
use iaas_core::Cloud;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::cloud::Session;
use iaas_core::model::*;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Provider;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::host::HostProviders;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::Handover;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmImage;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::MemoryStore;
use iaas_core::testing::fake::FakeHypervisor;
use iaas_core::testing::fake::Fault;
use iaas_core::testing::fake::World;

/// What goes wrong, and where, counted from the moment at which the tenant is ready.
#[derive(Clone, Copy, Debug)]
enum Point {
    Nowhere,
    Commit(u64, CommitFault),
    Effect(u64, Fault),
}

const FAULTS: [Fault; 6] =
    [Fault::Refused, Fault::NotLanded, Fault::ReplyLost, Fault::Half, Fault::CrashBefore, Fault::CrashAfter];

/// What a life came to.
#[derive(Debug)]
struct Outcome {
    commits: u64,
    effects: u64,
    defects: Vec<String>,
}

/// How a life is disturbed besides its point.
#[derive(Clone, Copy)]
struct Leaks {
    around: fn(&World, HostProviders) -> HostProviders,
    loses: Option<&'static str>,
}

const NONE: Leaks = Leaks { around: |_, host| host, loses: None };

#[test]
fn a_crash_at_any_commit_or_effect_leaves_nothing() {
    let calm = live(Point::Nowhere, NONE);
    assert_eq!(calm.defects, [] as [String; 0]);
    let commits = (1..=calm.commits).flat_map(|k| CommitFault::ALL.map(|fault| Point::Commit(k, fault)));
    let effects = (1..=calm.effects).flat_map(|k| FAULTS.map(|fault| Point::Effect(k, fault)));
    let points: Vec<Point> = commits.chain(effects).collect();
    // A life of so many steps has a matrix of so many points: a matrix without points proves nothing.
    assert!(calm.commits > 15 && calm.effects > 8, "{calm:?}");
    // Providers wake us for what we do ourselves: without care each effect would ask for the next one, for ever.
    assert!(calm.effects < 40, "the same is done again and again: {calm:?}");
    let mut leaks = 0;
    let mut told = Vec::new();
    for point in &points {
        let outcome = live(*point, NONE);
        leaks += outcome.defects.len();
        told.extend(outcome.defects.into_iter().map(|defect| format!("{point:?}: {defect}")));
    }
    println!("where=fake points={} leaks={leaks}", points.len());
    assert!(told.is_empty(), "{leaks} leaks:\n{}", told.join("\n"));
}

#[test]
fn a_hypervisor_that_leaves_a_thing_is_found_out() {
    let leaks = Leaks { around: |world, host| Leaky::around(world, host), ..NONE };
    let outcome = live(Point::Nowhere, leaks);
    assert!(outcome.defects.iter().any(|d| d.starts_with("left over: vm")), "{outcome:?}");
}

#[test]
fn a_record_that_goes_on_counting_is_found_out() {
    let leaks = Leaks { loses: Some("r/port/"), ..NONE };
    let outcome = live(Point::Nowhere, leaks);
    assert!(outcome.defects.iter().any(|d| d.starts_with("quota: port")), "{outcome:?}");
}

/// One whole life in a world of its own.
fn live(point: Point, leaks: Leaks) -> Outcome {
    in_virtual_time(async move {
        let within = Duration::from_secs(3600);
        tokio::time::timeout(within, Life::begin(leaks).await.run(point)).await.unwrap_or_else(|_| {
            panic!("{point:?}: an hour has passed and the life is not over");
        })
    })
}

struct Life {
    rig: Rig,
    plan: Arc<Plan>,
    store: Arc<FaultyStore>,
    cloud: Option<Cloud>,
    tenant: Tenant,
    orphans: u64,
}

impl Life {
    /// A tenant that has everything but an instance.
    async fn begin(leaks: Leaks) -> Self {
        let clock = Arc::new(VirtualClock::new());
        let mut rig = Rig::on(clock.clone());
        rig.around = leaks.around;
        let plan = Plan::new();
        let store = FaultyStore::new(MemoryStore::with_clock(clock), &plan);
        rig.store = Arc::clone(&store) as Arc<dyn StateStore>;
        rig.world.set_settle(Duration::from_millis(40));
        let cloud = rig.open().await.unwrap();
        let tenant = tenant(&cloud.session_as("root"), &rig, "acme").await.unwrap();
        assert!(cloud.settled(MINUTE).await);
        *plan.loses.lock().unwrap() = leaks.loses;
        Self { rig, plan, store, cloud: Some(cloud), tenant, orphans: 0 }
    }

    async fn run(mut self, point: Point) -> Outcome {
        let (commits, effects) = (self.plan.count(), self.rig.world.effect_count());
        match point {
            Point::Nowhere => {}
            Point::Commit(k, fault) => self.plan.fail_at(commits + k, fault),
            Point::Effect(k, fault) => self.rig.world.fail_at(effects + k, fault),
        }
        self.finish(point).await;
        self.rest().await;
        let (commits, effects) = (self.plan.count() - commits, self.rig.world.effect_count() - effects);
        let mut defects = self.verdict().await;
        // Read anew, so that only what is stored counts.
        self.restart().await;
        defects.extend(self.verdict().await);
        defects.dedup();
        Outcome { commits, effects, defects }
    }

    /// Plays the script until it succeeds, with a restart after each death.
    async fn finish(&mut self, point: Point) {
        for _ in 0..5 {
            let cloud = self.cloud.clone().unwrap();
            let root = cloud.session_as("root");
            drop(cloud);
            let died = tokio::select! {
                done = script(&root, self.tenant) => match done {
                    Ok(()) => return,
                    Err(error) => {
                        let halts = matches!(point, Point::Commit(_, CommitFault::NotLanded | CommitFault::ReplyLost));
                        assert!(halts || matches!(point, Point::Commit(_, CommitFault::Refused)), "{point:?}: {error:?}");
                        halts
                    }
                },
                () = self.plan.crashed() => true,
                () = self.rig.world.crashed() => true,
            };
            drop(root);
            if died {
                self.restart().await;
            }
        }
        panic!("{point:?}: the script did not succeed");
    }

    /// What follows the script comes to its end, or to its death.
    async fn rest(&mut self) {
        let cloud = self.cloud.clone().unwrap();
        let died = tokio::select! {
            _ = cloud.settled(10 * MINUTE) => false,
            () = self.plan.crashed() => true,
            () = self.rig.world.crashed() => true,
        };
        drop(cloud);
        if died || self.plan.lost() {
            self.restart().await;
        }
    }

    /// The process is gone without a word, and starts again.
    async fn restart(&mut self) {
        let cloud = self.cloud.take().unwrap();
        self.orphans += cloud.orphans_removed();
        drop(cloud);
        self.rig.world.restart();
        self.store = self.store.reopen();
        self.rig.store = Arc::clone(&self.store) as Arc<dyn StateStore>;
        self.cloud = Some(self.rig.open().await.expect("it opens again"));
    }

    async fn verdict(&self) -> Vec<String> {
        let cloud = self.cloud.as_ref().unwrap();
        let mut defects = Vec::new();
        if !cloud.settled(10 * MINUTE).await {
            defects.push("it does not come to rest".to_owned());
        }
        defects.extend(judge(&self.rig).await);
        // What is left over after two sweeps was taken for wanted, or is not ours.
        tokio::time::sleep(3 * MINUTE).await;
        let orphans = self.orphans + cloud.orphans_removed();
        if orphans > 0 {
            defects.push(format!("{orphans} orphans were removed"));
        }
        let state = iaas_core::engine::adopt::load(&self.rig.store).await.unwrap();
        let used: Vec<_> = state.used(self.tenant.project).into_iter().collect();
        let left = [("networks", 1), ("security-groups", 1), ("subnets", 1)].map(|(n, k)| (n.to_owned(), k));
        if used != left {
            defects.push(format!("quota: {used:?} are used, and only the network is left"));
        }
        defects
    }
}

const MINUTE: Duration = Duration::from_secs(60);

/// A volume and an instance come, are used, and go. Every step may have been done before.
async fn script(root: &Session, tenant: Tenant) -> Result<()> {
    let spec = VolumeSpec::new(ByteSize::gib(1)).unwrap();
    let volume = root.volumes().create(tenant.project, "data", spec).token("data").await?;
    let launch = root.instances().launch(tenant.project, tenant.instance("web", vec![volume.out]));
    let web = launch.token("web").await?;
    let (volume, instance) = (volume.out, web.out);
    // After a death in the second half, what the token names is on its way out, or gone.
    if let Ok(record) = root.instances().get(instance).await
        && record.meta.absent.is_none()
    {
        web.wait().await?;
        use_it(root, tenant, instance).await;
    }
    gone(root.instances().delete(instance).token("web-goes").await, root, instance).await?;
    let left = root.attachments().list(tenant.project, None, 10).await?;
    assert_eq!(left, [], "the instance went before its attachments");
    match root.volumes().delete(volume).token("data-goes").await {
        Ok(op) => op.wait().await.map(|_| ()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn gone(
    asked: Result<iaas_core::cloud::Op<Id<Instance>>>,
    root: &Session,
    instance: Id<Instance>,
) -> Result<()> {
    match asked {
        Ok(op) => op.wait().await?,
        Err(error) if error.kind() == ErrorKind::NotFound => instance,
        Err(error) => return Err(error),
    };
    let absent = root.instances().get(instance).await.unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound, "{absent:?}");
    Ok(())
}

/// The guest is up, has said so, and has its disk and its interface.
async fn use_it(root: &Session, tenant: Tenant, instance: Id<Instance>) {
    let record = root.instances().get(instance).await.unwrap();
    assert_eq!(record.state(), InstanceState::Running, "{record:?}");
    let mut console = root.instances().console(instance, 0).await.unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"GUEST-READY\n") {
        text.extend_from_slice(&console.read().await.unwrap().expect("more of the console"));
    }
    let started = text.windows(5).filter(|w| w == b"Linux").count();
    assert_eq!(started, 1, "the guest was started once: {}", String::from_utf8_lossy(&text));
    let devices = &record.status.vms[&record.bind.term.0].is.devices;
    let attached = root.attachments().list(tenant.project, None, 10).await.unwrap();
    assert_eq!(attached.len(), 2);
    for attachment in attached {
        assert_eq!(devices.get(&attachment.meta.id.uuid()), Some(&DeviceState::Present), "{attachment:?}");
    }
}

/// A hypervisor that leaves something of each VM behind, without a tag.
#[derive(Debug)]
struct Leaky {
    inner: FakeHypervisor,
    last: Mutex<Option<VmSpec>>,
}

impl Leaky {
    fn around(world: &World, mut host: HostProviders) -> HostProviders {
        let inner = FakeHypervisor::open(world, host.id);
        host.hypervisor = Arc::new(Self { inner, last: Mutex::default() });
        host
    }
}

#[async_trait]
impl Provider for Leaky {
    async fn hello(&self) -> Result<Hello> {
        self.inner.hello().await
    }
    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.inner.claim(cx).await
    }
    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>> {
        self.inner.changes(cx).await
    }
    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        self.inner.usage(cx, after, limit).await
    }
}

#[async_trait]
impl Converge<Vm> for Leaky {
    async fn ensure(&self, cx: &Ctx, id: Id<Vm>, rev: Rev, spec: &VmSpec) -> Result<Seen<Vm>> {
        *self.last.lock().unwrap() = Some(VmSpec { devices: Default::default(), ..spec.clone() });
        self.inner.ensure(cx, id, rev, spec).await
    }
    async fn remove(&self, cx: &Ctx, id: Id<Vm>, upto: Rev) -> Result<()> {
        self.inner.remove(cx, id, upto).await?;
        let left = Id::from_uuid(self.inner.world().clock().uuid());
        self.inner.plant(left, None, self.last.lock().unwrap().clone().expect("it was ensured"));
        Ok(())
    }
    async fn observe(&self, cx: &Ctx, id: Id<Vm>) -> Result<Option<Seen<Vm>>> {
        self.inner.observe(cx, id).await
    }
    async fn inventory(&self, cx: &Ctx, after: Option<Id<Vm>>, limit: usize) -> Result<Vec<Found<Vm>>> {
        self.inner.inventory(cx, after, limit).await
    }
}

#[async_trait]
impl Hypervisor for Leaky {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        None
    }
    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        None
    }
    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.inner.console(cx, vm, from).await
    }
}
