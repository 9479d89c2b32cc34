//! The fake's wire: frames pass from port to port as the program of their fabric says, packet by packet.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::Weak;

use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use super::network::net;
use super::site::Stand;
use super::world::World;
use super::world::lock;
use crate::Error;
use crate::Id;
use crate::Mac;
use crate::Result;
use crate::Term;
use crate::model::Port;
use crate::spi::Site;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::IoBuffers;
use crate::spi::dataplane::Offloads;
use crate::spi::dataplane::frame::VNET_HEADER;
use crate::spi::network::PacketQuery;
use crate::spi::network::Plug;
use crate::spi::network::Verdict;

/// The router's Ethernet address on every fake network.
const ROUTER: Mac = Mac([0x02, 0, 0, 0, 0, 0x01]);
/// The frames that wait for a guest; more are dropped.
const BACKLOG: usize = 256;
/// The longest frame, header included.
const MAX_FRAME: usize = 65_536 + VNET_HEADER;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// The wire of one plug.
#[derive(Debug)]
pub struct Line {
    port: Id<Port>,
    pub(super) term: Term,
    queues: u16,
    fabric: Option<Site>,
    state: Mutex<Wire>,
}

#[derive(Debug, Default)]
struct Wire {
    waiting: VecDeque<Vec<u8>>,
    listeners: Vec<Weak<EventFd>>,
    cut: bool,
    seq: u64,
    rx: (u64, u64),
    tx: (u64, u64),
    dropped: u64,
}

impl Line {
    pub(super) fn new(port: Id<Port>, term: Term, queues: u16, fabric: Option<Site>) -> Self {
        Self { port, term, queues, fabric, state: Mutex::default() }
    }

    pub(super) fn is_open(&self) -> bool {
        lock(&self.state).listeners.iter().any(|l| l.strong_count() > 0)
    }

    pub(super) fn cut(&self) {
        lock(&self.state).cut = true;
    }

    /// Its counters as the guest counts them.
    pub(super) fn count(&self) -> (u64, BTreeMap<String, u128>) {
        let mut wire = lock(&self.state);
        wire.seq += 1;
        let totals = [
            ("rx-packets", wire.rx.0),
            ("rx-bytes", wire.rx.1),
            ("tx-packets", wire.tx.0),
            ("tx-bytes", wire.tx.1),
        ];
        (wire.seq, totals.into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect())
    }

    /// Gives the guest a frame.
    fn push(&self, frame: Vec<u8>) {
        let mut wire = lock(&self.state);
        if wire.cut || wire.waiting.len() >= BACKLOG {
            wire.dropped += 1;
            return;
        }
        wire.waiting.push_back(frame);
        wire.listeners.retain(|l| l.strong_count() > 0);
        for listener in wire.listeners.iter().filter_map(Weak::upgrade) {
            // A full event counter wakes all the same.
            let _ = listener.write(1);
        }
    }
}

/// Opens each queue pair of the plug of `port` with that term.
pub(super) fn open(world: &World, port: Id<Port>, term: Term) -> Result<Vec<Box<dyn FramePort>>> {
    let line = line(world, |l| l.port == port && l.term == term)
        .ok_or_else(|| Error::not_found("no plug of this port has this term"))?;
    (0..line.queues).map(|_| FakePort::new(world, &line).map(|p| Box::new(p) as _)).collect()
}

/// The newest line that `is` the one.
fn line(world: &World, is: impl Fn(&Line) -> bool) -> Option<Arc<Line>> {
    let mut newest: Option<Arc<Line>> = None;
    for stand in world.all_standing::<Stand<Plug>>() {
        stand.find(|_, _, line| {
            if is(line) && newest.as_ref().is_none_or(|n| n.term < line.term) {
                newest = Some(line.clone());
            }
            None::<()>
        });
    }
    newest
}

/// A queue pair of a plug.
#[derive(Debug)]
struct FakePort {
    world: World,
    line: Arc<Line>,
    event: Arc<EventFd>,
}

impl FakePort {
    fn new(world: &World, line: &Arc<Line>) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)
            .map_err(|e| Error::internal("no event descriptor could be made").because(&e))?;
        let event = Arc::new(event);
        lock(&line.state).listeners.push(Arc::downgrade(&event));
        Ok(Self { world: world.clone(), line: line.clone(), event })
    }

    /// Sends one Ethernet frame, without its virtio-net header.
    fn switch(&self, frame: &[u8]) -> Option<()> {
        let fabric = net(&self.world, self.line.fabric)?;
        let (mac, network) = fabric.with(|p| {
            let port = p.port(self.line.port)?;
            Some((port.mac, p.network_of(port)?))
        })??;
        if frame.get(6..12)? != mac.0 {
            return None;
        }
        match ethertype(frame)? {
            ARP => {
                let wanted = arp_target(frame)?;
                let answer = fabric.with(|p| {
                    if p.is_router(network, wanted) {
                        return Some(ROUTER);
                    }
                    p.holder(network, wanted).map(|(_, port)| port.mac)
                })??;
                self.line.push(arp_reply(frame, answer)?);
            }
            _ => {
                let query = parse(self.line.port, frame)?;
                let trace = fabric.forward(&query)?;
                let Verdict::Delivered(to) = trace.verdict else { return None };
                let theirs = fabric.with(|p| p.port(to).map(|p| p.mac))??;
                let mut frame = frame.to_vec();
                frame.get_mut(..6)?.copy_from_slice(&theirs.0);
                line(&self.world, |l| l.port == to)?.push(frame);
            }
        }
        Some(())
    }
}

impl FramePort for FakePort {
    fn offloads(&mut self, _: Offloads) -> Offloads {
        Offloads::default()
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let _ = self.event.read();
        let mut count = 0;
        for (buffers, len) in into.iter_mut().zip(lens) {
            let mut wire = lock(&self.line.state);
            let fits = |f: &Vec<u8>| f.len() + VNET_HEADER <= buffers.len();
            while wire.waiting.front().is_some_and(|f| !fits(f)) {
                wire.waiting.pop_front();
                wire.dropped += 1;
            }
            let Some(frame) = wire.waiting.pop_front() else { break };
            wire.rx = (wire.rx.0 + 1, wire.rx.1 + frame.len() as u64);
            buffers.write_at(0, &[0; VNET_HEADER]);
            buffers.write_at(VNET_HEADER, &frame);
            *len = u32::try_from(frame.len() + VNET_HEADER).unwrap_or(u32::MAX);
            count += 1;
        }
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for frame in frames {
            let mut bytes = vec![0; frame.len().min(MAX_FRAME)];
            frame.read_at(0, &mut bytes);
            let Some(bytes) = bytes.get(VNET_HEADER..) else { continue };
            {
                let mut wire = lock(&self.line.state);
                wire.tx = (wire.tx.0 + 1, wire.tx.1 + bytes.len() as u64);
            }
            // A dropped frame is not an error of the sender's.
            let _ = self.switch(bytes);
        }
        Ok(frames.len())
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

fn ethertype(frame: &[u8]) -> Option<u16> {
    number(frame, 12)
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

/// Whose Ethernet address an ARP request asks for. RFC 826: hardware Ethernet, protocol IPv4, operation 1.
fn arp_target(frame: &[u8]) -> Option<IpAddr> {
    let request = [number(frame, 14)?, number(frame, 16)?, number(frame, 20)?] == [1, IPV4, 1];
    let target: [u8; 4] = frame.get(38..42)?.try_into().ok()?;
    request.then(|| Ipv4Addr::from(target).into())
}

fn arp_reply(request: &[u8], mac: Mac) -> Option<Vec<u8>> {
    let (asker, asked) = (request.get(22..32)?, request.get(38..42)?);
    let mut reply = Vec::with_capacity(42);
    reply.extend_from_slice(asker.get(..6)?);
    reply.extend_from_slice(&mac.0);
    reply.extend_from_slice(request.get(12..20)?);
    reply.extend_from_slice(&2u16.to_be_bytes());
    reply.extend_from_slice(&mac.0);
    reply.extend_from_slice(asked);
    reply.extend_from_slice(asker);
    Some(reply)
}

/// What an IP packet in a frame is about.
fn parse(from: Id<Port>, frame: &[u8]) -> Option<PacketQuery> {
    let ip = frame.get(14..)?;
    let (src, dst, protocol, at): (IpAddr, IpAddr, u8, usize) = match ethertype(frame)? {
        // RFC 791 §3.1.
        IPV4 => {
            let words = |at: usize| ip.get(at..at + 4)?.try_into().ok().map(|b: [u8; 4]| Ipv4Addr::from(b));
            let header = usize::from(ip.first()? & 0xf) * 4;
            (words(12)?.into(), words(16)?.into(), *ip.get(9)?, header)
        }
        // RFC 8200 §3; extension headers are not looked into.
        IPV6 => {
            let words = |at: usize| ip.get(at..at + 16)?.try_into().ok().map(|b: [u8; 16]| Ipv6Addr::from(b));
            (words(8)?.into(), words(24)?.into(), *ip.get(6)?, 40)
        }
        _ => return None,
    };
    let ported = matches!(protocol, 6 | 17);
    let port = |at| if ported { number(ip, at) } else { Some(0) };
    Some(PacketQuery { from, src: Some(src), dst, protocol, src_port: port(at)?, dst_port: port(at + 2)? })
}
