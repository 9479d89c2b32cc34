//! Block storage: volumes in RAM, access to them, and the opener of their targets.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::id::Pool;
use iaas_core::model::Host;
use iaas_core::spi::Phase;
use iaas_core::spi::Site;
use iaas_core::spi::base::AtOnce;
use iaas_core::spi::base::Look;
use iaas_core::spi::base::Maker;
use iaas_core::spi::base::PoolMaker;
use iaas_core::spi::base::SyncDisk;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessObserved;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::Fenced;
use iaas_core::spi::block::Health;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeObserved;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::cap;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::Geometry;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::Key;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;

use crate::lock;

const CAPACITY: u64 = 64 << 20;

/// A pool; it is itself the disk, so its volumes outlive the provider and not the process.
#[derive(Debug)]
pub(crate) struct RamPool(
    pub(crate) Id<Pool>,
    pub(crate) Mutex<BTreeMap<Id<PoolVolume>, Arc<Mutex<Volume>>>>,
);

/// Bytes and their newest writer.
#[derive(Debug, Default)]
pub(crate) struct Volume {
    bytes: Vec<u8>,
    writer: Term,
}

impl RamPool {
    /// Bytes of all volumes.
    pub(crate) fn used(&self) -> u64 {
        lock(&self.1).values().map(|volume| lock(volume).bytes.len() as u64).sum()
    }

    fn volume(&self, id: Id<PoolVolume>) -> Result<Arc<Mutex<Volume>>> {
        lock(&self.1)
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::not_found("no such volume in RAM").about(id.object()))
    }
}

#[async_trait]
impl Maker for RamPool {
    type Kind = PoolVolume;
    fn product(&self) -> String {
        "ram 0.1".into()
    }
    fn site(&self) -> Site {
        Site::Pool(self.0)
    }
    fn caps(&self) -> &'static [&'static str] {
        &[cap::GROW]
    }
    fn check(&self, old: Option<&PoolVolumeSpec>, new: &PoolVolumeSpec) -> Result<()> {
        let shrinks = old.is_some_and(|old| new.size < old.size);
        if shrinks
            || !(1..=CAPACITY).contains(&new.size)
            || !new.size.is_multiple_of(4096)
            || new.passport.len() > 16 << 10
        {
            return Err(Error::invalid("this size or passport cannot be kept")
                .remedy("use 4 KiB to 64 MiB, never less"));
        }
        if new.from.is_some() || new.key.is_some() {
            return Err(Error::unsupported("RAM makes no clones and encrypts nothing"));
        }
        Ok(())
    }
    async fn make(&self, id: Id<PoolVolume>, spec: &PoolVolumeSpec) -> Result<()> {
        let size = usize::try_from(spec.size).map_err(|e| Error::invalid("too large").because(&e))?;
        lock(lock(&self.1).entry(id).or_default()).bytes.resize(size, 0);
        Ok(())
    }
    async fn unmake(&self, id: Id<PoolVolume>) -> Result<()> {
        lock(&self.1).remove(&id);
        Ok(())
    }
    async fn look(&self, id: Id<PoolVolume>, _: &PoolVolumeSpec) -> Result<Look<PoolVolume>> {
        let volume = self.volume(id)?;
        let volume = lock(&volume);
        let (size, writer) = (volume.bytes.len() as u64, volume.writer);
        Ok(Look::settled(PoolVolumeObserved { size, unique: size, writer, health: Health::Good }))
    }
    fn passport(&self, spec: &PoolVolumeSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }
}

#[async_trait]
impl PoolMaker for RamPool {
    async fn fence(&self, id: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let volume = self.volume(id)?;
        let mut volume = lock(&volume);
        volume.writer = volume.writer.max(below);
        Ok(Fenced::Done(below))
    }
}

/// A volume, opened by the writer with a term.
#[derive(Debug)]
struct RamDisk(Arc<Mutex<Volume>>, Term, bool);

impl SyncDisk for RamDisk {
    fn geometry(&self) -> Geometry {
        let (size, read_only) = (lock(&self.0).bytes.len() as u64, self.2);
        Geometry {
            size,
            block: 512,
            preferred: 4096,
            max_bytes: 1 << 20,
            read_only,
            discard: false,
            write_zeroes: false,
        }
    }
    fn run(&self, op: &BlockOp) -> io::Result<()> {
        let mut volume = lock(&self.0);
        if !self.2 && self.1 < volume.writer && !matches!(op, BlockOp::Read { .. }) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "a newer writer has claimed it"));
        }
        let mut part = |at: u64, len: usize, act: &dyn Fn(&mut [u8])| {
            let at = usize::try_from(at).ok();
            let bytes = at.and_then(|at| volume.bytes.get_mut(at..at.checked_add(len)?));
            bytes.map(act).ok_or_else(|| io::ErrorKind::InvalidInput.into())
        };
        match op {
            BlockOp::Read { at, into } => part(*at, into.len(), &|bytes| _ = into.write_at(0, bytes)),
            BlockOp::Write { at, from } => part(*at, from.len(), &|bytes| _ = from.read_at(0, bytes)),
            BlockOp::Flush => Ok(()),
            BlockOp::Discard { at, len } | BlockOp::WriteZeroes { at, len, .. } => {
                part(*at, usize::try_from(*len).unwrap_or(usize::MAX), &|bytes| bytes.fill(0))
            }
        }
    }
    fn claim(&self, term: Term) -> Result<()> {
        let mut volume = lock(&self.0);
        if term < volume.writer {
            return Err(Error::fenced("a newer writer has claimed it"));
        }
        volume.writer = term;
        Ok(())
    }
}

/// Access of a host to the pool: in one process there is nothing to make.
#[derive(Debug)]
pub(crate) struct RamAccess(pub(crate) Arc<RamPool>, pub(crate) Id<Host>);

#[async_trait]
impl Maker for RamAccess {
    type Kind = Access;
    fn product(&self) -> String {
        "ram 0.1".into()
    }
    fn site(&self) -> Site {
        Site::Host(self.1)
    }
    fn check(&self, _: Option<&AccessSpec>, new: &AccessSpec) -> Result<()> {
        if new.pool == self.0.0 {
            return Ok(());
        }
        Err(Error::invalid("that is another pool").remedy("call the provider of that pool"))
    }
    async fn make(&self, _: Id<Access>, _: &AccessSpec) -> Result<()> {
        Ok(())
    }
    async fn unmake(&self, _: Id<Access>) -> Result<()> {
        Ok(())
    }
    async fn look(&self, _: Id<Access>, spec: &AccessSpec) -> Result<Look<Access>> {
        let mut look: Look<Access> = Look::settled(AccessObserved { target: None });
        match self.0.volume(spec.volume) {
            Ok(_) => look.is.target = Some(target(spec.volume, spec.term, spec.mode)),
            Err(error) => look.phase = Phase::Blocked(error),
        }
        Ok(look)
    }
}

/// How a volume is opened.
pub(crate) fn target(volume: Id<PoolVolume>, term: Term, mode: Mode) -> Target {
    let form = Form::Opener { scheme: "ram".into(), version: 1, token: Bytes::new() };
    Target { id: volume.uuid(), term, mode, forms: vec![form], key: None }
}

impl BlockOpener for RamPool {
    fn scheme(&self) -> (&'static str, u16) {
        ("ram", 1)
    }
    fn prepare(&self, target: &Target) -> Result<Grant> {
        self.volume(Id::from_uuid(target.id)).map(|_| Grant::default())
    }
    fn open(&self, target: &Target, _: Grant, _: Option<Key>, _: &Env) -> Result<Box<dyn BlockDevice>> {
        let volume = self.volume(Id::from_uuid(target.id))?;
        let disk = RamDisk(volume, target.term, target.mode != Mode::Write);
        if target.mode == Mode::Write {
            disk.claim(target.term)?;
        }
        Ok(Box::new(AtOnce::new(disk)))
    }
}
