//! A vhost-user-blk front-end: what a VMM and its guest's driver do, without a guest.
//!
//! One program drives every service that is compared, with one queue, so that only the services differ.

#![expect(unsafe_code, reason = "the driver is given raw memory that it shares with the service")]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use memmap2::MmapMut;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::poll;
use nix::sys::memfd::MFdFlags;
use nix::sys::memfd::memfd_create;
use virtio_driver::EventFd;
use virtio_driver::QueueNotifier;
use virtio_driver::VhostUser;
use virtio_driver::VirtioBlkConfig;
use virtio_driver::VirtioBlkFeatureFlags;
use virtio_driver::VirtioBlkQueue;
use virtio_driver::VirtioBlkReqBuf;
use virtio_driver::VirtioBlkTransport;
use virtio_driver::VirtioFeatureFlags;

/// A connection to one service, with one queue of 128 descriptors.
pub(crate) struct FrontEnd {
    // In this order: the queue's rings lie in the transport's memory.
    queue: VirtioBlkQueue<'static, usize>,
    kick: Box<dyn QueueNotifier>,
    used: Arc<EventFd>,
    _transport: Box<VirtioBlkTransport>,
    data: MmapMut,
    size: u64,
}

impl FrontEnd {
    /// Connects to the service at `socket`, which may still be starting.
    ///
    /// # Errors
    /// `TimedOut`: none came up. Those of the protocol.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport(socket)?);
        let file = File::from(memfd_create("bench-data", MFdFlags::MFD_CLOEXEC)?);
        file.set_len((DEPTH * BLOCK) as u64)?;
        // SAFETY: the file is this process's own; only the service maps it too, and no reference to its bytes is ever made.
        let data = unsafe { MmapMut::map_mut(&file) }?;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, QUEUE_SIZE)?;
        transport.map_mem_region(data.as_ptr().addr(), data.len(), file.as_raw_fd(), 0)?;
        let size = u64::from(transport.get_config()?.capacity) * 512;
        let queue = queues.pop().ok_or_else(|| io::Error::other("the service has no queue"))?;
        let (kick, used) = (transport.get_submission_notifier(0), transport.get_completion_fd(0));
        Ok(Self { queue, kick, used, _transport: transport, data, size })
    }

    /// Reads or writes blocks of 4 KiB at random places for `time`, 32 of them in flight; gives operations per second.
    ///
    /// # Errors
    /// `TimedOut`: the service stands still. That of a failed operation.
    pub(crate) fn random(&mut self, write: bool, seed: u64, time: Duration) -> io::Result<f64> {
        let (mut places, mut free) = (Places::new(seed, self.size), (0..DEPTH).collect::<Vec<_>>());
        let (begun, mut ended) = (Instant::now(), 0_u32);
        loop {
            if begun.elapsed() < time {
                while let Some(slot) = free.pop() {
                    self.start(write, places.next(), slot)?;
                }
                if self.queue.avail_notif_needed() {
                    self.kick.notify()?;
                }
            } else if free.len() == DEPTH {
                return Ok(f64::from(ended) / begun.elapsed().as_secs_f64());
            }
            match self.reap(&mut free)? {
                0 => self.wait()?,
                count => ended += count,
            }
        }
    }

    fn start(&mut self, write: bool, at: u64, slot: usize) -> io::Result<()> {
        let place = self.data.as_mut_ptr().wrapping_add(slot * BLOCK);
        // SAFETY: `slot` is below `DEPTH`, so the block lies inside `data`, which lives as long as the queue.
        unsafe {
            if write {
                self.queue.write_raw(at, place, BLOCK, slot)
            } else {
                self.queue.read_raw(at, place, BLOCK, slot)
            }
        }
    }

    fn reap(&mut self, free: &mut Vec<usize>) -> io::Result<u32> {
        let mut count = 0;
        for done in self.queue.completions() {
            if done.ret != 0 {
                return Err(io::Error::from_raw_os_error(-done.ret));
            }
            free.push(done.context);
            count += 1;
        }
        Ok(count)
    }

    /// Asks for an interrupt, and sleeps until it comes.
    fn wait(&mut self) -> io::Result<()> {
        self.queue.set_used_notif_enabled(true);
        if !self.queue.completions().has_next() {
            let mut fds = [PollFd::new(self.used.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PATIENCE)? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.used.read()?;
        }
        self.queue.set_used_notif_enabled(false);
        Ok(())
    }
}

impl fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd").field("size", &self.size).finish_non_exhaustive()
    }
}

fn transport(socket: &Path) -> io::Result<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>> {
    let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    // With a flush of its own the driver leaves the service's write cache on: no write is synced by itself.
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let features = features.bits() | VirtioBlkFeatureFlags::FLUSH.bits();
    let begun = Instant::now();
    loop {
        match VhostUser::new(path, features) {
            Err(e) if is_starting(&e) && begun.elapsed() < START => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

fn is_starting(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Places in a volume, all over it and the same in every run.
#[derive(Debug)]
pub(crate) struct Places {
    seed: u64,
    count: u64,
}

impl Places {
    /// Those of blocks of 4 KiB in `size` bytes.
    pub(crate) fn new(seed: u64, size: u64) -> Self {
        Self { seed, count: (size / BLOCK as u64).max(1) }
    }

    /// The next, in bytes: a linear congruential step (Knuth, MMIX).
    pub(crate) fn next(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 16) % self.count * BLOCK as u64
    }
}

/// Operations in flight.
pub(crate) const DEPTH: usize = 32;
/// Bytes of an operation.
pub(crate) const BLOCK: usize = 4096;
/// A power of two with three descriptors for each operation.
const QUEUE_SIZE: u16 = 128;
/// How long a service may take to come up.
const START: Duration = Duration::from_secs(10);
/// Milliseconds without a completion after which a service is broken.
const PATIENCE: u16 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_blocks_of_the_volume_and_many() {
        let mut places = Places::new(1, 1 << 20);
        let all: std::collections::BTreeSet<_> = (0..4096).map(|_| places.next()).collect();
        assert!(all.iter().all(|at| at % 4096 == 0 && *at < 1 << 20));
        // 256 blocks, each missed by 4096 draws with a chance of e^-16.
        assert_eq!(all.len(), 256);
    }
}
