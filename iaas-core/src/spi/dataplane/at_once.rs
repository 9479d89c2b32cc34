//! The queue of a device that does each operation at once, in the thread that kicks.

use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use super::BlockDone;
use super::BlockOp;
use super::BlockQueue;
use super::Geometry;
use crate::Error;
use crate::Result;

/// A device that does each operation at once.
pub(crate) trait AtOnce: Debug + Send + Sync + 'static {
    /// Its shape now.
    fn geometry(&self) -> Geometry;

    /// Does an operation that fits the shape.
    fn run(&self, op: &BlockOp) -> io::Result<()>;
}

/// Opens a queue of `device`.
pub(crate) fn queue<D: AtOnce>(device: &Arc<D>, depth: u16) -> Result<Box<dyn BlockQueue>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = EventFd::from_value_and_flags(0, flags)
        .map_err(|e| Error::internal("no event descriptor could be made").because(&e))?;
    let (waiting, done) = (Vec::new(), Vec::new());
    Ok(Box::new(Queue { device: Arc::clone(device), depth: depth.max(1).into(), waiting, done, event }))
}

/// Takes a new size, which the pool must have given already.
pub(crate) fn resize(device: &impl AtOnce, size: u64) -> Result<()> {
    if size == device.geometry().size {
        return Ok(());
    }
    Err(Error::conflict("the pool has not grown the volume to that size"))
}

#[derive(Debug)]
struct Queue<D> {
    device: Arc<D>,
    depth: usize,
    waiting: Vec<(u64, BlockOp)>,
    done: Vec<BlockDone>,
    event: EventFd,
}

impl<D: AtOnce> Queue<D> {
    fn run(&self, op: &BlockOp) -> io::Result<()> {
        let shape = self.device.geometry();
        let (at, len, writes) = match op {
            BlockOp::Read { at, into } => (*at, into.len() as u64, false),
            BlockOp::Write { at, from } => (*at, from.len() as u64, true),
            BlockOp::Flush => (0, 0, false),
            BlockOp::Discard { at, len } | BlockOp::WriteZeroes { at, len, .. } => (*at, *len, true),
        };
        let block = u64::from(shape.block.max(1));
        let fits = at.checked_add(len).is_some_and(|end| end <= shape.size);
        if !fits || !at.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range does not fit the device"));
        }
        if writes && shape.read_only {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "opened for reading only"));
        }
        self.device.run(op)
    }
}

impl<D: AtOnce> BlockQueue for Queue<D> {
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp> {
        if self.waiting.len() + self.done.len() >= self.depth {
            return Err(op);
        }
        self.waiting.push((tag, op));
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        for (tag, op) in std::mem::take(&mut self.waiting) {
            let result = self.run(&op);
            let buffers = match op {
                BlockOp::Read { into, .. } => Some(into),
                BlockOp::Write { from, .. } => Some(from),
                BlockOp::Flush | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => None,
            };
            self.done.push(BlockDone { tag, result, buffers });
        }
        if !self.done.is_empty() {
            self.event.write(1)?;
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        // Nothing to read from the event is fine: it is only a hint.
        let _ = self.event.read();
        let count = self.done.len();
        out.append(&mut self.done);
        count
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
