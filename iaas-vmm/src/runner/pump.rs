//! A NIC's frames between QEMU's datagrams and the port's ring.
//!
//! QEMU's datagram back-end speaks plain Ethernet frames; the ring has a virtio-net header before each. So frames of the
//! guest get a header of zeroes, and checksums that the ring leaves to the guest are filled in here. No frame that was
//! taken from one side is dropped while the other has no room: it waits, and so does everything behind it. A switch that is
//! down therefore costs time, not frames.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use super::nic::NicCounters;
use crate::virtio::net::checksum;

/// A thread that moves the frames of one NIC until it is dropped.
#[derive(Debug)]
pub struct Pump {
    counters: Arc<NicCounters>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Pump {
    /// Starts to pump between `port` and a new pair of datagram sockets, whose other end is for QEMU.
    ///
    /// # Errors
    /// `Unavailable`: no sockets or thread can be made.
    pub fn start(mut port: Box<dyn FramePort>) -> Result<(Self, OwnedFd)> {
        let cannot = |e: &dyn std::error::Error| Error::unavailable("a NIC cannot be connected").because(e);
        let (ours, theirs) = UnixDatagram::pair().map_err(|e| cannot(&e))?;
        ours.set_nonblocking(true).map_err(|e| cannot(&e))?;
        port.offloads(Offloads::default());
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_flags(flags).map_err(|e| cannot(&e))?);
        let counters = Arc::new(NicCounters::default());
        let moving = Moving::new(ours, port, counters.clone());
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("nic".into())
            .spawn(move || {
                if let Err(error) = moving.run(&stopped) {
                    tracing::error!(%error, "a NIC stands still");
                }
            })
            .map_err(|e| cannot(&e))?;
        Ok((Self { counters, stop, thread: Some(thread) }, theirs.into()))
    }

    /// What the NIC has moved.
    pub fn counters(&self) -> &NicCounters {
        &self.counters
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Moving {
    guest: UnixDatagram,
    port: Box<dyn FramePort>,
    counters: Arc<NicCounters>,
    /// Frames of the guest, header first, that the port has not taken.
    outward: Vec<IoBuffers>,
    /// Frames for the guest that QEMU has not taken, the next at the end.
    inward: Vec<Vec<u8>>,
    into: Vec<IoBuffers>,
    lens: Vec<u32>,
    datagram: Vec<u8>,
}

impl Moving {
    fn new(guest: UnixDatagram, port: Box<dyn FramePort>, counters: Arc<NicCounters>) -> Self {
        Self {
            guest,
            port,
            counters,
            outward: Vec::with_capacity(BATCH),
            inward: Vec::with_capacity(BATCH),
            into: (0..BATCH).map(|_| IoBuffers::zeroed(FRAME_MAX)).collect(),
            lens: vec![0; BATCH],
            datagram: vec![0; FRAME_MAX],
        }
    }

    fn run(mut self, stop: &EventFd) -> io::Result<()> {
        loop {
            let out = self.outward_turn()?;
            let inn = self.inward_turn()?;
            if !out && !inn && self.wait(stop)? {
                return Ok(());
            }
        }
    }

    /// Moves frames of the guest to the port; says whether it got anywhere.
    fn outward_turn(&mut self) -> io::Result<bool> {
        let mut moved = false;
        while self.outward.len() < BATCH {
            let len = match self.guest.recv(&mut self.datagram) {
                Ok(len) => len,
                Err(e) if would_block(&e) => break,
                // The other end was closed: QEMU is gone, and the runner is about to stop us.
                Err(_) => break,
            };
            let frame = self.datagram.get(..len).unwrap_or_default();
            let buffers = IoBuffers::zeroed(VNET_HEADER + len);
            buffers.write_at(VNET_HEADER, frame);
            self.outward.push(buffers);
            moved = true;
        }
        if self.outward.is_empty() {
            return Ok(moved);
        }
        match self.port.send(&self.outward) {
            Ok(0) => {}
            Err(e) if would_block(&e) => {}
            Err(e) => return Err(e),
            Ok(taken) => {
                let taken = taken.min(self.outward.len());
                for sent in self.outward.drain(..taken) {
                    self.counters.sent(sent.len() - VNET_HEADER);
                }
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Moves frames of the port to the guest; says whether it got anywhere.
    fn inward_turn(&mut self) -> io::Result<bool> {
        let mut moved = false;
        if self.inward.is_empty() {
            match self.port.recv(&mut self.into, &mut self.lens) {
                Ok(0) => {}
                Err(e) if would_block(&e) => {}
                Err(e) => return Err(e),
                Ok(count) => {
                    self.take_in(count);
                    moved = true;
                }
            }
        }
        while let Some(frame) = self.inward.last() {
            match self.guest.send(frame) {
                Ok(_) => {}
                Err(e) if would_block(&e) => break,
                // ENOBUFS and the like: the frame waits. A closed socket: it has nowhere to go any more.
                Err(_) => break,
            }
            self.counters.received(frame.len());
            self.inward.pop();
            moved = true;
        }
        Ok(moved)
    }

    fn take_in(&mut self, count: usize) {
        for (buffers, len) in self.into.iter().zip(&self.lens).take(count) {
            let mut bytes = vec![0; usize::try_from(*len).unwrap_or(0).min(FRAME_MAX)];
            buffers.read_at(0, &mut bytes);
            match plain(bytes) {
                Some(frame) => self.inward.push(frame),
                None => drop(self.counters.refused.fetch_add(1, Ordering::Relaxed)),
            }
        }
        self.inward.reverse();
    }

    /// Waits until a side may go on; says whether to stop.
    fn wait(&self, stop: &EventFd) -> io::Result<bool> {
        let mut guest = PollFlags::empty();
        if self.outward.is_empty() {
            guest |= PollFlags::POLLIN;
        }
        if !self.inward.is_empty() {
            guest |= PollFlags::POLLOUT;
        }
        let mut fds =
            vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(self.guest.as_fd(), guest)];
        // The port's event also stands for frames that we do not want while the guest has no room: then it is not polled,
        // and room in the port is looked for now and then.
        let stuck = !self.inward.is_empty();
        if !stuck {
            fds.push(PollFd::new(self.port.event_fd(), PollFlags::POLLIN));
        }
        let pause =
            if stuck && !self.outward.is_empty() { PollTimeout::from(STUCK_MS) } else { PollTimeout::NONE };
        match nix::poll::poll(&mut fds, pause) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(fds.first().and_then(PollFd::any).unwrap_or(false))
    }
}

/// The Ethernet frame behind a virtio-net header, with the checksum that the header leaves open filled in.
///
/// `None` for a segment that is still to be cut, and for a header that points outside of its frame.
///
/// # Source
/// virtio 1.2 §5.1.6.4, `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
fn plain(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let header: [u8; VNET_HEADER] = bytes.get(..VNET_HEADER)?.try_into().ok()?;
    let [flags, segment, _, _, _, _, start_lo, start_hi, offset_lo, offset_hi, _, _] = header;
    if segment != 0 {
        return None;
    }
    bytes.drain(..VNET_HEADER);
    if flags & NEEDS_CHECKSUM != 0 {
        let start = usize::from(u16::from_le_bytes([start_lo, start_hi]));
        let place = start + usize::from(u16::from_le_bytes([offset_lo, offset_hi]));
        let sum = checksum(bytes.get(start..)?);
        bytes.get_mut(place..place + 2)?.copy_from_slice(&sum.to_be_bytes());
    }
    (bytes.len() >= ETHERNET_HEADER).then_some(bytes)
}

fn would_block(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Frames of one turn.
const BATCH: usize = 32;
/// The largest datagram: header and 64 KiB of frame.
const FRAME_MAX: usize = VNET_HEADER + 65_536;
const ETHERNET_HEADER: usize = 14;
const NEEDS_CHECKSUM: u8 = 1;
/// How often room in the port is looked for while neither side has any.
const STUCK_MS: u8 = 5;

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;

    /// The far side of a port: what arrived there, and what it has for the guest.
    #[derive(Debug, Default)]
    struct Far {
        arrived: Vec<Vec<u8>>,
        waiting: VecDeque<Vec<u8>>,
        room: usize,
    }

    #[derive(Debug)]
    struct Port(Arc<Mutex<Far>>, Arc<EventFd>);

    impl FramePort for Port {
        fn offloads(&mut self, want: Offloads) -> Offloads {
            want
        }
        fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
            let _ = self.1.read();
            let mut far = self.0.lock().unwrap();
            let mut count = 0;
            for (buffers, len) in into.iter().zip(lens) {
                let Some(frame) = far.waiting.pop_front() else { break };
                *len = u32::try_from(buffers.write_at(0, &frame)).unwrap();
                count += 1;
            }
            if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
        }
        fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
            let mut far = self.0.lock().unwrap();
            let count = frames.len().min(far.room);
            for frame in &frames[..count] {
                let mut bytes = vec![0; frame.len()];
                frame.read_at(0, &mut bytes);
                far.arrived.push(bytes);
            }
            far.room -= count;
            if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
        }
        fn event_fd(&self) -> BorrowedFd<'_> {
            self.1.as_fd()
        }
    }

    fn pumped(room: usize) -> (Pump, UnixDatagram, Arc<Mutex<Far>>, Arc<EventFd>) {
        let far = Arc::new(Mutex::new(Far { room, ..Far::default() }));
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let (pump, qemu) = Pump::start(Box::new(Port(far.clone(), event.clone()))).unwrap();
        let qemu = UnixDatagram::from(qemu);
        qemu.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        (pump, qemu, far, event)
    }

    fn until(mut done: impl FnMut() -> bool) {
        for _ in 0..30_000 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("it did not happen");
    }

    #[test]
    fn no_frame_is_lost_while_the_port_has_no_room() {
        let (pump, qemu, far, event) = pumped(0);
        for n in 0..60u8 {
            qemu.send(&[n; 60]).unwrap();
        }
        for _ in 0..60 {
            far.lock().unwrap().room += 1;
            event.write(1).unwrap();
        }
        until(|| far.lock().unwrap().arrived.len() == 60);
        let far = far.lock().unwrap();
        for (n, frame) in far.arrived.iter().enumerate() {
            assert_eq!(frame[..VNET_HEADER], [0; VNET_HEADER]);
            assert_eq!(frame[VNET_HEADER..], [u8::try_from(n).unwrap(); 60]);
        }
        until(|| pump.counters().tx_bytes.load(Ordering::Relaxed) == 3600);
    }

    #[test]
    fn no_frame_is_lost_while_qemu_has_no_room() {
        let (pump, qemu, far, event) = pumped(0);
        let frame = |n: u16| [vec![0; VNET_HEADER], n.to_le_bytes().to_vec(), vec![0; 1512]].concat();
        far.lock().unwrap().waiting.extend((0..1000).map(frame));
        event.write(1).unwrap();
        let mut bytes = [0; 2000];
        for n in 0..1000u16 {
            assert_eq!(qemu.recv(&mut bytes).unwrap(), 1514);
            assert_eq!(bytes[..2], n.to_le_bytes());
        }
        until(|| pump.counters().rx_bytes.load(Ordering::Relaxed) == 1_514_000);
    }

    #[test]
    fn an_open_checksum_is_filled_in_and_what_is_no_frame_refused() {
        // UDP 1234 → 53 over nothing: start 14, checksum at 6; the field holds the pseudo header's sum.
        let mut bytes = vec![NEEDS_CHECKSUM, 0, 0, 0, 0, 0, 14, 0, 6, 0, 0, 0];
        bytes.extend([0; 14]);
        bytes.extend([0x04, 0xd2, 0x00, 0x35, 0x00, 0x08, 0x12, 0x34]);
        let frame = plain(bytes.clone()).unwrap();
        // 0x04d2 + 0x0035 + 0x0008 + 0x1234 = 0x1743; its complement.
        assert_eq!(frame[20..22], 0xe8bc_u16.to_be_bytes());
        let mut outside = bytes.clone();
        outside[8] = 200;
        assert_eq!(plain(outside), None);
        let mut segment = bytes;
        segment[1] = 1;
        assert_eq!(plain(segment), None);
        assert_eq!(plain(vec![0; 20]), None);
        assert_eq!(plain(vec![0; 3]), None);
    }
}
