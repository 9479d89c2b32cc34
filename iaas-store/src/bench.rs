//! Drives a volume as hard as it goes, for benches: on the device itself, without a guest.

use std::io;
use std::time::Duration;
use std::time::Instant;

use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::IoBuffers;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;

/// What to do at random places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// `block.randread`.
    RandRead,
    /// `block.randwrite`.
    RandWrite,
}

/// Runs `ops` operations of `block` bytes with `depth` in flight, at places that follow from `seed`, and says how long it
/// took. The volume should have been written before, or reads find holes.
///
/// # Errors
/// That of the first operation that fails.
pub fn random(
    device: &dyn BlockDevice,
    pattern: Pattern,
    depth: u16,
    block: u32,
    ops: u64,
    seed: u64,
) -> io::Result<Duration> {
    let places = (device.geometry().size / u64::from(block.max(1))).max(1);
    let mut queue = device.open_queue(depth).map_err(io::Error::other)?;
    let mut free: Vec<IoBuffers> = (0..depth).map(|_| IoBuffers::zeroed(block as usize)).collect();
    let (mut started, mut ended, mut random) = (0, 0, seed | 1);
    let mut done = Vec::with_capacity(depth.into());
    let start = Instant::now();
    while ended < ops {
        while started < ops
            && let Some(buffers) = free.pop()
        {
            // xorshift64: any spread will do, the same for the same seed.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = random % places * u64::from(block);
            let op = match pattern {
                Pattern::RandRead => BlockOp::Read { at, into: buffers },
                Pattern::RandWrite => BlockOp::Write { at, from: buffers },
            };
            queue.submit(started, op).map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
            started += 1;
        }
        queue.kick()?;
        wait(&mut *queue, &mut done)?;
        for BlockDone { result, buffers, .. } in done.drain(..) {
            result?;
            free.extend(buffers);
            ended += 1;
        }
    }
    Ok(start.elapsed())
}

/// Waits until something has ended.
fn wait(queue: &mut dyn BlockQueue, done: &mut Vec<BlockDone>) -> io::Result<()> {
    while queue.reap(done) == 0 {
        let mut fds = [PollFd::new(queue.event_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            other => drop(other?),
        }
    }
    Ok(())
}
