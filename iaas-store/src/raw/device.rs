//! An open volume.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::spi::block::FreezeReceipt;
use iaas_core::spi::block::FreezeTicket;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::Geometry;
use nix::fcntl::FcntlArg;
use nix::fcntl::OFlag;
use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use super::claim::Core;
use super::claim::Writer;
use super::psync::Psync;
use super::queue::Engine;
use super::queue::RawQueue;
use super::trouble;
use super::uring::Uring;
use crate::sys;
use crate::sys::Job;
use crate::sys::Vectors;
use crate::sys::Verb;

/// How operations reach the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring where it works, else threads.
    #[default]
    Best,
    /// io_uring, or an error.
    Uring,
    /// A few threads per queue.
    Threads,
}

/// A raw volume, opened in the process that uses it.
#[derive(Debug)]
pub(crate) struct RawDevice {
    shared: Arc<Shared>,
}

/// What the queues of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    data: Arc<File>,
    writer: Writer,
    size: AtomicU64,
    direct: bool,
    read_only: bool,
    discard: bool,
    engine: IoEngine,
}

impl RawDevice {
    /// Over an open data file and the right to write it.
    pub(crate) fn new(data: File, writer: Writer, read_only: bool, engine: IoEngine) -> Result<Self> {
        let size = writer.record()?.size;
        let flags = nix::fcntl::fcntl(&data, FcntlArg::F_GETFL).map_err(|e| trouble("look", &e.into()))?;
        let direct = OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT);
        let discard = !read_only && punches(&data, size);
        let size = AtomicU64::new(size);
        let shared = Shared { data: Arc::new(data), writer, size, direct, read_only, discard, engine };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Shared {
    pub(crate) fn core(&self) -> &Arc<Core> {
        self.writer.core()
    }
    pub(crate) fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn engine(&self, depth: u16, event: &Arc<EventFd>) -> io::Result<Box<dyn Engine>> {
        let uring = match self.engine {
            IoEngine::Uring => true,
            IoEngine::Threads => false,
            IoEngine::Best => sys::has_uring(),
        };
        if uring {
            match Uring::new(depth, self.data.clone(), event) {
                Ok(engine) => return Ok(Box::new(engine)),
                // Locked memory may be used up for one more ring.
                Err(error) if self.engine == IoEngine::Best => {
                    tracing::debug!(%error, "no io_uring for this queue; threads serve it");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Box::new(Psync::new(depth, self.data.clone(), event.clone())?))
    }
}

impl BlockDevice for RawDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.shared.size(),
            block: BLOCK,
            preferred: 4096,
            max_bytes: MAX_BYTES,
            read_only: self.shared.read_only,
            discard: self.shared.discard,
            write_zeroes: self.shared.discard,
        }
    }

    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event =
            EventFd::from_value_and_flags(0, flags).map_err(|e| trouble("make an event", &e.into()))?;
        let event = Arc::new(event);
        let engine = self.shared.engine(depth, &event).map_err(|e| {
            Error::unavailable("a queue of the volume cannot be opened")
                .remedy("allow io_uring, or choose threads")
                .because(&e)
        })?;
        Ok(Box::new(RawQueue::new(self.shared.clone(), depth, event, engine)))
    }

    fn claim(&self, term: Term) -> Result<()> {
        if self.shared.read_only {
            return Err(Error::conflict("the volume is opened for reading").remedy("open it to write"));
        }
        self.shared.writer.claim(term)
    }

    fn release(&self) -> Result<()> {
        self.shared.writer.release(|| self.shared.data.sync_data())
    }

    fn resize(&self, size: u64) -> Result<()> {
        if self.shared.writer.record()?.size != size {
            return Err(Error::conflict("the pool has not given the volume that size")
                .remedy("let the pool grow it first"));
        }
        self.shared.size.store(size, SeqCst);
        Ok(())
    }

    fn freeze(&self, _: &FreezeTicket) -> Result<FreezeReceipt> {
        Err(Error::unsupported("a raw file has no snapshots").remedy("ask the pool's capabilities first"))
    }
}

/// Whether the file system can free space inside the file: tried where there is nothing to free.
fn punches(data: &File, size: u64) -> bool {
    let job = Job { verb: Verb::Punch, at: size, len: 4096, buffers: None, skip: 0 };
    job.run(data, &mut Vectors::default()).is_ok()
}

/// The unit of operations.
pub(crate) const BLOCK: u32 = 512;
/// The most bytes of a read or write.
pub(crate) const MAX_BYTES: u32 = 1 << 20;
const MAX_DEPTH: u16 = 1024;
