//! Two ends of a cable inside one process, that can lose and reorder frames by a seed: for tests, and for VMs in-process.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use rustix::event::EventfdFlags;

/// How bad a cable is. In thousandths of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Frames that are lost.
    pub loss: u16,
    /// Frames that arrive after the one behind them.
    pub reorder: u16,
}

/// One end of a cable.
#[derive(Debug)]
pub struct MemoryPort {
    outward: Arc<Mutex<Lane>>,
    inward: Arc<Mutex<Lane>>,
    ours: OwnedFd,
    theirs: OwnedFd,
    faults: Faults,
    random: u64,
    dropped: u64,
}

/// Frames on their way in one direction.
#[derive(Debug, Default)]
struct Lane {
    frames: VecDeque<Vec<u8>>,
    /// Buffers that were emptied, to be filled again.
    spare: Vec<Vec<u8>>,
    /// The sender waits for room.
    stuck: bool,
}

impl MemoryPort {
    /// Both ends of a good cable.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn pair() -> io::Result<(Self, Self)> {
        Self::faulty_pair(Faults::default(), 0)
    }

    /// Both ends of a cable with faults that follow from `seed`.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn faulty_pair(faults: Faults, seed: u64) -> io::Result<(Self, Self)> {
        let (one, two) = (Arc::default(), Arc::default());
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (a, b) = (rustix::event::eventfd(0, flags)?, rustix::event::eventfd(0, flags)?);
        let end = |outward: &Arc<_>,
                   inward: &Arc<_>,
                   ours: &OwnedFd,
                   theirs: &OwnedFd,
                   random|
         -> io::Result<Self> {
            let (outward, inward) = (Arc::clone(outward), Arc::clone(inward));
            let (ours, theirs) = (ours.try_clone()?, theirs.try_clone()?);
            Ok(Self { outward, inward, ours, theirs, faults, random, dropped: 0 })
        };
        Ok((end(&one, &two, &a, &b, seed)?, end(&two, &one, &b, &a, !seed)?))
    }

    /// Frames that did not fit into the receiver's buffers.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Replaces `out` by the next frame; `false` if there is none.
    pub(crate) fn take(&mut self, out: &mut Vec<u8>) -> bool {
        let mut lane = lock(&self.inward);
        let Some(frame) = lane.frames.pop_front() else { return false };
        lane.spare.push(std::mem::replace(out, frame));
        if std::mem::take(&mut lane.stuck) {
            wake(&self.theirs);
        }
        true
    }

    /// Sends a frame; `false` if there is no room. The other end hears of it by [`ring`](Self::ring).
    pub(crate) fn give(&mut self, frame: &[u8]) -> bool {
        self.put(frame.len(), |out| out.extend_from_slice(frame))
    }

    /// Tells the other end that there are frames.
    pub(crate) fn ring(&self) {
        wake(&self.theirs);
    }

    /// Sends the frame that `fill` writes, or loses it.
    fn put(&mut self, len: usize, fill: impl FnOnce(&mut Vec<u8>)) -> bool {
        let (lost, late) = (self.happens(self.faults.loss), self.happens(self.faults.reorder));
        let mut lane = lock(&self.outward);
        if lane.frames.len() >= LANE {
            lane.stuck = true;
            return false;
        }
        if lost {
            return true;
        }
        let mut frame = lane.spare.pop().unwrap_or_else(|| Vec::with_capacity(len));
        frame.clear();
        fill(&mut frame);
        let at = lane.frames.len().saturating_sub(usize::from(late));
        lane.frames.insert(at, frame);
        true
    }

    /// Whether an event of that many thousandths happens now.
    fn happens(&mut self, thousandths: u16) -> bool {
        if thousandths == 0 {
            return false;
        }
        // SplitMix64 (Steele, Lea, Flood 2014): every seed gives a different, repeatable row.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % 1000 < u64::from(thousandths)
    }
}

impl FramePort for MemoryPort {
    /// Nothing is ever sent over a wire, so everything may be left undone.
    fn offloads(&mut self, want: Offloads) -> Offloads {
        want
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        // Emptied first: a bell that rings after this is heard.
        let _ = rustix::io::read(&self.ours, &mut [0; 8]);
        let mut lane = lock(&self.inward);
        let mut done = 0;
        while let (Some(buffers), Some(len)) = (into.get(done), lens.get_mut(done))
            && let Some(frame) = lane.frames.pop_front()
        {
            if buffers.write_at(0, &frame) == frame.len() {
                *len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
                done += 1;
            } else {
                self.dropped += 1;
            }
            lane.spare.push(frame);
        }
        if std::mem::take(&mut lane.stuck) {
            wake(&self.theirs);
        }
        if !lane.frames.is_empty() {
            wake(&self.ours);
        }
        if done == 0 && !into.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(done) }
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        let mut done = 0;
        for frame in frames {
            let whole = |out: &mut Vec<u8>| {
                out.resize(frame.len(), 0);
                frame.read_at(0, out);
            };
            if !self.put(frame.len(), whole) {
                break;
            }
            done += 1;
        }
        wake(&self.theirs);
        if done == 0 && !frames.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(done) }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(fd: &OwnedFd) {
    // Fails only when the counter is full, and then the other end is about to wake anyway.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Frames that a cable holds in each direction.
const LANE: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(port: &mut MemoryPort) -> Vec<u8> {
        let mut got = Vec::new();
        let (mut buffers, mut lens) = ([IoBuffers::zeroed(8), IoBuffers::zeroed(8)], [0; 2]);
        while let Ok(n) = port.recv(&mut buffers, &mut lens) {
            for buffer in &buffers[..n] {
                let mut byte = [0];
                buffer.read_at(0, &mut byte);
                got.push(byte[0]);
            }
        }
        got
    }

    #[test]
    fn a_good_cable_keeps_order_and_tells_when_there_is_room_again() {
        let (mut a, mut b) = MemoryPort::pair().unwrap();
        let frame = |n: u8| IoBuffers::copied(&[n; 3]);
        assert_eq!(a.send(&[frame(1), frame(2), frame(3)]).unwrap(), 3);
        assert_eq!(drain(&mut b), [1, 2, 3]);
        let many: Vec<IoBuffers> = (0..LANE + 1).map(|_| frame(9)).collect();
        assert_eq!(a.send(&many).unwrap(), LANE);
        assert_eq!(a.send(&many[..1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _ = rustix::io::read(&a.ours, &mut [0; 8]);
        assert_eq!(drain(&mut b).len(), LANE);
        assert!(rustix::io::read(&a.ours, &mut [0; 8]).is_ok(), "the sender's bell rang");
    }

    #[test]
    fn a_bad_cable_is_bad_in_the_same_way_for_the_same_seed() {
        let run = |seed| {
            let (mut a, mut b) = MemoryPort::faulty_pair(Faults { loss: 200, reorder: 200 }, seed).unwrap();
            let frames: Vec<IoBuffers> = (0..100).map(|n| IoBuffers::copied(&[n])).collect();
            assert_eq!(a.send(&frames).unwrap(), 100);
            drain(&mut b)
        };
        let got = run(7);
        assert_eq!(got, run(7));
        assert_ne!(got, run(8));
        assert!(got.len() < 100 && !got.is_sorted());
    }
}
