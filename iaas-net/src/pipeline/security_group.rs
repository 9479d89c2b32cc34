//! Stage `security_group`: stateful filtering by CIDR and by membership.
//!
//! A packet passes if it belongs to a remembered flow that the *current* program still allows, so that a revoked rule ends
//! its flows at once. Else it is the first of a flow: some egress rule of the sender's groups and some ingress rule of the
//! receiver's must allow it; a port without groups allows all.
//!
//! **Packets in mid-stream.** The table may have lost a flow: it expired, was evicted, or the switch was restarted. A TCP
//! packet that does not open a connection, and an echo reply, pass without an entry if the rules allow a flow in their own
//! direction *or in the other*; the flow counts as opened from the side that the rules allow. A stranger gains only packets
//! that the receiver's own stack refuses. UDP replies need their entry, or a new question.
//!
//! **Related.** An ICMP error passes if it quotes a packet of a remembered flow that was sent from the receiver to the sender
//! of the error. Packets to the router and its services are not filtered.

use std::time::Duration;

use iaas_core::Entity;
use iaas_core::ObjectRef;
use iaas_core::model::SecurityGroup;
use iaas_core::model::security_group::Protocol;

use super::Reason;
use super::flow::Flows;
use super::flow::Key;
use super::flow::Opened;
use super::parse::Ip;
use super::parse::Transport;
use super::parse::quoted;
use super::trace::Tracer;
use crate::program::Peer;
use crate::program::PolicyRule;
use crate::program::PortPart;
use crate::program::Program;
use crate::topology::unmapped;
use crate::wire::protocol;

/// The stage's name in traces.
const STAGE: &str = "security_group";

/// A packet on its way between two ports of one VPC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passage<'a> {
    pub(crate) program: &'a Program,
    pub(crate) epoch: u64,
    pub(crate) now: Duration,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) ip: &'a Ip,
    pub(crate) frame: &'a [u8],
}

/// Lets the packet pass and remembers its flow, or says why not.
pub(crate) fn admit(at: &Passage<'_>, flows: &mut Flows, trace: &mut impl Tracer) -> Result<(), Reason> {
    let vpc = at.program.port_at(at.from).vpc;
    let Some((key, side)) = Key::of(vpc, at.ip) else { return admit_stateless(at, vpc, flows, trace) };
    if !at.ip.transport.opens()
        && let Some(flow) = flows.find(&key, at.now)
    {
        // The flow's own direction, as a packet of its opener.
        let forward = if flow.opener == side { Question::of(at) } else { Question::of(at).turned() };
        if forward.allowed(at.program).is_ok() {
            flow.epoch = at.epoch;
            flow.renumber(side, at.from, at.to);
            flow.touch(at.now, side, at.ip.transport);
            trace.note(STAGE, true, || ("it belongs to an allowed flow".to_owned(), None));
            return Ok(());
        }
        flows.forget(&key);
    }
    let asked = Question::of(at);
    let opener = match asked.allowed(at.program) {
        Ok(why) => {
            why.explain(at, trace);
            side
        }
        Err(_) if in_mid_stream(at.ip.transport) && asked.turned().allowed(at.program).is_ok() => {
            trace.note(STAGE, true, || ("it is the reply of a flow that the rules allow".to_owned(), None));
            side.other()
        }
        Err(denied) => return denied.explain(at, trace),
    };
    let (from, to) = if opener == side { (at.from, at.to) } else { (at.to, at.from) };
    let owner = at.program.port_at(from).id;
    let opened = Opened { key, opener, epoch: at.epoch, from, to, owner };
    if !flows.open(at.now, opened, side, at.ip.transport) {
        trace.note(STAGE, false, || (Reason::FlowLimit.text().to_owned(), Some(owner.object())));
        return Err(Reason::FlowLimit);
    }
    Ok(())
}

/// A packet that makes no flow: an ICMP error that belongs to one, or whatever the rules allow.
fn admit_stateless(
    at: &Passage<'_>,
    vpc: u32,
    flows: &mut Flows,
    trace: &mut impl Tracer,
) -> Result<(), Reason> {
    if let Transport::IcmpError { inner } = at.ip.transport
        && let Some(about) = quoted(at.frame, inner, at.ip.v6)
        && (about.src, about.dst) == (at.ip.dst, at.ip.src)
        && let Some((key, _)) = Key::of(vpc, &about)
        && flows.find(&key, at.now).is_some()
    {
        trace.note(STAGE, true, || ("it is an error about an allowed flow".to_owned(), None));
        return Ok(());
    }
    match Question::of(at).allowed(at.program) {
        Ok(why) => {
            why.explain(at, trace);
            Ok(())
        }
        Err(denied) => denied.explain(at, trace),
    }
}

/// Whether a packet may be one of a flow that the table has lost.
fn in_mid_stream(transport: Transport) -> bool {
    match transport {
        Transport::Tcp { .. } => !transport.opens(),
        Transport::Echo { request, .. } => !request,
        _ => false,
    }
}

/// May a flow be opened from one port to another?
#[derive(Clone, Copy, Debug)]
struct Question {
    from: u32,
    to: u32,
    src: u128,
    dst: u128,
    protocol: u8,
    dst_port: u16,
    src_port: u16,
}

/// The rules that allow a flow: of the sender's groups and of the receiver's; `None` where a port has no groups.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    egress: Option<RuleAt>,
    ingress: Option<RuleAt>,
}

/// The n-th rule of a group.
#[derive(Clone, Copy, Debug)]
struct RuleAt {
    group: u32,
    n: usize,
}

/// Whose rules deny a flow.
#[derive(Clone, Copy, Debug)]
struct Denied(Reason);

impl Question {
    fn of(at: &Passage<'_>) -> Self {
        let (src_port, dst_port) = at.ip.transport.ports();
        let Ip { src, dst, protocol, .. } = *at.ip;
        Self { from: at.from, to: at.to, src, dst, protocol, dst_port, src_port }
    }

    /// The same of the flow in the other direction.
    fn turned(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
            src: self.dst,
            dst: self.src,
            dst_port: self.src_port,
            src_port: self.dst_port,
            ..self
        }
    }

    fn allowed(&self, program: &Program) -> Result<Allowed, Denied> {
        let (sender, receiver) = (program.port_at(self.from), program.port_at(self.to));
        let egress = self
            .rule(sender, receiver, self.dst, |group| &program.group(group).egress)
            .ok_or(Denied(Reason::Egress))?;
        let ingress = self
            .rule(receiver, sender, self.src, |group| &program.group(group).ingress)
            .ok_or(Denied(Reason::Ingress))?;
        Ok(Allowed { egress, ingress })
    }

    /// The first rule of `own`'s groups that matches with `peer` at the other end; `Some(None)` without groups.
    fn rule<'a>(
        &self,
        own: &PortPart,
        peer: &PortPart,
        address: u128,
        rules: impl Fn(u32) -> &'a Vec<PolicyRule>,
    ) -> Option<Option<RuleAt>> {
        if own.groups.is_empty() {
            return Some(None);
        }
        own.groups.iter().find_map(|group| {
            let n = rules(*group).iter().position(|rule| self.matches(rule, peer, address))?;
            Some(Some(RuleAt { group: *group, n }))
        })
    }

    fn matches(&self, rule: &PolicyRule, peer: &PortPart, address: u128) -> bool {
        let protocol = match rule.protocol {
            Protocol::Any => true,
            Protocol::Icmp => matches!(self.protocol, protocol::ICMP | protocol::ICMPV6),
            Protocol::Tcp => self.protocol == protocol::TCP,
            Protocol::Udp => self.protocol == protocol::UDP,
        };
        let ported = matches!(rule.protocol, Protocol::Tcp | Protocol::Udp);
        protocol
            && (!ported || rule.ports.contains(self.dst_port))
            && match rule.peer {
                Peer::Any => true,
                Peer::Cidr(cidr) => cidr.contains(unmapped(address)),
                Peer::Group(group) => peer.member(group),
            }
    }
}

impl Allowed {
    fn explain(self, at: &Passage<'_>, trace: &mut impl Tracer) {
        trace.note(STAGE, true, || {
            let say = |side: &str, rule: Option<RuleAt>| match rule {
                Some(r) => {
                    let id = at.program.group(r.group).id;
                    format!("{side} rule {} of {} {id}", r.n + 1, SecurityGroup::NAME)
                }
                None => format!("{side}: the port has no groups"),
            };
            let because = format!("{}; {}", say("egress", self.egress), say("ingress", self.ingress));
            let by = self.ingress.or(self.egress).map(|r| at.program.group(r.group).id.object());
            (because, by)
        });
    }
}

impl Denied {
    fn explain(self, at: &Passage<'_>, trace: &mut impl Tracer) -> Result<(), Reason> {
        trace.note(STAGE, false, || {
            let port = if self.0 == Reason::Egress { at.from } else { at.to };
            let by: ObjectRef = at.program.port_at(port).id.object();
            (self.0.text().to_owned(), Some(by))
        });
        Err(self.0)
    }
}
