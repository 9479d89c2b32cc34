//! A volume, opened in the process that uses it: queues of operations on buffers that come back when done.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use super::IoBuffers;
use crate::Result;
use crate::Term;
use crate::spi::block::FreezeReceipt;
use crate::spi::block::FreezeTicket;

/// The shape of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes; a multiple of `block`.
    pub size: u64,
    /// The unit of alignment and of length, in bytes: a power of two, at least 512.
    pub block: u32,
    /// The best length and alignment of a write, in bytes.
    pub preferred: u32,
    /// The most bytes of one operation.
    pub max_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether `Discard` frees space.
    pub discard: bool,
    /// Whether `WriteZeroes` is cheaper than writing zeroes.
    pub write_zeroes: bool,
}

/// An operation. Offsets and lengths are bytes, multiples of [`Geometry::block`].
#[derive(Debug)]
pub enum BlockOp {
    /// Fills the buffers from `at`.
    Read {
        /// Where.
        at: u64,
        /// To where.
        into: IoBuffers,
    },
    /// Writes the buffers to `at`. Durable only after a later flush.
    Write {
        /// Where.
        at: u64,
        /// From where.
        from: IoBuffers,
    },
    /// Makes every write durable that was done before it was submitted.
    Flush,
    /// The bytes are no longer needed; they then read as zeroes.
    Discard {
        /// Where.
        at: u64,
        /// How many.
        len: u64,
    },
    /// The bytes read as zeroes from now on.
    WriteZeroes {
        /// Where.
        at: u64,
        /// How many.
        len: u64,
        /// Whether the space may be freed.
        unmap: bool,
    },
}

/// A finished operation.
#[derive(Debug)]
pub struct BlockDone {
    /// The tag it was submitted with.
    pub tag: u64,
    /// How it ended.
    pub result: io::Result<()>,
    /// The buffers of a read or write, given back.
    pub buffers: Option<IoBuffers>,
}

/// An open volume.
///
/// # Contract
/// Behaves like a disk with a volatile write cache: operations that are in flight together may take effect in any order;
/// a flush makes durable what was done before it was submitted. Operations that do not fit the geometry end with
/// `InvalidInput` and touch nothing.
pub trait BlockDevice: Debug + Send + Sync {
    /// The device's shape.
    fn geometry(&self) -> Geometry;

    /// Opens a queue that holds up to `depth` operations; one thread uses it.
    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>>;

    /// Becomes the writer with `term`, durably, before the first write.
    ///
    /// # Errors
    /// `Fenced` if a higher term has claimed it.
    fn claim(&self, term: Term) -> Result<()>;

    /// Flushes and gives the claim up.
    fn release(&self) -> Result<()>;

    /// Takes a new size, in bytes, after the pool has grown the volume.
    fn resize(&self, size: u64) -> Result<()>;

    /// Freezes the state for a snapshot.
    fn freeze(&self, ticket: &FreezeTicket) -> Result<FreezeReceipt>;
}

/// A queue of operations of one thread.
pub trait BlockQueue: Debug + Send {
    /// Takes `op`, or gives it back if the queue is full.
    ///
    /// # Errors
    /// The operation itself: reap and try again.
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp>;

    /// Starts what was submitted.
    fn kick(&mut self) -> io::Result<()>;

    /// Appends finished operations to `out` and says how many; never blocks.
    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize;

    /// Readable when there may be something to reap.
    fn event_fd(&self) -> BorrowedFd<'_>;
}
