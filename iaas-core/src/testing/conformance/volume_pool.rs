//! The contract of [`VolumePool`], down to the bytes.

use std::time::Duration;

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::Patience;
use super::calls::fresh;
use super::calls::gone;
use super::calls::id;
use super::calls::make;
use super::calls::ours;
use super::calls::put;
use super::calls::reopen;
use super::converge;
use super::demand;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use super::should_fail;
use crate::Entity;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::spi::block::Fenced;
use crate::spi::block::PoolVolume;
use crate::spi::block::Source;
use crate::spi::block::VolumeJob;
use crate::spi::block::VolumePool;
use crate::spi::block::VolumeSnapshot;
use crate::spi::block::cap;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOp;
use crate::spi::dataplane::BlockQueue;
use crate::spi::dataplane::IoBuffers;
use crate::spi::target::Mode;

/// A pool under test.
#[async_trait]
pub trait PoolRig: ConvergeRig<PoolVolume> + Rig<Provider = dyn VolumePool> {
    /// Opens a volume as a guest's process would: through an access and the opener. Dropping it is a kill.
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>>;

    /// Bytes that the pool uses, seen from outside.
    async fn used(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

/// What a wrap may do to the devices of a pool.
pub(crate) trait WrapDevice: Send + Sync {
    fn device(&self, device: Box<dyn BlockDevice>) -> Box<dyn BlockDevice> {
        device
    }
    /// The term that a writer claims instead of its own.
    fn term(&self, term: Term) -> Term {
        term
    }
}

#[async_trait]
impl<R: PoolRig, W: Wrap<dyn VolumePool> + WrapDevice> PoolRig for Wrapped<R, W> {
    async fn open(&self, volume: Id<PoolVolume>, term: Term, mode: Mode) -> Result<Box<dyn BlockDevice>> {
        let device = self.inner.open(volume, self.by.term(term), mode).await?;
        Ok(self.by.device(device))
    }
    async fn used(&self) -> Result<Option<u64>> {
        self.inner.used().await
    }
}

/// The checks, in the order of the contracts.
pub fn suite() -> Vec<Check<dyn PoolRig>> {
    let mut all = converge::checks::<PoolVolume, dyn PoolRig>();
    all.extend([
        Check::<dyn PoolRig> { clause: "new-reads-zero", run: |rig| Box::pin(new_reads_zero(rig)) },
        Check { clause: "flushed-survives", run: |rig| Box::pin(flushed_survives(rig)) },
        Check { clause: "grow-keeps", run: |rig| Box::pin(grow_keeps(rig)) },
        Check { clause: "stale-writer-fenced", run: |rig| Box::pin(stale_writer_fenced(rig)) },
        Check { clause: "fence-honest", run: |rig| Box::pin(fence_honest(rig)) },
        Check { clause: "kinds-agree", run: |rig| Box::pin(kinds_agree(rig)) },
        Check { clause: "remove-frees", run: |rig| Box::pin(remove_frees(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl PoolRig) -> Report {
    super::run::<dyn PoolRig>("volume pool", &suite(), rig).await
}

type Rigged<'a> = &'a dyn PoolRig;

async fn volume(rig: Rigged<'_>, pool: &dyn VolumePool) -> Result<Id<PoolVolume>, String> {
    make::<PoolVolume, dyn PoolRig>(rig, pool, &ours(1), 1, Rev(1)).await
}

/// An open volume with one queue.
struct Disk {
    device: Box<dyn BlockDevice>,
    queue: Box<dyn BlockQueue>,
    patience: Duration,
    tag: u64,
}

impl Disk {
    async fn open(rig: Rigged<'_>, volume: Id<PoolVolume>, term: u64) -> Result<Self, String> {
        let device = should("opening the volume", rig.open(volume, Term(term), Mode::Write).await)?;
        let queue = should("opening a queue", device.open_queue(8))?;
        Ok(Self { device, queue, patience: rig.patience(), tag: 0 })
    }

    /// Does one operation and gives its buffers back.
    async fn run(&mut self, op: BlockOp) -> Result<std::io::Result<Option<IoBuffers>>, String> {
        self.tag += 1;
        self.queue.submit(self.tag, op).map_err(|op| format!("an empty queue is full for {op:?}"))?;
        self.queue.kick().map_err(|e| format!("kick: {e}"))?;
        let patience = Patience::new(self.patience);
        let mut done = Vec::new();
        while self.queue.reap(&mut done) == 0 {
            patience.wait(|| "an operation did not end".to_owned()).await?;
        }
        match done.pop() {
            Some(one) if done.is_empty() && one.tag == self.tag => Ok(one.result.map(|()| one.buffers)),
            other => Err(format!("one operation ended as {other:?} and {done:?}")),
        }
    }

    async fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>, String> {
        let read = self.run(BlockOp::Read { at, into: IoBuffers::zeroed(len) }).await?;
        let buffers = read.map_err(|e| format!("read at {at}: {e}"))?.ok_or("a read lost its buffers")?;
        let mut bytes = vec![0; len];
        buffers.read_at(0, &mut bytes);
        Ok(bytes)
    }

    async fn write(&mut self, at: u64, bytes: &[u8]) -> Result<std::io::Result<()>, String> {
        let ended = self.run(BlockOp::Write { at, from: IoBuffers::copied(bytes) }).await?;
        Ok(ended.map(|_| ()))
    }

    async fn flush(&mut self) -> Result<std::io::Result<()>, String> {
        Ok(self.run(BlockOp::Flush).await?.map(|_| ()))
    }

    /// Writes and flushes; both must succeed.
    async fn keep(&mut self, at: u64, bytes: &[u8]) -> Result<(), String> {
        self.write(at, bytes).await?.map_err(|e| format!("write at {at}: {e}"))?;
        self.flush().await?.map_err(|e| format!("flush: {e}"))
    }
}

/// 4 KiB of a pattern.
fn page(seed: u8) -> Vec<u8> {
    (0..4096usize).map(|i| u8::try_from(i % 251).unwrap_or(0) ^ seed).collect()
}

async fn new_reads_zero(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    // A volume that was used and removed leaves nothing to the next one.
    let first = volume(rig, &*pool).await?;
    let mut disk = Disk::open(rig, first, 1).await?;
    disk.keep(0, &page(1)).await?;
    drop(disk);
    should("remove", pool.remove(&ours(1), first, Rev(1)).await)?;
    gone(rig, &*pool, &ours(1), first).await?;
    let second = volume(rig, &*pool).await?;
    let mut disk = Disk::open(rig, second, 1).await?;
    let geometry = disk.device.geometry();
    demand!(
        geometry.size == rig.spec(1).size,
        "{} bytes were wanted, there are {}",
        rig.spec(1).size,
        geometry.size
    );
    let chunk = 64 << 10;
    for at in (0..geometry.size).step_by(chunk) {
        let len = usize::try_from(geometry.size - at).unwrap_or(chunk).min(chunk);
        let bytes = disk.read(at, len).await?;
        let dirty = bytes.iter().position(|b| *b != 0);
        demand!(dirty.is_none(), "a new volume has other bytes than zero from {at} on, at {dirty:?}");
    }
    Ok(())
}

async fn flushed_survives(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let volume = volume(rig, &*pool).await?;
    let mut disk = Disk::open(rig, volume, 1).await?;
    disk.keep(8192, &page(2)).await?;
    // Never flushed; it may survive or not.
    disk.write(0, &page(3)).await?.map_err(|e| format!("write: {e}"))?;
    drop(disk);
    let pool = reopen(rig, pool).await?;
    let mut disk = Disk::open(rig, volume, 2).await?;
    demand!(disk.read(8192, 4096).await? == page(2), "what was flushed is lost after a kill of the writer");
    drop((disk, pool));
    Ok(())
}

async fn grow_keeps(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let volume = volume(rig, &*pool).await?;
    let mut disk = Disk::open(rig, volume, 1).await?;
    disk.keep(4096, &page(4)).await?;
    drop(disk);
    let mut spec = rig.spec(1);
    let old = spec.size;
    spec.size *= 2;
    let hello = should("hello", pool.hello().await)?;
    if !hello.caps.contains(cap::GROW) {
        let ended = pool.ensure(&ours(1), volume, Rev(2), &spec).await;
        return should_fail("growing without the capability", ErrorKind::Unsupported, ended);
    }
    let seen = put(rig, &*pool, &ours(1), volume, Rev(2), &spec).await?;
    demand!(seen.is.size == spec.size, "it was to grow to {} and has {}", spec.size, seen.is.size);
    let mut disk = Disk::open(rig, volume, 2).await?;
    demand!(disk.device.geometry().size == spec.size, "an opener still sees the old size");
    demand!(disk.read(4096, 4096).await? == page(4), "growing lost data");
    demand!(disk.read(old, 4096).await?.iter().all(|b| *b == 0), "the new bytes are not zero");
    drop(disk);
    spec.size = old;
    let shrunk = pool.ensure(&ours(1), volume, Rev(3), &spec).await;
    should_fail("shrinking", ErrorKind::Invalid, shrunk)
}

async fn stale_writer_fenced(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let volume = volume(rig, &*pool).await?;
    let mut old = Disk::open(rig, volume, 1).await?;
    old.keep(0, &page(5)).await?;
    let mut new = Disk::open(rig, volume, 2).await?;
    new.keep(0, &page(6)).await?;
    let written = old.write(0, &page(7)).await?;
    let flushed = old.flush().await?;
    demand!(written.is_err() || flushed.is_err(), "a writer that a newer one replaced could flush");
    demand!(old.device.claim(Term(1)).is_err(), "an older writer could claim the volume again");
    drop(old);
    demand!(new.read(0, 4096).await? == page(6), "a stale writer changed what the new one wrote");
    let seen = should("observe", pool.observe(&ours(1), volume).await)?;
    let writer = seen.map(|s| s.is.writer);
    demand!(writer == Some(Term(2)), "the writer is {writer:?}, not 2");
    Ok(())
}

async fn fence_honest(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let volume = volume(rig, &*pool).await?;
    let mut old = Disk::open(rig, volume, 1).await?;
    old.keep(0, &page(8)).await?;
    let fenced = should("fence", pool.fence(&ours(1), volume, Term(5)).await)?;
    if !matches!(fenced, Fenced::Done(_)) {
        return Ok(());
    }
    let written = old.write(0, &page(9)).await?;
    let flushed = old.flush().await?;
    demand!(
        written.is_err() || flushed.is_err(),
        "fence answered {fenced:?}, and an older writer could flush"
    );
    drop(old);
    let mut new = Disk::open(rig, volume, 5).await?;
    demand!(new.read(0, 4096).await? == page(8), "an older writer wrote behind the fence");
    Ok(())
}

async fn kinds_agree(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let hello = should("hello", pool.hello().await)?;
    let says = [VolumeSnapshot::NAME, VolumeJob::NAME].map(|kind| hello.kinds.contains(kind));
    let has = [pool.snapshots().is_some(), pool.jobs().is_some()];
    demand!(says == has, "hello says {says:?} of snapshots and jobs, and there are {has:?}");
    demand!(hello.kinds.contains(PoolVolume::NAME), "hello does not name the kind {}", PoolVolume::NAME);
    if !hello.caps.contains(cap::CLONE) {
        let mut spec = rig.spec(1);
        spec.from = Some(Source::Volume(volume(rig, &*pool).await?));
        let ended = pool.ensure(&ours(1), id(), Rev(2), &spec).await;
        should_fail("a clone without the capability", ErrorKind::Unsupported, ended)?;
    }
    Ok(())
}

async fn remove_frees(rig: Rigged<'_>) -> Verdict {
    let pool = fresh(rig).await?;
    let before = should("a look at the space", rig.used().await)?;
    let volume = volume(rig, &*pool).await?;
    let mut disk = Disk::open(rig, volume, 1).await?;
    disk.keep(0, &page(10)).await?;
    drop(disk);
    should("remove", pool.remove(&ours(1), volume, Rev(1)).await)?;
    gone(rig, &*pool, &ours(1), volume).await?;
    let after = should("a look at the space", rig.used().await)?;
    demand!(before == after, "before the volume {before:?} bytes were used, after its removal {after:?}");
    Ok(())
}
