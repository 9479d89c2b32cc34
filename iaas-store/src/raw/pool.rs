//! The pool: volumes come, grow and go.
//!
//! A volume comes in four steps, each durable: the record says *making*, the data file is made, the record says *whole*.
//! It goes by: the record says *leaving*, the data file goes, the record goes. So whatever a crash leaves has a record with
//! its owner, and the same call finishes it. Bytes are never thrown away for a record that says *whole*.

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Cloud;
use iaas_core::id::Pool;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Tag;
use iaas_core::spi::block::Fenced;
use iaas_core::spi::block::Health;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeObserved;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::VolumeJob;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::block::VolumeSnapshot;
use iaas_core::spi::block::cap;
use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use super::sidecar;
use super::sidecar::Loaded;
use super::sidecar::MAX_PASSPORT;
use super::sidecar::Sidecar;
use super::sidecar::State;
use super::sidecar::WRITER;
use super::site::SiteBase;
use super::site::blocking;
use super::site::not_older;
use super::site::own;
use super::site::provider;
use super::site::removable;
use super::site::stamp;
use super::small;
use super::small::gone;
use super::token::data_name;
use super::token::meta_name;
use super::trouble;
use crate::rawio::RawFile;
use crate::rawio::RawFolder;
use crate::rawio::RealFolder;

/// A pool of volumes, each a sparse raw file in one folder of this host.
#[derive(Clone, Debug)]
pub struct RawPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    base: Arc<SiteBase>,
    folder: Arc<dyn RawFolder>,
    pool: Id<Pool>,
    /// Whether the folder's locks are those of this kernel alone.
    local: bool,
}

impl RawPool {
    /// Opens the pool in `folder`, or makes it there. Blocks on a few small files.
    ///
    /// `state` is the host's folder of state, where the fence of the pool's leaders is kept.
    ///
    /// # Errors
    /// - `Conflict`: the folder is the pool of another cloud, or another pool.
    /// - `Invalid`, `Unsupported`: its `pool.meta` is damaged, or of a newer format.
    /// - `Unavailable`: it cannot be read or written.
    pub fn open(folder: &Path, state: &Path, cloud: Id<Cloud>, pool: Id<Pool>) -> Result<Self> {
        let real = RealFolder::at(folder).map_err(|e| trouble("make the folder", &e))?;
        let local = is_local(folder).map_err(|e| trouble("look at the file system", &e))?;
        Self::over(Arc::new(real), local, state, cloud, pool)
            .map_err(|e| e.detail(folder.display().to_string()))
    }

    pub(crate) fn over(
        folder: Arc<dyn RawFolder>,
        local: bool,
        state: &Path,
        cloud: Id<Cloud>,
        pool: Id<Pool>,
    ) -> Result<Self> {
        let install = identity(&*folder, cloud, pool)?;
        let caps = &[cap::GROW];
        let kind = <PoolVolume as iaas_core::Entity>::NAME;
        let base = SiteBase::open(state, cloud, Site::Pool(pool), install, kind, caps)?;
        Ok(Self { inner: Arc::new(Inner { base: Arc::new(base), folder, pool, local }) })
    }
}

provider!(RawPool);

#[async_trait]
impl Converge<PoolVolume> for RawPool {
    #[tracing::instrument(name = "volume.ensure", skip_all, fields(op = %cx.call.op, volume = %id))]
    async fn ensure(
        &self,
        cx: &Ctx,
        id: Id<PoolVolume>,
        rev: Rev,
        spec: &PoolVolumeSpec,
    ) -> Result<Seen<PoolVolume>> {
        check(spec).map_err(|e| e.about(id.object()))?;
        let (inner, call, spec) = (self.inner.clone(), cx.call.clone(), spec.clone());
        let effect = move || inner.ensure(&call, id, rev, &spec);
        self.inner.base.act(&cx.call, id.object(), effect).await
    }

    #[tracing::instrument(name = "volume.remove", skip_all, fields(op = %cx.call.op, volume = %id))]
    async fn remove(&self, cx: &Ctx, id: Id<PoolVolume>, upto: Rev) -> Result<()> {
        let (inner, call) = (self.inner.clone(), cx.call.clone());
        let effect = move || inner.remove(&call, id, upto);
        self.inner.base.act(&cx.call, id.object(), effect).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<PoolVolume>) -> Result<Option<Seen<PoolVolume>>> {
        let (inner, cloud) = (self.inner.clone(), cx.call.cloud);
        blocking(move || inner.observe(cloud, id).map_err(|e| e.about(id.object()))).await
    }

    async fn inventory(
        &self,
        cx: &Ctx,
        after: Option<Id<PoolVolume>>,
        limit: usize,
    ) -> Result<Vec<Found<PoolVolume>>> {
        let (inner, cloud) = (self.inner.clone(), cx.call.cloud);
        blocking(move || {
            let ids = inner.ids()?.into_iter().filter(|id| after.is_none_or(|after| *id > after));
            Ok(ids.filter_map(|id| inner.found(cloud, id)).take(limit).collect())
        })
        .await
    }
}

#[async_trait]
impl VolumePool for RawPool {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        None
    }

    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        None
    }

    /// `Done` when the pool's file system is one of this kernel alone: then the lock of the writer is a proof. On a
    /// network file system `SameKernel`. A writer that lives hears that it is fenced; if it does not let go within the
    /// call's budget, 10 s at most, this fails with `Timeout`, and it is kept from making anything durable meanwhile.
    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let (inner, call) = (self.inner.clone(), cx.call.clone());
        blocking(move || {
            let _inside = inner.base.fence(call.cloud)?.enter_now(&call)?;
            inner.fence(&call, volume, below).map_err(|e| e.about(volume.object()))
        })
        .await
    }
}

impl Inner {
    fn ensure(
        &self,
        call: &Call,
        id: Id<PoolVolume>,
        rev: Rev,
        spec: &PoolVolumeSpec,
    ) -> Result<Seen<PoolVolume>> {
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let Some(file) = self.record(id)? else { return self.make(id, tag, spec) };
        let state = sidecar::update(&*file, |old| {
            self.own(old, call.cloud, id)?;
            not_older(&old.tag, call, rev)?;
            match old.state {
                State::Making => old.size = spec.size,
                State::Whole => self.grow(old, spec.size)?,
                // What was accepted to go is gone.
                State::Leaving => return Ok((false, State::Leaving)),
            }
            let changed = old.tag != tag || old.passport != spec.passport || old.state == State::Making;
            (old.tag, old.passport) = (tag, spec.passport.clone());
            Ok((changed || old.size != spec.size, old.state))
        })?;
        match state {
            State::Whole => {}
            State::Making => self.make_data(id, &*file)?,
            State::Leaving => {
                self.erase(id)?;
                return self.make(id, tag, spec);
            }
        }
        self.seen(&Sidecar::read(&*file)?)
    }

    /// Makes a volume of which nothing is there.
    fn make(&self, id: Id<PoolVolume>, tag: Tag, spec: &PoolVolumeSpec) -> Result<Seen<PoolVolume>> {
        if self.data(id)?.is_some() {
            return Err(Error::conflict("there is a data file of this volume, but no record of it")
                .remedy("move the file away, or put its record back"));
        }
        let sidecar = Sidecar {
            state: State::Making,
            seq: 0,
            volume: id,
            pool: self.pool,
            tag,
            size: spec.size,
            term: Term(0),
            holder: Term(0),
            passport: spec.passport.clone(),
        };
        let made = self.make_record(sidecar).and_then(|file| {
            self.make_data(id, &*file)?;
            Sidecar::read(&*file)
        });
        match made {
            Ok(sidecar) => self.seen(&sidecar),
            // Nothing was there before, so nothing shall be there now.
            Err(error) => match self.erase(id) {
                Ok(()) => Err(error.outcome_is(Outcome::NotDone)),
                Err(_) => Err(error.outcome_is(Outcome::Unknown)),
            },
        }
    }

    fn make_record(&self, mut sidecar: Sidecar) -> Result<Arc<dyn RawFile>> {
        let name = meta_name(sidecar.volume);
        let draft = small::draft(&name);
        let io = |e: io::Error| trouble("make the record", &e);
        gone(self.folder.remove(&draft)).map_err(io)?;
        let file = self.folder.create(&draft).map_err(io)?;
        // Both slots take their space now, so that no later update finds the disk full.
        let zeroes = vec![0; usize::try_from(sidecar::LEN).unwrap_or_default()];
        file.write_at(&zeroes, 0).map_err(io)?;
        sidecar.write(&*file)?;
        self.folder.rename(&draft, &name).and_then(|()| self.folder.sync()).map_err(io)?;
        Ok(file)
    }

    /// Makes the data file of a record that says *making*, and lets it say *whole*.
    fn make_data(&self, id: Id<PoolVolume>, record: &dyn RawFile) -> Result<()> {
        let size = Sidecar::read(record)?.size;
        let make = || {
            // Nobody has seen what is there: the record has never said *whole*.
            gone(self.folder.remove(&data_name(id)))?;
            let data = self.folder.create(&data_name(id))?;
            data.set_len(size)?;
            data.sync()?;
            self.folder.sync()
        };
        make().map_err(|e: io::Error| trouble("make the data file", &e))?;
        sidecar::update(record, |sidecar| {
            sidecar.state = State::Whole;
            Ok((true, ()))
        })
    }

    /// Grows a whole volume: first the data, then the record.
    fn grow(&self, old: &mut Sidecar, size: u64) -> Result<()> {
        if size < old.size {
            return Err(Error::invalid("a volume cannot shrink").remedy("make a smaller one and copy"));
        }
        if size == old.size {
            return Ok(());
        }
        // A volume without data stays so: its absence is told by `observe`.
        let Some(data) = self.data(old.volume)? else { return Ok(()) };
        let grow = || {
            if data.len()? < size {
                data.set_len(size)?;
            }
            data.sync()
        };
        grow().map_err(|e: io::Error| trouble("grow the data file", &e))?;
        old.size = size;
        Ok(())
    }

    fn remove(&self, call: &Call, id: Id<PoolVolume>, upto: Rev) -> Result<()> {
        if let Some(file) = self.record(id)? {
            match Sidecar::load(&*file)? {
                Loaded::Damaged(tag) => {
                    own(&tag, call.cloud)?;
                    removable(&tag, call, upto)?;
                }
                Loaded::Good(_) => sidecar::update(&*file, |sidecar| {
                    self.own(sidecar, call.cloud, id)?;
                    removable(&sidecar.tag, call, upto)?;
                    sidecar.state = State::Leaving;
                    Ok((true, ()))
                })?,
            }
            return self.erase(id);
        }
        // A record that was never completed; a data file without one is not ours to remove.
        let draft = small::draft(&meta_name(id));
        gone(self.folder.remove(&draft)).map_err(|e| trouble("remove", &e))
    }

    /// Removes the files of a volume whose record does not say *whole*: the record last, because it names the owner.
    fn erase(&self, id: Id<PoolVolume>) -> Result<()> {
        let erase = || {
            gone(self.folder.remove(&data_name(id)))?;
            self.folder.sync()?;
            gone(self.folder.remove(&meta_name(id)))?;
            gone(self.folder.remove(&small::draft(&meta_name(id))))?;
            self.folder.sync()
        };
        erase().map_err(|e: io::Error| trouble("remove", &e))
    }

    fn observe(&self, cloud: Id<Cloud>, id: Id<PoolVolume>) -> Result<Option<Seen<PoolVolume>>> {
        let Some(file) = self.record(id)? else { return self.observe_draft(id) };
        let sidecar = Sidecar::read(&*file)?;
        if sidecar.tag.cloud != cloud {
            return Ok(None);
        }
        self.own(&sidecar, cloud, id)?;
        self.seen(&sidecar).map(Some)
    }

    /// A record that was never completed is something that is left.
    fn observe_draft(&self, id: Id<PoolVolume>) -> Result<Option<Seen<PoolVolume>>> {
        if self.open(&small::draft(&meta_name(id)))?.is_none() {
            return Ok(None);
        }
        let is =
            PoolVolumeObserved { size: 0, unique: 0, writer: Term(0), health: Health::Damaged { bytes: 0 } };
        Ok(Some(Seen {
            applied: Rev(0),
            phase: Phase::Broken(half_made()),
            at: stamp(),
            is,
            final_usage: Vec::new(),
        }))
    }

    fn seen(&self, sidecar: &Sidecar) -> Result<Seen<PoolVolume>> {
        let data = self.data(sidecar.volume)?;
        let look = || match &data {
            Some(data) => Ok((data.len()?, data.used()?)),
            None => Ok((0, 0)),
        };
        let (len, unique) = look().map_err(|e: io::Error| trouble("look at the data file", &e))?;
        let lost = sidecar.size.saturating_sub(len);
        let phase = match sidecar.state {
            State::Making => Phase::Broken(half_made()),
            State::Leaving => Phase::Leaving,
            State::Whole if lost > 0 => Phase::Broken(
                Error::internal(format!("{lost} bytes of the volume are gone"))
                    .remedy("restore its data file, or remove the volume"),
            ),
            State::Whole => Phase::Settled,
        };
        let health = if lost > 0 { Health::Damaged { bytes: lost } } else { Health::Good };
        let is = PoolVolumeObserved { size: sidecar.size, unique, writer: sidecar.term, health };
        Ok(Seen { applied: sidecar.tag.rev, phase, at: stamp(), is, final_usage: Vec::new() })
    }

    /// A volume as the inventory of `cloud` lists it; `None` if it is not its own. One whose owner cannot be read is listed
    /// for the cloud that the pool belongs to, at revision 0.
    fn found(&self, cloud: Id<Cloud>, id: Id<PoolVolume>) -> Option<Found<PoolVolume>> {
        let file = match self.record(id) {
            // Removed since the folder was read.
            Ok(None) => return None,
            Ok(Some(file)) => file,
            Err(error) => return self.unreadable(cloud, id, error),
        };
        let (tag, passport, seen) = match Sidecar::load(&*file) {
            Ok(Loaded::Good(sidecar)) => {
                let seen = self.own(&sidecar, cloud, id).and_then(|()| self.seen(&sidecar));
                (sidecar.tag, Some(sidecar.passport), seen)
            }
            Ok(Loaded::Damaged(tag)) => {
                (tag, None, Err(Error::internal("the record of the volume is damaged")))
            }
            Err(error) => return self.unreadable(cloud, id, error),
        };
        let found = Found { id, tag, passport, seen: seen.map_err(|e| e.about(id.object())) };
        (tag.cloud == cloud).then_some(found)
    }

    fn unreadable(&self, cloud: Id<Cloud>, id: Id<PoolVolume>, error: Error) -> Option<Found<PoolVolume>> {
        let tag = Tag { cloud, incarnation: Uuid::nil(), rev: Rev(0) };
        let found = Found { id, tag, passport: None, seen: Err(error.about(id.object())) };
        (cloud == self.base.home()).then_some(found)
    }

    fn fence(&self, call: &Call, id: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let file = self.record(id)?.ok_or_else(|| {
            Error::not_found("the volume is not in the pool").remedy("a volume that is gone has no writer")
        })?;
        sidecar::update(&*file, |sidecar| {
            self.own(sidecar, call.cloud, id)?;
            let raise = sidecar.term < below;
            sidecar.term = sidecar.term.max(below);
            Ok((raise, ()))
        })?;
        if !self.local {
            return Ok(Fenced::SameKernel);
        }
        let until = Instant::now() + call.budget.min(PATIENCE);
        loop {
            if file.try_lock_byte(WRITER).map_err(|e| trouble("lock", &e))? {
                file.unlock_byte(WRITER).map_err(|e| trouble("unlock", &e))?;
                return Ok(Fenced::Done(below));
            }
            // The lock is held, and by a writer that is not kept out.
            if Sidecar::read(&*file)?.holder >= below {
                return Ok(Fenced::Done(below));
            }
            if Instant::now() >= until {
                return Err(Error::timeout("the older writer has not let go of the volume")
                    .remedy("end its process and fence again; it makes nothing durable any more"));
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn hello(&self, cloud: Id<Cloud>) -> Result<Hello> {
        self.base.hello(cloud, |incarnation| {
            let tags = self.ids()?.into_iter().filter_map(|id| self.found(cloud, id)).map(|found| found.tag);
            let revs = tags.filter(|tag| tag.incarnation == incarnation).map(|tag| tag.rev);
            Ok(revs.max().unwrap_or(Rev(0)))
        })
    }

    /// The volumes that have a record, in order.
    fn ids(&self) -> Result<Vec<Id<PoolVolume>>> {
        let names = self.folder.names().map_err(|e| trouble("list the folder", &e))?;
        let id = |name: &String| name.strip_suffix(".meta").and_then(|id| Uuid::try_parse(id).ok());
        let mut ids: Vec<_> = names.iter().filter_map(id).map(Id::from_uuid).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn record(&self, id: Id<PoolVolume>) -> Result<Option<Arc<dyn RawFile>>> {
        self.open(&meta_name(id))
    }

    fn data(&self, id: Id<PoolVolume>) -> Result<Option<Arc<dyn RawFile>>> {
        self.open(&data_name(id))
    }

    fn open(&self, name: &str) -> Result<Option<Arc<dyn RawFile>>> {
        match self.folder.open(name) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(trouble(&format!("open {name}"), &e)),
        }
    }

    fn own(&self, sidecar: &Sidecar, cloud: Id<Cloud>, id: Id<PoolVolume>) -> Result<()> {
        own(&sidecar.tag, cloud)?;
        if sidecar.volume != id || sidecar.pool != self.pool {
            return Err(Error::conflict("the record is that of another volume")
                .remedy("give the files of the volume their own names back"));
        }
        Ok(())
    }
}

/// Refuses what a raw file cannot be.
fn check(spec: &PoolVolumeSpec) -> Result<()> {
    if spec.size == 0 || !spec.size.is_multiple_of(4096) || i64::try_from(spec.size).is_err() {
        return Err(Error::invalid(format!("a volume cannot have {} bytes", spec.size))
            .remedy("use a multiple of 4096 bytes, at least 4096"));
    }
    if spec.passport.len() > MAX_PASSPORT {
        return Err(Error::invalid("the passport is too large").remedy("use at most 16 KiB"));
    }
    let lacks = |what: &str| {
        Err(Error::unsupported(format!("a pool of raw files {what}"))
            .remedy("use a pool that can, or do without"))
    };
    if spec.from.is_some() {
        return lacks("makes no clones");
    }
    if spec.key.is_some() {
        return lacks("does not encrypt");
    }
    if spec.qos.iops.is_some() || spec.qos.bandwidth.is_some() {
        return lacks("does not limit");
    }
    Ok(())
}

/// Reads who the folder belongs to, or says that it is ours; answers the installation.
fn identity(folder: &dyn RawFolder, cloud: Id<Cloud>, pool: Id<Pool>) -> Result<Uuid> {
    let Some(bytes) = small::read(folder, IDENTITY)? else {
        let install = Uuid::new_v4();
        let mut bytes = Vec::from(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        for id in [cloud.uuid(), pool.uuid(), install] {
            bytes.extend(id.as_bytes());
        }
        bytes.extend(Sha256::digest(&bytes));
        small::write(folder, IDENTITY, &bytes)?;
        return Ok(install);
    };
    let damaged =
        || Error::invalid("the pool's `pool.meta` is damaged").remedy("restore it, or use another folder");
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(damaged)?;
    let (format, rest) = rest.split_first_chunk::<4>().ok_or_else(damaged)?;
    if magic != MAGIC {
        return Err(damaged());
    }
    let format = u32::from_le_bytes(*format);
    if format > FORMAT {
        return Err(Error::unsupported(format!("the pool has format {format}"))
            .remedy(format!("use a newer version of this program; this one reads up to format {FORMAT}")));
    }
    let (ids, sum) = rest.split_first_chunk::<48>().ok_or_else(damaged)?;
    if bytes.get(..60).is_none_or(|body| Sha256::digest(body).as_slice() != sum) {
        return Err(damaged());
    }
    let (owner, install) = ids.split_at(32);
    if owner != [cloud.uuid().as_bytes().as_slice(), pool.uuid().as_bytes()].concat() {
        return Err(Error::conflict("the folder is the pool of another cloud, or another pool")
            .remedy("give this pool a folder of its own"));
    }
    Uuid::from_slice(install).map_err(|e| damaged().because(&e))
}

fn half_made() -> Error {
    Error::conflict("the volume is half-made").remedy("ensure it again, or remove it")
}

/// Whether the file system is one on which this kernel alone hands out locks.
fn is_local(folder: &Path) -> io::Result<bool> {
    use nix::sys::statfs;
    let kind = statfs::statfs(folder)?.filesystem_type();
    let local = [
        statfs::EXT4_SUPER_MAGIC,
        statfs::XFS_SUPER_MAGIC,
        statfs::BTRFS_SUPER_MAGIC,
        statfs::TMPFS_MAGIC,
        statfs::OVERLAYFS_SUPER_MAGIC,
    ];
    Ok(local.contains(&kind))
}

/// Where a pool is, for those who need more than its volumes.
pub(crate) fn absolute(folder: &Path) -> Result<PathBuf> {
    std::path::absolute(folder).map_err(|e| trouble("find the folder", &e))
}

const IDENTITY: &str = "pool.meta";
const MAGIC: &[u8; 8] = b"IAASPOOL";
const FORMAT: u32 = 1;
/// How long a fence waits for a live writer to let go.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests;
