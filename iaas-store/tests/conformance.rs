//! The pool and the access against their contracts, on real files.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Cloud;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::VolumeAccess;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::target::Mode;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::volume_access;
use iaas_core::testing::conformance::volume_pool;
use iaas_core::testing::conformance::wire::Wire;
use iaas_store::IoEngine;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use support::Place;
use support::cx;
use uuid::Uuid;

/// The cloud that the suites call as their own.
const OURS: Id<Cloud> = Id::from_uuid(Uuid::from_u128(0xa));

struct PoolOfFiles {
    place: Mutex<Place>,
    engine: IoEngine,
}

impl PoolOfFiles {
    fn with(engine: IoEngine) -> Self {
        Self { place: Mutex::new(Place::new()), engine }
    }

    fn open_pool(&self) -> Result<RawPool> {
        let place = self.place.lock().unwrap();
        RawPool::open(&place.volumes(), &place.folder().join("state"), OURS, support::POOL)
    }

    fn open_access(&self) -> Result<RawAccess> {
        let place = self.place.lock().unwrap();
        let state = place.folder().join("state");
        RawAccess::open(&place.volumes(), &state, OURS, support::HOST, support::POOL)
    }
}

/// A call of the suites' cloud; opening volumes is not what the fence is tested with.
fn call() -> Ctx {
    let Ctx { call, cancel } = cx(1 << 40);
    Ctx { call: Call { cloud: OURS, ..call }, cancel }
}

#[async_trait]
impl Rig for PoolOfFiles {
    type Provider = dyn VolumePool;

    async fn fresh(&self) -> Result<Arc<dyn VolumePool>> {
        *self.place.lock().unwrap() = Place::new();
        Ok(Arc::new(self.open_pool()?))
    }

    async fn reopen(&self, old: Arc<dyn VolumePool>) -> Result<Arc<dyn VolumePool>> {
        drop(old);
        Ok(Arc::new(self.open_pool()?))
    }

    async fn change(&self, provider: &dyn VolumePool, cx: &Ctx) -> Result<()> {
        provider.ensure(cx, Id::from_uuid(Uuid::now_v7()), Rev(1), &support::spec(4096)).await.map(drop)
    }

    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let names = self.place.lock().unwrap().names();
        let mut ids: Vec<Uuid> =
            names.iter().filter_map(|name| Uuid::parse_str(name.split('.').next()?).ok()).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(Some(ids.into_iter().map(|id| ObjectRef { kind: PoolVolume::NAME.into(), id }).collect()))
    }
}

#[async_trait]
impl ConvergeRig<PoolVolume> for PoolOfFiles {
    fn spec(&self, _: u32) -> PoolVolumeSpec {
        support::spec(256 << 10)
    }

    fn bad(&self) -> Vec<PoolVolumeSpec> {
        let passport = vec![0; (16 << 10) + 1].into();
        vec![
            support::spec(0),
            support::spec(4097),
            support::spec(u64::MAX - 4095),
            // Larger than any file of the file system, as it turns out when it is made.
            support::spec((i64::MAX as u64) - 4095),
            PoolVolumeSpec { passport, ..support::spec(4096) },
        ]
    }

    async fn plant(&self, id: Id<PoolVolume>) -> Result<bool> {
        let volumes = self.place.lock().unwrap().volumes();
        std::fs::write(volumes.join(format!("{}.raw", id.uuid())), "somebody's").unwrap();
        Ok(true)
    }
}

#[async_trait]
impl volume_pool::PoolRig for PoolOfFiles {
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let spec = AccessSpec { pool: support::POOL, volume, term, mode };
        let id: Id<Access> = Id::from_uuid(Uuid::now_v7());
        let seen = self.open_access()?.ensure(&call(), id, Rev(1), &spec).await?;
        let target = seen.is.target.ok_or_else(|| Error::not_found("the access has no target"))?;
        support::open(&target, self.engine)
    }

    async fn used(&self) -> Result<Option<u64>> {
        use std::os::unix::fs::MetadataExt;
        let place = self.place.lock().unwrap();
        let blocks = |name: &String| std::fs::metadata(place.volumes().join(name)).unwrap().blocks();
        Ok(Some(place.names().iter().map(blocks).sum::<u64>() * 512))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_keeps_its_contract_with_io_uring() {
    volume_pool::run(&PoolOfFiles::with(IoEngine::Best)).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_keeps_its_contract_over_a_wire() {
    volume_pool::run(&Wrapped::new(PoolOfFiles::with(IoEngine::Best), Wire)).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_keeps_its_contract_with_threads() {
    volume_pool::run(&PoolOfFiles::with(IoEngine::Threads)).await.assert_clean();
}

struct AccessToFiles {
    pool: PoolOfFiles,
}

#[async_trait]
impl Rig for AccessToFiles {
    type Provider = dyn VolumeAccess;

    async fn fresh(&self) -> Result<Arc<dyn VolumeAccess>> {
        self.pool.fresh().await?;
        Ok(Arc::new(self.pool.open_access()?))
    }

    async fn reopen(&self, old: Arc<dyn VolumeAccess>) -> Result<Arc<dyn VolumeAccess>> {
        drop(old);
        Ok(Arc::new(self.pool.open_access()?))
    }

    async fn change(&self, provider: &dyn VolumeAccess, cx: &Ctx) -> Result<()> {
        provider.ensure(cx, Id::from_uuid(Uuid::now_v7()), Rev(1), &self.spec(1)).await.map(drop)
    }

    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let folder = self
            .pool
            .place
            .lock()
            .unwrap()
            .folder()
            .join("state/access")
            .join(support::POOL.uuid().to_string());
        let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let ids = names.filter_map(|name| Uuid::parse_str(name.split('.').next()?).ok());
        Ok(Some(ids.map(|id| ObjectRef { kind: Access::NAME.into(), id }).collect()))
    }
}

#[async_trait]
impl ConvergeRig<Access> for AccessToFiles {
    fn spec(&self, _: u32) -> AccessSpec {
        AccessSpec {
            pool: support::POOL,
            volume: Id::from_uuid(Uuid::now_v7()),
            term: Term(3),
            mode: Mode::Write,
        }
    }

    async fn drive(&self, _: &dyn VolumeAccess, cx: &Ctx, _: Id<Access>, spec: &AccessSpec) -> Result<()> {
        // The volume comes after the access to it, from the same cloud.
        let mut of = call();
        of.call.cloud = cx.call.cloud;
        self.pool.open_pool()?.ensure(&of, spec.volume, Rev(1), &support::spec(4096)).await.map(drop)
    }

    fn bad(&self) -> Vec<AccessSpec> {
        vec![AccessSpec { pool: Id::from_uuid(Uuid::from_u128(0xbad)), ..self.spec(1) }]
    }
}

#[async_trait]
impl volume_access::AccessRig for AccessToFiles {
    fn missing(&self) -> AccessSpec {
        AccessSpec { volume: Id::from_uuid(Uuid::now_v7()), ..self.spec(1) }
    }

    async fn volumes(&self) -> usize {
        self.pool.place.lock().unwrap().names().iter().filter(|name| name.ends_with(".raw")).count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_keeps_its_contract() {
    let rig = AccessToFiles { pool: PoolOfFiles::with(IoEngine::Best) };
    volume_access::run(&rig).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn access_keeps_its_contract_over_a_wire() {
    let rig = AccessToFiles { pool: PoolOfFiles::with(IoEngine::Best) };
    volume_access::run(&Wrapped::new(rig, Wire)).await.assert_clean();
}
