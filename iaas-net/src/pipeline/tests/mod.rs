//! The pipeline against hand-made packets, against a foreign TCP/IP stack, and by laws.

mod guests;
mod laws;
mod stages;

use std::sync::Arc;
use std::time::Duration;

use iaas_core::Cidr;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::PortRange;
use iaas_core::Rev;
use iaas_core::model::Port;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Protocol;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::network::NetObject;

use super::*;
use crate::Topology;
use crate::topology::mac_of;
use crate::topology::numbered;
use crate::topology::port;
use crate::topology::vpc;
use crate::wire;

/// A pipeline with these ports plugged in, in the order of their slots.
fn plugged(objects: Vec<NetObject>, ports: &[u8]) -> Pipeline {
    let mut pipeline = Pipeline::new(Limits::default(), Offloads::default(), 1);
    pipeline.install(program(1, objects));
    for (n, p) in ports.iter().enumerate() {
        assert_eq!(pipeline.plug(id_of(*p)), Slot(u32::try_from(n).unwrap()));
    }
    pipeline
}

fn program(rev: u64, objects: Vec<NetObject>) -> Arc<Program> {
    Arc::new(Topology::new(objects).unwrap().compile(Rev(rev)).unwrap())
}

fn id_of(p: u8) -> Id<Port> {
    numbered(p.into())
}

fn group(id: u128, rules: Vec<Rule>) -> NetObject {
    NetObject::SecurityGroup { id: numbered(id), rules }
}

fn rule(direction: Direction, protocol: Protocol, ports: PortRange, remote: Remote) -> Rule {
    Rule { direction, protocol, ports, remote }
}

fn all(direction: Direction) -> Rule {
    rule(direction, Protocol::Any, PortRange::ALL, Remote::Any)
}

fn cidr(text: &str) -> Remote {
    Remote::Cidr(text.parse::<Cidr>().unwrap())
}

/// Sends one frame and says what became of it, and its bytes afterwards.
fn send(pipeline: &mut Pipeline, now: Duration, from: u32, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
    let mut batch = [Frame { from: Slot(from), bytes }];
    let mut verdicts = Vec::new();
    pipeline.process(now, &mut batch, &mut verdicts);
    let [frame] = batch;
    (verdicts[0], frame.bytes)
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// 10.`n`.`s`.`p`.
fn v4(n: u8, s: u8, p: u8) -> std::net::IpAddr {
    std::net::Ipv4Addr::new(10, n, s, p).into()
}

/// The SLAAC address of port `p` in subnet `s` of VPC `n`.
fn v6(n: u8, s: u8, p: u8) -> std::net::IpAddr {
    let prefix = std::net::Ipv6Addr::new(0xfd00, n.into(), s.into(), 0, 0, 0, 0, 0);
    crate::topology::slaac(prefix, mac_of(p)).into()
}

/// A packet made by smoltcp's emitters, from `from` to the Ethernet address `hop`.
fn ip_packet(from: Mac, hop: Mac, src: std::net::IpAddr, dst: std::net::IpAddr, what: What) -> Vec<u8> {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::*;
    let caps = ChecksumCapabilities::default();
    let (s, d) = (IpAddress::from(src), IpAddress::from(dst));
    let mut payload = vec![0; 1500];
    let (protocol, length) = match what {
        What::Tcp { src: src_port, dst: dst_port, control, ack, data } => {
            let repr = TcpRepr {
                src_port,
                dst_port,
                control,
                seq_number: TcpSeqNumber(1),
                ack_number: ack.then_some(TcpSeqNumber(1)),
                window_len: 1000,
                window_scale: None,
                max_seg_size: None,
                sack_permitted: false,
                sack_ranges: [None; 3],
                timestamp: None,
                payload: data,
            };
            repr.emit(&mut TcpPacket::new_unchecked(&mut payload[..repr.buffer_len()]), &s, &d, &caps);
            (IpProtocol::Tcp, repr.buffer_len())
        }
        What::Udp { src: src_port, dst: dst_port, data } => {
            let repr = UdpRepr { src_port, dst_port };
            let length = repr.header_len() + data.len();
            let mut packet = UdpPacket::new_unchecked(&mut payload[..length]);
            repr.emit(&mut packet, &s, &d, data.len(), |b| b.copy_from_slice(data), &caps);
            (IpProtocol::Udp, length)
        }
        What::Echo { id, request } => {
            let data = b"ping";
            match (s, d) {
                (IpAddress::Ipv4(_), _) => {
                    let repr = if request {
                        Icmpv4Repr::EchoRequest { ident: id, seq_no: 1, data }
                    } else {
                        Icmpv4Repr::EchoReply { ident: id, seq_no: 1, data }
                    };
                    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut payload[..repr.buffer_len()]), &caps);
                    (IpProtocol::Icmp, repr.buffer_len())
                }
                (IpAddress::Ipv6(s), IpAddress::Ipv6(d)) => {
                    let repr = if request {
                        Icmpv6Repr::EchoRequest { ident: id, seq_no: 1, data }
                    } else {
                        Icmpv6Repr::EchoReply { ident: id, seq_no: 1, data }
                    };
                    let length = repr.buffer_len();
                    repr.emit(&s, &d, &mut Icmpv6Packet::new_unchecked(&mut payload[..length]), &caps);
                    (IpProtocol::Icmpv6, length)
                }
                _ => unreachable!("both addresses are of one family"),
            }
        }
        What::Raw(protocol, bytes) => {
            payload[..bytes.len()].copy_from_slice(bytes);
            (IpProtocol::from(protocol), bytes.len())
        }
    };
    let ip = IpRepr::new(s, d, protocol, length, 64);
    let eth = EthernetRepr {
        src_addr: EthernetAddress(from.0),
        dst_addr: EthernetAddress(hop.0),
        ethertype: if src.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 },
    };
    let mut frame = vec![0; VNET_HEADER + 14 + ip.header_len() + length];
    eth.emit(&mut EthernetFrame::new_unchecked(&mut frame[VNET_HEADER..]));
    ip.emit(&mut frame[VNET_HEADER + 14..], &caps);
    frame[VNET_HEADER + 14 + ip.header_len()..].copy_from_slice(&payload[..length]);
    frame
}

/// The transport part of a packet.
#[derive(Clone, Copy, Debug)]
enum What<'a> {
    Tcp { src: u16, dst: u16, control: smoltcp::wire::TcpControl, ack: bool, data: &'a [u8] },
    Udp { src: u16, dst: u16, data: &'a [u8] },
    Echo { id: u16, request: bool },
    Raw(u8, &'a [u8]),
}

fn syn(src: u16, dst: u16) -> What<'static> {
    What::Tcp { src, dst, control: smoltcp::wire::TcpControl::Syn, ack: false, data: b"" }
}

fn ack(src: u16, dst: u16) -> What<'static> {
    What::Tcp { src, dst, control: smoltcp::wire::TcpControl::None, ack: true, data: b"data" }
}
