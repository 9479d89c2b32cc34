//! Router advertisements: hosts form their address from the prefix (SLAAC), learn the MTU and the name servers.

use std::net::IpAddr;

use super::Asker;
use super::ndp;
use super::router_link_local;
use crate::pipeline::Reason;
use crate::topology::ROUTER_MAC;
use crate::topology::mapped;
use crate::wire;
use crate::wire::protocol::ICMPV6;

/// How long a host uses the router without hearing from it again, in seconds: three times [`EVERY`].
const LIFETIME: u16 = 1800;
/// Seconds between unasked advertisements to a port.
///
/// RFC 4861 §6.2.1: `MaxRtrAdvInterval`, whose default is 600.
pub(crate) const EVERY: u64 = 600;

/// Writes an advertisement for the asker's subnet.
///
/// # Source
/// RFC 4861 §4.2 (message), §4.6.1, §4.6.2, §4.6.4 (options); RFC 8106 §5.1 (name servers).
pub(crate) fn advertise(asker: &Asker<'_>, out: &mut Vec<u8>) -> Result<(), Reason> {
    let prefix = asker.subnet.v6.ok_or(Reason::NoAnswer)?;
    let mut options = [0u8; 512];
    let options = options_of(asker, mapped(prefix.cidr.network()), prefix.cidr.length(), &mut options);
    wire::begin(out, ndp::ALL_NODES_MAC, ROUTER_MAC, wire::IPV6);
    let from = router_link_local();
    wire::ipv6(out, ICMPV6, 255, from, ndp::ALL_NODES, 16 + options.len());
    let at = out.len();
    // Hop limit 64; neither "managed" nor "other": there is no DHCPv6.
    out.extend_from_slice(&[134, 0, 0, 0, 64, 0]);
    out.extend_from_slice(&LIFETIME.to_be_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(options);
    ndp::finish(out, at, from, ndp::ALL_NODES);
    Ok(())
}

/// Writes the options into `room` and returns the part that they fill.
fn options_of<'r>(asker: &Asker<'_>, prefix: u128, length: u8, room: &'r mut [u8]) -> &'r [u8] {
    let mut at = 0;
    let mut add = |bytes: &[u8]| {
        wire::put(room, at, bytes);
        at += bytes.len();
    };
    add(&[1, 1]);
    add(&ROUTER_MAC.0);
    add(&[5, 1, 0, 0, 0, 0]);
    add(&asker.mtu().to_be_bytes());
    // On-link and autonomous; valid and preferred for ever: an address is a port's as long as the port is there.
    add(&[3, 4, length, 0xc0]);
    add(&[0xff; 8]);
    add(&[0; 4]);
    add(&prefix.to_be_bytes());
    let dns = asker.subnet.dns.iter().filter_map(|a| if let IpAddr::V6(v6) = a { Some(*v6) } else { None });
    for server in dns.take(MOST_DNS) {
        add(&[25, 3, 0, 0]);
        add(&u32::from(LIFETIME).to_be_bytes());
        add(&server.octets());
    }
    room.get(..at).unwrap_or_default()
}

/// Name servers that are announced: 48 + 8 × 24 bytes fit into the room for options.
const MOST_DNS: usize = 8;
