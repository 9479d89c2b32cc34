//! A control plane that stops for a while in the middle of a commit or an effect, and then goes on as if nothing had been.
//!
//! Its calls of the store and of providers, and its timers, stand still from the stall on: so its lease lapses.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Clock;
use iaas_core::Cloud;
use iaas_core::Epoch;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::cloud::CloudBuilder;
use iaas_core::engine::sites::Blobs;
use iaas_core::id::Pool;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Kind;
use iaas_core::spi::Provider;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::artifact::Artifact;
use iaas_core::spi::artifact::Artifacts;
use iaas_core::spi::block::Fenced;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::VolumeAccess;
use iaas_core::spi::block::VolumeJob;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::block::VolumeSnapshot;
use iaas_core::spi::hypervisor::Handover;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmImage;
use iaas_core::spi::network::NetProgram;
use iaas_core::spi::network::NetUpdate;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Plugs;
use iaas_core::spi::network::Synced;
use iaas_core::spi::network::Trace;
use iaas_core::spi::state_store::Change;
use iaas_core::spi::state_store::Check;
use iaas_core::spi::state_store::Entry;
use iaas_core::spi::state_store::Lead;
use iaas_core::spi::state_store::StateStore;
use iaas_core::spi::state_store::Write;
use iaas_core::testing::fake::FakeAccess;
use iaas_core::testing::fake::FakeArtifacts;
use iaas_core::testing::fake::FakeAuthorizer;
use iaas_core::testing::fake::FakeHypervisor;
use iaas_core::testing::fake::FakeMeter;
use iaas_core::testing::fake::FakeNetwork;
use iaas_core::testing::fake::FakePlugs;
use iaas_core::testing::fake::FakePool;
use iaas_core::testing::fake::World;
use jiff::Timestamp;
use tokio::sync::watch;
use uuid::Uuid;

use super::Rig;

/// Where in a call the control plane stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before it arrives.
    Before,
    /// At the site, after its epoch was found to be good. Effects only.
    Inside,
    /// After it was carried out, before the answer.
    After,
}

/// The call in which the control plane stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    Nowhere,
    Commit(u64, When),
    Effect(u64, When),
}

/// How the call ended in which the control plane stopped: its error.
pub type Ended = std::result::Result<(), iaas_core::Error>;

/// One control plane's ability to stop.
#[derive(Debug)]
pub struct Stall {
    world: World,
    state: Mutex<State>,
    stopped: watch::Sender<bool>,
    /// Lets the call go on in which it stopped.
    call: watch::Sender<bool>,
    /// Lets everything else go on.
    rest: watch::Sender<bool>,
    ended: watch::Sender<Option<Ended>>,
}

#[derive(Debug)]
struct State {
    commits: u64,
    effects: u64,
    point: Point,
}

impl Stall {
    pub fn new(world: &World) -> Arc<Self> {
        Arc::new(Self {
            world: world.clone(),
            state: Mutex::new(State { commits: 0, effects: 0, point: Point::Nowhere }),
            stopped: watch::Sender::new(false),
            call: watch::Sender::new(true),
            rest: watch::Sender::new(true),
            ended: watch::Sender::new(None),
        })
    }

    /// Counts from here, and stops at `point`.
    pub fn arm(&self, point: Point) {
        *self.state.lock().unwrap() = State { commits: 0, effects: 0, point };
    }

    /// Commits and effects that were asked for since it was armed.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state.lock().unwrap();
        (state.commits, state.effects)
    }

    /// Returns when it has stopped.
    pub async fn stopped(&self) {
        self.stopped.subscribe().wait_for(|stopped| *stopped).await.unwrap();
    }

    /// Goes on, first with the call in which it stopped; says how that ended.
    pub async fn go_on(&self) -> Ended {
        self.call.send_replace(true);
        let ended = self.ended.subscribe().wait_for(Option::is_some).await.unwrap().clone().unwrap();
        self.rest.send_replace(true);
        ended
    }

    async fn pass(&self) {
        self.rest.subscribe().wait_for(|open| *open).await.unwrap();
    }

    fn next(&self, commit: bool) -> Option<When> {
        let mut state = self.state.lock().unwrap();
        let (number, planned) = if commit {
            state.commits += 1;
            (state.commits, if let Point::Commit(k, when) = state.point { Some((k, when)) } else { None })
        } else {
            state.effects += 1;
            (state.effects, if let Point::Effect(k, when) = state.point { Some((k, when)) } else { None })
        };
        planned.filter(|(k, _)| *k == number).map(|(_, when)| when)
    }

    fn stop(&self) {
        self.call.send_replace(false);
        self.rest.send_replace(false);
        self.stopped.send_replace(true);
    }

    async fn hold(&self) {
        self.call.subscribe().wait_for(|open| *open).await.unwrap();
    }

    /// A commit or an effect.
    async fn run<T>(&self, commit: bool, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        self.pass().await;
        let Some(when) = self.next(commit) else {
            let done = work.await;
            self.pass().await;
            return done;
        };
        let done = match when {
            When::Before => {
                self.stop();
                self.hold().await;
                work.await
            }
            When::After => {
                let done = work.await;
                self.stop();
                self.hold().await;
                done
            }
            When::Inside => {
                let mut work = Box::pin(work);
                self.world.set_delay(INSIDE);
                let early = tokio::select! {
                    biased;
                    done = &mut work => Some(done),
                    () = std::future::ready(()) => None,
                };
                self.world.set_delay(Duration::ZERO);
                self.stop();
                let done = match early {
                    Some(done) => done,
                    None => work.await,
                };
                self.hold().await;
                done
            }
        };
        self.ended.send_replace(Some(done.as_ref().map(|_| ()).map_err(Clone::clone)));
        self.pass().await;
        done
    }
}

/// Longer than a lease.
const INSIDE: Duration = Duration::from_secs(40);

/// All parts of a control plane that can stop, before its opening.
pub fn builder(rig: &Rig, stall: &Arc<Stall>) -> CloudBuilder {
    let around = |rest| Around { rest, stall: Arc::clone(stall) };
    let mut host = rig.site.reopen(rig.host);
    host.hypervisor =
        Arc::new(Stalling { inner: FakeHypervisor::open(&rig.world, rig.host), stall: Arc::clone(stall) });
    host.artifacts =
        Arc::new(Stalling { inner: FakeArtifacts::open(&rig.world, rig.host), stall: Arc::clone(stall) });
    let plugs = FakePlugs::open(&rig.world, rig.host, rig.site.fabric);
    host.plugs = Arc::new(Stalling { inner: plugs, stall: Arc::clone(stall) });
    let pool: Id<Pool> = rig.site.pool;
    let access = FakeAccess::open(&rig.world, rig.host, pool);
    host.access =
        [(pool, Arc::new(Stalling { inner: access, stall: Arc::clone(stall) }) as Arc<dyn VolumeAccess>)]
            .into();
    let volumes = FakePool::open(&rig.world, pool);
    let network = FakeNetwork::open(&rig.world, rig.site.fabric);
    Cloud::builder()
        .store(Arc::new(around(Arc::clone(&rig.store))))
        .clock(Arc::new(Around { rest: Arc::clone(&rig.clock), stall: Arc::clone(stall) }))
        .pool(pool, Arc::new(Stalling { inner: volumes, stall: Arc::clone(stall) }))
        .fabric(rig.site.fabric, Arc::new(Stalling { inner: network, stall: Arc::clone(stall) }))
        .host(host)
        .authorizer(Arc::new(FakeAuthorizer::new()))
        .meter(Arc::new(FakeMeter::open(&rig.world)))
        .blobs(Arc::clone(&rig.blobs) as Arc<dyn Blobs>)
        .operator("root")
}

/// A store or a clock that stands still with its control plane.
#[derive(Debug)]
struct Around<T> {
    rest: T,
    stall: Arc<Stall>,
}

#[async_trait]
impl Clock for Around<Arc<dyn Clock>> {
    fn now(&self) -> Timestamp {
        self.rest.now()
    }
    fn monotonic(&self) -> Duration {
        self.rest.monotonic()
    }
    async fn sleep(&self, span: Duration) {
        self.rest.sleep(span).await;
        self.stall.pass().await;
    }
    fn uuid(&self) -> Uuid {
        self.rest.uuid()
    }
}

#[async_trait]
impl StateStore for Around<Arc<dyn StateStore>> {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>> {
        self.stall.pass().await;
        self.rest.get(key).await
    }
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)> {
        self.stall.pass().await;
        self.rest.scan(prefix, after, limit).await
    }
    async fn commit(&self, lead: &Lead, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        self.stall.run(true, self.rest.commit(lead, checks, writes)).await
    }
    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>> {
        self.stall.pass().await;
        self.rest.watch(prefix, after).await
    }
    async fn lead(&self, me: Uuid, ttl: Duration, floor: Epoch) -> Result<Option<Lead>> {
        self.stall.pass().await;
        self.rest.lead(me, ttl, floor).await
    }
    async fn renew(&self, lead: &Lead) -> Result<()> {
        self.stall.pass().await;
        self.rest.renew(lead).await
    }
    async fn resign(&self, lead: Lead) -> Result<()> {
        self.stall.pass().await;
        self.rest.resign(lead).await
    }
}

/// A provider whose calls stand still with their control plane.
#[derive(Debug)]
struct Stalling<P> {
    inner: P,
    stall: Arc<Stall>,
}

#[async_trait]
impl<P: Provider> Provider for Stalling<P> {
    async fn hello(&self) -> Result<Hello> {
        self.stall.pass().await;
        self.inner.hello().await
    }
    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.stall.pass().await;
        self.inner.claim(cx).await
    }
    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>> {
        self.inner.changes(cx).await
    }
    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        self.stall.pass().await;
        self.inner.usage(cx, after, limit).await
    }
}

#[async_trait]
impl<K: Kind, P: Converge<K>> Converge<K> for Stalling<P> {
    async fn ensure(&self, cx: &Ctx, id: Id<K>, rev: Rev, spec: &K::Spec) -> Result<Seen<K>> {
        self.stall.run(false, self.inner.ensure(cx, id, rev, spec)).await
    }
    async fn remove(&self, cx: &Ctx, id: Id<K>, upto: Rev) -> Result<()> {
        self.stall.run(false, self.inner.remove(cx, id, upto)).await
    }
    async fn observe(&self, cx: &Ctx, id: Id<K>) -> Result<Option<Seen<K>>> {
        self.stall.pass().await;
        self.inner.observe(cx, id).await
    }
    async fn inventory(&self, cx: &Ctx, after: Option<Id<K>>, limit: usize) -> Result<Vec<Found<K>>> {
        self.stall.pass().await;
        self.inner.inventory(cx, after, limit).await
    }
}

#[async_trait]
impl Hypervisor for Stalling<FakeHypervisor> {
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

#[async_trait]
impl Artifacts for Stalling<FakeArtifacts> {
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>> {
        self.stall.pass().await;
        let inner = self.inner.upload(cx, id).await?;
        Ok(Box::new(Upload { inner, stall: Arc::clone(&self.stall) }))
    }
}

/// An upload, whose effect is its close.
struct Upload {
    inner: Box<dyn ByteStream>,
    stall: Arc<Stall>,
}

#[async_trait]
impl ByteStream for Upload {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        self.inner.read().await
    }
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.inner.write(bytes).await
    }
    async fn close(&mut self) -> Result<()> {
        self.stall.run(false, self.inner.close()).await
    }
}

impl Plugs for Stalling<FakePlugs> {}
impl VolumeAccess for Stalling<FakeAccess> {}

#[async_trait]
impl VolumePool for Stalling<FakePool> {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        None
    }
    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        None
    }
    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: iaas_core::Term) -> Result<Fenced> {
        self.stall.run(false, self.inner.fence(cx, volume, below)).await
    }
}

#[async_trait]
impl NetProgram for Stalling<FakeNetwork> {
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced> {
        self.stall.run(false, self.inner.sync(cx, up)).await
    }
    async fn explain(&self, cx: &Ctx, query: &PacketQuery) -> Result<Trace> {
        self.inner.explain(cx, query).await
    }
}
