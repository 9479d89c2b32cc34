//! The packet engine: frames and a time in, verdicts out. No socket, clock or random number inside; one stage per file.
//!
//! ```text
//! frame → parse → antispoof → flow hit ─────────────────────────────→ deliver
//!                    └ miss → arp ndp dhcp icmp → route → security_group ┘
//! ```
//! A hit costs one hash of the five-tuple and allocates nothing. A miss walks the stages with the same functions that
//! [`explain`](Pipeline::explain) walks. One pipeline serves one thread.
//!
//! Not in here: broadcast and multicast are answered or dropped, never flooded; fragments, VLAN tags, IPv4 options and IPv6
//! extension headers are dropped, each with its own [`Reason`].

mod antispoof;
mod explain;
mod flow;
pub(crate) mod parse;
mod route;
mod security_group;
mod trace;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use iaas_core::Id;
use iaas_core::model::Port;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;

pub use self::explain::explain;
pub use self::flow::Limits;
pub use self::verdict::Drops;
pub use self::verdict::Reason;
pub use self::verdict::Verdict;

use self::flow::Flows;
use self::flow::Key;
use self::parse::Body;
use self::parse::Ip;
use self::parse::Packet;
use self::parse::Transport;
use self::route::Hop;
use self::security_group::Passage;
use self::trace::Silent;
use self::trace::Tracer;
use crate::program::Program;
use crate::service::Answer;
use crate::service::Asker;
use crate::service::arp;
use crate::service::dhcp;
use crate::service::icmp;
use crate::service::ndp;
use crate::service::ra;
use crate::service::router_link_local;
use crate::topology::ROUTER_MAC;
use crate::topology::mapped;

/// A plugged-in port, by the number that [`Pipeline::plug`] gave it. Stays the same over programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// A frame on its way: a virtio-net header, then Ethernet. The buffer is reused for the answer.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The port that sent it.
    pub from: Slot,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// One packet engine.
#[derive(Debug)]
pub struct Pipeline {
    program: Arc<Program>,
    epoch: u64,
    slots: Vec<Option<Plugged>>,
    /// The slot of each port of the program.
    here: Vec<Option<Slot>>,
    flows: Flows,
    agreed: Offloads,
    scratch: Vec<u8>,
    drops: Drops,
    next_sweep: Duration,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug)]
struct Plugged {
    id: Id<Port>,
    /// The port's number in the current program.
    number: Option<u32>,
    /// When the port hears from its router next.
    advert: Duration,
    /// Whether its guest has sent anything. Before that it may not be up, and its NIC would throw an advertisement away
    /// that is counted as delivered.
    spoke: bool,
}

/// What the stages decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Forward(Hop),
    Answer(Answer),
}

impl Pipeline {
    /// A pipeline that knows no port. `seed` keeps guests from choosing flows that meet in the table; draw it anew each start.
    /// `agreed`: what all ports of this switch may leave to each other.
    pub fn new(limits: Limits, agreed: Offloads, seed: u64) -> Self {
        Self {
            program: Arc::new(Program::empty(iaas_core::Rev(0))),
            epoch: 0,
            slots: Vec::new(),
            here: Vec::new(),
            flows: Flows::new(limits, seed),
            agreed,
            scratch: Vec::with_capacity(2048),
            drops: Drops::default(),
            next_sweep: Duration::ZERO,
        }
    }

    /// Replaces the program. Flows stay as far as the new program allows them; a port whose router has something else to say
    /// than before hears it at the next [`tick`](Self::tick).
    pub fn install(&mut self, program: Arc<Program>) {
        let before = std::mem::replace(&mut self.program, program);
        self.epoch += 1;
        self.here = vec![None; self.program.ports()];
        for n in 0..self.slots.len() {
            self.bind(n, &before);
        }
    }

    /// The current program.
    pub fn program(&self) -> &Arc<Program> {
        &self.program
    }

    /// Plugs a port in. A port that is plugged in already keeps its slot.
    pub fn plug(&mut self, id: Id<Port>) -> Slot {
        let taken = self.slots.iter().position(|s| s.is_some_and(|s| s.id == id));
        let n = taken.or_else(|| self.slots.iter().position(Option::is_none)).unwrap_or(self.slots.len());
        if n == self.slots.len() {
            self.slots.push(None);
        }
        if let Some(slot) = self.slots.get_mut(n) {
            *slot = Some(Plugged { id, number: None, advert: Duration::ZERO, spoke: false });
        }
        let program = self.program.clone();
        self.bind(n, &program);
        // Slots are as many as ports of one host, far below 2^32.
        Slot(u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// Takes a port out.
    pub fn unplug(&mut self, slot: Slot) {
        if let Some(gone) = self.slots.get_mut(slot.0 as usize).and_then(Option::take)
            && let Some(here) = gone.number.and_then(|n| self.here.get_mut(n as usize))
        {
            *here = None;
        }
    }

    /// Whether the program knows the port in that slot.
    pub fn knows(&self, slot: Slot) -> bool {
        self.number(slot).is_some()
    }

    /// How often each reason dropped a frame.
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// Flows that are remembered.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// Decides on each frame of a batch; `verdicts` gets one for each, in order. `now` is any clock that never goes back.
    pub fn process(&mut self, now: Duration, batch: &mut [Frame], verdicts: &mut Vec<Verdict>) {
        verdicts.clear();
        for frame in batch {
            verdicts.push(self.one(now, frame));
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_deadline(&self) -> Option<Duration> {
        let adverts = self.slots.iter().flatten().filter(|s| self.advertises(s)).map(|s| s.advert);
        let sweep = (self.flows.len() > 0).then_some(self.next_sweep);
        adverts.chain(sweep).min()
    }

    /// Does what is due: forgets flows, and hands unasked router advertisements to `send`.
    pub fn tick(&mut self, now: Duration, mut send: impl FnMut(Slot, &[u8])) {
        if self.next_sweep <= now {
            self.flows.sweep(now, flow::SWEEP);
            self.next_sweep = now.saturating_add(Duration::from_secs(1));
        }
        for n in 0..self.slots.len() {
            let Some(slot) = self.slots.get(n).copied().flatten() else { continue };
            let Some(number) = slot.number.filter(|_| slot.spoke && slot.advert <= now) else { continue };
            if ra::advertise(&Asker::new(&self.program, number), &mut self.scratch).is_ok() {
                send(Slot(u32::try_from(n).unwrap_or(u32::MAX)), &self.scratch);
            }
            if let Some(Some(slot)) = self.slots.get_mut(n) {
                slot.advert = now.saturating_add(Duration::from_secs(ra::EVERY));
            }
        }
    }

    /// Lets the port in that slot hear from its router as soon as its guest has sent something: its guest is coming up.
    pub fn greet(&mut self, slot: Slot) {
        if let Some(Some(plugged)) = self.slots.get_mut(slot.0 as usize) {
            (plugged.advert, plugged.spoke) = (Duration::ZERO, false);
        }
    }

    fn one(&mut self, now: Duration, frame: &mut Frame) -> Verdict {
        let decision = self.decide(now, frame);
        let verdict = match decision {
            Ok(Decision::Forward(hop)) => self.forward(hop, frame),
            Ok(Decision::Answer(Answer::Reply(_))) => {
                frame.bytes.clear();
                frame.bytes.extend_from_slice(&self.scratch);
                Ok(Verdict::Reply)
            }
            Ok(Decision::Answer(Answer::Absorb(_))) => Ok(Verdict::Absorb),
            Err(reason) => Err(reason),
        };
        verdict.unwrap_or_else(|reason| {
            self.drops.count(reason);
            Verdict::Drop(reason)
        })
    }

    fn decide(&mut self, now: Duration, frame: &Frame) -> Result<Decision, Reason> {
        let number = self.heard(frame.from).ok_or(Reason::UnknownPort)?;
        let packet = parse::parse(&frame.bytes, self.agreed)?;
        if let Some(hop) = self.known(now, number, &packet) {
            return Ok(Decision::Forward(hop));
        }
        let (epoch, bytes) = (self.epoch, frame.bytes.as_slice());
        let at = Arrival { program: &self.program, epoch, now, from: number, packet: &packet, frame: bytes };
        decide(&at, &mut self.flows, &mut self.scratch, &mut Silent)
    }

    /// The fast path: a packet of a flow that this very program allowed.
    ///
    /// The key holds the source address, and the entry the port that owns it in this program, so a hit from that port
    /// proves what `antispoof`, `route` and `security_group` would find.
    fn known(&mut self, now: Duration, number: u32, packet: &Packet) -> Option<Hop> {
        let Body::Ip(ip) = &packet.body else { return None };
        let sender = self.program.port_at(number);
        if ip.transport.opens() || packet.from != sender.mac {
            return None;
        }
        let (key, side) = Key::of(sender.vpc, ip)?;
        let flow = self.flows.find(&key, now)?;
        if flow.epoch != self.epoch || flow.port(side) != number {
            return None;
        }
        let to = flow.port(side.other());
        let hop = route::hop(&self.program, number, to, packet, ip).ok()?;
        flow.touch(now, side, ip.transport);
        Some(hop)
    }

    fn forward(&self, hop: Hop, frame: &mut Frame) -> Result<Verdict, Reason> {
        let slot = self.here.get(hop.to as usize).copied().flatten().ok_or(Reason::NotHere)?;
        if hop.routed {
            route::rewrite(&mut frame.bytes, self.program.port_at(hop.to).mac);
        }
        Ok(Verdict::Deliver(slot))
    }

    fn number(&self, slot: Slot) -> Option<u32> {
        self.slots.get(slot.0 as usize).copied().flatten()?.number
    }

    /// The number of the port in that slot, whose guest has just sent something.
    fn heard(&mut self, slot: Slot) -> Option<u32> {
        let plugged = self.slots.get_mut(slot.0 as usize)?.as_mut()?;
        plugged.spoke = true;
        plugged.number
    }

    fn advertises(&self, slot: &Plugged) -> bool {
        slot.spoke
            && slot.number.is_some_and(|n| self.program.subnet(self.program.port_at(n).subnet).v6.is_some())
    }

    /// Ties slot `n` to its port in the current program. If its router did not say the same in the program before, its guest
    /// hears from it.
    fn bind(&mut self, n: usize, before: &Program) {
        let Some(Some(slot)) = self.slots.get_mut(n) else { return };
        let number = self.program.port(slot.id);
        if slot.number.map(|old| says(before, old)) != number.map(|new| says(&self.program, new)) {
            slot.advert = Duration::ZERO;
        }
        slot.number = number;
        if let Some(here) = number.and_then(|number| self.here.get_mut(number as usize)) {
            *here = u32::try_from(n).ok().map(Slot);
        }
    }
}

/// The advertisement that a port hears, if any.
fn says(program: &Program, number: u32) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    ra::advertise(&Asker::new(program, number), &mut bytes).ok().map(|()| bytes)
}

/// A parsed packet that came from a port of the program.
#[derive(Clone, Copy, Debug)]
struct Arrival<'a> {
    program: &'a Program,
    epoch: u64,
    now: Duration,
    from: u32,
    packet: &'a Packet,
    frame: &'a [u8],
}

/// The slow path: all stages after `parse`.
fn decide(
    at: &Arrival<'_>,
    flows: &mut Flows,
    out: &mut Vec<u8>,
    trace: &mut impl Tracer,
) -> Result<Decision, Reason> {
    let port = at.program.port_at(at.from);
    let own = || Some(port.id.object());
    antispoof::check(port, at.packet)
        .inspect_err(|reason| trace.note("antispoof", false, || (reason.text().to_owned(), own())))?;
    trace.note("antispoof", true, || ("both source addresses are the port's own".to_owned(), own()));
    let router = || Some(at.program.subnet(port.subnet).id.object());
    if let Some((stage, answer)) = serve(at, out) {
        trace.note(stage, answer.is_ok(), || match answer {
            Ok(Answer::Reply(what) | Answer::Absorb(what)) => (what.to_owned(), router()),
            Err(reason) => (reason.text().to_owned(), router()),
        });
        return answer.map(Decision::Answer);
    }
    // `serve` took everything that is not IP.
    let Body::Ip(ip) = &at.packet.body else { return Err(Reason::EtherType) };
    let hop = match route::find(at.program, at.from, at.packet, ip) {
        Err(Reason::HopLimit) => {
            let answer = icmp::time_exceeded(&Asker::new(at.program, at.from), ip, at.frame, out);
            trace.note("route", false, || (Reason::HopLimit.text().to_owned(), None));
            return answer.map(Decision::Answer);
        }
        Err(reason) => {
            let network = at.program.vpc(port.vpc).id;
            trace.note("route", false, || (reason.text().to_owned(), Some(network.object())));
            return Err(reason);
        }
        Ok(hop) => hop,
    };
    let receiver = at.program.port_at(hop.to);
    trace.note("route", true, || {
        let how = if hop.routed {
            "by the router to a port of the network"
        } else {
            "to a port of the same subnet"
        };
        (how.to_owned(), Some(receiver.id.object()))
    });
    let Arrival { program, epoch, now, from, frame, .. } = *at;
    let passage = Passage { program, epoch, now, from, to: hop.to, ip, frame };
    security_group::admit(&passage, flows, trace)?;
    Ok(Decision::Forward(hop))
}

/// Asks the service whose packet this is; `None` if it is to be forwarded.
fn serve(at: &Arrival<'_>, out: &mut Vec<u8>) -> Option<(&'static str, Result<Answer, Reason>)> {
    let asker = Asker::new(at.program, at.from);
    let ip = match &at.packet.body {
        Body::Arp(arp) => return Some(("arp", arp::answer(&asker, arp, out))),
        Body::Ip(ip) => ip,
    };
    let router = at.program.gateway(asker.port.vpc, ip.dst).is_some() || ip.dst == router_link_local();
    match ip.transport {
        Transport::Icmp { kind } if ip.v6 && ndp::serves(kind) => {
            Some(("ndp", ndp::answer(&asker, ip, kind, at.frame, out)))
        }
        Transport::Udp { dst: 67, .. } if !ip.v6 && for_dhcp(&asker, ip) => {
            Some(("dhcp", dhcp::answer(&asker, ip, at.frame, out)))
        }
        _ if router && at.packet.to == ROUTER_MAC => Some(("icmp", icmp::echo(&asker, ip, at.frame, out))),
        _ if router => Some(("icmp", Err(Reason::WrongNextHop))),
        _ => None,
    }
}

/// Whether a packet to the DHCP port is for the subnet's router.
fn for_dhcp(asker: &Asker<'_>, ip: &Ip) -> bool {
    ip.dst == antispoof::BROADCAST_V4 || asker.subnet.v4.is_some_and(|p| mapped(p.gateway) == ip.dst)
}

/// The largest frame that a port carries: a super-frame of 64 KiB behind its headers.
pub const LARGEST_FRAME: usize = VNET_HEADER + crate::wire::ETHERNET + 65_535;

#[cfg(test)]
mod tests;
