//! A packet ring in a memfd: the runner's side ([`RingPort`]) and the switch's side (`RingLink`).
//!
//! The runner owns the memfd. It holds two rings of bytes, one for each direction, each with one producer and one consumer.
//! A record is its length (`u64`) and that many bytes, padded to 8; it may run over the end of the ring and goes on at its
//! beginning. Positions count bytes for ever; a position's place is its remainder by the ring's size, a power of two.
//!
//! **Neither side trusts the other.** Each keeps its own position to itself and only publishes it. Of the other's position and
//! of each length it believes nothing that does not fit into the ring: what does not is skipped and counted, so the worst that
//! a broken peer gets is the loss of its own frames. The file is sealed against shrinking and growing, which the switch checks
//! before it maps it.
//!
//! **A consumer releases a record only after it has passed it on**, so that a switch that dies loses none; the next one begins
//! where the last one released, and a frame that was passed on but not released arrives twice.
//!
//! **Doorbells are one-byte messages on the socket** over which the memfd came. `MSG_DONTWAIT` keeps a send from blocking
//! whatever the peer does to the socket's flags (an eventfd's `O_NONBLOCK` is shared with whoever has the descriptor), and
//! its end says at once that the peer is gone. A side that is about to sleep says so in the ring; only then is it rung.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use rustix::event::epoll;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;

use super::socket;
use crate::pipeline::LARGEST_FRAME;
use crate::sys::Mapping;

/// Bytes of each ring: eight super-frames. A power of two.
const SIZE: usize = 512 << 10;
/// Bytes before the rings.
const HEAD: usize = 4096;
/// "iaasring" and the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"iaasrng1");
/// Where the magic number is, and the size of each ring.
const AT_MAGIC: usize = 0;
const AT_SIZE: usize = 8;

/// Where the numbers and bytes of one ring are. Each number has a cache line of its own.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// What was produced so far; the producer writes it.
    head: usize,
    /// What was consumed so far; the consumer writes it.
    tail: usize,
    /// Not zero: the consumer sleeps until something is produced.
    hungry: usize,
    /// Not zero: the producer sleeps until something is consumed.
    stuck: usize,
    data: usize,
}

/// From the runner to the switch.
const OUT: Place = Place { head: 128, tail: 256, hungry: 384, stuck: 512, data: HEAD };
/// From the switch to the runner.
const IN: Place = Place { head: 640, tail: 768, hungry: 896, stuck: 1024, data: HEAD + SIZE };

/// One end of one ring that puts records in.
#[derive(Debug)]
struct Producer {
    map: Arc<Mapping>,
    at: Place,
    head: u64,
}

/// One end of one ring that takes records out.
#[derive(Debug)]
struct Consumer {
    map: Arc<Mapping>,
    at: Place,
    /// Released up to here.
    tail: u64,
    /// Read up to here.
    seen: u64,
    /// Times that the other side's numbers made no sense.
    broken: u64,
}

/// Bytes that a record of `len` bytes takes.
fn record(len: usize) -> u64 {
    8 + (len as u64).next_multiple_of(8)
}

/// The offset of a position in the ring's bytes.
fn offset(position: u64) -> usize {
    // The mask is below 2^32, so nothing is lost.
    usize::try_from(position & (SIZE as u64 - 1)).unwrap_or(0)
}

impl Producer {
    /// Goes on where the producer before it ended. A head that makes no sense is the peer's doing: it starts over at the tail.
    fn resume(map: Arc<Mapping>, at: Place) -> Self {
        let (head, tail) = (map.load(at.head), map.load(at.tail));
        let sane = head.is_multiple_of(8) && head.wrapping_sub(tail) <= SIZE as u64;
        Self { map, at, head: if sane { head } else { tail & !7 } }
    }

    /// Whether a record of `len` bytes fits. A tail that makes no sense leaves no room.
    fn has_room(&self, len: usize) -> bool {
        let used = self.head.wrapping_sub(self.map.load(self.at.tail));
        used <= SIZE as u64 && record(len) <= SIZE as u64 - used
    }

    /// Puts a record of `len` bytes in, which `copy` writes: (place in the mapping, bytes, offset in the record).
    fn push(&mut self, len: usize, mut copy: impl FnMut(&Mapping, usize, usize, usize) -> bool) -> bool {
        if len > LARGEST_FRAME || !self.has_room(len) {
            return false;
        }
        let start = self.head.wrapping_add(8);
        self.map.store(self.at.data + offset(self.head), len as u64);
        let first = len.min(SIZE - offset(start));
        let whole = copy(&self.map, self.at.data + offset(start), first, 0)
            && (first == len || copy(&self.map, self.at.data, len - first, first));
        if whole {
            self.head = self.head.wrapping_add(record(len));
        }
        whole
    }

    /// Lets the consumer see what was put in; says whether it must be woken.
    fn publish(&self) -> bool {
        self.map.store(self.at.head, self.head);
        let hungry = self.map.load(self.at.hungry) != 0;
        if hungry {
            self.map.store(self.at.hungry, 0);
        }
        hungry
    }

    /// Asks to be woken when there is room.
    fn wait_for_room(&self) {
        self.map.store(self.at.stuck, 1);
    }
}

impl Consumer {
    /// Goes on where the consumer before it released. A tail that makes no sense is the peer's doing: it skips everything.
    fn resume(map: Arc<Mapping>, at: Place) -> Self {
        let (head, tail) = (map.load(at.head), map.load(at.tail));
        let sane = tail.is_multiple_of(8) && head.wrapping_sub(tail) <= SIZE as u64;
        let tail = if sane { tail } else { head & !7 };
        Self { map, at, tail, seen: tail, broken: u64::from(!sane) }
    }

    /// The length of the next record, if there is one.
    fn peek(&mut self) -> Option<usize> {
        let ready = self.map.load(self.at.head).wrapping_sub(self.seen);
        if ready == 0 {
            return None;
        }
        let len = usize::try_from(self.map.load(self.at.data + offset(self.seen))).unwrap_or(usize::MAX);
        let limit = SIZE as u64 - self.seen.wrapping_sub(self.tail);
        if ready <= limit && ready.is_multiple_of(8) && len <= LARGEST_FRAME && record(len) <= ready {
            return Some(len);
        }
        self.broken += 1;
        self.seen = self.map.load(self.at.head) & !7;
        // Nothing of what was read before is released by this: the caller's next `release` covers it.
        None
    }

    /// Copies the record that `peek` measured out and moves on to the next: (place in the mapping, bytes, offset).
    fn pop(&mut self, len: usize, mut copy: impl FnMut(&Mapping, usize, usize, usize) -> bool) -> bool {
        let start = self.seen.wrapping_add(8);
        self.seen = self.seen.wrapping_add(record(len));
        let first = len.min(SIZE - offset(start));
        copy(&self.map, self.at.data + offset(start), first, 0)
            && (first == len || copy(&self.map, self.at.data, len - first, first))
    }

    /// Gives back the room of everything that was read; says whether the producer must be woken.
    fn release(&mut self) -> bool {
        if self.tail == self.seen {
            return false;
        }
        self.tail = self.seen;
        self.map.store(self.at.tail, self.tail);
        let stuck = self.map.load(self.at.stuck) != 0;
        if stuck {
            self.map.store(self.at.stuck, 0);
        }
        stuck
    }

    /// Asks to be woken when something comes; says whether something has come meanwhile.
    fn wait_for_more(&self) -> bool {
        self.map.store(self.at.hungry, 1);
        self.map.load(self.at.head) != self.seen
    }
}

/// The runner's side: makes the ring, and gives it to each switch that dials.
///
/// It has no thread: a switch is let in whenever [`recv`](FramePort::recv) finds nothing to receive, which
/// [`event_fd`](FramePort::event_fd) asks for. Until one comes, frames wait in the ring.
#[derive(Debug)]
pub struct RingPort {
    memfd: OwnedFd,
    outward: Producer,
    inward: Consumer,
    listener: OwnedFd,
    peer: Option<OwnedFd>,
    events: OwnedFd,
    agreed: Offloads,
    dropped: u64,
}

impl RingPort {
    /// Makes a ring for whoever dials `listener`, a listening `SOCK_SEQPACKET` socket. `agreed`: what all ports of the switch
    /// may leave to each other.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn new(listener: OwnedFd, agreed: Offloads) -> io::Result<Self> {
        let memfd = rustix::fs::memfd_create("iaas-port", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, (HEAD + 2 * SIZE) as u64)?;
        rustix::fs::fcntl_add_seals(&memfd, SEALS)?;
        let map = Arc::new(Mapping::new(&memfd, HEAD + 2 * SIZE)?);
        map.store(AT_MAGIC, MAGIC);
        map.store(AT_SIZE, SIZE as u64);
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        socket::set_nonblocking(&listener)?;
        epoll::add(&events, &listener, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let (outward, inward) = (Producer::resume(map.clone(), OUT), Consumer::resume(map, IN));
        Ok(Self { memfd, outward, inward, listener, peer: None, events, agreed, dropped: 0 })
    }

    /// Whether a switch is connected.
    pub fn is_connected(&self) -> bool {
        self.peer.is_some()
    }

    /// Frames that did not fit into the guest's buffers, or were too large to send.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Lets new switches in and notes when one is gone. Returns when there is nothing left to note.
    fn look_around(&mut self) {
        while let Some(new) = socket::accept(&self.listener) {
            // The newest wins: whoever dials has the host's lock of the switch. Closing the old socket takes it out of
            // `events`.
            self.peer = None;
            if socket::send_ring(&new, &self.memfd).is_ok()
                && epoll::add(&self.events, &new, epoll::EventData::new_u64(1), epoll::EventFlags::IN).is_ok()
            {
                self.peer = Some(new);
            }
        }
        if self.peer.as_ref().is_some_and(|peer| !socket::drain(peer)) {
            self.peer = None;
        }
    }

    fn ring(&self) {
        if let Some(peer) = &self.peer {
            socket::ring(peer);
        }
    }

    /// Copies the next frames out.
    fn take(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> usize {
        let mut done = 0;
        let room = into.len().min(lens.len());
        while done < room
            && let Some(len) = self.inward.peek()
        {
            let (Some(buffers), Some(length)) = (into.get(done), lens.get_mut(done)) else { break };
            let fits = len <= buffers.len();
            let whole =
                self.inward.pop(len, |map, at, part, offset| !fits || map.read_to(at, part, buffers, offset));
            if fits && whole {
                // At most `LARGEST_FRAME`.
                *length = u32::try_from(len).unwrap_or(0);
                done += 1;
            } else {
                self.dropped += 1;
            }
        }
        if self.inward.release() {
            self.ring();
        }
        done
    }
}

impl FramePort for RingPort {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        let Offloads { checksum, tso4, tso6, uso } = self.agreed;
        Offloads {
            checksum: want.checksum && checksum,
            tso4: want.tso4 && tso4,
            tso6: want.tso6 && tso6,
            uso: want.uso && uso,
        }
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        if into.is_empty() {
            // Nothing is asked for, but a switch may be waiting to be let in.
            self.look_around();
            return Ok(0);
        }
        loop {
            let done = self.take(into, lens);
            if done > 0 {
                return Ok(done);
            }
            // The doorbell is emptied first: one that rings after this is heard.
            self.look_around();
            if !self.inward.wait_for_more() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if self.inward.peek().is_none() {
                // The head moved, but to nonsense, which `peek` skipped.
                self.inward.release();
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        let mut done = 0;
        for frame in frames {
            let len = frame.len();
            if len > LARGEST_FRAME {
                self.dropped += 1;
            } else if !self.outward.push(len, |map, at, part, offset| map.write_from(at, part, frame, offset))
            {
                break;
            }
            done += 1;
        }
        if self.outward.publish() {
            self.ring();
        }
        if done == 0 && !frames.is_empty() {
            self.outward.wait_for_room();
            // Room that came between the two is not missed.
            if frames.first().is_some_and(|f| self.outward.has_room(f.len())) {
                return self.send(frames);
            }
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(done)
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// The switch's side of a ring.
#[derive(Debug)]
pub(crate) struct RingLink {
    inward: Consumer,
    outward: Producer,
    peer: OwnedFd,
}

impl RingLink {
    /// Takes the ring that came over `peer`, after checking that it is one.
    ///
    /// # Errors
    /// `InvalidData` if it is not sealed, has the wrong size or another layout.
    pub(crate) fn new(memfd: OwnedFd, peer: OwnedFd) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let seals = rustix::fs::fcntl_get_seals(&memfd).map_err(|_| wrong("the ring is not a memfd"))?;
        if !seals.contains(SEALS) {
            return Err(wrong("the ring's memory is not sealed"));
        }
        let size = rustix::fs::fstat(&memfd)?.st_size;
        if usize::try_from(size).ok() != Some(HEAD + 2 * SIZE) {
            return Err(wrong("the ring has another size"));
        }
        let map = Arc::new(Mapping::new(&memfd, HEAD + 2 * SIZE)?);
        if (map.load(AT_MAGIC), map.load(AT_SIZE)) != (MAGIC, SIZE as u64) {
            return Err(wrong("the ring has another layout"));
        }
        Ok(Self { inward: Consumer::resume(map.clone(), OUT), outward: Producer::resume(map, IN), peer })
    }

    /// The socket that says when something happens.
    #[cfg(test)]
    fn peer(&self) -> &OwnedFd {
        &self.peer
    }

    /// Empties the doorbell; `false`: the runner is gone.
    pub(crate) fn drain(&self) -> bool {
        socket::drain(&self.peer)
    }

    /// Replaces `out` by the guest's next frame; `false` if there is none.
    pub(crate) fn next(&mut self, out: &mut Vec<u8>) -> bool {
        while let Some(len) = self.inward.peek() {
            out.clear();
            if self.inward.pop(len, |map, at, part, _| map.append(at, part, out)) {
                return true;
            }
        }
        false
    }

    /// Gives back the room of the frames that were taken: they have been passed on.
    pub(crate) fn release(&mut self) {
        if self.inward.release() {
            socket::ring(&self.peer);
        }
    }

    /// Asks to be rung for the next frame; `true` if one is there already.
    pub(crate) fn sleep(&mut self) -> bool {
        self.inward.wait_for_more()
    }

    /// Hands a frame to the guest; `false` if the ring is full.
    pub(crate) fn give(&mut self, frame: &[u8]) -> bool {
        let copy = |map: &Mapping, at: usize, part: usize, offset: usize| {
            frame.get(offset..offset + part).is_some_and(|bytes| map.write(at, bytes))
        };
        self.outward.push(frame.len(), copy)
    }

    /// Lets the guest see the frames that were given.
    pub(crate) fn publish(&self) {
        if self.outward.publish() {
            socket::ring(&self.peer);
        }
    }

    /// How often the runner's numbers made no sense.
    pub(crate) fn broken(&self) -> u64 {
        self.inward.broken
    }
}

/// What keeps a mapped file from being pulled away.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

#[cfg(test)]
mod tests;
