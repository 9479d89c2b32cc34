//! virtio-net: frames between a driver's two queues and a [`FramePort`].
//!
//! Frames are received into and sent from guest memory itself, behind the header that both sides use alike. A frame that
//! the port has no room for waits, and so does everything behind it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use virtio_bindings::bindings::virtio_net;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::chain::Chain;
use super::chain::Fault;
use super::chain::Spans;
use super::device::Next;
use super::device::Served;
use super::device::VirtioDevice;
use crate::memory;

/// One NIC with one pair of queues.
#[derive(Debug)]
pub struct Net {
    port: Box<dyn FramePort>,
    mac: [u8; 6],
    offers: Offloads,
    acked: u64,
    inward: Waiting,
    outward: Waiting,
    lens: Vec<u32>,
}

/// Chains that were taken and not given back, oldest first.
#[derive(Debug, Default)]
struct Waiting {
    heads: Vec<u16>,
    frames: Vec<IoBuffers>,
}

impl Waiting {
    fn push(&mut self, head: u16, frame: IoBuffers) {
        self.heads.push(head);
        self.frames.push(frame);
    }

    fn len(&self) -> usize {
        self.heads.len()
    }

    fn clear(&mut self) {
        self.heads.clear();
        self.frames.clear();
    }

    /// Forgets the first `count` frames and gives their chains.
    fn finish(&mut self, count: usize) -> Vec<u16> {
        let count = count.min(self.len());
        self.frames.drain(..count);
        self.heads.drain(..count).collect()
    }
}

impl Net {
    /// A NIC with address `mac` on `port`.
    pub fn new(mut port: Box<dyn FramePort>, mac: [u8; 6]) -> Self {
        let offers = port.offloads(Offloads { checksum: true, ..Offloads::default() });
        let (inward, outward) = (Waiting::default(), Waiting::default());
        Self { port, mac, offers, acked: 0, inward, outward, lens: vec![0; BATCH] }
    }

    fn has(&self, feature: u32) -> bool {
        self.acked & 1 << feature != 0
    }

    /// Moves frames of the driver to the port; says whether chains were given back, and whether more may be waiting.
    fn send(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<(bool, bool), Fault> {
        let mut used = false;
        for _ in 0..TURNS {
            queue.disable_notification(&**memory).map_err(Fault::ring)?;
            while self.outward.len() < BATCH
                && let Some(chain) = queue.iter(memory.clone()).map_err(Fault::ring)?.next()
            {
                let chain = Chain::read(chain, CHAIN_MAX)?;
                let frame = self.outgoing(&chain.readable, memory)?;
                self.outward.push(chain.head, frame);
            }
            let more = queue.enable_notification(&**memory).map_err(Fault::ring)?;
            let sent = self.hand_over();
            for head in self.outward.finish(sent) {
                queue.add_used(&**memory, head, 0).map_err(Fault::ring)?;
                used = true;
            }
            if sent == 0 || !more && self.outward.len() == 0 {
                return Ok((used, false));
            }
        }
        Ok((used, true))
    }

    /// A frame of the driver, whose header must say nothing that was not agreed on.
    fn outgoing(&self, spans: &Spans, memory: &Arc<GuestMemoryMmap>) -> Result<IoBuffers, Fault> {
        let len = usize::try_from(spans.len()).unwrap_or(usize::MAX);
        if !(VNET_HEADER + 1..=FRAME_MAX).contains(&len) {
            return Err(Fault(format!("a frame of {len} bytes with its header")));
        }
        let frame = whole(spans, memory)?;
        let mut header = [0; 2];
        frame.read_at(0, &mut header);
        let [flags, segments] = header;
        // virtio 1.2 §5.1.6.2. Whoever receives it checks again: the guest can still write here.
        let allowed = if self.has(virtio_net::VIRTIO_NET_F_CSUM) { NEEDS_CHECKSUM } else { 0 };
        if flags & !allowed != 0 || segments != 0 {
            return Err(Fault(format!(
                "a frame with offloads that were not agreed on ({flags:#x}, {segments:#x})"
            )));
        }
        Ok(frame)
    }

    /// Gives the port what it takes; says how many frames.
    fn hand_over(&mut self) -> usize {
        if self.outward.len() == 0 {
            return 0;
        }
        match self.port.send(&self.outward.frames) {
            Ok(count) => count,
            Err(error) => {
                note(&error);
                0
            }
        }
    }

    /// Moves frames of the port to the driver; says whether chains were given back, and whether the port has no more.
    fn receive(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<(bool, bool), Fault> {
        let mut used = false;
        for _ in 0..TURNS {
            self.take_buffers(queue, memory)?;
            if self.inward.len() == 0 {
                return Ok((used, false));
            }
            let count = match self.port.recv(&mut self.inward.frames, &mut self.lens) {
                Ok(count) => count.min(self.inward.len()),
                Err(error) => {
                    note(&error);
                    0
                }
            };
            if count == 0 {
                return Ok((used, true));
            }
            if !self.has(virtio_net::VIRTIO_NET_F_GUEST_CSUM) {
                self.inward
                    .frames
                    .iter()
                    .take(count)
                    .zip(&self.lens)
                    .for_each(|(frame, len)| fill_in(frame, *len));
            }
            for (head, len) in self.inward.finish(count).into_iter().zip(&self.lens) {
                queue.add_used(&**memory, head, *len).map_err(Fault::ring)?;
                used = true;
            }
        }
        Ok((used, false))
    }

    /// Takes room for frames from the driver, a batch at most.
    fn take_buffers(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<(), Fault> {
        loop {
            while self.inward.len() < BATCH {
                let Some(chain) = queue.iter(memory.clone()).map_err(Fault::ring)?.next() else { break };
                let chain = Chain::read(chain, CHAIN_MAX)?;
                if chain.writable.len() < u64::try_from(VNET_HEADER).unwrap_or(0) {
                    return Err(Fault("no room for a frame's header".into()));
                }
                self.inward.push(chain.head, whole(&chain.writable, memory)?);
            }
            if self.inward.len() == BATCH {
                return queue.disable_notification(&**memory).map_err(Fault::ring);
            }
            if !queue.enable_notification(&**memory).map_err(Fault::ring)? {
                return Ok(());
            }
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let checksum = u64::from(self.offers.checksum);
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << virtio_net::VIRTIO_NET_F_MAC
            | checksum << virtio_net::VIRTIO_NET_F_CSUM
            | checksum << virtio_net::VIRTIO_NET_F_GUEST_CSUM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// virtio 1.2 §5.1.4, `struct virtio_net_config`: of it, the address.
    fn config(&self) -> Vec<u8> {
        let mut space = self.mac.to_vec();
        space.resize(CONFIG_LEN, 0);
        space
    }

    fn activate(&mut self, features: u64) {
        self.acked = features;
    }

    fn serve(&mut self, queues: &mut [Queue], memory: &Arc<GuestMemoryMmap>) -> Result<Served, Fault> {
        let [receive, send] = queues else { return Ok(Served::default()) };
        let mut served = Served::default();
        let mut more = false;
        let mut starved = false;
        if send.ready() {
            let (used, again) = self.send(send, memory)?;
            more |= again;
            served.notify |= u64::from(used && send.needs_notification(&**memory).map_err(Fault::ring)?) << 1;
        }
        if receive.ready() {
            let (used, empty) = self.receive(receive, memory)?;
            starved = !empty && self.inward.len() == 0;
            more |= !empty && !starved;
            served.notify |= u64::from(used && receive.needs_notification(&**memory).map_err(Fault::ring)?);
        }
        served.next = match (more, starved, self.outward.len() > 0) {
            (true, ..) => Next::Now,
            // The port's event also stands for frames that the driver has no room for: then it says nothing about room
            // in the port.
            (_, true, true) => Next::Soon,
            (_, true, false) => Next::Kick,
            (_, false, _) => Next::Event,
        };
        Ok(served)
    }

    fn abandon(&mut self) -> usize {
        self.inward.clear();
        self.outward.clear();
        0
    }

    fn reset(&mut self) {
        self.inward.clear();
        self.outward.clear();
        self.acked = 0;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.port.event_fd())
    }
}

/// All of `spans` as buffers.
fn whole(spans: &Spans, memory: &Arc<GuestMemoryMmap>) -> Result<IoBuffers, Fault> {
    let ranges = memory::host_ranges(memory, &spans.0);
    let ranges = ranges.ok_or_else(|| Fault("a frame outside of guest memory".into()))?;
    Ok(memory::buffers(memory, ranges))
}

/// Fills in the checksum that a received frame's header leaves to the driver, which did not agree to that.
fn fill_in(frame: &IoBuffers, len: u32) {
    let mut header = [0; VNET_HEADER];
    frame.read_at(0, &mut header);
    let [flags, .., start_lo, start_hi, offset_lo, offset_hi, _, _] = header;
    if flags & NEEDS_CHECKSUM == 0 {
        return;
    }
    let start = VNET_HEADER + usize::from(u16::from_le_bytes([start_lo, start_hi]));
    let place = start + usize::from(u16::from_le_bytes([offset_lo, offset_hi]));
    let end = usize::try_from(len).unwrap_or(0).min(FRAME_MAX);
    let mut bytes = vec![0; end.saturating_sub(start)];
    frame.read_at(start, &mut bytes);
    if place + 2 <= end {
        frame.write_at(place, &checksum(&bytes).to_be_bytes());
    }
    frame.write_at(0, &[flags & !NEEDS_CHECKSUM]);
}

/// The Internet checksum of `bytes`, whose checksum field holds that of the pseudo header. Never zero, which UDP reads as
/// "none".
///
/// # Source
/// RFC 1071 §1, RFC 768.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    // At most 32 Ki words of 16 bits: no overflow.
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !u16::try_from(sum).unwrap_or(u16::MAX) {
        0 => 0xffff,
        sum => sum,
    }
}

fn note(error: &io::Error) {
    if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
        tracing::warn!(%error, "a NIC's port does not work");
    }
}

const QUEUE_SIZE: u16 = 256;
/// Frames of one call of the port.
const BATCH: usize = 32;
/// Calls of the port in one turn, before other devices have theirs.
const TURNS: usize = 8;
const CHAIN_MAX: usize = 64;
/// The largest frame: its header and 64 KiB.
const FRAME_MAX: usize = VNET_HEADER + 65_550;
const CONFIG_LEN: usize = 12;
const NEEDS_CHECKSUM: u8 = 1;
