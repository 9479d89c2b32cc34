//! Laws that hold for any packet and any rules.

use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Verdict as Explained;
use proptest::prelude::*;
use smoltcp::wire::TcpControl;

use super::*;

/// Any rule over the groups 5 and 6 and prefixes around the sample addresses.
fn any_rule() -> impl Strategy<Value = Rule> {
    let direction = prop_oneof![Just(Direction::Ingress), Just(Direction::Egress)];
    let protocol =
        prop_oneof![Just(Protocol::Any), Just(Protocol::Icmp), Just(Protocol::Tcp), Just(Protocol::Udp)];
    let remote = prop_oneof![
        Just(Remote::Any),
        Just(Remote::Group(numbered(5))),
        Just(Remote::Group(numbered(6))),
        Just(cidr("10.1.0.0/24")),
        Just(cidr("10.1.1.0/24")),
        Just(cidr("fd00:1::/64")),
        Just(cidr("0.0.0.0/0")),
    ];
    let ports =
        prop_oneof![Just(PortRange::ALL), Just(PortRange::new(1, 100).unwrap()), Just(PortRange::one(80))];
    (direction, protocol, ports, remote).prop_map(|(d, p, ports, r)| {
        let ported = matches!(p, Protocol::Tcp | Protocol::Udp);
        rule(d, p, if ported { ports } else { PortRange::ALL }, r)
    })
}

/// Two groups with any rules, and ports 10 (subnet 0) and 20 (any subnet) in any of them.
fn any_world() -> impl Strategy<Value = (Vec<NetObject>, u8)> {
    let groups = || prop::collection::vec(prop_oneof![Just(5u128), Just(6u128)], 0..=2);
    let rules = || prop::collection::vec(any_rule(), 0..5);
    (rules(), rules(), groups(), groups(), 0u8..2).prop_map(|(five, six, a, b, subnet)| {
        let mut objects = vpc(1);
        objects.extend([group(5, five), group(6, six), port(1, 0, 10, &a), port(1, subnet, 20, &b)]);
        (objects, subnet)
    })
}

/// A first packet and its reply.
fn any_exchange() -> impl Strategy<Value = (What<'static>, What<'static>)> {
    let port = prop_oneof![Just(80u16), Just(81), 1u16..];
    prop_oneof![
        (1u16.., port.clone()).prop_map(|(s, d)| {
            let reply = What::Tcp { src: d, dst: s, control: TcpControl::Syn, ack: true, data: b"" };
            (syn(s, d), reply)
        }),
        (1u16.., port).prop_map(|(s, d)| {
            let udp = |src, dst| What::Udp { src, dst, data: b"data" };
            (udp(s, d), udp(d, s))
        }),
        any::<u16>().prop_map(|id| (What::Echo { id, request: true }, What::Echo { id, request: false })),
    ]
}

fn hop(subnet: u8, to: u8) -> Mac {
    if subnet == 0 { mac_of(to) } else { ROUTER_MAC }
}

fn query(subnet: u8, v6_: bool, what: What<'_>) -> PacketQuery {
    let dst = if v6_ { v6(1, subnet, 20) } else { v4(1, subnet, 20) };
    let (protocol, src_port, dst_port) = match what {
        What::Tcp { src, dst, .. } => (6, src, dst),
        What::Udp { src, dst, .. } => (17, src, dst),
        What::Echo { .. } if v6_ => (58, 0, 0),
        What::Echo { .. } => (1, 0, 0),
        What::Raw(protocol, _) => (protocol, 0, 0),
    };
    PacketQuery { from: id_of(10), src: None, dst, protocol, src_port, dst_port }
}

proptest! {
    #[test]
    fn replies_of_allowed_flows_pass_and_explain_agrees(
        (objects, subnet) in any_world(),
        (first, reply) in any_exchange(),
        v6_: bool,
        restarted: bool,
    ) {
        let (a, b) = if v6_ { (v6(1, 0, 10), v6(1, subnet, 20)) } else { (v4(1, 0, 10), v4(1, subnet, 20)) };
        let mut pipeline = plugged(objects.clone(), &[10, 20]);
        let (verdict, _) = send(&mut pipeline, secs(1), 0, ip_packet(mac_of(10), hop(subnet, 20), a, b, first));
        let explained = pipeline.explain(&query(subnet, v6_, first)).unwrap();
        let delivered = verdict == Verdict::Deliver(Slot(1));
        let same = if delivered { Explained::Delivered(id_of(20)) } else { Explained::Dropped };
        prop_assert_eq!(explained.verdict, same, "{:?} {:?}", verdict, explained.stages);
        prop_assert_eq!(explained.stages.last().unwrap().passed, delivered);
        if delivered {
            // UDP alone needs its entry: nothing in a reply says that it is one.
            if restarted && !matches!(first, What::Udp { .. }) {
                pipeline = plugged(objects, &[10, 20]);
            }
            let (verdict, _) = send(&mut pipeline, secs(2), 1, ip_packet(mac_of(20), hop(subnet, 10), b, a, reply));
            prop_assert_eq!(verdict, Verdict::Deliver(Slot(0)));
        }
    }

    #[test]
    fn a_hit_and_a_miss_decide_alike((objects, subnet) in any_world(), port in 79u16..82, n in 1usize..4) {
        let packet = || ip_packet(mac_of(10), hop(subnet, 20), v4(1, 0, 10), v4(1, subnet, 20), ack(4000, port));
        let mut warm = plugged(objects.clone(), &[10, 20]);
        let first = send(&mut warm, secs(1), 0, packet());
        for _ in 0..n {
            prop_assert_eq!(&send(&mut warm, secs(1), 0, packet()), &first);
        }
        prop_assert_eq!(&send(&mut plugged(objects, &[10, 20]), secs(9), 0, packet()), &first);
    }

    #[test]
    fn no_bytes_make_the_pipeline_panic_or_loop(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        kind in prop_oneof![Just(None), Just(Some(wire::IPV4)), Just(Some(wire::IPV6)), Just(Some(wire::ARP))],
        headers in any::<bool>(),
    ) {
        let mut pipeline = plugged(sample(), &[10, 20]);
        let mut bytes = bytes;
        if let Some(kind) = kind {
            wire::put(&mut bytes, 0, &[0; 12]);
            wire::put(&mut bytes, 12, &ROUTER_MAC.0);
            wire::put(&mut bytes, 18, &mac_of(10).0);
            wire::put(&mut bytes, 24, &kind.to_be_bytes());
            if headers {
                wire::put(&mut bytes, 26, if kind == wire::IPV6 { &[0x60] } else { &[0x45] });
            }
        }
        let length = bytes.len();
        let (verdict, after) = send(&mut pipeline, secs(1), 0, bytes);
        prop_assert!(matches!(verdict, Verdict::Reply) || after.len() == length);
    }

    #[test]
    fn no_change_of_a_good_packet_makes_the_pipeline_panic(
        which in 0usize..7,
        at in 0usize..400,
        byte: u8,
        cut in 0usize..400,
    ) {
        let mut pipeline = plugged(sample(), &[10, 20]);
        let mut bytes = good(which);
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        bytes.truncate(cut.max(1));
        let (verdict, after) = send(&mut pipeline, secs(1), 0, bytes);
        if verdict == Verdict::Reply {
            let to_guest = after[VNET_HEADER] & 1 == 1 || after[VNET_HEADER..][..6] == mac_of(10).0;
            prop_assert!(to_guest);
        }
    }

    #[test]
    fn a_forged_source_never_gets_through(a in any::<[u8; 4]>(), mac in any::<[u8; 6]>(), which in 0u8..2) {
        let mut pipeline = plugged(sample(), &[10, 20]);
        let src: std::net::IpAddr = if which == 0 { a.into() } else { v4(1, 0, 10) };
        let from = if which == 1 { Mac(mac) } else { mac_of(10) };
        prop_assume!(src != v4(1, 0, 10) || from != mac_of(10));
        let what = What::Udp { src: 1, dst: 2, data: b"" };
        let (verdict, _) = send(&mut pipeline, secs(1), 0, ip_packet(from, mac_of(20), src, v4(1, 0, 20), what));
        prop_assert!(matches!(verdict, Verdict::Drop(Reason::SpoofedMac | Reason::SpoofedAddress)), "{:?}", verdict);
    }
}

fn sample() -> Vec<NetObject> {
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[]), port(1, 0, 20, &[])]);
    objects
}

/// A good packet of each protocol from port 10.
fn good(which: usize) -> Vec<u8> {
    let between = |what| ip_packet(mac_of(10), mac_of(20), v4(1, 0, 10), v4(1, 0, 20), what);
    match which {
        0 => between(ack(1, 2)),
        1 => between(What::Echo { id: 7, request: true }),
        2 => ip_packet(mac_of(10), mac_of(20), v6(1, 0, 10), v6(1, 0, 20), syn(1, 2)),
        3 => ip_packet(
            mac_of(10),
            ROUTER_MAC,
            v6(1, 0, 10),
            "fd00:1::1".parse().unwrap(),
            What::Echo { id: 7, request: true },
        ),
        4 => stages::arp(v4(1, 0, 10), v4(1, 0, 1)),
        5 => stages::dhcp(1, None),
        _ => stages::solicit(v6(1, 0, 10), v6(1, 0, 20)),
    }
}
