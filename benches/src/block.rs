//! Random reads and writes of 4 KiB on a volume, 32 in flight: on the device itself, and through vhost-user-blk.

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::time::Duration;

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

use crate::front_end::BLOCK;
use crate::front_end::DEPTH;
use crate::front_end::FrontEnd;
use crate::front_end::Places;
use crate::measures;
use crate::service::Service;

/// Opens and serves one volume of at least 1 MiB.
pub trait BlockRig: Debug {
    /// The volume, to write. Called again only when what it gave before is gone.
    fn open(&self) -> Box<dyn BlockDevice>;

    /// Serves the volume at `socket`. A runner serves it in a process of its own, so [`Service::process`] is nearest to
    /// that; [`Service::thread`] is the same service for a volume that only this process has.
    ///
    /// # Errors
    /// It cannot be started.
    fn serve(&self, socket: &Path) -> io::Result<Service>;

    /// Starts another implementation's service of the same bytes, at the same time.
    ///
    /// # Errors
    /// Why there is none, and how to get it: the figures then have no peer.
    fn peer(&self, socket: &Path) -> Result<Service, String>;
}

/// Measures a volume that was written to its end before.
///
/// * `block.direct.randread.qd32`, `block.direct.randwrite.qd32`: operations per second on the [`BlockDevice`] itself.
/// * `block.randread.qd32`, `block.randwrite.qd32`: through the runner's vhost-user-blk service, against the peer's, driven
///   by the same front-end in turns; medians, because a machine that others use too is never the same for long.
///
/// # Panics
/// If the volume or its service fails.
pub fn block(criterion: &mut Criterion, rig: &impl BlockRig) {
    let device = rig.open();
    fill(&*device).expect("the volume takes bytes");
    for (name, write) in [("block.direct.randread.qd32", false), ("block.direct.randwrite.qd32", true)] {
        let mut queue = device.open_queue(32).expect("a queue");
        let mut places = Places::new(1, device.geometry().size);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(BATCH));
        group.bench_function("ours", |b| b.iter(|| batch(&mut *queue, &mut places, write).expect("I/O")));
        group.finish();
    }
    drop(device);
    served(rig).expect("the service serves");
}

/// Writes the whole volume, so that reads find bytes and writes find their blocks.
///
/// # Errors
/// Those of the volume.
pub fn fill(device: &dyn BlockDevice) -> io::Result<()> {
    let geometry = device.geometry();
    let step = (1 << 20).min(u64::from(geometry.max_bytes));
    let mut queue = device.open_queue(1).map_err(io::Error::other)?;
    let bytes: Vec<u8> = (0..step).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let ours = IoBuffers::zeroed(bytes.len());
    ours.write_at(0, &bytes);
    let mut buffers = Some(ours);
    for at in (0..geometry.size / step).map(|n| n * step) {
        let from = buffers.take().ok_or(io::ErrorKind::Other)?;
        submit(&mut *queue, BlockOp::Write { at, from })?;
        let mut done = Vec::new();
        wait(&mut *queue, &mut done)?;
        for one in done {
            one.result?;
            buffers = one.buffers;
        }
    }
    Ok(())
}

fn batch(queue: &mut dyn BlockQueue, places: &mut Places, write: bool) -> io::Result<()> {
    let mut free: Vec<IoBuffers> = (0..DEPTH).map(|_| IoBuffers::zeroed(BLOCK)).collect();
    let mut done: Vec<BlockDone> = Vec::new();
    let (mut sent, mut back) = (0, 0);
    while back < BATCH {
        while sent < BATCH
            && let Some(buffers) = free.pop()
        {
            let at = places.next();
            submit(
                queue,
                if write {
                    BlockOp::Write { at, from: buffers }
                } else {
                    BlockOp::Read { at, into: buffers }
                },
            )?;
            sent += 1;
        }
        wait(queue, &mut done)?;
        for one in done.drain(..) {
            one.result?;
            free.extend(one.buffers);
            back += 1;
        }
    }
    Ok(())
}

/// Never more than the queue's depth at a time.
fn submit(queue: &mut dyn BlockQueue, op: BlockOp) -> io::Result<()> {
    queue.submit(0, op).map_err(|_| io::Error::other("the queue takes less than its depth"))
}

/// Sets going what was submitted, and waits until something is done.
fn wait(queue: &mut dyn BlockQueue, done: &mut Vec<BlockDone>) -> io::Result<()> {
    queue.kick()?;
    while queue.reap(done) == 0 {
        let mut fds = [PollFd::new(queue.event_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(PATIENCE))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Drives both services in turns and prints the medians of their rounds.
fn served(rig: &impl BlockRig) -> io::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    // A service must outlive its front-end, and variables go in reverse.
    let _ours = rig.serve(&at("ours.sock"))?;
    let mut ours = FrontEnd::connect(&at("ours.sock"))?;
    let peer = rig.peer(&at("peer.sock"));
    let mut peer = peer.and_then(|service| match FrontEnd::connect(&at("peer.sock")) {
        Ok(front_end) => Ok((front_end, service)),
        Err(error) => Err(format!(
            "its service does not come up ({error}); `cargo bench --bench block` shows what it says"
        )),
    });
    if let Err(why) = &peer {
        println!("NOTE block.randread.qd32 and block.randwrite.qd32 have no peer: {why}");
    }
    for (name, write) in [("block.randread.qd32", false), ("block.randwrite.qd32", true)] {
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        let (rounds, time) = if measures() { (ROUNDS, ROUND) } else { (1, ROUND / 20) };
        for seed in 0..rounds {
            let mut turn = |of_peer: bool| -> io::Result<()> {
                match (&mut peer, of_peer) {
                    (Ok((peer, _)), true) => theirs.push(peer.random(write, seed, time)?),
                    (Err(_), true) => {}
                    (_, false) => mine.push(ours.random(write, seed, time)?),
                }
                Ok(())
            };
            // Who begins changes, so that a machine that grows slower or faster favours nobody.
            turn(seed % 2 == 0)?;
            turn(seed % 2 == 1)?;
        }
        let shown = |of: &mut [f64]| median(of).map_or_else(|| "-".to_owned(), |iops| format!("{iops:.0}"));
        println!("HARNESS {name} ours={} peer={}", shown(&mut mine), shown(&mut theirs));
    }
    Ok(())
}

fn median(of: &mut [f64]) -> Option<f64> {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied()
}

/// Operations per measured batch.
const BATCH: u64 = 256;
/// Turns of each side, and how long one is.
const ROUNDS: u64 = 15;
const ROUND: Duration = Duration::from_millis(500);
/// Milliseconds without a completion after which a device is broken.
const PATIENCE: u16 = 10_000;
