//! DHCPv4: each port is offered its own address, and nothing else, by the router of its subnet.
//!
//! There is no lease table: the program is the table, and the lease time only makes hosts ask again for the options.
//! Option overload (RFC 2132 §9.3) in requests is not read: no option that the server needs is ever moved there.

use std::net::IpAddr;
use std::net::Ipv4Addr;

use super::Answer;
use super::Asker;
use crate::pipeline::Reason;
use crate::pipeline::parse::Ip;
use crate::topology::ROUTER_MAC;
use crate::wire;
use crate::wire::BROADCAST;
use crate::wire::protocol::UDP;

/// Seconds for which an address is promised; hosts ask again at half of it (RFC 2131 §4.4.5).
const LEASE: u32 = 3600;

/// Answers a client's message.
///
/// # Source
/// RFC 2131 §4.3 (server), RFC 2132 (options).
pub(crate) fn answer(asker: &Asker<'_>, ip: &Ip, frame: &[u8], out: &mut Vec<u8>) -> Result<Answer, Reason> {
    let message = frame.get(ip.l4 + 8..ip.end).unwrap_or_default();
    let request = Request::read(message).ok_or(Reason::Malformed)?;
    if request.client != asker.port.mac.0 {
        return Err(Reason::SpoofedMac);
    }
    let lease = Lease::of(asker).ok_or(Reason::NoAnswer)?;
    if request.server.is_some_and(|server| server != lease.router) {
        return Ok(Answer::Absorb("the client chose another server"));
    }
    let own = asker.port.v4.ok_or(Reason::NoAnswer)?;
    match request.kind {
        kind::DISCOVER => reply(asker, &request, &lease, kind::OFFER, own, out),
        // §4.3.2: in the state INIT-REBOOT or SELECTING the address is an option, in RENEWING and REBINDING it is `ciaddr`.
        kind::REQUEST if request.wanted.unwrap_or(request.current) == own => {
            reply(asker, &request, &lease, kind::ACK, own, out)
        }
        kind::REQUEST => reply(asker, &request, &lease, kind::NAK, Ipv4Addr::UNSPECIFIED, out),
        // §4.3.5: no address and no lease time.
        kind::INFORM => reply(asker, &request, &lease, kind::ACK, Ipv4Addr::UNSPECIFIED, out),
        kind::RELEASE | kind::DECLINE => return Ok(Answer::Absorb("the port keeps its address")),
        _ => return Err(Reason::Malformed),
    }
    Ok(Answer::Reply("the port's own address by DHCP"))
}

/// DHCP message types.
///
/// # Source
/// RFC 2132 §9.6.
mod kind {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const DECLINE: u8 = 4;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

/// The magic cookie and the fixed part before it.
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const FIXED: usize = 236;

/// What the server needs of a client's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    kind: u8,
    transaction: [u8; 4],
    flags: [u8; 2],
    current: Ipv4Addr,
    client: [u8; 6],
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Request {
    fn read(message: &[u8]) -> Option<Self> {
        let [1, 1, 6, _] = wire::take(message, 0)? else { return None };
        if wire::take(message, FIXED)? != COOKIE {
            return None;
        }
        let mut request = Self {
            kind: 0,
            transaction: wire::take(message, 4)?,
            flags: wire::take(message, 10)?,
            current: Ipv4Addr::from(wire::take::<4>(message, 12)?),
            client: wire::take(message, 28)?,
            wanted: None,
            server: None,
        };
        let mut rest = message.get(FIXED + 4..)?;
        // Each turn takes at least one byte off `rest`.
        while let [code, after @ ..] = rest {
            match code {
                0 => rest = after,
                255 => break,
                _ => {
                    let (length, after) = after.split_first()?;
                    let value = after.get(..usize::from(*length))?;
                    request.option(*code, value);
                    rest = after.get(usize::from(*length)..)?;
                }
            }
        }
        (request.kind != 0).then_some(request)
    }

    fn option(&mut self, code: u8, value: &[u8]) {
        match (code, value) {
            (53, [kind]) => self.kind = *kind,
            (50, &[a, b, c, d]) => self.wanted = Some(Ipv4Addr::new(a, b, c, d)),
            (54, &[a, b, c, d]) => self.server = Some(Ipv4Addr::new(a, b, c, d)),
            _ => {}
        }
    }
}

/// What the subnet tells its hosts.
#[derive(Clone, Copy, Debug)]
struct Lease {
    router: Ipv4Addr,
    mask: Ipv4Addr,
}

impl Lease {
    fn of(asker: &Asker<'_>) -> Option<Self> {
        let prefix = asker.subnet.v4?;
        let IpAddr::V4(router) = prefix.gateway else { return None };
        let host = u32::MAX.checked_shr(prefix.cidr.length().into()).unwrap_or(0);
        Some(Self { router, mask: Ipv4Addr::from(!host) })
    }
}

/// Writes a reply of `kind` that gives `address`.
fn reply(
    asker: &Asker<'_>,
    request: &Request,
    lease: &Lease,
    kind: u8,
    address: Ipv4Addr,
    out: &mut Vec<u8>,
) {
    // §4.1: a NAK and what a client asks for are broadcast; a client with an address gets its reply there.
    let broadcast = kind == kind::NAK || (request.current.is_unspecified() && request.flags[0] & 0x80 != 0);
    let to = match (broadcast, request.current.is_unspecified()) {
        (true, _) => Ipv4Addr::BROADCAST,
        (false, false) => request.current,
        (false, true) => address,
    };
    let mut options = [0u8; 256];
    let options = options_of(asker, lease, kind, !address.is_unspecified(), &mut options);
    // RFC 1542 §2.1: some clients want the 300 bytes of BOOTP.
    let length = (FIXED + options.len()).max(300) + 8;
    wire::begin(out, if broadcast { BROADCAST } else { asker.port.mac }, ROUTER_MAC, wire::IPV4);
    wire::ipv4(out, UDP, lease.router.octets(), to.octets(), length);
    let at = out.len();
    out.resize(at + length, 0);
    wire::put(out, at, &[0, 67, 0, 68]);
    wire::put(out, at + 4, &u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    let body = at + 8;
    wire::put(out, body, &[2, 1, 6, 0]);
    wire::put(out, body + 4, &request.transaction);
    wire::put(out, body + 10, &request.flags);
    if kind == kind::ACK {
        wire::put(out, body + 12, &request.current.octets());
    }
    wire::put(out, body + 16, &address.octets());
    wire::put(out, body + 28, &request.client);
    wire::put(out, body + FIXED, options);
    let datagram = out.get(at..).unwrap_or_default();
    let pseudo = wire::pseudo(&lease.router.octets(), &to.octets(), UDP, length);
    // RFC 768: zero would say "no checksum".
    let sum = match wire::checksum(pseudo, datagram) {
        0 => u16::MAX,
        sum => sum,
    };
    wire::put(out, at + 6, &sum.to_be_bytes());
}

/// Writes cookie and options into `room` and returns the part that they fill.
fn options_of<'r>(asker: &Asker<'_>, lease: &Lease, kind: u8, leased: bool, room: &'r mut [u8]) -> &'r [u8] {
    let mut at = 0;
    let mut add = |bytes: &[u8]| {
        wire::put(room, at, bytes);
        at += bytes.len();
    };
    add(&COOKIE);
    add(&[53, 1, kind, 54, 4]);
    add(&lease.router.octets());
    if leased {
        add(&[51, 4]);
        add(&LEASE.to_be_bytes());
    }
    if kind != kind::NAK {
        add(&[1, 4]);
        add(&lease.mask.octets());
        add(&[3, 4]);
        add(&lease.router.octets());
        add(&[26, 2]);
        add(&asker.mtu().to_be_bytes());
        let dns =
            asker.subnet.dns.iter().filter_map(|a| if let IpAddr::V4(v4) = a { Some(*v4) } else { None });
        let dns: Vec<u8> = dns.take(MOST_DNS).flat_map(|a| a.octets()).collect();
        if let Ok(length @ 1..) = u8::try_from(dns.len()) {
            add(&[6, length]);
            add(&dns);
        }
    }
    add(&[255]);
    room.get(..at).unwrap_or_default()
}

/// Name servers that are told.
const MOST_DNS: usize = 8;
