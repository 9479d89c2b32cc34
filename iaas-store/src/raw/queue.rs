//! A queue of operations on a raw file: checks, splits, bounces, and judges what came of them.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::IoBuffers;
use nix::sys::eventfd::EventFd;

use super::device::BLOCK;
use super::device::MAX_BYTES;
use super::device::Shared;
use crate::sys::Job;
use crate::sys::MAX_VECTORS;
use crate::sys::Verb;

/// Runs jobs; each holds a slot from its start to its end.
pub(crate) trait Engine: Debug + Send {
    /// Takes a job.
    fn start(&mut self, slot: u16, job: Job);
    /// Sets what was taken going.
    fn submit(&mut self) -> io::Result<()>;
    /// Appends the jobs that have ended; never blocks.
    fn reap(&mut self, ended: &mut Vec<Ended>);
}

/// A job that has ended, with the bytes that it moved.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) slot: u16,
    pub(crate) job: Job,
    pub(crate) result: io::Result<usize>,
}

/// A queue of a raw volume.
#[derive(Debug)]
pub(crate) struct RawQueue {
    shared: Arc<Shared>,
    event: Arc<EventFd>,
    depth: usize,
    waiting: VecDeque<(u64, BlockOp)>,
    slots: Vec<Option<Running>>,
    free: Vec<u16>,
    done: Vec<BlockDone>,
    ended: Vec<Ended>,
    /// Bytes of memory of our own that operations under way use.
    bounced: usize,
    // Last: it waits for its jobs when it is dropped.
    engine: Box<dyn Engine>,
}

/// An operation under way.
#[derive(Debug)]
struct Running {
    tag: u64,
    what: What,
    at: u64,
    total: u64,
    moved: u64,
    /// The guest's buffers, when ours stand in for them.
    guest: Option<IoBuffers>,
    /// Bytes of ours.
    ours: usize,
    retries: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Read,
    Write,
    Flush,
    /// Zeroing by the file system, freeing the space or not.
    Zero {
        free: bool,
    },
    /// Zeroing by writing zeroes, where the file system cannot.
    Fill,
}

impl RawQueue {
    pub(crate) fn new(shared: Arc<Shared>, depth: u16, event: Arc<EventFd>, engine: Box<dyn Engine>) -> Self {
        Self {
            shared,
            event,
            depth: depth.into(),
            waiting: VecDeque::new(),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            done: Vec::new(),
            ended: Vec::new(),
            bounced: 0,
            engine,
        }
    }

    /// Starts what waits, as far as there is room.
    fn pump(&mut self) -> io::Result<()> {
        while let Some((tag, op)) = self.waiting.pop_front() {
            if self.bounced > 0 && self.bounced + self.needs(&op) > MAX_BOUNCED {
                self.waiting.push_front((tag, op));
                break;
            }
            self.begin(tag, op);
        }
        let submitted = self.engine.submit();
        if !self.done.is_empty() {
            let _ = self.event.write(1);
        }
        submitted
    }

    /// Bytes of our own memory that an operation may need.
    fn needs(&self, op: &BlockOp) -> usize {
        match op {
            BlockOp::Read { into: buffers, .. } | BlockOp::Write { from: buffers, .. } => {
                if self.must_bounce(buffers) { buffers.len() } else { 0 }
            }
            BlockOp::WriteZeroes { len, .. } | BlockOp::Discard { len, .. } => fill_len(*len),
            BlockOp::Flush => 0,
        }
    }

    fn must_bounce(&self, buffers: &IoBuffers) -> bool {
        let block = BLOCK as usize;
        let whole = |part: usize| part.is_multiple_of(block);
        let aligned = || buffers.ranges().iter().all(|r| whole(r.base.addr()) && whole(r.len));
        buffers.ranges().len() > MAX_VECTORS || (self.shared.is_direct() && !aligned())
    }

    fn begin(&mut self, tag: u64, op: BlockOp) {
        let (what, at, total, buffers) = match op {
            BlockOp::Read { at, into } => (What::Read, at, into.len() as u64, Some(into)),
            BlockOp::Write { at, from } => (What::Write, at, from.len() as u64, Some(from)),
            BlockOp::Flush => (What::Flush, 0, 0, None),
            BlockOp::Discard { at, len } => (What::Zero { free: true }, at, len, None),
            BlockOp::WriteZeroes { at, len, unmap } => (What::Zero { free: unmap }, at, len, None),
        };
        if let Err(error) = self.check(what, at, total) {
            return self.done.push(BlockDone { tag, result: Err(error), buffers });
        }
        let nothing = if what == What::Flush { !self.shared.core().owes_flush() } else { total == 0 };
        if nothing {
            return self.done.push(BlockDone { tag, result: Ok(()), buffers });
        }
        let writes = !matches!(what, What::Read | What::Flush);
        if let Err(error) = self.shared.core().enter(writes) {
            return self.done.push(BlockDone { tag, result: Err(error), buffers });
        }
        // There are as many slots as operations are taken.
        let Some(slot) = self.free.pop() else {
            self.shared.core().leave();
            let full = io::Error::from(io::ErrorKind::ResourceBusy);
            return self.done.push(BlockDone { tag, result: Err(full), buffers });
        };
        let (guest, ours, buffers) = self.stand_in(what, buffers);
        self.bounced += ours;
        self.put(slot, Running { tag, what, at, total, moved: 0, guest, ours, retries: 0 });
        self.next_step(slot, buffers);
    }

    /// Puts our own buffers in the place of a guest's that the file cannot take.
    fn stand_in(
        &self,
        what: What,
        buffers: Option<IoBuffers>,
    ) -> (Option<IoBuffers>, usize, Option<IoBuffers>) {
        let Some(guest) = buffers else { return (None, 0, None) };
        if !self.must_bounce(&guest) {
            return (None, 0, Some(guest));
        }
        let ours = IoBuffers::zeroed(guest.len());
        if what == What::Write {
            copy(&guest, &ours);
        }
        (Some(guest), ours.len(), Some(ours))
    }

    /// Refuses what does not fit the device.
    fn check(&self, what: What, at: u64, len: u64) -> io::Result<()> {
        let block = u64::from(BLOCK);
        let moves = matches!(what, What::Read | What::Write);
        let fits = at.checked_add(len).is_some_and(|end| end <= self.shared.size());
        let whole = at.is_multiple_of(block) && len.is_multiple_of(block);
        if !fits || !whole || (moves && len > u64::from(MAX_BYTES)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range does not fit the device"));
        }
        if self.shared.is_read_only() && !matches!(what, What::Read | What::Flush) {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the volume is opened for reading",
            ));
        }
        Ok(())
    }

    /// Starts the next job of an operation, with its buffers.
    fn next_step(&mut self, slot: u16, buffers: Option<IoBuffers>) {
        let Some(running) = self.running(slot) else { return };
        let at = running.at + running.moved;
        let left = running.total - running.moved;
        let skip = usize::try_from(running.moved).unwrap_or(usize::MAX);
        let job = match running.what {
            What::Read => Job { verb: Verb::Read, at, len: left, buffers, skip },
            What::Write => Job { verb: Verb::Write, at, len: left, buffers, skip },
            What::Flush => Job { verb: Verb::Sync, at: 0, len: 0, buffers, skip: 0 },
            What::Zero { free } => {
                let verb = if free { Verb::Punch } else { Verb::Zero };
                Job { verb, at, len: left, buffers, skip: 0 }
            }
            What::Fill => Job { verb: Verb::Write, at, len: fill_len(left) as u64, buffers, skip: 0 },
        };
        self.engine.start(slot, job);
    }

    /// Takes in what ended; says whether anything was started again.
    fn take_in(&mut self) -> bool {
        let mut ended = std::mem::take(&mut self.ended);
        self.engine.reap(&mut ended);
        let mut again = false;
        for Ended { slot, job, result } in ended.drain(..) {
            again |= self.judge(slot, job.buffers, result);
        }
        self.ended = ended;
        again
    }

    /// Judges a job that ended: the operation goes on (`true`), or it is done.
    fn judge(&mut self, slot: u16, buffers: Option<IoBuffers>, result: io::Result<usize>) -> bool {
        let core = self.shared.core().clone();
        let Some(running) = self.running(slot) else { return false };
        let verdict = match (running.what, result) {
            (_, Err(e)) if is_passing(&e) && running.retries < MAX_RETRIES => {
                running.retries += 1;
                Step::Again(buffers)
            }
            (What::Flush, result) => Step::End(core.judge_sync(result.map(drop))),
            (What::Zero { .. }, Err(e)) if e.kind() == io::ErrorKind::Unsupported => {
                running.what = What::Fill;
                running.ours = fill_len(running.total);
                let zeroes = IoBuffers::zeroed(running.ours);
                self.bounced += zeroes.len();
                Step::Again(Some(zeroes))
            }
            (_, Err(e)) => Step::Back(Err(e), buffers),
            (What::Zero { .. }, Ok(_)) => Step::End(Ok(())),
            (_, Ok(count)) => {
                running.moved = running.total.min(running.moved + count as u64);
                match (running.moved == running.total, count) {
                    (true, _) => Step::Back(Ok(()), buffers),
                    (false, 0) => Step::Back(Err(io::ErrorKind::UnexpectedEof.into()), buffers),
                    (false, _) => Step::Again(buffers),
                }
            }
        };
        match verdict {
            Step::Again(buffers) => {
                self.next_step(slot, buffers);
                true
            }
            Step::Back(result, buffers) => {
                self.end(slot, result, buffers);
                false
            }
            Step::End(result) => {
                self.end(slot, result, None);
                false
            }
        }
    }

    fn end(&mut self, slot: u16, result: io::Result<()>, buffers: Option<IoBuffers>) {
        let Some(running) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) else { return };
        self.free.push(slot);
        self.bounced -= running.ours;
        self.shared.core().leave();
        let buffers = match (running.what, running.guest, buffers) {
            (What::Read, Some(guest), Some(ours)) => {
                copy(&ours, &guest);
                Some(guest)
            }
            (What::Write, Some(guest), _) => Some(guest),
            (What::Read | What::Write, None, theirs) => theirs,
            _ => None,
        };
        self.done.push(BlockDone { tag: running.tag, result, buffers });
    }

    fn running(&mut self, slot: u16) -> Option<&mut Running> {
        self.slots.get_mut(usize::from(slot))?.as_mut()
    }

    fn put(&mut self, slot: u16, running: Running) {
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = Some(running);
        }
    }

    fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

enum Step {
    Again(Option<IoBuffers>),
    Back(io::Result<()>, Option<IoBuffers>),
    End(io::Result<()>),
}

impl BlockQueue for RawQueue {
    fn submit(&mut self, tag: u64, op: BlockOp) -> Result<(), BlockOp> {
        if self.waiting.len() + self.busy() + self.done.len() >= self.depth {
            return Err(op);
        }
        self.waiting.push_back((tag, op));
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        self.pump()
    }

    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        // Before the look, so that what ends after it makes the event readable again.
        let _ = self.event.read();
        let again = self.take_in();
        let count = self.done.len();
        out.append(&mut self.done);
        // What could not be set going now is tried again at the next kick.
        if again || (count > 0 && !self.waiting.is_empty() && self.bounced < MAX_BOUNCED) {
            let _ = self.pump();
        }
        count
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for RawQueue {
    fn drop(&mut self) {
        // The engine waits for its jobs when it goes; until then the volume is not given up.
        let idle = Box::new(Idle);
        drop(std::mem::replace(&mut self.engine, idle));
        for _ in 0..self.busy() {
            self.shared.core().leave();
        }
    }
}

/// Stands in for the engine of a queue that goes.
#[derive(Debug)]
struct Idle;

impl Engine for Idle {
    fn start(&mut self, _: u16, _: Job) {}
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, _: &mut Vec<Ended>) {}
}

/// Copies the bytes of `from`, in pieces of a page.
fn copy(from: &IoBuffers, to: &IoBuffers) {
    let mut page = [0; 4096];
    let mut at = 0;
    loop {
        let count = from.read_at(at, &mut page);
        let Some(bytes) = page.get(..count).filter(|bytes| !bytes.is_empty()) else { return };
        if to.write_at(at, bytes) < count {
            return;
        }
        at += count;
    }
}

/// Errors that pass when the same is asked again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Bytes of zeroes with which `len` bytes are filled, piece by piece.
fn fill_len(len: u64) -> usize {
    usize::try_from(len.min(u64::from(MAX_BYTES))).unwrap_or(MAX_BYTES as usize)
}

/// The most bytes of our own memory that the operations of a queue use, beyond those of a single one.
const MAX_BOUNCED: usize = 16 << 20;
const MAX_RETRIES: u8 = 100;
