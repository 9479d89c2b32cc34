//! The rigs of the fakes: they prove the fakes, and show how a rig is written.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::artifacts::ArtifactsRig;
use super::artifacts::blob;
use super::artifacts::upload;
use super::calls::id;
use super::calls::ours;
use super::hypervisor::HypervisorRig;
use super::inventory::InventoryRig;
use super::net_program::NetRig;
use super::plugs::PlugsRig;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::small::AuditRig;
use super::small::KeysRig;
use super::small::PlacementRig;
use super::volume_access::AccessRig;
use super::volume_pool::PoolRig;
use crate::Boot;
use crate::Digest;
use crate::Error;
use crate::Id;
use crate::Mac;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::SystemClock;
use crate::Term;
use crate::model::Host;
use crate::model::Port;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Stamp;
use crate::spi::artifact::Artifact;
use crate::spi::artifact::Artifacts;
use crate::spi::audit::AuditSink;
use crate::spi::block::Access;
use crate::spi::block::AccessSpec;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::Qos;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumePool;
use crate::spi::contract::SealKey;
use crate::spi::contract::Sealed;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOpener;
use crate::spi::dataplane::Env;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::PortOpener;
use crate::spi::host::HostInventory;
use crate::spi::hypervisor::Device;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Origin;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmSpec;
use crate::spi::key::KeyManager;
use crate::spi::key::KeyName;
use crate::spi::network::NetObject;
use crate::spi::network::NetProgram;
use crate::spi::network::NetUpdate;
use crate::spi::network::Plug;
use crate::spi::network::PlugSpec;
use crate::spi::network::Plugs;
use crate::spi::placement::Placement;
use crate::spi::target::Mode;
use crate::spi::target::Target;
use crate::testing::fake::FakeAccess;
use crate::testing::fake::FakeArtifacts;
use crate::testing::fake::FakeAuditSink;
use crate::testing::fake::FakeHypervisor;
use crate::testing::fake::FakeInventory;
use crate::testing::fake::FakeKeys;
use crate::testing::fake::FakeNetwork;
use crate::testing::fake::FakeOpener;
use crate::testing::fake::FakePlacement;
use crate::testing::fake::FakePlugs;
use crate::testing::fake::FakePool;
use crate::testing::fake::Fault;
use crate::testing::fake::Site;
use crate::testing::fake::World;

/// The newest world of a rig.
#[derive(Debug, Default)]
struct Bench(Mutex<Option<Here>>);

#[derive(Clone, Debug)]
struct Here {
    world: World,
    site: Site,
    host: Id<Host>,
}

impl Bench {
    /// A new world.
    fn fresh(&self) -> Here {
        let world = World::new(Arc::new(SystemClock::new()));
        let here = Here { site: Site::new(&world), host: id(), world };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(here.clone());
        here
    }

    fn here(&self) -> Result<Here> {
        let here = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        here.ok_or_else(|| Error::conflict("this rig has no world yet").remedy("call `fresh` first"))
    }

    fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        Ok(Some(self.here()?.world.things().into_iter().map(|t| t.object).collect()))
    }

    fn fingerprint(&self) -> Result<Option<String>> {
        Ok(Some(self.here()?.world.effect_count().to_string()))
    }

    fn slow(&self, delay: Duration) -> bool {
        self.here().map(|here| here.world.set_delay(delay)).is_ok()
    }

    fn break_next(&self, fault: Fault) -> bool {
        self.here().map(|here| here.world.fail_next(fault)).is_ok()
    }
}

/// What a fake that must happen may take.
const PATIENCE: Duration = Duration::from_millis(500);

macro_rules! fake_rig {
    (
        $(#[$doc:meta])* $name:ident for dyn $provider:ident,
        fresh: $fresh:expr, open: $open:expr, change: $change:expr
    ) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $name(Bench);

        #[async_trait]
        impl Rig for $name {
            type Provider = dyn $provider;

            async fn fresh(&self) -> Result<Arc<dyn $provider>> {
                let here = self.0.fresh();
                let fresh: fn(Here) -> super::BoxFuture<Result<()>> = $fresh;
                fresh(here.clone()).await?;
                let open: fn(&Here) -> Arc<dyn $provider> = $open;
                Ok(open(&here))
            }
            async fn reopen(&self, old: Arc<dyn $provider>) -> Result<Arc<dyn $provider>> {
                drop(old);
                let open: fn(&Here) -> Arc<dyn $provider> = $open;
                Ok(open(&self.0.here()?))
            }
            async fn change(&self, provider: &dyn $provider, cx: &Ctx) -> Result<()> {
                $change(self, provider, cx).await
            }
            async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
                self.0.world()
            }
            async fn fingerprint(&self) -> Result<Option<String>> {
                self.0.fingerprint()
            }
            fn slow(&self, delay: Duration) -> bool {
                self.0.slow(delay)
            }
            fn break_next(&self, fault: Fault) -> bool {
                self.0.break_next(fault)
            }
            fn patience(&self) -> Duration {
                PATIENCE
            }
        }
    };
}

/// Makes a new object: the change of a rig that converges.
async fn new_object<K: crate::spi::Kind, R: ConvergeRig<K>>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
) -> Result<()> {
    provider.ensure(cx, id(), Rev(1), &rig.spec(9)).await.map(|_| ())
}

fake_rig!(
    /// The rig of [`FakeHypervisor`].
    FakeHypervisorRig for dyn Hypervisor,
    fresh: |here| Box::pin(async move { bring_kernel(&here).await }),
    open: |here| Arc::new(FakeHypervisor::open(&here.world, here.host)),
    change: new_object
);

async fn bring_kernel(here: &Here) -> Result<()> {
    let artifacts = FakeArtifacts::open(&here.world, here.host);
    let id = id();
    artifacts.ensure(&ours(1), id, Rev(1), &Digest::of(&blob(0))).await?;
    upload(&artifacts, &ours(1), id, &blob(0)).await
}

#[async_trait]
impl ConvergeRig<Vm> for FakeHypervisorRig {
    fn spec(&self, number: u32) -> VmSpec {
        VmSpec {
            term: Term(1),
            run: Run::On(Boot(1)),
            vcpus: 1 + number % 4,
            memory: 64 << 20,
            origin: Origin::Kernel { kernel: Digest::of(&blob(0)), initrd: None, cmdline: "quiet".into() },
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Bytes::from_static(b"a passport"),
        }
    }

    fn bad(&self) -> Vec<VmSpec> {
        let good = || self.spec(1);
        let kernel = |cmdline| Origin::Kernel { kernel: Digest::of(&blob(0)), initrd: None, cmdline };
        vec![
            VmSpec { vcpus: 0, ..good() },
            VmSpec { vcpus: 257, ..good() },
            VmSpec { memory: 0, ..good() },
            VmSpec { memory: (64 << 20) + 1, ..good() },
            VmSpec { origin: kernel("x".repeat(2048)), ..good() },
            VmSpec { origin: kernel("a\nb".into()), ..good() },
            VmSpec { passport: vec![0; (16 << 10) + 1].into(), ..good() },
        ]
    }

    async fn plant(&self, id: Id<Vm>) -> Result<bool> {
        let here = self.0.here()?;
        FakeHypervisor::open(&here.world, here.host).plant(id, None, self.spec(1));
        Ok(true)
    }
}

impl FakeHypervisorRig {
    fn vms(&self) -> Result<FakeHypervisor> {
        self.0.here().map(|here| FakeHypervisor::open(&here.world, here.host))
    }
}

#[async_trait]
impl HypervisorRig for FakeHypervisorRig {
    async fn guest_prints(&self, vm: Id<Vm>, line: &str) -> bool {
        self.vms().map(|vms| vms.guest_prints(vm, line)).is_ok()
    }
    async fn guest_ignores_button(&self, vm: Id<Vm>) -> bool {
        self.vms().map(|vms| vms.guest_ignores_button(vm)).is_ok()
    }
    async fn kill(&self, vm: Id<Vm>) -> bool {
        self.vms().map(|vms| vms.kill(vm)).is_ok()
    }
    async fn device(&self) -> Option<Device> {
        let here = self.0.here().ok()?;
        let (pool, volume) = (FakePool::open(&here.world, here.site.pool), id());
        pool.ensure(&ours(1), volume, Rev(1), &volume_spec()).await.ok()?;
        let access = FakeAccess::open(&here.world, here.host, here.site.pool);
        let spec = AccessSpec { pool: here.site.pool, volume, term: Term(1), mode: Mode::Write };
        let seen = access.ensure(&ours(1), id(), Rev(2), &spec).await.ok()?;
        Some(Device::Disk { target: seen.is.target?, boot: None })
    }
}

fn nothing(_: Here) -> super::BoxFuture<Result<()>> {
    Box::pin(async { Ok(()) })
}

fake_rig!(
    /// The rig of [`FakeArtifacts`].
    FakeArtifactsRig for dyn Artifacts,
    fresh: nothing,
    open: |here| Arc::new(FakeArtifacts::open(&here.world, here.host)),
    change: new_object
);

#[async_trait]
impl ConvergeRig<Artifact> for FakeArtifactsRig {
    fn spec(&self, number: u32) -> Digest {
        Digest::of(&blob(number))
    }
    fn bad(&self) -> Vec<Digest> {
        Vec::new()
    }
    async fn drive(
        &self,
        artifacts: &dyn Artifacts,
        cx: &Ctx,
        id: Id<Artifact>,
        digest: &Digest,
    ) -> Result<()> {
        let numbers = 0..16;
        let right = numbers.map(blob).find(|b| Digest::of(b) == *digest);
        upload(artifacts, cx, id, &right.unwrap_or_default()).await
    }
    async fn plant(&self, id: Id<Artifact>) -> Result<bool> {
        let here = self.0.here()?;
        FakeArtifacts::open(&here.world, here.host).plant(id, None, self.spec(1));
        Ok(true)
    }
}

impl ArtifactsRig for FakeArtifactsRig {}

fake_rig!(
    /// The rig of [`FakePool`].
    FakePoolRig for dyn VolumePool,
    fresh: nothing,
    open: |here| Arc::new(FakePool::open(&here.world, here.site.pool)),
    change: new_object
);

fn volume_spec() -> PoolVolumeSpec {
    PoolVolumeSpec { size: 256 << 10, from: None, qos: Qos::default(), key: None, passport: Bytes::new() }
}

#[async_trait]
impl ConvergeRig<PoolVolume> for FakePoolRig {
    fn spec(&self, _: u32) -> PoolVolumeSpec {
        volume_spec()
    }
    fn bad(&self) -> Vec<PoolVolumeSpec> {
        vec![
            PoolVolumeSpec { size: 0, ..volume_spec() },
            PoolVolumeSpec { size: 4097, ..volume_spec() },
            PoolVolumeSpec { passport: vec![0; (16 << 10) + 1].into(), ..volume_spec() },
        ]
    }
    async fn plant(&self, id: Id<PoolVolume>) -> Result<bool> {
        let here = self.0.here()?;
        FakePool::open(&here.world, here.site.pool).plant(id, None, volume_spec());
        Ok(true)
    }
}

#[async_trait]
impl PoolRig for FakePoolRig {
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let here = self.0.here()?;
        let access = FakeAccess::open(&here.world, here.host, here.site.pool);
        let spec = AccessSpec { pool: here.site.pool, volume, term, mode };
        let seen = access.ensure(&ours(u64::MAX), id(), Rev(1), &spec).await?;
        let target = seen.is.target.ok_or_else(|| Error::not_found("the access has no target"))?;
        let opener = FakeOpener::new(&here.world);
        let grant = BlockOpener::prepare(&opener, &target)?;
        BlockOpener::open(&opener, &target, grant, None, &Env::default())
    }

    async fn used(&self) -> Result<Option<u64>> {
        let here = self.0.here()?;
        Ok(Some(FakePool::open(&here.world, here.site.pool).used()))
    }
}

fake_rig!(
    /// The rig of [`FakeAccess`].
    FakeAccessRig for dyn VolumeAccess,
    fresh: |here| Box::pin(async move { bring_volumes(&here).await }),
    open: |here| Arc::new(FakeAccess::open(&here.world, here.host, here.site.pool)),
    change: new_object
);

async fn bring_volumes(here: &Here) -> Result<()> {
    let pool = FakePool::open(&here.world, here.site.pool);
    for number in 1..16 {
        pool.ensure(&ours(1), numbered(number), Rev(1), &volume_spec()).await?;
    }
    Ok(())
}

fn numbered<K>(number: u32) -> Id<K> {
    Id::from_uuid(Uuid::from_u128(0x1000 + u128::from(number)))
}

#[async_trait]
impl ConvergeRig<Access> for FakeAccessRig {
    fn spec(&self, number: u32) -> AccessSpec {
        // Without a world there is no pool; the suite asks only after `fresh`.
        let pool = self.0.here().map_or(Id::from_uuid(Uuid::nil()), |here| here.site.pool);
        AccessSpec { pool, volume: numbered(number), term: Term(3), mode: Mode::Write }
    }
    fn bad(&self) -> Vec<AccessSpec> {
        vec![AccessSpec { pool: id(), ..self.spec(1) }]
    }
    async fn plant(&self, id: Id<Access>) -> Result<bool> {
        let here = self.0.here()?;
        FakeAccess::open(&here.world, here.host, here.site.pool).plant(id, None, self.spec(1));
        Ok(true)
    }
}

#[async_trait]
impl AccessRig for FakeAccessRig {
    fn missing(&self) -> AccessSpec {
        AccessSpec { volume: id(), ..self.spec(1) }
    }
    async fn volumes(&self) -> usize {
        let world = self.0.world().ok().flatten().unwrap_or_default();
        world.iter().filter(|o| o.typed::<PoolVolume>().is_some()).count()
    }
}

fake_rig!(
    /// The rig of [`FakeNetwork`].
    FakeNetRig for dyn NetProgram,
    fresh: nothing,
    open: |here| Arc::new(FakeNetwork::open(&here.world, here.site.fabric)),
    change: sync_nothing
);

async fn sync_nothing(_: &FakeNetRig, net: &dyn NetProgram, cx: &Ctx) -> Result<()> {
    let nothing = NetUpdate { from: None, to: Rev(1), put: Vec::new(), drop: Vec::new() };
    net.sync(cx, &nothing).await.map(|_| ())
}

#[async_trait]
impl NetRig for FakeNetRig {
    async fn plug(&self, port: Id<Port>) -> Result<Box<dyn FramePort>> {
        let here = self.0.here()?;
        let plugs = FakePlugs::open(&here.world, here.host, here.site.fabric);
        let spec = PlugSpec { port, term: Term(1), queues: 1 };
        let seen = plugs.ensure(&ours(1), id(), Rev(1), &spec).await?;
        let target = seen.is.target.ok_or_else(|| Error::not_found("the plug has no target"))?;
        open_port(&here.world, &target)
    }
    fn transit(&self) -> Duration {
        // The fake's wire delivers before `send` returns.
        Duration::from_millis(10)
    }
}

fn open_port(world: &World, target: &Target) -> Result<Box<dyn FramePort>> {
    let opener = FakeOpener::new(world);
    let grant = PortOpener::prepare(&opener, target)?;
    let mut queues = PortOpener::open(&opener, target, grant, &Env::default())?;
    queues.pop().ok_or_else(|| Error::internal("a port has no queue"))
}

fake_rig!(
    /// The rig of [`FakePlugs`].
    FakePlugsRig for dyn Plugs,
    fresh: |here| Box::pin(async move { bring_program(&here).await }),
    open: |here| Arc::new(FakePlugs::open(&here.world, here.host, here.site.fabric)),
    change: new_object
);

/// One subnet with the ports of the numbers up to 15.
fn flat_program() -> Vec<NetObject> {
    let (network, subnet) = (numbered(100), numbered(101));
    let mut program = vec![
        NetObject::Network { id: network, vni: 7, mtu: 1500 },
        NetObject::Subnet {
            id: subnet,
            network,
            cidrs: "10.9.0.0/24".parse().into_iter().collect(),
            dns: Vec::new(),
        },
    ];
    program.extend((1..16).map(|number| {
        let (mac, addr, _) = flat_address(number);
        NetObject::Port {
            id: numbered(number),
            subnet,
            mac,
            addrs: vec![addr.into()],
            groups: BTreeSet::new(),
        }
    }));
    program
}

fn flat_address(number: u32) -> (Mac, Ipv4Addr, Ipv4Addr) {
    let low = u8::try_from(number).unwrap_or(255);
    (Mac([2, 0, 0, 0, 9, low]), Ipv4Addr::new(10, 9, 0, low + 10), Ipv4Addr::new(10, 9, 0, 1))
}

async fn bring_program(here: &Here) -> Result<()> {
    let update = NetUpdate { from: None, to: Rev(4), put: flat_program(), drop: Vec::new() };
    FakeNetwork::open(&here.world, here.site.fabric).sync(&ours(1), &update).await.map(|_| ())
}

#[async_trait]
impl ConvergeRig<Plug> for FakePlugsRig {
    fn spec(&self, number: u32) -> PlugSpec {
        PlugSpec { port: numbered(number), term: Term(2), queues: 1 }
    }
    fn bad(&self) -> Vec<PlugSpec> {
        vec![PlugSpec { queues: 0, ..self.spec(1) }, PlugSpec { queues: 1000, ..self.spec(1) }]
    }
    async fn plant(&self, id: Id<Plug>) -> Result<bool> {
        let here = self.0.here()?;
        FakePlugs::open(&here.world, here.host, here.site.fabric).plant(id, None, self.spec(1));
        Ok(true)
    }
}

#[async_trait]
impl PlugsRig for FakePlugsRig {
    fn address(&self, number: u32) -> (Mac, Ipv4Addr, Ipv4Addr) {
        flat_address(number)
    }
    async fn open(&self, target: &Target) -> Result<Box<dyn FramePort>> {
        open_port(&self.0.here()?.world, target)
    }
}

fake_rig!(
    /// The rig of [`FakeInventory`].
    FakeInventoryRig for dyn HostInventory,
    fresh: nothing,
    open: |here| Arc::new(FakeInventory::open(&here.world, here.host)),
    change: renew
);

async fn renew(_: &FakeInventoryRig, inventory: &dyn HostInventory, cx: &Ctx) -> Result<()> {
    inventory.lease(cx, Duration::from_secs(10)).await.map(|_| ())
}

#[async_trait]
impl InventoryRig for FakeInventoryRig {
    async fn stamp(&self) -> Result<Stamp> {
        Ok(self.0.here()?.world.stamp())
    }
}

/// The rig of [`FakeAuditSink`].
#[derive(Debug, Default)]
pub struct FakeAuditRig(Mutex<Arc<FakeAuditSink>>);

#[async_trait]
impl AuditRig for FakeAuditRig {
    async fn fresh(&self) -> Result<Arc<dyn AuditSink>> {
        let sink = Arc::new(FakeAuditSink::new());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sink.clone();
        Ok(sink)
    }
    async fn leaves(&self) -> Result<Vec<Bytes>> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).leaves())
    }
}

/// The rig of [`FakeKeys`].
#[derive(Debug, Default)]
pub struct FakeKeysRig(Mutex<Option<Arc<FakeKeys>>>);

#[async_trait]
impl KeysRig for FakeKeysRig {
    async fn fresh(&self) -> Result<Arc<dyn KeyManager>> {
        let keys = Arc::new(FakeKeys::new(&World::new(Arc::new(SystemClock::new()))));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(keys.clone());
        Ok(keys)
    }
    fn key(&self) -> KeyName {
        KeyName("volumes".to_owned())
    }
    fn host(&self, number: u8) -> SealKey {
        FakeKeys::seal_key(&[number])
    }
    async fn open(&self, sealed: &Sealed, number: u8) -> Result<Vec<u8>> {
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        keys.ok_or_else(|| Error::conflict("there is no key manager yet"))?.open(sealed, &[number])
    }
}

/// The rig of [`FakePlacement`].
#[derive(Clone, Copy, Debug, Default)]
pub struct FakePlacementRig;

impl PlacementRig for FakePlacementRig {
    fn placement(&self) -> Arc<dyn Placement> {
        Arc::new(FakePlacement)
    }
}
