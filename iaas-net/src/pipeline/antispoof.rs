//! Stage `antispoof`: a port sends only as itself.
//!
//! Beside its addresses a port may use its link-local address, and no address at all where the protocols of address
//! configuration need that.

use super::Reason;
use super::parse::Body;
use super::parse::Ip;
use super::parse::Packet;
use super::parse::Transport;
use crate::program::PortPart;
use crate::topology::mapped;

/// The unspecified IPv4 address, mapped.
const NONE_V4: u128 = 0xffff_0000_0000;
/// The limited broadcast address, mapped.
pub(crate) const BROADCAST_V4: u128 = 0xffff_ffff_ffff;

/// Checks both source addresses.
pub(crate) fn check(port: &PortPart, packet: &Packet) -> Result<(), Reason> {
    if packet.from != port.mac {
        return Err(Reason::SpoofedMac);
    }
    match &packet.body {
        Body::Arp(arp) if arp.sender_mac != port.mac => Err(Reason::SpoofedMac),
        // RFC 5227 §1.1: a probe has the sender address zero.
        Body::Arp(arp) if arp.sender == [0; 4] => Ok(()),
        Body::Arp(arp) if port.owns(mapped(arp.sender.into())) => Ok(()),
        Body::Ip(ip) if port.owns(ip.src) || configuring(ip) => Ok(()),
        Body::Arp(_) | Body::Ip(_) => Err(Reason::SpoofedAddress),
    }
}

/// Whether this is a packet of a host that has no address yet.
fn configuring(ip: &Ip) -> bool {
    match ip.transport {
        // RFC 2131 §4.1: a client without an address sends from zero, port 68, to all, port 67.
        Transport::Udp { src: 68, dst: 67 } => ip.src == NONE_V4 && ip.dst == BROADCAST_V4,
        // RFC 4862 §5.4.2 (duplicate address detection), RFC 4861 §4.1 (router solicitation).
        Transport::Icmp { kind: 133 | 135 } => ip.v6 && ip.src == 0,
        _ => false,
    }
}
