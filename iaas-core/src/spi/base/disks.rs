//! Block storage around [`Disks`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::RwLockReadGuard;
use std::sync::RwLockWriteGuard;

use async_trait::async_trait;
use bytes::Bytes;

use super::maker::Look;
use super::maker::Maker;
use super::maker::check_passport;
use super::maker::failed;
use super::notes::Notes;
use super::provider;
use super::provider::Base;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::Term;
use crate::id::Pool;
use crate::model::Host;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Site;
use crate::spi::block::Access;
use crate::spi::block::AccessObserved;
use crate::spi::block::AccessSpec;
use crate::spi::block::Fenced;
use crate::spi::block::FreezeReceipt;
use crate::spi::block::FreezeTicket;
use crate::spi::block::Health;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeObserved;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumeJob;
use crate::spi::block::VolumePool;
use crate::spi::block::VolumeSnapshot;
use crate::spi::block::cap;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOp;
use crate::spi::dataplane::BlockOpener;
use crate::spi::dataplane::BlockQueue;
use crate::spi::dataplane::Env;
use crate::spi::dataplane::Geometry;
use crate::spi::dataplane::Grant;
use crate::spi::dataplane::Key;
use crate::spi::dataplane::at_once;
use crate::spi::dataplane::at_once::AtOnce;
use crate::spi::target::Form;
use crate::spi::target::Mode;
use crate::spi::target::Target;

/// How disks are made, removed and opened.
pub trait Disks: Debug + Send + Sync + 'static {
    /// A short name for your storage: `a-z`, `0-9` and `-`. It is also the scheme of its opener.
    fn name(&self) -> &'static str;

    /// Refuses what you can never keep, say a size beyond yours. Sizes are multiples of 4096 and never shrink, and sources
    /// and keys are refused already.
    fn check(&self, spec: &PoolVolumeSpec) -> Result<()>;

    /// Makes a disk of `size` bytes that read as zeroes, or grows one that is there by such bytes; `Ok` if it is so already.
    fn make(&self, id: Id<PoolVolume>, size: u64) -> io::Result<()>;

    /// Lets nothing be left of a disk; `Ok` if there is none.
    fn remove(&self, id: Id<PoolVolume>) -> io::Result<()>;

    /// Opens a disk; `NotFound` if there is none.
    fn open(&self, id: Id<PoolVolume>) -> io::Result<Arc<dyn Disk>>;
}

/// An open disk. Every range that is asked for lies inside.
pub trait Disk: Debug + Send + Sync + 'static {
    /// Its bytes.
    fn size(&self) -> u64;

    /// Reads from `at` on.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes from `at` on.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Returns when everything that was written survives whatever a disk of yours survives.
    fn flush(&self) -> io::Result<()>;
}

/// Opens the storage of `pool` on `home`, a folder of its own where the base keeps its notes.
///
/// # Errors
/// `Conflict` if another one has the folder open and does not end within ten seconds; `Internal` if it cannot be used.
pub async fn storage(pool: Id<Pool>, home: impl Into<PathBuf>, disks: Arc<dyn Disks>) -> Result<Storage> {
    let home = home.into();
    let base = provider::open(home.join("volumes"), move |notes| {
        Volumes(Arc::new(Shared { pool, disks, notes: Arc::clone(notes), slots: Mutex::default() }))
    });
    let base = base.await?;
    let shared = Arc::clone(&base.maker().0);
    Ok(Storage { home, pool: Arc::new(base), shared })
}

/// A pool around [`Disks`], access to it, and the opener of its volumes.
#[derive(Clone, Debug)]
pub struct Storage {
    home: PathBuf,
    pool: Arc<dyn VolumePool>,
    shared: Arc<Shared>,
}

impl Storage {
    /// The pool.
    pub fn pool(&self) -> Arc<dyn VolumePool> {
        Arc::clone(&self.pool)
    }

    /// Access to the pool on a host.
    ///
    /// # Errors
    /// As [`storage`].
    pub async fn access(&self, host: Id<Host>) -> Result<Arc<dyn VolumeAccess>> {
        let shared = Arc::clone(&self.shared);
        let folder = self.home.join(format!("access-{}", host.uuid()));
        Ok(Arc::new(provider::open(folder, move |_| Accesses(shared, host)).await?))
    }

    /// Opens volumes in this process, and only here: that is how the one writer is told from older ones.
    pub fn opener(&self) -> Arc<dyn BlockOpener> {
        Arc::new(Opener(Arc::clone(&self.shared)))
    }
}

#[derive(Debug)]
struct Shared {
    pool: Id<Pool>,
    disks: Arc<dyn Disks>,
    notes: Arc<Notes>,
    slots: Mutex<BTreeMap<Id<PoolVolume>, Arc<Slot>>>,
}

/// Who may write to a volume. Held shared by each write, and alone by who changes the writer.
#[derive(Debug)]
struct Slot(RwLock<Writer>);

#[derive(Clone, Copy, Debug)]
struct Writer {
    term: Term,
    gone: bool,
}

impl Slot {
    fn read(&self) -> RwLockReadGuard<'_, Writer> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Writer> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn slot(&self, id: Id<PoolVolume>) -> Result<Arc<Slot>> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(&id) {
            return Ok(Arc::clone(slot));
        }
        let term = self.notes.get(&key(id))?.unwrap_or_default();
        let slot = Arc::new(Slot(RwLock::new(Writer { term, gone: false })));
        slots.insert(id, Arc::clone(&slot));
        Ok(slot)
    }

    /// Raises the writer of a volume to `term`, durably; returns when no older write is under way.
    fn raise(&self, id: Id<PoolVolume>, slot: &Slot, term: Term) -> Result<()> {
        let mut writer = slot.write();
        if writer.gone {
            return Err(Error::not_found("the volume is gone").about(id.object()));
        }
        if term > writer.term {
            self.notes.put(&key(id), Some(&term))?;
            writer.term = term;
        }
        Ok(())
    }

    fn open(&self, id: Id<PoolVolume>) -> Result<Arc<dyn Disk>> {
        self.disks.open(id).map_err(|e| failed("opening the volume", &e).about(id.object()))
    }
}

fn key(id: Id<PoolVolume>) -> String {
    format!("writer-{}", id.uuid())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes volumes.
#[derive(Debug)]
struct Volumes(Arc<Shared>);

impl Maker for Volumes {
    type Kind = PoolVolume;

    fn product(&self) -> String {
        self.0.disks.name().to_owned()
    }

    fn site(&self) -> Site {
        Site::Pool(self.0.pool)
    }

    fn caps(&self) -> &'static [&'static str] {
        &[cap::GROW]
    }

    fn check(&self, _: Id<PoolVolume>, old: Option<&PoolVolumeSpec>, new: &PoolVolumeSpec) -> Result<()> {
        if new.size == 0 || !new.size.is_multiple_of(4096) {
            return Err(Error::invalid(format!("a volume of {} bytes", new.size))
                .remedy("use a multiple of 4096 bytes"));
        }
        if let Some(old) = old.filter(|old| new.size < old.size) {
            return Err(Error::invalid(format!("a volume of {} bytes cannot shrink", old.size))
                .remedy("make a smaller one and copy what you need"));
        }
        check_passport(&new.passport)?;
        if new.from.is_some() || new.key.is_some() {
            return Err(Error::unsupported("this storage makes no clones and encrypts nothing")
                .remedy("leave the source and the key out, or use another pool"));
        }
        self.0.disks.check(new)
    }

    fn make(&self, id: Id<PoolVolume>, spec: &PoolVolumeSpec, made: bool) -> Result<()> {
        if made {
            // Its bytes were lost: an empty disk in their place would hide it.
            self.0.open(id)?;
        }
        self.0.disks.make(id, spec.size).map_err(|e| failed("making the volume", &e))
    }

    fn unmake(&self, id: Id<PoolVolume>) -> Result<()> {
        let slot = self.0.slot(id)?;
        slot.write().gone = true;
        self.0.disks.remove(id).map_err(|e| failed("removing the volume", &e))?;
        self.0.notes.put(&key(id), None::<&Term>)?;
        lock(&self.0.slots).remove(&id);
        Ok(())
    }

    fn look(&self, id: Id<PoolVolume>, spec: &PoolVolumeSpec) -> Result<Look<PoolVolume>> {
        let writer = self.0.slot(id)?.read().term;
        let (phase, size, health) = match self.0.open(id) {
            Ok(disk) => (Phase::Settled, disk.size(), Health::Good),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let gone = Error::internal("the bytes of the volume are gone").because(&e);
                let health = Health::Damaged { bytes: spec.size };
                (Phase::Broken(gone.remedy("restore it from a copy, or remove it")), 0, health)
            }
            Err(e) => return Err(e),
        };
        let is = PoolVolumeObserved { size, unique: size, writer, health };
        Ok(Look { phase, is, final_usage: Vec::new() })
    }

    fn passport(&self, spec: &PoolVolumeSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }
}

#[async_trait]
impl VolumePool for Base<Volumes> {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        None
    }

    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        None
    }

    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let fence = move |volumes: &Volumes| {
            volumes.0.raise(volume, &*volumes.0.slot(volume)?, below)?;
            Ok(Fenced::Done(below))
        };
        self.change(cx, volume, fence).await
    }
}

/// Makes access: in one process there is nothing to make.
#[derive(Debug)]
struct Accesses(Arc<Shared>, Id<Host>);

impl Maker for Accesses {
    type Kind = Access;

    fn product(&self) -> String {
        self.0.disks.name().to_owned()
    }

    fn site(&self) -> Site {
        Site::Host(self.1)
    }

    fn check(&self, _: Id<Access>, _: Option<&AccessSpec>, new: &AccessSpec) -> Result<()> {
        if new.pool == self.0.pool {
            return Ok(());
        }
        Err(Error::invalid("that is another pool").remedy("call the provider of that pool"))
    }

    fn make(&self, _: Id<Access>, _: &AccessSpec, _: bool) -> Result<()> {
        Ok(())
    }

    fn unmake(&self, _: Id<Access>) -> Result<()> {
        Ok(())
    }

    fn look(&self, _: Id<Access>, spec: &AccessSpec) -> Result<Look<Access>> {
        let (phase, target) = match self.0.open(spec.volume) {
            Ok(_) => (Phase::Settled, Some(self.0.target(spec))),
            Err(error) => (Phase::Blocked(error), None),
        };
        Ok(Look { phase, is: AccessObserved { target }, final_usage: Vec::new() })
    }
}

impl VolumeAccess for Base<Accesses> {}

impl Shared {
    fn target(&self, spec: &AccessSpec) -> Target {
        let token = Bytes::copy_from_slice(self.pool.uuid().as_bytes());
        let form = Form::Opener { scheme: self.disks.name().to_owned(), version: VERSION, token };
        Target { id: spec.volume.uuid(), term: spec.term, mode: spec.mode, forms: vec![form], key: None }
    }
}

/// Opens the volumes of one pool.
#[derive(Debug)]
struct Opener(Arc<Shared>);

impl Opener {
    fn open_own(&self, target: &Target) -> Result<Arc<dyn Disk>> {
        let ours = target.forms.iter().any(|form| {
            matches!(form, Form::Opener { scheme, version, token }
                if (scheme.as_str(), *version) == self.scheme() && **token == *self.0.pool.uuid().as_bytes())
        });
        if !ours {
            return Err(Error::unsupported("no form of this target is of this pool")
                .remedy("use the opener of its pool")
                .outcome_is(Outcome::NotDone));
        }
        self.0.open(Id::from_uuid(target.id))
    }
}

impl BlockOpener for Opener {
    fn scheme(&self) -> (&'static str, u16) {
        (self.0.disks.name(), VERSION)
    }

    fn prepare(&self, target: &Target) -> Result<Grant> {
        self.open_own(target).map(|_| Grant::default())
    }

    fn open(&self, target: &Target, _: Grant, _: Option<Key>, _: &Env) -> Result<Box<dyn BlockDevice>> {
        let disk = self.open_own(target)?;
        let id = Id::from_uuid(target.id);
        let slot = self.0.slot(id)?;
        let read_only = target.mode == Mode::Read;
        let shared = Arc::clone(&self.0);
        let device = Device(Arc::new(Volume { id, disk, shared, slot, read_only, term: Mutex::default() }));
        if target.mode == Mode::Write {
            device.claim(target.term)?;
        }
        Ok(Box::new(device))
    }
}

#[derive(Debug)]
struct Device(Arc<Volume>);

/// An open volume.
#[derive(Debug)]
struct Volume {
    id: Id<PoolVolume>,
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    read_only: bool,
    /// What it claimed the volume with.
    term: Mutex<Option<Term>>,
}

impl Volume {
    /// Lets a change happen while this is the writer.
    fn write(&self, change: impl FnOnce(&dyn Disk) -> io::Result<()>) -> io::Result<()> {
        let writer = self.slot.read();
        let denied = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        match *lock(&self.term) {
            _ if writer.gone => Err(io::Error::new(io::ErrorKind::NotFound, "the volume is gone")),
            None => denied("no writer has claimed it here"),
            Some(term) if term < writer.term => denied("a newer writer has claimed the volume"),
            Some(_) => change(&*self.disk),
        }
    }
}

impl AtOnce for Volume {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.disk.size(),
            block: 512,
            preferred: 4096,
            max_bytes: 1 << 20,
            read_only: self.read_only,
            discard: false,
            write_zeroes: false,
        }
    }

    fn run(&self, op: &BlockOp) -> io::Result<()> {
        match op {
            BlockOp::Read { at, into } => {
                if self.slot.read().gone {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "the volume is gone"));
                }
                pieces(*at, into.len() as u64, |at, offset, piece| {
                    self.disk.read(at, piece)?;
                    into.write_at(offset, piece);
                    Ok(())
                })
            }
            BlockOp::Write { at, from } => self.write(|disk| {
                pieces(*at, from.len() as u64, |at, offset, piece| {
                    from.read_at(offset, piece);
                    disk.write(at, piece)
                })
            }),
            BlockOp::Discard { at, len } | BlockOp::WriteZeroes { at, len, .. } => {
                self.write(|disk| pieces(*at, *len, |at, _, piece| disk.write(at, piece)))
            }
            // A reader has nothing to flush.
            BlockOp::Flush if self.read_only => Ok(()),
            BlockOp::Flush => self.write(|disk| disk.flush()),
        }
    }
}

/// Does a range in pieces of bounded memory: where on the disk, where in the range, and a buffer of zeroes.
fn pieces(
    at: u64,
    len: u64,
    mut each: impl FnMut(u64, usize, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(PIECE).min(PIECE)];
    let mut done = 0;
    while done < len {
        let size = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
        let offset = usize::try_from(done).map_err(io::Error::other)?;
        let piece = buffer.get_mut(..size).unwrap_or_default();
        each(at + done, offset, piece)?;
        done += size as u64;
    }
    Ok(())
}

impl BlockDevice for Device {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>> {
        at_once::queue(&self.0, depth)
    }

    fn claim(&self, term: Term) -> Result<()> {
        if self.0.read_only {
            return Err(Error::invalid("it was opened for reading only").about(self.0.id.object()));
        }
        self.0.shared.raise(self.0.id, &self.0.slot, term)?;
        let now = self.0.slot.read().term;
        if term < now {
            return Err(Error::fenced(format!("writer {now} has claimed the volume"))
                .about(self.0.id.object())
                .outcome_is(Outcome::NotDone));
        }
        *lock(&self.0.term) = Some(term);
        Ok(())
    }

    fn release(&self) -> Result<()> {
        self.0.run(&BlockOp::Flush).map_err(|e| Error::fenced("the last flush was refused").because(&e))?;
        *lock(&self.0.term) = None;
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<()> {
        at_once::resize(&*self.0, size)
    }

    fn freeze(&self, _: &FreezeTicket) -> Result<FreezeReceipt> {
        Err(Error::unsupported("this storage takes no snapshots"))
    }
}

const VERSION: u16 = 1;
/// Bytes that are copied at once.
const PIECE: usize = 64 << 10;
