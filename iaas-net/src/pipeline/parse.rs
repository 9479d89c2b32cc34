//! Stage `parse`: where the headers of a frame are. Copies nothing but addresses and numbers; trusts no length.

use iaas_core::Mac;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;

use super::Reason;
use crate::wire::ARP;
use crate::wire::ETHERNET;
use crate::wire::IPV4;
use crate::wire::IPV6;
use crate::wire::be16;
use crate::wire::protocol;
use crate::wire::take;

/// A frame's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) to: Mac,
    pub(crate) from: Mac,
    pub(crate) body: Body,
}

/// What the Ethernet header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Arp(Arp),
    Ip(Ip),
}

/// An ARP message for Ethernet and IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arp {
    pub(crate) request: bool,
    pub(crate) sender_mac: Mac,
    pub(crate) sender: [u8; 4],
    pub(crate) target: [u8; 4],
}

/// An IP packet; IPv4 addresses are mapped into IPv6. Offsets count from the frame's first byte, vnet header included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) v6: bool,
    pub(crate) src: u128,
    pub(crate) dst: u128,
    pub(crate) protocol: u8,
    pub(crate) hops: u8,
    /// Where the IP header begins.
    pub(crate) l3: usize,
    /// Where the next header begins.
    pub(crate) l4: usize,
    /// Where the packet ends; padding may follow.
    pub(crate) end: usize,
    /// Bytes of payload per segment if the frame is to be cut into several.
    pub(crate) segment: Option<u16>,
    pub(crate) transport: Transport,
}

/// The transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp {
        src: u16,
        dst: u16,
        flags: u8,
    },
    Udp {
        src: u16,
        dst: u16,
    },
    /// ICMP or ICMPv6 echo.
    Echo {
        id: u16,
        request: bool,
    },
    /// An ICMP error about the packet at that offset.
    IcmpError {
        inner: usize,
    },
    /// Any other ICMP message.
    Icmp {
        kind: u8,
    },
    Other,
}

/// Bits of the TCP header.
///
/// # Source
/// RFC 9293 §3.1.
pub(crate) mod tcp {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const ACK: u8 = 0x10;
}

impl Transport {
    /// Source and destination ports, zero where there are none.
    pub(crate) fn ports(self) -> (u16, u16) {
        match self {
            Self::Tcp { src, dst, .. } | Self::Udp { src, dst } => (src, dst),
            Self::Echo { .. } | Self::IcmpError { .. } | Self::Icmp { .. } | Self::Other => (0, 0),
        }
    }

    /// Whether this opens a TCP connection.
    pub(crate) fn opens(self) -> bool {
        matches!(self, Self::Tcp { flags, .. } if flags & (tcp::SYN | tcp::ACK) == tcp::SYN)
    }
}

/// Finds the headers of a frame that begins with a virtio-net header.
pub(crate) fn parse(frame: &[u8], agreed: Offloads) -> Result<Packet, Reason> {
    let at = VNET_HEADER;
    let to = Mac(take(frame, at).ok_or(Reason::Malformed)?);
    let from = Mac(take(frame, at + 6).ok_or(Reason::Malformed)?);
    let segment = vnet(frame, agreed)?;
    let body = match be16(frame, at + 12).ok_or(Reason::Malformed)? {
        IPV4 => Body::Ip(Ip { segment, ..ipv4(frame, at + ETHERNET)? }),
        IPV6 => Body::Ip(Ip { segment, ..ipv6(frame, at + ETHERNET)? }),
        ARP => Body::Arp(arp(frame, at + ETHERNET)?),
        0x8100 | 0x88a8 | 0x9100 => return Err(Reason::Vlan),
        _ => return Err(Reason::EtherType),
    };
    Ok(Packet { to, from, body })
}

/// Checks the virtio-net header: the receiver's device will act on it. Returns the segment size of a super-frame.
///
/// # Source
/// virtio 1.2 §5.1.6, §5.1.6.2.
fn vnet(frame: &[u8], agreed: Offloads) -> Result<Option<u16>, Reason> {
    const NEEDS_CSUM: u8 = 1;
    const DATA_VALID: u8 = 2;
    let [flags, gso, _, _, s0, s1, c0, c1, o0, o1] = take(frame, 0).ok_or(Reason::Malformed)?;
    if (flags, gso) == (0, 0) {
        return Ok(None);
    }
    let start = usize::from(u16::from_le_bytes([c0, c1]));
    let offset = usize::from(u16::from_le_bytes([o0, o1]));
    let needs_csum = flags & NEEDS_CSUM != 0;
    let fits = !needs_csum || (agreed.checksum && VNET_HEADER + start + offset + 2 <= frame.len());
    // §5.1.6.1: the top bit of the type says only that the segments carry ECN.
    let known = match gso & 0x7f {
        0 => gso == 0,
        1 => agreed.tso4 && needs_csum,
        4 => agreed.tso6 && needs_csum,
        5 => agreed.uso && needs_csum,
        _ => false,
    };
    let segment = u16::from_le_bytes([s0, s1]);
    if flags & !(NEEDS_CSUM | DATA_VALID) != 0 || !fits || !known || (gso != 0 && segment == 0) {
        return Err(Reason::Offload);
    }
    Ok((gso != 0).then_some(segment))
}

/// RFC 826 with Ethernet and IPv4 addresses.
fn arp(frame: &[u8], at: usize) -> Result<Arp, Reason> {
    let head: [u8; 8] = take(frame, at).ok_or(Reason::Malformed)?;
    let [0, 1, 8, 0, 6, 4, 0, op @ (1 | 2)] = head else { return Err(Reason::Malformed) };
    Ok(Arp {
        request: op == 1,
        sender_mac: Mac(take(frame, at + 8).ok_or(Reason::Malformed)?),
        sender: take(frame, at + 14).ok_or(Reason::Malformed)?,
        target: take(frame, at + 24).ok_or(Reason::Malformed)?,
    })
}

/// RFC 791 §3.1.
fn ipv4(frame: &[u8], at: usize) -> Result<Ip, Reason> {
    let head: [u8; 20] = take(frame, at).ok_or(Reason::Malformed)?;
    let [version, _, l0, l1, _, _, f0, f1, hops, protocol, _, _, a @ .., b0, b1, b2, b3] = head;
    match version {
        0x45 => {}
        0x46..=0x4f => return Err(Reason::HeaderOptions),
        _ => return Err(Reason::Malformed),
    }
    // Offset and "more fragments"; the bits above them are "don't fragment" and a reserved one.
    if u16::from_be_bytes([f0, f1]) & 0x3fff != 0 {
        return Err(Reason::Fragment);
    }
    let end = at + usize::from(u16::from_be_bytes([l0, l1]));
    if end > frame.len() || end < at + 20 {
        return Err(Reason::Malformed);
    }
    let map = |v4: [u8; 4]| 0xffff_0000_0000 | u128::from(u32::from_be_bytes(v4));
    let l4 = at + 20;
    let transport = transport(frame.get(..end).unwrap_or_default(), l4, protocol, false)?;
    let (src, dst) = (map(a), map([b0, b1, b2, b3]));
    Ok(Ip { v6: false, src, dst, protocol, hops, l3: at, l4, end, segment: None, transport })
}

/// RFC 8200 §3; a packet with extension headers is not looked into.
fn ipv6(frame: &[u8], at: usize) -> Result<Ip, Reason> {
    let head: [u8; 8] = take(frame, at).ok_or(Reason::Malformed)?;
    let [version, _, _, _, l0, l1, protocol, hops] = head;
    if version >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    match protocol {
        44 => return Err(Reason::Fragment),
        // Hop-by-hop, routing, ESP-less authentication, no next header, destination options, mobility, HIP, shim6.
        0 | 43 | 51 | 59 | 60 | 135 | 139 | 140 => return Err(Reason::HeaderOptions),
        _ => {}
    }
    let src = u128::from_be_bytes(take(frame, at + 8).ok_or(Reason::Malformed)?);
    let dst = u128::from_be_bytes(take(frame, at + 24).ok_or(Reason::Malformed)?);
    let l4 = at + 40;
    let end = l4 + usize::from(u16::from_be_bytes([l0, l1]));
    // An IPv4 address in IPv6 clothes would meet the tables' IPv4 entries: RFC 4291 §2.5.5.2 addresses never travel.
    let clothed = |address: u128| address >> 32 == 0xffff;
    if end > frame.len() || clothed(src) || clothed(dst) {
        return Err(Reason::Malformed);
    }
    let transport = transport(frame.get(..end).unwrap_or_default(), l4, protocol, true)?;
    Ok(Ip { v6: true, src, dst, protocol, hops, l3: at, l4, end, segment: None, transport })
}

/// The transport header at `at`, which must be whole.
fn transport(packet: &[u8], at: usize, protocol: u8, v6: bool) -> Result<Transport, Reason> {
    let port = |n: usize| be16(packet, at + n).ok_or(Reason::Malformed);
    match (protocol, v6) {
        (protocol::TCP, _) => {
            let head: [u8; 20] = take(packet, at).ok_or(Reason::Malformed)?;
            Ok(Transport::Tcp { src: port(0)?, dst: port(2)?, flags: head[13] })
        }
        (protocol::UDP, _) => {
            let _: [u8; 8] = take(packet, at).ok_or(Reason::Malformed)?;
            Ok(Transport::Udp { src: port(0)?, dst: port(2)? })
        }
        (protocol::ICMP, false) | (protocol::ICMPV6, true) => icmp(packet, at, v6),
        _ => Ok(Transport::Other),
    }
}

/// RFC 792, RFC 4443 §2.1.
fn icmp(packet: &[u8], at: usize, v6: bool) -> Result<Transport, Reason> {
    let head: [u8; 8] = take(packet, at).ok_or(Reason::Malformed)?;
    let [kind, _, _, _, i0, i1, ..] = head;
    let id = u16::from_be_bytes([i0, i1]);
    Ok(match (kind, v6) {
        (8, false) | (128, true) => Transport::Echo { id, request: true },
        (0, false) | (129, true) => Transport::Echo { id, request: false },
        (3 | 11 | 12, false) | (1..=4, true) => Transport::IcmpError { inner: at + 8 },
        _ => Transport::Icmp { kind },
    })
}

/// The packet that an ICMP error quotes: its addresses and ports, no more need be there.
pub(crate) fn quoted(frame: &[u8], inner: usize, v6: bool) -> Option<Ip> {
    let (protocol, hops, src, dst, l4) = if v6 {
        let [0x60..=0x6f, _, _, _, _, _, next, hops] = take(frame, inner)? else { return None };
        let src = u128::from_be_bytes(take(frame, inner + 8)?);
        (next, hops, src, u128::from_be_bytes(take(frame, inner + 24)?), inner + 40)
    } else {
        let [0x45, _, _, _, _, _, _, _, hops, protocol] = take(frame, inner)? else { return None };
        let map = |v4: [u8; 4]| 0xffff_0000_0000 | u128::from(u32::from_be_bytes(v4));
        (protocol, hops, map(take(frame, inner + 12)?), map(take(frame, inner + 16)?), inner + 20)
    };
    let transport = match (protocol, v6) {
        // RFC 792: at least 8 bytes of the transport header are quoted, so the TCP flags are not.
        (protocol::TCP, _) => {
            Transport::Tcp { src: be16(frame, l4)?, dst: be16(frame, l4 + 2)?, flags: tcp::ACK }
        }
        (protocol::UDP, _) => Transport::Udp { src: be16(frame, l4)?, dst: be16(frame, l4 + 2)? },
        (protocol::ICMP, false) | (protocol::ICMPV6, true) => icmp(frame, l4, v6).ok()?,
        _ => Transport::Other,
    };
    Some(Ip { v6, src, dst, protocol, hops, l3: inner, l4, end: frame.len(), segment: None, transport })
}
