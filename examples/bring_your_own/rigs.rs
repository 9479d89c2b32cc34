//! What the suites need to know: how to make each part fresh, open it again, and look behind it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::spi::Ctx;
use iaas_core::spi::base::Base;
use iaas_core::spi::base::RamShelf;
use iaas_core::spi::base::Shelf;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::block::VolumeAccess;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::target::Mode;
use iaas_core::testing::conformance::hypervisor::HypervisorRig;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::volume_access::AccessRig;
use iaas_core::testing::conformance::volume_pool::PoolRig;
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::lock;
use crate::ram::RamAccess;
use crate::ram::RamPool;
use crate::ram::target;
use crate::supervisor::Supervisor;

/// The newest site of a rig: what outlives the provider, and the provider.
type Newest<M> = Mutex<Option<(Arc<dyn Shelf>, Arc<Base<M>>)>>;

/// A rig of a provider that stands on a [`Base`]: fresh on an empty shelf, and opened again on what is left.
macro_rules! base_rig {
    ($(#[$doc:meta])* $name:ident: $maker:ty as dyn $provider:ident, $fresh:expr, $world:expr) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name(Newest<$maker>);

        impl $name {
            fn open(&self, maker: Arc<$maker>, shelf: Arc<dyn Shelf>) -> Result<Arc<dyn $provider>> {
                let base = Arc::new(Base::open(maker, Arc::clone(&shelf))?);
                *lock(&self.0) = Some((shelf, Arc::clone(&base)));
                Ok(base)
            }
            fn newest(&self) -> Result<(Arc<dyn Shelf>, Arc<Base<$maker>>)> {
                lock(&self.0).clone().ok_or_else(|| Error::conflict("`fresh` comes first"))
            }
        }

        #[async_trait]
        impl Rig for $name {
            type Provider = dyn $provider;
            async fn fresh(&self) -> Result<Arc<dyn $provider>> {
                let fresh: fn() -> Result<$maker> = $fresh;
                self.open(Arc::new(fresh()?), Arc::new(RamShelf::default()))
            }
            async fn reopen(&self, old: Arc<dyn $provider>) -> Result<Arc<dyn $provider>> {
                drop(old);
                let (shelf, base) = self.newest()?;
                base.drain().await;
                self.open(Arc::clone(base.maker()), shelf)
            }
            async fn change(&self, provider: &dyn $provider, cx: &Ctx) -> Result<()> {
                provider.ensure(cx, Id::from_uuid(Uuid::now_v7()), Rev(1), &self.spec(9)).await.map(|_| ())
            }
            async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
                let world: fn(&$maker) -> Option<Vec<ObjectRef>> = $world;
                Ok(world(self.newest()?.1.maker()))
            }
            async fn fingerprint(&self) -> Result<Option<String>> {
                Ok(Some(format!("{:?} {:?}", self.world().await?, self.newest()?.0.all()?)))
            }
        }
    };
}

fn pool() -> RamPool {
    RamPool(Id::from_uuid(Uuid::from_u128(7)), Mutex::default())
}

base_rig!(
    /// The rig of [`RamPool`].
    Pools: RamPool as dyn VolumePool,
    || Ok(pool()),
    |pool| Some(lock(&pool.1).keys().map(|id| id.object()).collect())
);

fn volume() -> PoolVolumeSpec {
    PoolVolumeSpec { size: 256 << 10, from: None, qos: Qos::default(), key: None, passport: Bytes::new() }
}

impl ConvergeRig<PoolVolume> for Pools {
    fn spec(&self, _: u32) -> PoolVolumeSpec {
        volume()
    }
    fn bad(&self) -> Vec<PoolVolumeSpec> {
        let large = vec![0; (16 << 10) + 1].into();
        [0, 4097, 1 << 40]
            .map(|size| PoolVolumeSpec { size, ..volume() })
            .into_iter()
            .chain([PoolVolumeSpec { passport: large, ..volume() }])
            .collect()
    }
}

#[async_trait]
impl PoolRig for Pools {
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let pool = Arc::clone(self.newest()?.1.maker());
        let target = target(volume, term, mode);
        let grant = pool.prepare(&target)?;
        BlockOpener::open(&*pool, &target, grant, None, &Env::default())
    }
    async fn used(&self) -> Result<Option<u64>> {
        Ok(Some(self.newest()?.1.maker().used()))
    }
}

base_rig!(
    /// The rig of [`RamAccess`], to a pool with fifteen volumes.
    Accesses: RamAccess as dyn VolumeAccess,
    || {
        let pool = pool();
        lock(&pool.1).extend((1..16).map(|n| (numbered(n), Arc::default())));
        Ok(RamAccess(Arc::new(pool), numbered(100)))
    },
    |_| None
);

fn numbered<K>(number: u32) -> Id<K> {
    Id::from_uuid(Uuid::from_u128(number.into()))
}

impl ConvergeRig<Access> for Accesses {
    fn spec(&self, number: u32) -> AccessSpec {
        AccessSpec { pool: pool().0, volume: numbered(number), term: Term(3), mode: Mode::Write }
    }
    fn bad(&self) -> Vec<AccessSpec> {
        vec![AccessSpec { pool: numbered(8), ..self.spec(1) }]
    }
}

#[async_trait]
impl AccessRig for Accesses {
    fn missing(&self) -> AccessSpec {
        AccessSpec { volume: numbered(99), ..self.spec(1) }
    }
    async fn volumes(&self) -> usize {
        self.newest().map_or(0, |(_, base)| lock(&base.maker().0.1).len())
    }
}

base_rig!(
    /// The rig of [`Supervisor`], in a folder under the temporary one.
    Supervisors: Supervisor as dyn Hypervisor,
    || {
        let folder = root().join(Uuid::now_v7().to_string());
        Ok(Supervisor { host: numbered(1), folder })
    },
    |supervisor| {
        let names = std::fs::read_dir(&supervisor.folder).ok()?.flatten();
        Some(names.filter_map(|e| e.file_name().to_str()?.parse::<Id<Vm>>().ok()).map(|id| id.object()).collect())
    }
);

impl ConvergeRig<Vm> for Supervisors {
    fn spec(&self, number: u32) -> VmSpec {
        let cmdline = "echo GUEST-READY; exec sleep 600".to_owned();
        VmSpec {
            term: Term(1),
            run: Run::On(Boot(1)),
            vcpus: 1 + number % 4,
            memory: 1 << 20,
            origin: Origin::Kernel { kernel: Supervisor::kernel(), initrd: None, cmdline },
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Bytes::from_static(b"a passport"),
        }
    }
    fn bad(&self) -> Vec<VmSpec> {
        let newline =
            Origin::Kernel { kernel: Supervisor::kernel(), initrd: None, cmdline: "a\nb".to_owned() };
        let large = vec![0; (16 << 10) + 1].into();
        vec![
            VmSpec { vcpus: 0, ..self.spec(1) },
            VmSpec { memory: 0, ..self.spec(1) },
            VmSpec { origin: newline, ..self.spec(1) },
            VmSpec { passport: large, ..self.spec(1) },
        ]
    }
}

#[async_trait]
impl HypervisorRig for Supervisors {
    async fn kill(&self, vm: Id<Vm>) -> bool {
        let Ok((_, base)) = self.newest() else { return false };
        // The shell has a pid to be killed by once it has run.
        while base.maker().at(vm, "console").exists() && !base.maker().signal(vm, Signal::SIGKILL) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }
}

/// Ends the processes of all sites of this run, and removes their folders.
pub(crate) fn clear() {
    let sites = std::fs::read_dir(root()).into_iter().flatten().flatten();
    for site in sites {
        let supervisor = Supervisor { host: numbered(1), folder: site.path() };
        let vms = std::fs::read_dir(site.path()).into_iter().flatten().flatten();
        for vm in vms.filter_map(|e| e.file_name().to_str()?.parse::<Id<Vm>>().ok()) {
            supervisor.signal(vm, Signal::SIGKILL);
        }
    }
    // It holds only what this run made; what cannot be removed harms nobody.
    let _ = std::fs::remove_dir_all(root());
}

fn root() -> PathBuf {
    std::env::temp_dir().join(format!("bring-your-own-{}", std::process::id()))
}
