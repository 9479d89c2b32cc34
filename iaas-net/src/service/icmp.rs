//! ICMP of the router: echo replies for its own addresses, and "time exceeded" where the hop limit runs out.

use super::Answer;
use super::Asker;
use crate::pipeline::Reason;
use crate::pipeline::parse::Ip;
use crate::pipeline::parse::Transport;
use crate::topology::ROUTER_MAC;
use crate::topology::mapped;
use crate::topology::unmapped;
use crate::wire;
use crate::wire::protocol::ICMP;
use crate::wire::protocol::ICMPV6;
use std::net::IpAddr;

/// Answers an echo request to the router.
///
/// # Source
/// RFC 1812 §4.3.3.6 (IPv4), RFC 4443 §4.2 (IPv6).
pub(crate) fn echo(asker: &Asker<'_>, ip: &Ip, frame: &[u8], out: &mut Vec<u8>) -> Result<Answer, Reason> {
    let Transport::Echo { request: true, .. } = ip.transport else { return Err(Reason::RouterClosed) };
    if ip.end - ip.l3 > usize::from(asker.mtu()) {
        return Err(Reason::TooBig);
    }
    let kind = if ip.v6 { 129 } else { 0 };
    let body = frame.get(ip.l4 + 4..ip.end).unwrap_or_default();
    message(asker, ip, ip.dst, [kind, 0], &[], body, out);
    Ok(Answer::Reply("an echo reply of the router"))
}

/// Tells the sender that its packet would live no longer; quotes as much of it as is allowed.
///
/// # Source
/// RFC 1812 §4.3.2.3, RFC 4443 §3.3. No error is sent about an ICMP error (§2.4 e).
pub(crate) fn time_exceeded(
    asker: &Asker<'_>,
    ip: &Ip,
    frame: &[u8],
    out: &mut Vec<u8>,
) -> Result<Answer, Reason> {
    if matches!(ip.transport, Transport::IcmpError { .. }) {
        return Err(Reason::HopLimit);
    }
    let prefix = if ip.v6 { asker.subnet.v6 } else { asker.subnet.v4 }.ok_or(Reason::HopLimit)?;
    let quote = frame.get(ip.l3..ip.end.min(ip.l3 + QUOTE)).unwrap_or_default();
    let kind = if ip.v6 { 3 } else { 11 };
    message(asker, ip, mapped(prefix.gateway), [kind, 0], &[0; 4], quote, out);
    Ok(Answer::Reply("the hop limit ran out: time exceeded"))
}

/// Writes an ICMP message from the router's `source` to the asker.
fn message(
    asker: &Asker<'_>,
    ip: &Ip,
    source: u128,
    kind: [u8; 2],
    fixed: &[u8],
    body: &[u8],
    out: &mut Vec<u8>,
) {
    let length = 4 + fixed.len() + body.len();
    wire::begin(out, asker.port.mac, ROUTER_MAC, if ip.v6 { wire::IPV6 } else { wire::IPV4 });
    let mut pseudo = 0;
    match (unmapped(source), unmapped(ip.src)) {
        (IpAddr::V4(from), IpAddr::V4(to)) => wire::ipv4(out, ICMP, from.octets(), to.octets(), length),
        _ => {
            wire::ipv6(out, ICMPV6, 64, source, ip.src, length);
            pseudo = wire::pseudo(&source.to_be_bytes(), &ip.src.to_be_bytes(), ICMPV6, length);
        }
    }
    let at = out.len();
    out.extend_from_slice(&kind);
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(fixed);
    out.extend_from_slice(body);
    let sum = wire::checksum(pseudo, out.get(at..).unwrap_or_default());
    wire::put(out, at + 2, &sum.to_be_bytes());
}

/// Bytes of a packet that an error quotes, so that IPv4 errors stay within 576 bytes (RFC 1812 §4.3.2.3).
const QUOTE: usize = 540;
