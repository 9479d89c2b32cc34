//! Stage `route`: to which port a packet goes, directly inside a subnet and by the router between subnets of one VPC.

use super::Reason;
use super::parse::Ip;
use super::parse::Packet;
use crate::program::Program;
use crate::topology::ROUTER_MAC;
use crate::wire::ETHERNET;
use crate::wire::be16;
use crate::wire::put;
use iaas_core::Mac;
use iaas_core::spi::dataplane::frame::VNET_HEADER;

/// The next hop of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hop {
    /// The number of the receiving port.
    pub(crate) to: u32,
    /// Whether it goes through the router.
    pub(crate) routed: bool,
}

/// Whether nobody in particular is addressed.
pub(crate) fn is_multicast(packet: &Packet, ip: &Ip) -> bool {
    let address = if ip.v6 { ip.dst >> 120 == 0xff } else { (ip.dst >> 28) & 0xf >= 14 };
    packet.to.0[0] & 1 == 1 || address
}

/// Finds the port that has the destination address in the sender's VPC, and so never one of another VPC.
pub(crate) fn find(program: &Program, from: u32, packet: &Packet, ip: &Ip) -> Result<Hop, Reason> {
    if is_multicast(packet, ip) {
        return Err(Reason::Multicast);
    }
    let to =
        program.owner(program.port_at(from).vpc, ip.dst).filter(|to| *to != from).ok_or(Reason::NoRoute)?;
    hop(program, from, to, packet, ip)
}

/// Checks that the sender may reach `to` by the Ethernet address that it chose.
pub(crate) fn hop(program: &Program, from: u32, to: u32, packet: &Packet, ip: &Ip) -> Result<Hop, Reason> {
    let (sender, receiver) = (program.port_at(from), program.port_at(to));
    let size = ip.segment.map_or(ip.end - ip.l3, usize::from);
    if size > usize::from(program.vpc(sender.vpc).mtu) {
        return Err(Reason::TooBig);
    }
    if packet.to == ROUTER_MAC {
        // RFC 4291 §2.5.6: routers do not forward packets with link-local addresses.
        if ip.dst == receiver.link_local || ip.src == sender.link_local {
            return Err(Reason::NoRoute);
        }
        return if ip.hops > 1 { Ok(Hop { to, routed: true }) } else { Err(Reason::HopLimit) };
    }
    if packet.to == receiver.mac && sender.subnet == receiver.subnet {
        return Ok(Hop { to, routed: false });
    }
    Err(Reason::WrongNextHop)
}

/// Gives a routed packet its new Ethernet header and takes one from its hop limit, which `hop` found above one.
pub(crate) fn rewrite(frame: &mut [u8], to: Mac) {
    const L3: usize = VNET_HEADER + ETHERNET;
    put(frame, VNET_HEADER, &to.0);
    put(frame, VNET_HEADER + 6, &ROUTER_MAC.0);
    let v6 = frame.get(L3).is_some_and(|version| version >> 4 == 6);
    let Some(hops) = frame.get_mut(if v6 { L3 + 7 } else { L3 + 8 }) else { return };
    *hops = hops.saturating_sub(1);
    // RFC 1624 §3, eqn. 3: HC' = ~(~HC + ~m + m'), where the word of the TTL went down by 0x0100.
    if let Some(old) = be16(frame, L3 + 10).filter(|_| !v6) {
        let sum = u32::from(!old) + 0xfeff;
        let folded = (sum & 0xffff) + (sum >> 16);
        put(frame, L3 + 10, &(!u16::try_from(folded).unwrap_or(u16::MAX)).to_be_bytes());
    }
}
