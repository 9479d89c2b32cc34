//! Neighbour discovery: the pipeline answers for the router and for the other ports of the subnet.

use super::Answer;
use super::Asker;
use super::ra;
use crate::pipeline::Reason;
use crate::pipeline::parse::Ip;
use crate::wire;
use crate::wire::protocol::ICMPV6;
use iaas_core::Mac;

/// ff02::1, all nodes.
pub(crate) const ALL_NODES: u128 = 0xff02 << 112 | 1;
/// Where all nodes listen.
pub(crate) const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);

/// Whether this ICMPv6 type is for the router or nobody, and never forwarded.
pub(crate) fn serves(kind: u8) -> bool {
    // Router and neighbour discovery, and multicast listener reports.
    matches!(kind, 130..=137 | 143)
}

/// Answers a router or neighbour solicitation.
///
/// # Source
/// RFC 4861 §7.1.1: a hop limit below 255 has been forwarded and is not valid. §7.2.4: the advertisement.
pub(crate) fn answer(
    asker: &Asker<'_>,
    ip: &Ip,
    kind: u8,
    frame: &[u8],
    out: &mut Vec<u8>,
) -> Result<Answer, Reason> {
    let is_discovery = matches!(kind, 133..=137);
    if is_discovery && ip.hops != 255 {
        return Err(Reason::Malformed);
    }
    match kind {
        133 => ra::advertise(asker, out).map(|()| Answer::Reply("a router advertisement")),
        135 => neighbour(asker, ip, frame, out),
        134 | 137 => Err(Reason::RogueRouter),
        136 => Ok(Answer::Absorb("an announcement needs no answer")),
        _ => Ok(Answer::Absorb("the network floods no multicast")),
    }
}

fn neighbour(asker: &Asker<'_>, ip: &Ip, frame: &[u8], out: &mut Vec<u8>) -> Result<Answer, Reason> {
    let target = u128::from_be_bytes(wire::take(frame, ip.l4 + 8).ok_or(Reason::Malformed)?);
    if ip.l4 + 24 > ip.end {
        return Err(Reason::Malformed);
    }
    if asker.port.owns(target) {
        return Ok(Answer::Absorb("the address is the port's own"));
    }
    let (mac, router) = asker.neighbour(target).ok_or(Reason::NoAnswer)?;
    let probing = ip.src == 0;
    let to = if probing { ALL_NODES } else { ip.src };
    // §4.4: router, solicited, override. §7.2.4: not "solicited" in answer to a probe.
    let flags = u8::from(router) << 7 | u8::from(!probing) << 6 | 1 << 5;
    wire::begin(out, if probing { ALL_NODES_MAC } else { asker.port.mac }, mac, wire::IPV6);
    wire::ipv6(out, ICMPV6, 255, target, to, 32);
    let at = out.len();
    out.extend_from_slice(&[136, 0, 0, 0, flags, 0, 0, 0]);
    out.extend_from_slice(&target.to_be_bytes());
    out.extend_from_slice(&[2, 1]);
    out.extend_from_slice(&mac.0);
    finish(out, at, target, to);
    Ok(Answer::Reply("the Ethernet address of a neighbour"))
}

/// Fills in the checksum of the ICMPv6 message that begins at `at`.
pub(crate) fn finish(out: &mut [u8], at: usize, from: u128, to: u128) {
    let message = out.get(at..).unwrap_or_default();
    let pseudo = wire::pseudo(&from.to_be_bytes(), &to.to_be_bytes(), ICMPV6, message.len());
    let sum = wire::checksum(pseudo, message);
    wire::put(out, at + 2, &sum.to_be_bytes());
}
