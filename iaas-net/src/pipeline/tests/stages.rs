//! Each stage against packets made by hand or by smoltcp's emitters.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use smoltcp::wire::*;

use super::*;

/// An ARP request of port 10.
pub(super) fn arp(from: IpAddr, target: IpAddr) -> Vec<u8> {
    let (IpAddr::V4(from), IpAddr::V4(target)) = (from, target) else { unreachable!("ARP is for IPv4") };
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(mac_of(10).0),
        source_protocol_addr: from,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut out = Vec::new();
    wire::begin(&mut out, wire::BROADCAST, mac_of(10), wire::ARP);
    let at = out.len();
    out.resize(at + repr.buffer_len(), 0);
    repr.emit(&mut ArpPacket::new_unchecked(&mut out[at..]));
    out
}

/// A DHCP message of port 10 without an address.
pub(super) fn dhcp(kind: u8, wanted: Option<Ipv4Addr>) -> Vec<u8> {
    let repr = DhcpRepr {
        message_type: DhcpMessageType::from(kind),
        transaction_id: 0x1234,
        secs: 0,
        client_hardware_address: EthernetAddress(mac_of(10).0),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        broadcast: false,
        requested_ip: wanted,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        dns_servers: None,
        additional_options: &[],
    };
    let mut data = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut data)).unwrap();
    let what = What::Udp { src: 68, dst: 67, data: &data };
    ip_packet(mac_of(10), wire::BROADCAST, Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into(), what)
}

/// A neighbour solicitation of port 10.
pub(super) fn solicit(from: IpAddr, target: IpAddr) -> Vec<u8> {
    let (IpAddr::V6(from), IpAddr::V6(target)) = (from, target) else { unreachable!("NDP is for IPv6") };
    let [.., a, b, c] = target.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    ndisc(NdiscRepr::NeighborSolicit { target_addr: target, lladdr: None }, from, group)
}

fn ndisc(repr: NdiscRepr<'_>, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let repr = Icmpv6Repr::Ndisc(repr);
    let mut data = vec![0; repr.buffer_len()];
    repr.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(&mut data), &Default::default());
    let mac = Mac([0x33, 0x33, 0xff, 0, 0, 1]);
    let mut frame = ip_packet(mac_of(10), mac, from.into(), to.into(), What::Raw(58, &data));
    frame[VNET_HEADER + 14 + 7] = 255;
    frame
}

fn lab() -> Pipeline {
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[]), port(1, 0, 20, &[]), port(1, 1, 30, &[])]);
    plugged(objects, &[10, 20, 30])
}

fn udp(src: IpAddr, dst: IpAddr, hop: Mac) -> Vec<u8> {
    ip_packet(mac_of(10), hop, src, dst, What::Udp { src: 5, dst: 6, data: b"x" })
}

fn dropped(pipeline: &mut Pipeline, bytes: Vec<u8>) -> Option<Reason> {
    match send(pipeline, secs(1), 0, bytes).0 {
        Verdict::Drop(reason) => Some(reason),
        _ => None,
    }
}

#[test]
fn arp_is_answered_for_the_router_and_neighbours_and_nobody_else() {
    let mut pipeline = lab();
    let mut ask = |from, target| {
        let (verdict, bytes) = send(&mut pipeline, secs(1), 0, arp(from, target));
        (verdict == Verdict::Reply).then(|| {
            let packet = ArpPacket::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
            let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. } =
                ArpRepr::parse(&packet).unwrap()
            else {
                unreachable!("smoltcp knows only this")
            };
            assert_eq!(IpAddr::from(source_protocol_addr), target);
            Mac(source_hardware_addr.0)
        })
    };
    assert_eq!(ask(v4(1, 0, 10), v4(1, 0, 1)), Some(ROUTER_MAC));
    assert_eq!(ask(v4(1, 0, 10), v4(1, 0, 20)), Some(mac_of(20)));
    assert_eq!(
        ask(Ipv4Addr::UNSPECIFIED.into(), v4(1, 0, 20)),
        Some(mac_of(20)),
        "a probe learns of a conflict"
    );
    assert_eq!(ask(v4(1, 0, 10), v4(1, 0, 10)), None, "its own");
    assert_eq!(ask(v4(1, 0, 10), v4(1, 0, 99)), None, "nobody's");
    assert_eq!(ask(v4(1, 0, 10), v4(1, 1, 30)), None, "in another subnet");
    assert_eq!(ask(v4(1, 0, 20), v4(1, 0, 1)), None, "forged");
}

#[test]
fn ndp_is_answered_and_duplicate_address_detection_works() {
    let mut pipeline = lab();
    let free = send(&mut pipeline, secs(1), 0, solicit(Ipv6Addr::UNSPECIFIED.into(), v6(1, 0, 10)));
    assert_eq!(free.0, Verdict::Absorb);
    let mut ask = |from: IpAddr, target: IpAddr| {
        let (verdict, bytes) = send(&mut pipeline, secs(1), 0, solicit(from, target));
        (verdict == Verdict::Reply).then(|| {
            let ip = Ipv6Packet::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
            let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
            let repr = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &Default::default()).unwrap();
            let Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { flags, target_addr, lladdr }) = repr else {
                panic!("{repr:?}")
            };
            assert_eq!(IpAddr::from(target_addr), target);
            (lladdr.unwrap().as_bytes().to_vec(), flags, ip.dst_addr())
        })
    };
    let (mac, flags, to) = ask(v6(1, 0, 10), v6(1, 0, 20)).unwrap();
    assert_eq!((mac.as_slice(), IpAddr::from(to)), (&mac_of(20).0[..], v6(1, 0, 10)));
    assert_eq!(flags, NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE);
    let (mac, flags, _) = ask(v6(1, 0, 10), "fd00:1::1".parse().unwrap()).unwrap();
    assert_eq!(mac, ROUTER_MAC.0);
    assert!(flags.contains(NdiscNeighborFlags::ROUTER));
    let none: IpAddr = Ipv6Addr::UNSPECIFIED.into();
    assert!(ask(none, v6(1, 0, 10)).is_none(), "its own address is free");
    assert!(ask(none, crate::topology::link_local(mac_of(10)).into()).is_none());
    let (_, flags, to) = ask(none, v6(1, 0, 20)).expect("another's is not");
    assert_eq!((flags, to), (NdiscNeighborFlags::OVERRIDE, "ff02::1".parse().unwrap()));
    assert!(ask(v6(1, 0, 10), v6(1, 1, 30)).is_none());
}

#[test]
fn a_router_solicitation_gets_prefix_mtu_and_the_routers_address() {
    let mut pipeline = lab();
    let from = crate::topology::link_local(mac_of(10));
    let ask = ndisc(NdiscRepr::RouterSolicit { lladdr: None }, from, "ff02::2".parse().unwrap());
    let (verdict, bytes) = send(&mut pipeline, secs(1), 0, ask);
    assert_eq!(verdict, Verdict::Reply);
    check_advert(&bytes);
    // RFC 8106 §5.1: the name server's option is in it, which smoltcp does not read.
    let dns = "2620:fe::fe".parse::<Ipv6Addr>().unwrap().octets();
    assert!(bytes.windows(16).any(|w| w == dns));
}

fn check_advert(bytes: &[u8]) {
    let ip = Ipv6Packet::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
    assert_eq!(
        (ip.hop_limit(), IpAddr::from(ip.src_addr())),
        (255, crate::topology::link_local(ROUTER_MAC).into())
    );
    let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    let repr = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &Default::default()).unwrap();
    let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { lladdr, mtu, prefix_info, router_lifetime, .. }) = repr
    else {
        panic!("{repr:?}")
    };
    assert_eq!((lladdr.unwrap().as_bytes(), mtu), (&ROUTER_MAC.0[..], Some(1500)));
    assert_eq!(router_lifetime.secs(), 1800);
    let prefix = prefix_info.unwrap();
    assert_eq!((prefix.prefix.to_string(), prefix.prefix_len), ("fd00:1::".to_owned(), 64));
    assert_eq!(prefix.flags, NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF);
}

#[test]
fn ports_hear_from_their_router_unasked_and_again() {
    let mut pipeline = lab();
    let adverts = |pipeline: &mut Pipeline, now| {
        let mut heard = Vec::new();
        pipeline.tick(now, |slot, bytes| {
            if slot == Slot(0) {
                check_advert(bytes);
            }
            heard.push(slot.0);
        });
        heard
    };
    // The NIC of a guest that is not up throws away what is counted as delivered to it.
    assert_eq!(pipeline.next_deadline(), None);
    assert_eq!(adverts(&mut pipeline, secs(5)), []);
    let speak = |pipeline: &mut Pipeline, slot| {
        let _ = send(pipeline, secs(5), slot, vec![0; 60]);
    };
    (0..3).for_each(|slot| speak(&mut pipeline, slot));
    assert_eq!(pipeline.next_deadline(), Some(secs(0)));
    assert_eq!(adverts(&mut pipeline, secs(5)), [0, 1, 2]);
    assert_eq!(pipeline.next_deadline(), Some(secs(605)));
    assert_eq!(adverts(&mut pipeline, secs(604)), []);
    pipeline.greet(Slot(1));
    assert_eq!(adverts(&mut pipeline, secs(604)), []);
    speak(&mut pipeline, 1);
    assert_eq!(adverts(&mut pipeline, secs(604)), [1]);
    assert_eq!(adverts(&mut pipeline, secs(605)), [0, 2]);
    // A repair brings the same program again: nobody has anything new to hear.
    let same = pipeline.program().clone();
    pipeline.install(same);
    assert_eq!(adverts(&mut pipeline, secs(606)), []);
}

#[test]
fn dhcp_gives_its_options_and_refuses_other_addresses() {
    let mut pipeline = lab();
    let mut ask = |kind, wanted| {
        let (verdict, bytes) = send(&mut pipeline, secs(1), 0, dhcp(kind, wanted));
        (verdict == Verdict::Reply).then(|| {
            let ip = Ipv4Packet::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
            assert!(ip.verify_checksum());
            let udp = UdpPacket::new_checked(ip.payload()).unwrap();
            assert!(udp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
            let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
            let repr = DhcpRepr::parse(&packet).unwrap();
            let mtu = packet.options().find(|o| o.kind == 26).map(|o| o.data.to_vec());
            (
                repr.message_type,
                repr.your_ip.octets(),
                repr.subnet_mask.map(|m| m.octets()),
                repr.lease_duration,
                mtu,
            )
        })
    };
    let own = [10, 1, 0, 10];
    let mask = Some([255, 255, 255, 0]);
    let mtu = Some(1500u16.to_be_bytes().to_vec());
    assert_eq!(ask(1, None), Some((DhcpMessageType::Offer, own, mask, Some(3600), mtu.clone())));
    assert_eq!(ask(3, Some(own.into())), Some((DhcpMessageType::Ack, own, mask, Some(3600), mtu.clone())));
    assert_eq!(ask(3, Some([10, 1, 0, 20].into())), Some((DhcpMessageType::Nak, [0; 4], None, None, None)));
    assert_eq!(ask(8, None), Some((DhcpMessageType::Ack, [0; 4], mask, None, mtu)));
    assert_eq!(ask(7, None), None);
    // Another client's hardware address inside the message.
    let mut forged = dhcp(1, None);
    forged[VNET_HEADER + 14 + 28 + 28 + 5] = 20;
    assert_eq!(dropped(&mut lab(), forged), Some(Reason::SpoofedMac));
}

#[test]
fn what_is_not_forwarded_is_dropped_with_its_reason() {
    let good = || udp(v4(1, 0, 10), v4(1, 0, 20), mac_of(20));
    let changed = |at: usize, value: &[u8]| {
        let mut bytes = good();
        wire::put(&mut bytes, VNET_HEADER + at, value);
        bytes
    };
    let mut vnet = good();
    vnet[0] = 1;
    let mut unknown_protocol = changed(23, &[99]);
    wire::put(&mut unknown_protocol, VNET_HEADER + 16, &[1, 0]);
    let long = vec![0; 1481];
    let big = ip_packet(mac_of(10), mac_of(20), v4(1, 0, 10), v4(1, 0, 20), What::Raw(99, &long));
    let cases: Vec<(Vec<u8>, Option<Reason>)> = vec![
        (good(), None),
        (vec![], Some(Reason::Malformed)),
        (good()[..40].to_vec(), Some(Reason::Malformed)),
        (changed(12, &[0x81, 0]), Some(Reason::Vlan)),
        (changed(12, &[0x88, 0xcc]), Some(Reason::EtherType)),
        (changed(14, &[0x46]), Some(Reason::HeaderOptions)),
        (changed(14, &[0x44]), Some(Reason::Malformed)),
        (changed(16, &[0xff, 0xff]), Some(Reason::Malformed)),
        (unknown_protocol, Some(Reason::Malformed)),
        (changed(20, &[0x20, 0]), Some(Reason::Fragment)),
        (changed(20, &[0, 1]), Some(Reason::Fragment)),
        (vnet, Some(Reason::Offload)),
        (udp(v4(1, 0, 20), v4(1, 0, 20), mac_of(20)), Some(Reason::SpoofedAddress)),
        (changed(6, &mac_of(20).0), Some(Reason::SpoofedMac)),
        (udp(v4(1, 0, 10), v4(1, 0, 99), mac_of(20)), Some(Reason::NoRoute)),
        (udp(v4(1, 0, 10), v4(1, 0, 20), mac_of(30)), Some(Reason::WrongNextHop)),
        (udp(v4(1, 0, 10), v4(1, 1, 30), mac_of(30)), Some(Reason::WrongNextHop)),
        (udp(v4(1, 0, 10), v4(1, 0, 255), wire::BROADCAST), Some(Reason::Multicast)),
        (udp(v4(1, 0, 10), "224.0.0.251".parse().unwrap(), wire::BROADCAST), Some(Reason::Multicast)),
        (udp(v4(1, 0, 10), v4(1, 0, 1), ROUTER_MAC), Some(Reason::RouterClosed)),
        (big, Some(Reason::TooBig)),
        (udp(v4(1, 0, 10), v4(1, 1, 30), ROUTER_MAC), None),
    ];
    for (n, (bytes, reason)) in cases.into_iter().enumerate() {
        let mut pipeline = lab();
        assert_eq!(dropped(&mut pipeline, bytes), reason, "case {n}");
        if let Some(reason) = reason {
            assert_eq!(pipeline.drops().of(reason), 1);
        }
    }
}

#[test]
fn offloads_that_were_agreed_on_pass_untouched() {
    let agreed = Offloads { checksum: true, tso4: true, ..Offloads::default() };
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[]), port(1, 0, 20, &[])]);
    let mut pipeline = Pipeline::new(Limits::default(), agreed, 1);
    pipeline.install(program(1, objects));
    pipeline.plug(id_of(10));
    pipeline.plug(id_of(20));
    let super_frame = |kind: u8| {
        let mut bytes = ip_packet(mac_of(10), mac_of(20), v4(1, 0, 10), v4(1, 0, 20), ack(1, 2));
        bytes.resize(VNET_HEADER + 14 + 40_000, 0);
        wire::put(&mut bytes, VNET_HEADER + 16, &40_000u16.to_be_bytes());
        // NEEDS_CSUM, type, 54 bytes of headers, segments of 1448 bytes, checksum of TCP.
        wire::put(&mut bytes, 0, &[1, kind, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
        bytes
    };
    let (verdict, after) = send(&mut pipeline, secs(1), 0, super_frame(1));
    assert_eq!((verdict, after), (Verdict::Deliver(Slot(1)), super_frame(1)));
    assert_eq!(
        dropped(&mut pipeline, super_frame(4)),
        Some(Reason::Offload),
        "TSO for IPv6 was not agreed on"
    );
    let mut outside = super_frame(1);
    wire::put(&mut outside, 6, &[0xff, 0xff]);
    assert_eq!(dropped(&mut pipeline, outside), Some(Reason::Offload), "the checksum's place is outside");
}

#[test]
fn a_routed_packet_loses_one_hop_and_keeps_a_good_checksum() {
    for hops in [2, 3, 64, 255] {
        let mut bytes = udp(v4(1, 0, 10), v4(1, 1, 30), ROUTER_MAC);
        let mut ip = Ipv4Packet::new_unchecked(&mut bytes[VNET_HEADER + 14..]);
        ip.set_hop_limit(hops);
        ip.fill_checksum();
        let (verdict, bytes) = send(&mut lab(), secs(1), 0, bytes);
        assert_eq!(verdict, Verdict::Deliver(Slot(2)));
        let ip = Ipv4Packet::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
        assert!(ip.verify_checksum());
        assert_eq!(ip.hop_limit(), hops - 1);
        assert_eq!(bytes[VNET_HEADER..][..12], [mac_of(30).0, ROUTER_MAC.0].concat());
    }
}

#[test]
fn the_router_says_when_a_hop_limit_runs_out() {
    let mut bytes = udp(v4(1, 0, 10), v4(1, 1, 30), ROUTER_MAC);
    let mut ip = Ipv4Packet::new_unchecked(&mut bytes[VNET_HEADER + 14..]);
    ip.set_hop_limit(1);
    ip.fill_checksum();
    let (verdict, bytes) = send(&mut lab(), secs(1), 0, bytes);
    assert_eq!(verdict, Verdict::Reply);
    let ip = Ipv4Packet::new_checked(&bytes[VNET_HEADER + 14..]).unwrap();
    assert_eq!(IpAddr::from(ip.src_addr()), v4(1, 0, 1));
    let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
    let repr = Icmpv4Repr::parse(&icmp, &Default::default()).unwrap();
    assert!(matches!(repr, Icmpv4Repr::TimeExceeded { .. }), "{repr:?}");
}

#[test]
fn a_revoked_rule_ends_its_flows_and_a_kept_one_does_not() {
    let world = |ports| {
        let mut objects = vpc(1);
        let allow = rule(Direction::Ingress, Protocol::Tcp, PortRange::one(ports), Remote::Any);
        objects.extend([group(5, vec![allow]), port(1, 0, 10, &[]), port(1, 0, 20, &[5])]);
        objects
    };
    let mut pipeline = plugged(world(80), &[10, 20]);
    let packet = |what| ip_packet(mac_of(10), mac_of(20), v4(1, 0, 10), v4(1, 0, 20), what);
    assert_eq!(send(&mut pipeline, secs(1), 0, packet(syn(9, 80))).0, Verdict::Deliver(Slot(1)));
    assert_eq!(send(&mut pipeline, secs(1), 0, packet(ack(9, 80))).0, Verdict::Deliver(Slot(1)));
    pipeline.install(program(2, world(80)));
    assert_eq!(send(&mut pipeline, secs(2), 0, packet(ack(9, 80))).0, Verdict::Deliver(Slot(1)));
    pipeline.install(program(3, world(443)));
    assert_eq!(send(&mut pipeline, secs(3), 0, packet(ack(9, 80))).0, Verdict::Drop(Reason::Ingress));
    // Now as its first packet of the other direction: port 20 may send nothing at all.
    let back = ip_packet(mac_of(20), mac_of(10), v4(1, 0, 20), v4(1, 0, 10), syn(80, 9));
    assert_eq!(send(&mut pipeline, secs(3), 1, back).0, Verdict::Drop(Reason::Egress));
}

#[test]
fn an_open_flow_lets_its_errors_back_and_no_other() {
    let mut objects = vpc(1);
    let allow = rule(Direction::Ingress, Protocol::Udp, PortRange::one(53), Remote::Any);
    objects.extend([
        group(5, vec![allow, all(Direction::Egress)]),
        port(1, 0, 10, &[5]),
        port(1, 0, 20, &[5]),
        port(1, 0, 30, &[]),
    ]);
    let mut pipeline = plugged(objects, &[10, 20, 30]);
    let question = ip_packet(
        mac_of(10),
        mac_of(20),
        v4(1, 0, 10),
        v4(1, 0, 20),
        What::Udp { src: 7, dst: 53, data: b"q" },
    );
    let unreachable = |quoted: &[u8]| {
        let data = [&[3, 3, 0, 0, 0, 0, 0, 0][..], quoted].concat();
        ip_packet(mac_of(20), mac_of(10), v4(1, 0, 20), v4(1, 0, 10), What::Raw(1, &data))
    };
    let quoted = question[VNET_HEADER + 14..][..28].to_vec();
    assert_eq!(send(&mut pipeline, secs(1), 1, unreachable(&quoted)).0, Verdict::Drop(Reason::Ingress));
    assert_eq!(send(&mut pipeline, secs(1), 0, question).0, Verdict::Deliver(Slot(1)));
    assert_eq!(send(&mut pipeline, secs(1), 1, unreachable(&quoted)).0, Verdict::Deliver(Slot(0)));
    let original = quoted.clone();
    let mut other = quoted;
    other[21] = 8;
    assert_eq!(send(&mut pipeline, secs(1), 1, unreachable(&other)).0, Verdict::Drop(Reason::Ingress));
    // A third port that has seen the flow's addresses cannot end it.
    let forged = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &original].concat();
    let forged = ip_packet(mac_of(30), mac_of(10), v4(1, 0, 30), v4(1, 0, 10), What::Raw(1, &forged));
    assert_eq!(send(&mut pipeline, secs(1), 2, forged).0, Verdict::Drop(Reason::Ingress));
}

#[test]
fn a_port_may_not_act_as_a_router() {
    let from = crate::topology::link_local(mac_of(10));
    let redirect =
        NdiscRepr::Redirect { target_addr: from, dest_addr: from, lladdr: None, redirected_hdr: None };
    assert_eq!(
        dropped(&mut lab(), ndisc(redirect, from, "ff02::1".parse().unwrap())),
        Some(Reason::RogueRouter)
    );
}

#[test]
fn link_local_addresses_work_in_their_subnet_and_are_not_routed() {
    let ll = |p| IpAddr::from(crate::topology::link_local(mac_of(p)));
    assert_eq!(dropped(&mut lab(), udp(ll(10), ll(20), mac_of(20))), None);
    assert_eq!(dropped(&mut lab(), udp(ll(10), ll(30), ROUTER_MAC)), Some(Reason::NoRoute));
    assert_eq!(dropped(&mut lab(), udp(ll(20), ll(10), mac_of(20))), Some(Reason::SpoofedAddress));
}

#[test]
fn a_port_that_is_not_here_or_not_known_gets_and_sends_nothing() {
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[]), port(1, 0, 20, &[])]);
    let mut pipeline = plugged(objects.clone(), &[10]);
    let packet = || udp(v4(1, 0, 10), v4(1, 0, 20), mac_of(20));
    assert_eq!(dropped(&mut pipeline, packet()), Some(Reason::NotHere));
    let slot = pipeline.plug(id_of(20));
    assert_eq!(dropped(&mut pipeline, packet()), None);
    pipeline.unplug(slot);
    assert_eq!(dropped(&mut pipeline, packet()), Some(Reason::NotHere));
    pipeline.install(program(2, vpc(1)));
    assert_eq!(dropped(&mut pipeline, packet()), Some(Reason::UnknownPort));
}
