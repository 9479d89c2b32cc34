//! Why a packet arrives or not: the packet is built, and the same stages that forward packets walk it, taking notes.

use std::net::IpAddr;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Trace;
use iaas_core::spi::network::Verdict;

use super::Arrival;
use super::Decision;
use super::Pipeline;
use super::decide;
use super::flow::Flows;
use super::flow::Limits;
use super::parse;
use super::parse::tcp;
use super::trace::Recorder;
use super::trace::Tracer;
use crate::program::PortPart;
use crate::program::Program;
use crate::topology::ROUTER_MAC;
use crate::topology::mapped;
use crate::topology::unmapped;
use crate::wire;
use crate::wire::protocol;

impl Pipeline {
    /// Says what the current program does with the first packet of a flow, stage by stage. Changes nothing.
    ///
    /// A port that is not plugged in on this host counts as reached: the program is the fabric's.
    ///
    /// # Errors
    /// `NotFound` if the program has no such port; `Invalid` if the addresses are of two families or the port has none of
    /// the destination's.
    pub fn explain(&self, query: &PacketQuery) -> Result<Trace> {
        explain(&self.program, query)
    }
}

/// As [`Pipeline::explain`], of any program.
///
/// # Errors
/// As there.
pub fn explain(program: &Program, query: &PacketQuery) -> Result<Trace> {
    let from = program.port(query.from).ok_or_else(|| {
        Error::not_found("the network's program does not know this port").about(query.from.object())
    })?;
    let frame = build(program, program.port_at(from), query)?;
    let mut trace = Recorder::default();
    let end = |trace: Recorder, verdict| Trace { program: program.rev(), stages: trace.0, verdict };
    let packet = match parse::parse(&frame, Offloads::default()) {
        Ok(packet) => packet,
        Err(reason) => {
            trace.note("parse", false, || (reason.text().to_owned(), None));
            return Ok(end(trace, Verdict::Dropped));
        }
    };
    trace.note("parse", true, || ("all headers are whole".to_owned(), None));
    let at = Arrival { program, epoch: 1, now: Duration::ZERO, from, packet: &packet, frame: &frame };
    // The first packet of its flow meets an empty table.
    let mut flows = Flows::new(Limits { flows: 1, flows_per_port: 1 }, 0);
    let verdict = match decide(&at, &mut flows, &mut Vec::new(), &mut trace) {
        Ok(Decision::Forward(hop)) => {
            let id = program.port_at(hop.to).id;
            trace.note("deliver", true, || ("it is handed to the port".to_owned(), Some(id.object())));
            Verdict::Delivered(id)
        }
        Ok(Decision::Answer(_)) => Verdict::Answered,
        Err(_) => Verdict::Dropped,
    };
    Ok(end(trace, verdict))
}

/// Builds the frame that the port's guest would send.
fn build(program: &Program, port: &PortPart, query: &PacketQuery) -> Result<Vec<u8>> {
    let v6 = query.dst.is_ipv6();
    let own = || {
        let local = query.dst.is_ipv6() && mapped(query.dst) >> 118 == 0xfe80 >> 6;
        let link_local = local.then(|| unmapped(port.link_local));
        link_local.or_else(|| port.addrs.iter().map(|a| unmapped(*a)).find(|a| a.is_ipv6() == v6))
    };
    let src = query.src.or_else(own).ok_or_else(|| {
        Error::invalid("the port has no address of the destination's family").about(query.from.object())
    })?;
    if src.is_ipv6() != v6 {
        return Err(Error::invalid(format!("`{src}` and `{}` are of two families", query.dst)));
    }
    let mut out = Vec::new();
    let payload = payload(query, v6);
    wire::begin(
        &mut out,
        next_hop(program, port, query.dst),
        port.mac,
        if v6 { wire::IPV6 } else { wire::IPV4 },
    );
    match (src, query.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            wire::ipv4(&mut out, query.protocol, src.octets(), dst.octets(), payload.len());
        }
        _ => wire::ipv6(&mut out, query.protocol, 64, mapped(src), mapped(query.dst), payload.len()),
    }
    out.extend_from_slice(&payload);
    Ok(out)
}

/// The transport header of a first packet: a TCP SYN, an ICMP echo request.
fn payload(query: &PacketQuery, v6: bool) -> Vec<u8> {
    let ports = [query.src_port.to_be_bytes(), query.dst_port.to_be_bytes()].concat();
    match (query.protocol, v6) {
        (protocol::TCP, _) => [&ports[..], &[0; 8], &[0x50, tcp::SYN, 0xff, 0xff, 0, 0, 0, 0]].concat(),
        (protocol::UDP, _) => [&ports[..], &[0, 8, 0, 0]].concat(),
        (protocol::ICMP, false) => vec![8, 0, 0, 0, 0, 1, 0, 1],
        (protocol::ICMPV6, true) => vec![128, 0, 0, 0, 0, 1, 0, 1],
        _ => vec![0; 8],
    }
}

/// The Ethernet address that a host with this port's configuration sends to.
fn next_hop(program: &Program, port: &PortPart, dst: IpAddr) -> iaas_core::Mac {
    let subnet = program.subnet(port.subnet);
    let local = mapped(dst) >> 118 == 0xfe80 >> 6 || subnet.prefixes().any(|p| p.cidr.contains(dst));
    let neighbour = program.owner(port.vpc, mapped(dst)).filter(|_| local);
    match neighbour.map(|n| program.port_at(n)) {
        Some(peer) if peer.subnet == port.subnet => peer.mac,
        _ => ROUTER_MAC,
    }
}
