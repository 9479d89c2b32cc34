//! Rigs for parts that stand on [`spi::base`](crate::spi::base), each from a closure that makes yours anew.
//!
//! They give each run a folder of its own below the temporary one, look behind the base at what you made, let your methods
//! fail and dawdle, and leave nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::hypervisor::HypervisorRig;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::volume_access::AccessRig;
use super::volume_pool::PoolRig;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::spi::Ctx;
use crate::spi::Kind;
use crate::spi::base;
use crate::spi::base::Disk;
use crate::spi::base::Disks;
use crate::spi::base::Machines;
use crate::spi::base::Power;
use crate::spi::base::Storage;
use crate::spi::block::Access;
use crate::spi::block::AccessSpec;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::Qos;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumePool;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::Env;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Origin;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmSpec;
use crate::spi::target::Mode;
use crate::testing::fake::Fault;

/// The rig of [`base::hypervisor`]. `spec` gives a VM that runs as boot 1 and prints something when it starts.
pub fn hypervisor<M: Machines>(
    machines: impl Fn() -> M + Send + Sync + 'static,
    spec: VmSpec,
) -> impl HypervisorRig {
    Own { fresh: Box::new(move || Arc::new(machines())), spec, site: Mutex::default() }
}

/// The rig of the pool of [`base::storage`], for volumes of `size` bytes.
pub fn pool<D: Disks>(disks: impl Fn() -> D + Send + Sync + 'static, size: u64) -> impl PoolRig {
    let spec = PoolVolumeSpec { size, from: None, qos: Qos::default(), key: None, passport: Bytes::new() };
    Own { fresh: Box::new(move || Arc::new(disks())), spec, site: Mutex::default() }
}

/// The rig of [`Storage::access`], to volumes of `size` bytes.
pub fn access<D: Disks>(disks: impl Fn() -> D + Send + Sync + 'static, size: u64) -> impl AccessRig {
    let spec = Accessed { size };
    Own { fresh: Box::new(move || Arc::new(disks())), spec, site: Mutex::default() }
}

/// A rig of a `P` on parts `Y` of the integrator's, opened as `O`.
struct Own<Y: ?Sized, S, O> {
    fresh: Box<dyn Fn() -> Arc<Y> + Send + Sync>,
    spec: S,
    site: Mutex<Option<Site<Y, O>>>,
}

/// What outlives a provider, and the newest that was opened on it.
struct Site<Y: ?Sized, O> {
    home: Arc<Home>,
    between: Arc<Between<Y>>,
    open: Option<O>,
}

impl<Y: ?Sized, S, O: Clone> Own<Y, S, O> {
    fn site(&self) -> MutexGuard<'_, Option<Site<Y, O>>> {
        self.site.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parts that are new.
    fn renew(&self) -> Arc<Between<Y>> {
        Arc::new(Between {
            yours: (self.fresh)(),
            fault: Mutex::default(),
            delay: Mutex::default(),
            made: Mutex::default(),
        })
    }

    fn keep(&self, home: Arc<Home>, between: Arc<Between<Y>>, open: O) {
        *self.site() = Some(Site { home, between, open: Some(open) });
    }

    fn newest(&self) -> Result<Site<Y, O>> {
        let site = self.site();
        let Some(Site { home, between, open }) = site.as_ref() else {
            return Err(Error::conflict("`fresh` comes first"));
        };
        Ok(Site { home: Arc::clone(home), between: Arc::clone(between), open: open.clone() })
    }

    /// Lets go of what is open, as the end of its process does.
    fn close(&self) {
        if let Some(site) = self.site().as_mut() {
            site.open = None;
        }
    }

    fn between(&self) -> Option<Arc<Between<Y>>> {
        self.site().as_ref().map(|site| Arc::clone(&site.between))
    }
}

/// Stands between the base and the integrator's part.
#[derive(Debug)]
struct Between<Y: ?Sized> {
    fault: Mutex<Option<Fault>>,
    delay: Mutex<Duration>,
    /// The volumes that were asked for.
    made: Mutex<BTreeSet<Id<PoolVolume>>>,
    yours: Arc<Y>,
}

impl<Y: ?Sized> Between<Y> {
    /// Does what changes something; late, or with the next fault.
    fn act(&self, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        std::thread::sleep(*held(&self.delay));
        let fault = held(&self.fault).take();
        match fault {
            None => return act(),
            Some(Fault::Refused | Fault::NotLanded) => {}
            Some(_) => act()?,
        }
        Err(io::Error::other("a fault, as the suite wants it"))
    }

    fn break_next(&self, fault: Fault) -> bool {
        *held(&self.fault) = Some(fault);
        true
    }

    fn slow(&self, delay: Duration) -> bool {
        *held(&self.delay) = delay;
        true
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: Machines> Machines for Between<M> {
    fn name(&self) -> &str {
        self.yours.name()
    }
    fn check(&self, spec: &VmSpec) -> Result<()> {
        self.yours.check(spec)
    }
    fn start(&self, folder: &Path, spec: &VmSpec, console: File) -> io::Result<()> {
        self.act(|| self.yours.start(folder, spec, console))
    }
    fn stop(&self, folder: &Path) -> io::Result<()> {
        self.act(|| self.yours.stop(folder))
    }
    fn kill(&self, folder: &Path) -> io::Result<()> {
        self.act(|| self.yours.kill(folder))
    }
    fn look(&self, folder: &Path) -> io::Result<Power> {
        self.yours.look(folder)
    }
}

impl<D: Disks> Disks for Between<D> {
    fn name(&self) -> &'static str {
        self.yours.name()
    }
    fn check(&self, spec: &PoolVolumeSpec) -> Result<()> {
        self.yours.check(spec)
    }
    fn make(&self, id: Id<PoolVolume>, size: u64) -> io::Result<()> {
        held(&self.made).insert(id);
        self.act(|| self.yours.make(id, size))
    }
    fn remove(&self, id: Id<PoolVolume>) -> io::Result<()> {
        self.act(|| self.yours.remove(id))
    }
    fn open(&self, id: Id<PoolVolume>) -> io::Result<Arc<dyn Disk>> {
        self.yours.open(id)
    }
}

impl<D: Disks> Between<D> {
    /// The disks that are there, found by opening them.
    fn world(&self) -> Vec<(ObjectRef, u64)> {
        let asked = held(&self.made).clone();
        asked.into_iter().filter_map(|id| Some((id.object(), self.yours.open(id).ok()?.size()))).collect()
    }
}

/// A folder that goes, after `end`, when nobody uses it any more.
struct Home(PathBuf, Box<dyn Fn(&Path) + Send + Sync>);

impl Home {
    fn new(end: impl Fn(&Path) + Send + Sync + 'static) -> Result<Arc<Self>> {
        let path = std::env::temp_dir().join(format!("iaas-own-{}", Uuid::now_v7()));
        fs::create_dir(&path).map_err(|e| Error::internal("no temporary folder can be made").because(&e))?;
        Ok(Arc::new(Self(path, Box::new(end))))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        (self.1)(&self.0);
        let _ = fs::remove_dir_all(&self.0); // What cannot be removed harms no check.
    }
}

// ---- hypervisors --------------------------------------------------------------------------------------------------

type Vms<M> = Own<M, VmSpec, Arc<dyn Hypervisor>>;

impl<M: Machines> Vms<M> {
    async fn open(&self, home: Arc<Home>, between: Arc<Between<M>>) -> Result<Arc<dyn Hypervisor>> {
        let machines: Arc<dyn Machines> = Arc::clone(&between) as _;
        let open = base::hypervisor(numbered(1), &home.0, machines).await?;
        self.keep(home, between, Arc::clone(&open));
        Ok(open)
    }
}

/// Ends every VM below `home`.
fn sweep(machines: &impl Machines, home: &Path) {
    for folder in folders(home).into_iter().map(|vm| home.join(vm.to_string())) {
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(machines.look(&folder), Ok(Power::On)) && Instant::now() < until {
            let _ = machines.kill(&folder); // Looked at again.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn folders(home: &Path) -> Vec<Id<Vm>> {
    let names = fs::read_dir(home).into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[async_trait]
impl<M: Machines> Rig for Vms<M> {
    type Provider = dyn Hypervisor;

    async fn fresh(&self) -> Result<Arc<dyn Hypervisor>> {
        let between = self.renew();
        let machines = Arc::clone(&between.yours);
        self.open(Home::new(move |home| sweep(&*machines, home))?, between).await
    }
    async fn reopen(&self, old: Arc<dyn Hypervisor>) -> Result<Arc<dyn Hypervisor>> {
        drop(old);
        self.close();
        let Site { home, between, .. } = self.newest()?;
        self.open(home, between).await
    }
    async fn change(&self, provider: &dyn Hypervisor, cx: &Ctx) -> Result<()> {
        provider.ensure(cx, id(), Rev(1), &self.spec).await.map(|_| ())
    }
    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let home = self.newest()?.home;
        Ok(Some(folders(&home.0).into_iter().map(|vm| vm.object()).collect()))
    }
    async fn fingerprint(&self) -> Result<Option<String>> {
        fingerprint(self.world().await?, &self.newest()?.home)
    }
    fn slow(&self, delay: Duration) -> bool {
        self.between().is_some_and(|between| between.slow(delay))
    }
    fn break_next(&self, fault: Fault) -> bool {
        self.between().is_some_and(|between| between.break_next(fault))
    }
}

impl<M: Machines> ConvergeRig<Vm> for Vms<M> {
    fn spec(&self, number: u32) -> VmSpec {
        VmSpec { vcpus: 1 + number % 4, ..self.spec.clone() }
    }
    fn bad(&self) -> Vec<VmSpec> {
        let spec = || self.spec.clone();
        let mut bad = vec![
            VmSpec { vcpus: 0, ..spec() },
            VmSpec { vcpus: 257, ..spec() },
            VmSpec { memory: 0, ..spec() },
            VmSpec { memory: (1 << 20) + 1, ..spec() },
            VmSpec { passport: large(), ..spec() },
        ];
        if let Origin::Kernel { kernel, initrd, .. } = &self.spec.origin {
            for cmdline in ["a\nb".to_owned(), "a".repeat(2048)] {
                let origin = Origin::Kernel { kernel: *kernel, initrd: *initrd, cmdline };
                bad.push(VmSpec { origin, ..spec() });
            }
        }
        bad
    }
}

#[async_trait]
impl<M: Machines> HypervisorRig for Vms<M> {
    async fn kill(&self, vm: Id<Vm>) -> bool {
        let Ok(Site { home, between, .. }) = self.newest() else { return false };
        between.yours.kill(&home.0.join(vm.to_string())).is_ok()
    }
}

// ---- storage ------------------------------------------------------------------------------------------------------

type Pools<D> = Own<D, PoolVolumeSpec, Storage>;

impl<D: Disks> Pools<D> {
    async fn open(&self, home: Arc<Home>, between: Arc<Between<D>>) -> Result<Arc<dyn VolumePool>> {
        let disks: Arc<dyn Disks> = Arc::clone(&between) as _;
        let open = base::storage(numbered(7), &home.0, disks).await?;
        self.keep(home, between, open.clone());
        Ok(open.pool())
    }
}

#[async_trait]
impl<D: Disks> Rig for Pools<D> {
    type Provider = dyn VolumePool;

    async fn fresh(&self) -> Result<Arc<dyn VolumePool>> {
        self.open(Home::new(|_| {})?, self.renew()).await
    }
    async fn reopen(&self, old: Arc<dyn VolumePool>) -> Result<Arc<dyn VolumePool>> {
        drop(old);
        self.close();
        let Site { home, between, .. } = self.newest()?;
        self.open(home, between).await
    }
    async fn change(&self, provider: &dyn VolumePool, cx: &Ctx) -> Result<()> {
        provider.ensure(cx, id(), Rev(1), &self.spec).await.map(|_| ())
    }
    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let between = self.newest()?.between;
        Ok(Some(between.world().into_iter().map(|(object, _)| object).collect()))
    }
    async fn fingerprint(&self) -> Result<Option<String>> {
        fingerprint(self.world().await?, &self.newest()?.home)
    }
    fn slow(&self, delay: Duration) -> bool {
        self.between().is_some_and(|between| between.slow(delay))
    }
    fn break_next(&self, fault: Fault) -> bool {
        self.between().is_some_and(|between| between.break_next(fault))
    }
}

#[async_trait]
impl<D: Disks> ConvergeRig<PoolVolume> for Pools<D> {
    fn spec(&self, _: u32) -> PoolVolumeSpec {
        self.spec.clone()
    }
    fn bad(&self) -> Vec<PoolVolumeSpec> {
        let sizes = [0, 4097].map(|size| PoolVolumeSpec { size, ..self.spec.clone() });
        let large = PoolVolumeSpec { passport: large(), ..self.spec.clone() };
        sizes.into_iter().chain([large]).collect()
    }
    async fn plant(&self, id: Id<PoolVolume>) -> Result<bool> {
        let planted = self.between().map(|between| between.yours.make(id, self.spec.size));
        Ok(planted.is_some_and(|planted| planted.is_ok()))
    }
}

#[async_trait]
impl<D: Disks> PoolRig for Pools<D> {
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let storage = self.newest()?.open.ok_or_else(|| Error::conflict("the pool is closed"))?;
        let access = storage.access(numbered(1)).await?;
        let cx = super::calls::ours(1);
        let (pool, of) = (numbered(7), id());
        let seen = access.ensure(&cx, of, Rev(1), &AccessSpec { pool, volume, term, mode }).await?;
        let target = seen.is.target.ok_or_else(|| Error::conflict("access has no target"))?;
        access.remove(&cx, of, Rev(1)).await?;
        let opener = storage.opener();
        opener.open(&target, opener.prepare(&target)?, None, &Env::default())
    }
    async fn used(&self) -> Result<Option<u64>> {
        let between = self.newest()?.between;
        Ok(Some(between.world().into_iter().map(|(_, size)| size).sum()))
    }
}

/// The volumes that access is asked to.
struct Accessed {
    size: u64,
}

type Accesses<D> = Own<D, Accessed, Arc<dyn VolumeAccess>>;

impl<D: Disks> Accesses<D> {
    async fn open(&self, home: Arc<Home>, between: Arc<Between<D>>) -> Result<Arc<dyn VolumeAccess>> {
        let disks: Arc<dyn Disks> = Arc::clone(&between) as _;
        let open = base::storage(numbered(7), &home.0, disks).await?.access(numbered(1)).await?;
        self.keep(home, between, Arc::clone(&open));
        Ok(open)
    }
}

#[async_trait]
impl<D: Disks> Rig for Accesses<D> {
    type Provider = dyn VolumeAccess;

    async fn fresh(&self) -> Result<Arc<dyn VolumeAccess>> {
        let between = self.renew();
        for number in 1..16 {
            between
                .make(numbered(number), self.spec.size)
                .map_err(|e| Error::internal("a volume for the suite cannot be made").because(&e))?;
        }
        self.open(Home::new(|_| {})?, between).await
    }
    async fn reopen(&self, old: Arc<dyn VolumeAccess>) -> Result<Arc<dyn VolumeAccess>> {
        drop(old);
        self.close();
        let Site { home, between, .. } = self.newest()?;
        self.open(home, between).await
    }
    async fn change(&self, provider: &dyn VolumeAccess, cx: &Ctx) -> Result<()> {
        provider.ensure(cx, id(), Rev(1), &self.spec(9)).await.map(|_| ())
    }
    async fn fingerprint(&self) -> Result<Option<String>> {
        fingerprint(None, &self.newest()?.home)
    }
}

impl<D: Disks> ConvergeRig<Access> for Accesses<D> {
    fn spec(&self, number: u32) -> AccessSpec {
        AccessSpec { pool: numbered(7), volume: numbered(number), term: Term(3), mode: Mode::Write }
    }
    fn bad(&self) -> Vec<AccessSpec> {
        vec![AccessSpec { pool: numbered(8), ..self.spec(1) }]
    }
}

#[async_trait]
impl<D: Disks> AccessRig for Accesses<D> {
    fn missing(&self) -> AccessSpec {
        AccessSpec { volume: numbered(99), ..self.spec(1) }
    }
    async fn volumes(&self) -> usize {
        self.between().map_or(0, |between| between.world().len())
    }
}

fn numbered<K>(number: u32) -> Id<K> {
    Id::from_uuid(Uuid::from_u128(number.into()))
}

fn id<K: Kind>() -> Id<K> {
    super::calls::id()
}

/// More than a passport may have.
fn large() -> Bytes {
    vec![0; (16 << 10) + 1].into()
}

/// What is there, and every note of the base.
fn fingerprint(world: Option<Vec<ObjectRef>>, home: &Home) -> Result<Option<String>> {
    let mut notes = Vec::new();
    for folder in ["notes", "volumes", "access-00000000-0000-0000-0000-000000000001"] {
        for entry in fs::read_dir(home.0.join(folder)).into_iter().flatten().flatten() {
            notes.push((entry.file_name(), fs::read(entry.path()).ok()));
        }
    }
    notes.sort();
    Ok(Some(format!("{world:?} {notes:?}")))
}
