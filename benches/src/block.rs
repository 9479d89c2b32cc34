//! Random reads and writes of 4 KiB on an open volume, 32 in flight.

use std::fmt::Debug;
use std::io;

use criterion::Criterion;
use criterion::Throughput;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::IoBuffers;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;

/// Opens a volume of at least 64 MiB.
pub trait BlockRig: Debug {
    /// A writable volume.
    fn open(&self) -> Box<dyn BlockDevice>;
}

/// Measures batches of 256 operations of 4 KiB with 32 in flight.
pub fn block(criterion: &mut Criterion, rig: &impl BlockRig) {
    let device = rig.open();
    let size = device.geometry().size;
    let mut group = criterion.benchmark_group("block");
    group.throughput(Throughput::Elements(BATCH));
    for (name, write) in [("direct.randread.qd32", false), ("direct.randwrite.qd32", true)] {
        let Ok(mut queue) = device.open_queue(DEPTH) else { return };
        let mut seed = 1_u64;
        group.bench_function(name, |b| b.iter(|| batch(&mut *queue, size, write, &mut seed)));
    }
    group.finish();
}

fn batch(queue: &mut dyn BlockQueue, size: u64, write: bool, seed: &mut u64) -> io::Result<()> {
    let mut free: Vec<IoBuffers> = (0..DEPTH).map(|_| IoBuffers::zeroed(4096)).collect();
    let mut done: Vec<BlockDone> = Vec::new();
    let (mut sent, mut back) = (0, 0);
    while back < BATCH {
        while sent < BATCH
            && let Some(buffers) = free.pop()
        {
            let at = next(seed) % (size / 4096) * 4096;
            let op = if write {
                BlockOp::Write { at, from: buffers }
            } else {
                BlockOp::Read { at, into: buffers }
            };
            match queue.submit(sent, op) {
                Ok(()) => sent += 1,
                Err(BlockOp::Read { into: buffers, .. } | BlockOp::Write { from: buffers, .. }) => {
                    free.push(buffers);
                    break;
                }
                Err(_) => return Err(io::Error::other("another operation came back")),
            }
        }
        queue.kick()?;
        if queue.reap(&mut done) == 0 {
            let mut fds = [PollFd::new(queue.event_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(1000_u16))?;
            queue.reap(&mut done);
        }
        for one in done.drain(..) {
            one.result?;
            free.extend(one.buffers);
            back += 1;
        }
    }
    Ok(())
}

/// A linear congruential step (Knuth, MMIX): the same places in every run.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 16
}

/// Operations in flight.
const DEPTH: u16 = 32;
/// Operations per measured batch.
const BATCH: u64 = 256;
