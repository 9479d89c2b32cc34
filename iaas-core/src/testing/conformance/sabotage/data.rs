//! Spoiled disks and wires.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use super::Spoil;
use super::Spoiler;
use crate::Id;
use crate::Result;
use crate::Term;
use crate::model::Port;
use crate::spi::Reading;
use crate::spi::block::FreezeReceipt;
use crate::spi::block::FreezeTicket;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockDone;
use crate::spi::dataplane::BlockOp;
use crate::spi::dataplane::BlockQueue;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::Geometry;
use crate::spi::dataplane::IoBuffers;
use crate::spi::dataplane::Offloads;
use crate::spi::dataplane::frame::VNET_HEADER;
use crate::spi::network::NetObject;
use crate::testing::conformance::net_program::WrapPort;
use crate::testing::conformance::volume_pool::WrapDevice;

/// Adds the vnet header to each frame's bytes.
pub(super) fn count_headers(reading: &mut Reading) {
    for way in ["rx", "tx"] {
        let packets = reading.totals.get(&format!("{way}-packets")).copied().unwrap_or(0);
        if let Some(bytes) = reading.totals.get_mut(&format!("{way}-bytes")) {
            *bytes += packets * VNET_HEADER as u128;
        }
    }
}

impl WrapDevice for Spoiler {
    fn device(&self, device: Box<dyn BlockDevice>) -> Box<dyn BlockDevice> {
        match self.spoil {
            Spoil::DirtyNew | Spoil::LosesFlush => {
                Box::new(SpoiledDevice { inner: device, spoil: self.spoil })
            }
            _ => device,
        }
    }

    fn term(&self, term: Term) -> Term {
        if self.spoil == Spoil::LetsStaleWrite { Term(1) } else { term }
    }
}

#[derive(Debug)]
struct SpoiledDevice {
    inner: Box<dyn BlockDevice>,
    spoil: Spoil,
}

impl BlockDevice for SpoiledDevice {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>> {
        let inner = self.inner.open_queue(depth)?;
        Ok(Box::new(SpoiledQueue { inner, spoil: self.spoil, done: Vec::new() }))
    }
    fn claim(&self, term: Term) -> Result<()> {
        self.inner.claim(term)
    }
    fn release(&self) -> Result<()> {
        self.inner.release()
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.inner.resize(size)
    }
    fn freeze(&self, ticket: &FreezeTicket) -> Result<FreezeReceipt> {
        self.inner.freeze(ticket)
    }
}

#[derive(Debug)]
struct SpoiledQueue {
    inner: Box<dyn BlockQueue>,
    spoil: Spoil,
    done: Vec<BlockDone>,
}

impl BlockQueue for SpoiledQueue {
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp> {
        if self.spoil == Spoil::LosesFlush && matches!(op, BlockOp::Flush) {
            self.done.push(BlockDone { tag, result: Ok(()), buffers: None });
            return Ok(());
        }
        self.inner.submit(tag, op)
    }
    fn kick(&mut self) -> io::Result<()> {
        self.inner.kick()
    }
    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        let before = out.len();
        out.append(&mut self.done);
        self.inner.reap(out);
        if self.spoil == Spoil::DirtyNew {
            out.iter().skip(before).filter_map(|d| d.buffers.as_ref()).for_each(dirty);
        }
        out.len() - before
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.inner.event_fd()
    }
}

/// Shows something where nothing was written.
fn dirty(buffers: &IoBuffers) {
    let mut bytes = vec![0; buffers.len()];
    buffers.read_at(0, &mut bytes);
    if bytes.iter().all(|b| *b == 0) {
        buffers.write_at(0, b"an older tenant's secret");
    }
}

/// Where packets leak between ports.
#[derive(Debug, Default)]
pub(crate) struct Hub(Mutex<Leaks>);

#[derive(Debug, Default)]
struct Leaks {
    queues: BTreeMap<Id<Port>, VecDeque<Vec<u8>>>,
    known: BTreeSet<IpAddr>,
}

impl Hub {
    fn leaks(&self) -> MutexGuard<'_, Leaks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns the addresses of a program.
    pub(super) fn learn(&self, objects: &[NetObject]) {
        let addrs = objects.iter().filter_map(|o| match o {
            NetObject::Port { addrs, .. } => Some(addrs),
            _ => None,
        });
        self.leaks().known.extend(addrs.flatten());
    }

    /// Gives a frame to every other port, if it is one to leak.
    fn flood(&self, from: Id<Port>, frame: &[u8], spoil: Spoil) {
        let ipv4 = frame.get(VNET_HEADER + 12..VNET_HEADER + 14) == Some(&[8, 0]);
        let src = frame.get(VNET_HEADER + 26..VNET_HEADER + 30).and_then(|b| <[u8; 4]>::try_from(b).ok());
        let mut leaks = self.leaks();
        let false_source = src.is_some_and(|src| !leaks.known.contains(&IpAddr::V4(Ipv4Addr::from(src))));
        if !ipv4 || (spoil == Spoil::PassesSpoofed && !false_source) {
            return;
        }
        for (_, queue) in leaks.queues.iter_mut().filter(|(id, _)| **id != from) {
            queue.push_back(frame.to_vec());
        }
    }
}

impl WrapPort for Spoiler {
    fn port(&self, id: Id<Port>, wire: Box<dyn FramePort>) -> Box<dyn FramePort> {
        if !matches!(self.spoil, Spoil::LeaksAcross | Spoil::PassesSpoofed) {
            return wire;
        }
        self.hub.leaks().queues.insert(id, VecDeque::new());
        Box::new(SpoiledPort { inner: wire, id, hub: self.hub.clone(), spoil: self.spoil })
    }
}

#[derive(Debug)]
struct SpoiledPort {
    inner: Box<dyn FramePort>,
    id: Id<Port>,
    hub: Arc<Hub>,
    spoil: Spoil,
}

impl FramePort for SpoiledPort {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        self.inner.offloads(want)
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let leaked = self.hub.leaks().queues.get_mut(&self.id).and_then(VecDeque::pop_front);
        match (leaked, into.first(), lens.first_mut()) {
            (Some(frame), Some(buffers), Some(len)) => {
                *len = u32::try_from(buffers.write_at(0, &frame)).unwrap_or(0);
                Ok(1)
            }
            _ => self.inner.recv(into, lens),
        }
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for frame in frames {
            let mut bytes = vec![0; frame.len()];
            frame.read_at(0, &mut bytes);
            self.hub.flood(self.id, &bytes, self.spoil);
        }
        self.inner.send(frames)
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.inner.event_fd()
    }
}
