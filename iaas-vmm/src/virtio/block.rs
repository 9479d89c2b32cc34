//! virtio-blk: requests of a guest on one queue become operations on a [`BlockQueue`], completed in any order.
//!
//! Independent of the transport: a [`Queue`], guest memory and the volume's queue come in, status bytes and used entries go
//! out. Data is read and written in the guest's own memory; only parts that the volume cannot take as they are (not
//! aligned to its block) pass through a buffer of ours, at most [`BOUNCE_LIMIT`] bytes of them at a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iaas_core::Result;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::Geometry;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::buffer::IoRange;
use virtio_bindings::bindings::virtio_blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
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

/// One virtio-blk device with one queue.
#[derive(Debug)]
pub struct Block {
    geometry: Geometry,
    serial: [u8; 20],
    acked: u64,
    io: Box<dyn BlockQueue>,
    requests: Slots<Request>,
    pieces: Slots<Piece>,
    /// Requests that still have operations to submit, oldest first.
    ready: VecDeque<usize>,
    /// An operation that the volume's queue had no room for.
    held: Option<(usize, BlockOp)>,
    bounced: usize,
    done: Vec<BlockDone>,
    failed: Option<Fault>,
}

/// What a turn of the device asks of its transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// The guest must be interrupted.
    pub notify: bool,
    /// There is more to do: call again without waiting for a kick.
    pub again: bool,
}

impl Block {
    /// Puts a device in front of `volume`. `serial` is what `GET_ID` answers, cut to 20 bytes.
    ///
    /// # Errors
    /// Those of [`BlockDevice::open_queue`].
    pub fn new(volume: &dyn BlockDevice, serial: &str, depth: u16) -> Result<Self> {
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            geometry: volume.geometry(),
            serial: id,
            acked: 0,
            io: volume.open_queue(depth)?,
            requests: Slots::default(),
            pieces: Slots::default(),
            ready: VecDeque::new(),
            held: None,
            bounced: 0,
            done: Vec::new(),
            failed: None,
        })
    }

    /// The features that the device offers.
    pub fn features(&self) -> u64 {
        let bit = |bit: u32, on: bool| u64::from(on) << bit;
        let writable = !self.geometry.read_only;
        bit(VIRTIO_F_VERSION_1, true)
            | bit(VIRTIO_RING_F_EVENT_IDX, true)
            | bit(VIRTIO_RING_F_INDIRECT_DESC, true)
            | bit(virtio_blk::VIRTIO_BLK_F_SEG_MAX, true)
            | bit(virtio_blk::VIRTIO_BLK_F_BLK_SIZE, true)
            | bit(virtio_blk::VIRTIO_BLK_F_TOPOLOGY, true)
            | bit(virtio_blk::VIRTIO_BLK_F_FLUSH, true)
            | bit(virtio_blk::VIRTIO_BLK_F_RO, !writable)
            | bit(virtio_blk::VIRTIO_BLK_F_DISCARD, writable && self.geometry.discard)
            | bit(virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES, writable && self.geometry.write_zeroes)
    }

    /// Takes the features that the driver accepted.
    pub fn set_acked(&mut self, features: u64) {
        self.acked = features;
    }

    /// Takes a volume's new shape after it was resized.
    pub fn set_geometry(&mut self, geometry: Geometry) {
        self.geometry = geometry;
    }

    /// The configuration space.
    ///
    /// # Source
    /// virtio 1.2 §5.2.4, `struct virtio_blk_config`.
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let shape = &self.geometry;
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let ratio = (shape.preferred / shape.block.max(1)).max(1);
        let opt = u32::try_from(self.piece_limit()).unwrap_or(u32::MAX) / shape.block.max(1);
        // Sectors of one discard: what fits the field and the volume's blocks.
        let trim = u32::MAX / self.sectors_per_block() * self.sectors_per_block();
        put(0, &(shape.size / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &shape.block.to_le_bytes());
        put(24, &[u8::try_from(ratio.ilog2()).unwrap_or(0), 0]);
        put(26, &u16::try_from(ratio).unwrap_or(1).to_le_bytes());
        put(28, &opt.to_le_bytes());
        put(32, &[1]);
        put(34, &1u16.to_le_bytes());
        put(36, &trim.to_le_bytes());
        put(40, &TRIM_SEGMENTS.to_le_bytes());
        put(44, &self.sectors_per_block().to_le_bytes());
        put(48, &trim.to_le_bytes());
        put(52, &TRIM_SEGMENTS.to_le_bytes());
        put(56, &[u8::from(shape.discard)]);
        space
    }

    /// Readable when the volume has finished something; then call [`serve`](Self::serve).
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.io.event_fd()
    }

    /// Requests that the guest still waits for.
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// Why the device no longer works, if so.
    pub fn failed(&self) -> Option<&Fault> {
        self.failed.as_ref()
    }

    /// Takes new requests, submits what there is room for, and completes what is done. Never blocks; takes at most one
    /// queue's worth of requests at a time.
    ///
    /// # Errors
    /// [`Fault`]: the driver broke the protocol. The device does nothing more until [`reset`](Self::reset).
    pub fn serve(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<Turn, Fault> {
        if let Some(fault) = &self.failed {
            let fault = fault.clone();
            self.reap_blind();
            return Err(fault);
        }
        self.turn(queue, memory).inspect_err(|fault| self.failed = Some(fault.clone()))
    }

    /// Forgets the driver. To be called when nothing is [outstanding](Self::outstanding).
    pub fn reset(&mut self) {
        self.requests = Slots::default();
        self.pieces = Slots::default();
        self.ready.clear();
        self.held = None;
        self.bounced = 0;
        self.done.clear();
        self.failed = None;
    }

    /// Begins nothing more and takes back what the volume has finished, without telling the driver; says what is still
    /// [outstanding](Self::outstanding). Afterwards the device only waits for its [reset](Self::reset).
    pub fn abandon(&mut self) -> usize {
        self.failed.get_or_insert_with(|| Fault("it went away".into()));
        self.ready.clear();
        self.reap_blind();
        self.outstanding()
    }

    /// Operations that the volume has not given back; while there are any, guest memory may still be written.
    pub fn outstanding(&self) -> usize {
        self.pieces.len() - usize::from(self.held.is_some())
    }

    fn turn(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<Turn, Fault> {
        // A ring that ends in the middle of nowhere would be full for ever: its index says so and its places cannot be read.
        if queue.ready() && !queue.is_valid(&**memory) {
            return Err(Fault("a queue outside of guest memory".into()));
        }
        let mut budget = queue.size();
        let mut turn = Turn::default();
        let mut used = self.reap(queue, memory)?;
        while queue.ready() {
            queue.disable_notification(&**memory).map_err(Fault::ring)?;
            self.take(queue, memory, &mut budget)?;
            self.submit();
            used |= self.reap(queue, memory)?;
            if budget == 0 {
                turn.again = true;
                break;
            }
            if !queue.enable_notification(&**memory).map_err(Fault::ring)? {
                break;
            }
        }
        turn.notify = used && queue.needs_notification(&**memory).map_err(Fault::ring)?;
        Ok(turn)
    }

    /// Reads new requests off the available ring.
    fn take(
        &mut self,
        queue: &mut Queue,
        memory: &Arc<GuestMemoryMmap>,
        budget: &mut u16,
    ) -> Result<(), Fault> {
        let most = usize::from(queue.size());
        for chain in queue.iter(memory.clone()).map_err(Fault::ring)? {
            if self.requests.len() >= most {
                return Err(Fault("more requests in flight than the ring has descriptors".into()));
            }
            let chain = Chain::read(chain, CHAIN_MAX)?;
            let request = self.parse(chain, memory)?;
            let slot = self.requests.put(request);
            self.ready.push_back(slot);
            *budget -= 1;
            if *budget == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Understands a request. One that makes no sense to a disk is answered with an error; only one that cannot even be
    /// answered is a fault.
    fn parse(&self, chain: Chain, memory: &Arc<GuestMemoryMmap>) -> Result<Request, Fault> {
        let Chain { head, mut readable, mut writable } = chain;
        let status = writable.split_back(1).ok_or_else(|| Fault("no room for a status byte".into()))?;
        let header = readable.split_front(HEADER).ok_or_else(|| Fault("no whole request header".into()))?;
        // Before anything is done for a request that cannot be answered.
        if memory::host_ranges(memory, &status.0).is_none() {
            return Err(Fault("a status byte outside of guest memory".into()));
        }
        let mut bytes = [0; 16];
        header.copy_to(memory, &mut bytes)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let at = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let job = match kind {
            virtio_blk::VIRTIO_BLK_T_IN => self.data(at, &writable, memory, false)?,
            virtio_blk::VIRTIO_BLK_T_OUT if self.geometry.read_only => Job::Answer(IOERR),
            virtio_blk::VIRTIO_BLK_T_OUT => self.data(at, &readable, memory, true)?,
            virtio_blk::VIRTIO_BLK_T_FLUSH => Job::Flush { sent: false },
            virtio_blk::VIRTIO_BLK_T_GET_ID => self.identify(&writable, memory)?,
            virtio_blk::VIRTIO_BLK_T_DISCARD => {
                self.trim(&readable, memory, virtio_blk::VIRTIO_BLK_F_DISCARD)?
            }
            virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.trim(&readable, memory, virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES)?
            }
            _ => Job::Answer(UNSUPP),
        };
        // virtio 1.2 §2.7.8: at least the bytes that were written; for a read those of the data and the status.
        let written = match &job {
            Job::Data(data) if !data.write => u32::try_from(data.total).unwrap_or(u32::MAX - 1),
            Job::Answer(OK) => u32::try_from(self.serial.len()).unwrap_or(0),
            _ => 0,
        };
        Ok(Request { head, status, written, job, memory: memory.clone(), outstanding: 0, answer: OK })
    }

    fn data(
        &self,
        at: Option<u64>,
        spans: &Spans,
        memory: &Arc<GuestMemoryMmap>,
        write: bool,
    ) -> Result<Job, Fault> {
        let ranges = memory::host_ranges(memory, &spans.0)
            .ok_or_else(|| Fault("data outside of guest memory".into()))?;
        let fits = at.is_some_and(|at| self.fits(at, spans.len()));
        match (at, usize::try_from(spans.len())) {
            (Some(at), Ok(total)) if fits => {
                let all = memory::buffers(memory, ranges);
                Ok(Job::Data(Data { write, at, all, total, next: 0 }))
            }
            _ => Ok(Job::Answer(IOERR)),
        }
    }

    /// Whether a run of bytes lies in the volume and on its blocks.
    fn fits(&self, at: u64, len: u64) -> bool {
        let block = u64::from(self.geometry.block);
        let inside = at.checked_add(len).is_some_and(|end| end <= self.geometry.size);
        inside && at.is_multiple_of(block) && len.is_multiple_of(block)
    }

    fn identify(&self, writable: &Spans, memory: &GuestMemoryMmap) -> Result<Job, Fault> {
        // virtio 1.2 §5.2.6.1: the buffer has 20 bytes.
        let room = usize::try_from(writable.len()).unwrap_or(usize::MAX);
        if room < self.serial.len() {
            return Ok(Job::Answer(IOERR));
        }
        writable.copy_from(memory, &self.serial)?;
        Ok(Job::Answer(OK))
    }

    fn trim(&self, readable: &Spans, memory: &GuestMemoryMmap, feature: u32) -> Result<Job, Fault> {
        if self.features() & 1 << feature == 0 {
            return Ok(Job::Answer(UNSUPP));
        }
        let most = u64::from(TRIM_SEGMENTS) * TRIM_LEN;
        let len = readable.len();
        if len == 0 || len > most || !len.is_multiple_of(TRIM_LEN) {
            return Ok(Job::Answer(IOERR));
        }
        // At most `TRIM_SEGMENTS * 16` bytes, as just checked.
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        readable.copy_to(memory, &mut bytes)?;
        let zero = feature == virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
        let parts: Option<Vec<_>> = bytes.chunks_exact(16).map(|part| self.trim_part(part, zero)).collect();
        Ok(parts.map_or(Job::Answer(IOERR), |parts| Job::Trim { zero, parts, next: 0 }))
    }

    /// One `virtio_blk_discard_write_zeroes`: offset and length in bytes, and whether to free the space.
    fn trim_part(&self, part: &[u8], zero: bool) -> Option<(u64, u64, bool)> {
        let at = u64::from_le_bytes(part.get(..8)?.try_into().ok()?).checked_mul(SECTOR)?;
        let len = u64::from(u32::from_le_bytes(part.get(8..12)?.try_into().ok()?)) * SECTOR;
        let flags = u32::from_le_bytes(part.get(12..16)?.try_into().ok()?);
        // virtio 1.2 §5.2.6.2: `unmap` is the only flag, and a discard has none.
        let known = flags & !UNMAP == 0 && (zero || flags == 0);
        (known && self.fits(at, len)).then_some((at, len, flags & UNMAP != 0))
    }

    /// Gives the volume as much as it has room for.
    fn submit(&mut self) {
        let mut any = false;
        while let Some((piece, op)) = self.next_op() {
            let tag = u64::try_from(piece).unwrap_or(u64::MAX);
            match self.io.submit(tag, op) {
                Ok(()) => any = true,
                Err(op) => {
                    self.held = Some((piece, op));
                    break;
                }
            }
        }
        if any && let Err(error) = self.io.kick() {
            // What was taken stays in the volume's queue; the next kick tries again.
            tracing::warn!(%error, "a volume's queue could not be started");
        }
    }

    /// The next operation to submit, with its slot in `pieces`.
    fn next_op(&mut self) -> Option<(usize, BlockOp)> {
        if let Some(held) = self.held.take() {
            return Some(held);
        }
        let limit = self.piece_limit();
        let block = usize::try_from(self.geometry.block).unwrap_or(usize::MAX);
        while let Some(&slot) = self.ready.front() {
            // Bounded memory: wait for bounced pieces to come back before more are made.
            if self.bounced > BOUNCE_LIMIT {
                return None;
            }
            let Some(request) = self.requests.get_mut(slot) else {
                self.ready.pop_front();
                continue;
            };
            if let Some((op, bounce)) = request.next_op(limit, block) {
                request.outstanding += 1;
                self.bounced += bounce.as_ref().map_or(0, Bounce::len);
                return Some((self.pieces.put(Piece { request: slot, bounce }), op));
            }
            self.ready.pop_front();
            if request.outstanding == 0 {
                // Answered without the volume: comes back through `reap`.
                request.outstanding = 1;
                let piece = self.pieces.put(Piece { request: slot, bounce: None });
                let tag = u64::try_from(piece).unwrap_or(u64::MAX);
                self.done.push(BlockDone { tag, result: Ok(()), buffers: None });
            }
        }
        None
    }

    /// Completes what the volume has finished; says whether a used entry was added.
    fn reap(&mut self, queue: &mut Queue, memory: &Arc<GuestMemoryMmap>) -> Result<bool, Fault> {
        let mut used = false;
        loop {
            self.io.reap(&mut self.done);
            if self.done.is_empty() {
                break;
            }
            let mut finished = std::mem::take(&mut self.done).into_iter();
            while let Some(done) = finished.next() {
                let Some(request) = self.finish_piece(done) else { continue };
                if let Err(fault) = request.give_back(queue, memory) {
                    // The others have come back too, and must not be waited for.
                    self.done.extend(finished);
                    return Err(fault);
                }
                used = true;
            }
            self.submit();
        }
        Ok(used)
    }

    /// Notes the end of one operation; gives the request if that was its last.
    fn finish_piece(&mut self, done: BlockDone) -> Option<Request> {
        let slot = usize::try_from(done.tag).ok()?;
        let Piece { request: owner, bounce } = self.pieces.take(slot)?;
        let writes_through = self.acked & 1 << virtio_blk::VIRTIO_BLK_F_FLUSH == 0;
        let request = self.requests.get_mut(owner)?;
        request.outstanding -= 1;
        if let Some(bounce) = bounce {
            self.bounced -= bounce.len();
            if done.result.is_ok() {
                bounce.give_back(done.buffers.as_ref());
            }
        }
        if let Err(error) = &done.result {
            request.answer = answer_to(error);
            request.job = Job::Answer(request.answer);
        }
        if request.outstanding > 0 || !request.job.submitted() {
            return None;
        }
        // Without a flush command of its own, the driver takes a finished write for durable (virtio 1.2 §5.2.6.2).
        if writes_through && request.job.changes() {
            request.job = Job::Flush { sent: false };
            self.ready.push_back(owner);
            return None;
        }
        self.requests.take(owner)
    }

    /// Takes back operations of a device that has failed, without telling the guest.
    fn reap_blind(&mut self) {
        self.io.reap(&mut self.done);
        for done in std::mem::take(&mut self.done) {
            if let Ok(slot) = usize::try_from(done.tag) {
                self.bounced -= self.pieces.take(slot).and_then(|p| p.bounce).map_or(0, |b| b.len());
            }
        }
    }

    /// The most bytes of one operation: what the volume takes, whole blocks, and not more than a bounce may hold.
    fn piece_limit(&self) -> usize {
        let block = self.geometry.block.max(1);
        let most = self.geometry.max_bytes.min(1 << 20) / block * block;
        usize::try_from(most.max(block)).unwrap_or(usize::MAX)
    }

    fn sectors_per_block(&self) -> u32 {
        (self.geometry.block / 512).max(1)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        Self::features(self)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Self::config(self).to_vec()
    }

    fn activate(&mut self, features: u64) {
        self.set_acked(features);
    }

    fn serve(&mut self, queues: &mut [Queue], memory: &Arc<GuestMemoryMmap>) -> Result<Served, Fault> {
        let Some(queue) = queues.first_mut() else { return Ok(Served::default()) };
        let turn = Self::serve(self, queue, memory)?;
        let next = if turn.again { Next::Now } else { Next::Event };
        Ok(Served { notify: u64::from(turn.notify), next })
    }

    fn abandon(&mut self) -> usize {
        Self::abandon(self)
    }

    fn reset(&mut self) {
        Self::reset(self);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(Self::event_fd(self))
    }
}

/// A request of the guest.
#[derive(Debug)]
struct Request {
    head: u16,
    status: Spans,
    /// Bytes of data that the guest will find in its buffers.
    written: u32,
    job: Job,
    memory: Arc<GuestMemoryMmap>,
    outstanding: u32,
    answer: u8,
}

impl Request {
    /// Answers the driver.
    fn give_back(&self, queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        self.status.copy_from(&self.memory, &[self.answer])?;
        let len = if self.answer == OK { self.written + 1 } else { 1 };
        queue.add_used(memory, self.head, len).map_err(Fault::ring)
    }

    /// The next operation, of at most `limit` bytes, or `None` if all are submitted.
    fn next_op(&mut self, limit: usize, block: usize) -> Option<(BlockOp, Option<Bounce>)> {
        match &mut self.job {
            Job::Answer(answer) => {
                self.answer = *answer;
                None
            }
            Job::Flush { sent: true } => None,
            Job::Flush { sent } => {
                *sent = true;
                Some((BlockOp::Flush, None))
            }
            Job::Trim { zero, parts, next } => {
                let (at, len, unmap) = *parts.get(*next)?;
                *next += 1;
                let op = if *zero {
                    BlockOp::WriteZeroes { at, len, unmap }
                } else {
                    BlockOp::Discard { at, len }
                };
                Some((op, None))
            }
            Job::Data(data) => data.next_op(&self.memory, limit, block),
        }
    }
}

/// What a request asks for.
#[derive(Debug)]
enum Job {
    Answer(u8),
    Flush { sent: bool },
    Trim { zero: bool, parts: Vec<(u64, u64, bool)>, next: usize },
    Data(Data),
}

impl Job {
    fn submitted(&self) -> bool {
        match self {
            Self::Answer(_) => true,
            Self::Flush { sent } => *sent,
            Self::Trim { parts, next, .. } => *next >= parts.len(),
            Self::Data(data) => data.next >= data.total,
        }
    }

    fn changes(&self) -> bool {
        match self {
            Self::Answer(_) | Self::Flush { .. } => false,
            Self::Trim { .. } => true,
            Self::Data(data) => data.write,
        }
    }
}

/// A read or write.
#[derive(Debug)]
struct Data {
    write: bool,
    at: u64,
    all: IoBuffers,
    total: usize,
    next: usize,
}

impl Data {
    fn next_op(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        limit: usize,
        block: usize,
    ) -> Option<(BlockOp, Option<Bounce>)> {
        let len = limit.min(self.total - self.next);
        if len == 0 {
            return None;
        }
        let at = self.at + u64::try_from(self.next).unwrap_or(0);
        let ranges = cut(self.all.ranges(), self.next, len);
        self.next += len;
        let aligned =
            |range: &IoRange| range.base.addr().is_multiple_of(block) && range.len.is_multiple_of(block);
        let direct = ranges.iter().all(aligned);
        let guest = memory::buffers(memory, ranges);
        let (buffers, bounce) = if direct {
            (guest, None)
        } else {
            let ours = IoBuffers::zeroed(len);
            if self.write {
                copy(&guest, &ours);
            }
            (ours, Some(Bounce { len, to: (!self.write).then_some(guest) }))
        };
        let op = if self.write {
            BlockOp::Write { at, from: buffers }
        } else {
            BlockOp::Read { at, into: buffers }
        };
        Some((op, bounce))
    }
}

/// An operation that is with the volume.
#[derive(Debug)]
struct Piece {
    request: usize,
    bounce: Option<Bounce>,
}

/// Where the bytes of a buffer of ours go when it comes back.
#[derive(Debug)]
struct Bounce {
    len: usize,
    to: Option<IoBuffers>,
}

impl Bounce {
    fn len(&self) -> usize {
        self.len
    }

    fn give_back(self, from: Option<&IoBuffers>) {
        if let (Some(from), Some(to)) = (from, &self.to) {
            copy(from, to);
        }
    }
}

/// Copies all bytes of `from` to `to`.
fn copy(from: &IoBuffers, to: &IoBuffers) {
    let mut page = [0; 4096];
    let mut at = 0;
    loop {
        let count = from.read_at(at, &mut page);
        if count == 0 {
            return;
        }
        to.write_at(at, page.get(..count).unwrap_or_default());
        at += count;
    }
}

/// The `len` bytes of `ranges` from `skip` on.
fn cut(ranges: &[IoRange], mut skip: usize, mut len: usize) -> Vec<IoRange> {
    let mut out = Vec::new();
    for range in ranges {
        if skip >= range.len {
            skip -= range.len;
            continue;
        }
        let here = len.min(range.len - skip);
        if here == 0 {
            break;
        }
        out.push(IoRange { base: range.base.wrapping_add(skip), len: here });
        len -= here;
        skip = 0;
    }
    out
}

/// Numbered places that are used again.
#[derive(Debug)]
struct Slots<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    fn put(&mut self, value: T) -> usize {
        let slot = self.free.pop().unwrap_or(self.places.len());
        match self.places.get_mut(slot) {
            Some(place) => *place = Some(value),
            None => self.places.push(Some(value)),
        }
        slot
    }

    fn take(&mut self, slot: usize) -> Option<T> {
        let value = self.places.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(value)
    }

    fn get_mut(&mut self, slot: usize) -> Option<&mut T> {
        self.places.get_mut(slot)?.as_mut()
    }

    fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

fn answer_to(error: &io::Error) -> u8 {
    if error.kind() == io::ErrorKind::Unsupported { UNSUPP } else { IOERR }
}

/// Descriptors of the ring.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Bytes of the configuration space.
pub const CONFIG_LEN: usize = 60;
/// The unit of offsets and lengths in the protocol (virtio 1.2 §5.2.6).
const SECTOR: u64 = 512;
/// `struct virtio_blk_req` before its data.
const HEADER: u64 = 16;
/// Data segments of a request; Linux makes no use of more than 128 - 2.
const SEG_MAX: u32 = 126;
/// Header and status beside the data, with room for drivers that cut those too.
const CHAIN_MAX: usize = 132;
/// Ranges of one discard or write-zeroes request, and the bytes of each.
const TRIM_SEGMENTS: u32 = 16;
const TRIM_LEN: u64 = 16;
/// The flag of a write-zeroes range that allows to free its space.
const UNMAP: u32 = 1;
/// Bytes in buffers of ours at a time, beyond which no new one is made: 16 pieces of 1 MiB.
pub const BOUNCE_LIMIT: usize = 16 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[cfg(test)]
pub(crate) mod tests;
