//! smoltcp as the guests' TCP/IP stack: an independent reader and writer of every protocol that we answer.

use std::collections::VecDeque;
use std::net::IpAddr;

use smoltcp::iface::Config;
use smoltcp::iface::Interface;
use smoltcp::iface::SocketHandle;
use smoltcp::iface::SocketSet;
use smoltcp::phy::Device;
use smoltcp::phy::DeviceCapabilities;
use smoltcp::phy::Medium;
use smoltcp::socket::dhcpv4;
use smoltcp::socket::icmp;
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;
use smoltcp::wire::Icmpv4Packet;
use smoltcp::wire::Icmpv4Repr;
use smoltcp::wire::Icmpv6Packet;
use smoltcp::wire::Icmpv6Repr;
use smoltcp::wire::IpAddress;
use smoltcp::wire::IpCidr;
use smoltcp::wire::Ipv6Address;

use super::*;

/// A network card whose frames are queues.
#[derive(Default)]
struct Card {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
}

struct Taken(Vec<u8>);
struct Place<'a>(&'a mut VecDeque<Vec<u8>>);

impl smoltcp::phy::RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
impl smoltcp::phy::TxToken for Place<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
impl Device for Card {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Place<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Taken, Place<'_>)> {
        Some((Taken(self.rx.pop_front()?), Place(&mut self.tx)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Place<'_>> {
        Some(Place(&mut self.tx))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        (caps.medium, caps.max_transmission_unit) = (Medium::Ethernet, 1514);
        caps
    }
}

struct Guest {
    card: Card,
    iface: Interface,
    sockets: SocketSet<'static>,
}

impl Guest {
    fn new(mac: Mac) -> Self {
        let mut card = Card::default();
        let mut config = Config::new(EthernetAddress(mac.0).into());
        config.random_seed = u64::from(mac.0[5]);
        let iface = Interface::new(config, &mut card, Instant::ZERO);
        Self { card, iface, sockets: SocketSet::new(vec![]) }
    }

    /// A guest with the addresses of port `p` and the default routes of its subnet.
    fn configured(n: u8, s: u8, p: u8) -> Self {
        let mut guest = Self::new(mac_of(p));
        guest.iface.update_ip_addrs(|addrs| {
            addrs.push(IpCidr::new(v4(n, s, p).into(), 24)).unwrap();
            addrs.push(IpCidr::new(v6(n, s, p).into(), 64)).unwrap();
        });
        let routes = guest.iface.routes_mut();
        routes.add_default_ipv4_route(std::net::Ipv4Addr::new(10, n, s, 1)).unwrap();
        routes.add_default_ipv6_route(Ipv6Address::new(0xfd00, n.into(), s.into(), 0, 0, 0, 0, 1)).unwrap();
        guest
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }
}

/// Guests on a pipeline, and a clock that the test turns.
struct Lab {
    pipeline: Pipeline,
    guests: Vec<Guest>,
    now: Duration,
}

impl Lab {
    fn new(objects: Vec<NetObject>, ports: &[u8], guests: Vec<Guest>) -> Self {
        Self { pipeline: plugged(objects, ports), guests, now: Duration::ZERO }
    }

    /// Lets 10 ms pass: every guest runs, every frame moves.
    fn step(&mut self) {
        self.now += Duration::from_millis(10);
        let now = Instant::from_millis(i64::try_from(self.now.as_millis()).unwrap());
        for n in 0..self.guests.len() {
            let guest = &mut self.guests[n];
            guest.iface.poll(now, &mut guest.card, &mut guest.sockets);
            while let Some(frame) = self.guests[n].card.tx.pop_front() {
                let bytes = [&[0; VNET_HEADER][..], &frame].concat();
                let (verdict, bytes) = send(&mut self.pipeline, self.now, u32::try_from(n).unwrap(), bytes);
                let to = match verdict {
                    Verdict::Deliver(Slot(to)) => to as usize,
                    Verdict::Reply => n,
                    Verdict::Absorb | Verdict::Drop(_) => continue,
                };
                self.guests[to].card.rx.push_back(bytes[VNET_HEADER..].to_vec());
            }
        }
    }

    /// Steps up to ten seconds until `done`; says whether it came to that.
    fn until(&mut self, mut done: impl FnMut(&mut Vec<Guest>) -> bool) -> bool {
        (0..1000).any(|_| {
            self.step();
            done(&mut self.guests)
        })
    }

    /// Whether guest 0 gets an echo reply from `to`.
    fn pings(&mut self, to: IpAddr) -> bool {
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(77)).unwrap();
        let guest = &mut self.guests[0];
        let from =
            guest.iface.ip_addrs().iter().find(|a| a.address().version() == IpAddress::from(to).version());
        let from = from.map(IpCidr::address);
        let mut request = vec![0; 12];
        let caps = smoltcp::phy::ChecksumCapabilities::default();
        match (from, IpAddress::from(to)) {
            (Some(IpAddress::Ipv6(from)), IpAddress::Ipv6(to)) => {
                Icmpv6Repr::EchoRequest { ident: 77, seq_no: 1, data: b"ping" }.emit(
                    &from,
                    &to,
                    &mut Icmpv6Packet::new_unchecked(&mut request),
                    &caps,
                )
            }
            _ => Icmpv4Repr::EchoRequest { ident: 77, seq_no: 1, data: b"ping" }
                .emit(&mut Icmpv4Packet::new_unchecked(&mut request), &caps),
        }
        let handle = guest.sockets.add(socket);
        // smoltcp throws an echo reply away whose next hop it must first ask for, so it is pinged twice.
        let got = (0..2).any(|_| {
            let socket = self.guests[0].sockets.get_mut::<icmp::Socket<'_>>(handle);
            socket.send_slice(&request, to.into()).unwrap();
            self.until(|guests| {
                let socket = guests[0].sockets.get_mut::<icmp::Socket<'_>>(handle);
                socket.can_recv() && socket.recv().is_ok_and(|(_, from)| from == to.into())
            })
        });
        self.guests[0].sockets.remove(handle);
        got
    }

    /// Whether guest 0 gets a greeting from a server on guest 1 at `to`:`port`.
    fn fetches(&mut self, to: IpAddr, port: u16) -> bool {
        let (client, server) = (self.guests[0].tcp(), self.guests[1].tcp());
        self.guests[1].sockets.get_mut::<tcp::Socket<'_>>(server).listen(port).unwrap();
        let guest = &mut self.guests[0];
        let source = 40_000 + port % 1000;
        let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(client);
        socket.connect(guest.iface.context(), (IpAddress::from(to), port), source).unwrap();
        let mut sent = false;
        self.until(|guests| {
            let server = guests[1].sockets.get_mut::<tcp::Socket<'_>>(server);
            if server.may_send() && !sent {
                sent = server.send_slice(b"hello").is_ok();
            }
            let client = guests[0].sockets.get_mut::<tcp::Socket<'_>>(client);
            client.can_recv() && client.recv(|b| (b.len(), b == b"hello")).unwrap()
        })
    }
}

fn two_guests(subnet: u8, groups: &[u128], extra: Vec<NetObject>) -> Lab {
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, groups), port(1, subnet, 20, groups)]);
    objects.extend(extra);
    Lab::new(objects, &[10, 20], vec![Guest::configured(1, 0, 10), Guest::configured(1, subnet, 20)])
}

#[test]
fn a_dhcp_client_gets_the_ports_own_address_and_keeps_it() {
    let mut objects = vpc(1);
    objects.push(port(1, 0, 10, &[]));
    let mut lab = Lab::new(objects, &[10], vec![Guest::new(mac_of(10))]);
    let mut socket = dhcpv4::Socket::new();
    socket.set_outgoing_options(&[]);
    let handle = lab.guests[0].sockets.add(socket);
    let mut leases = Vec::new();
    let mut collect = |guests: &mut Vec<Guest>| {
        if let Some(dhcpv4::Event::Configured(config)) =
            guests[0].sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            leases.push((config.address, config.router, config.dns_servers.to_vec(), config.server.address));
            let (address, router) = (config.address, config.router);
            guests[0].iface.update_ip_addrs(|a| a.push(IpCidr::Ipv4(address)).unwrap());
            guests[0].iface.routes_mut().add_default_ipv4_route(router.unwrap()).unwrap();
        }
        !leases.is_empty()
    };
    assert!(lab.until(&mut collect));
    // Half of the lease of 3600 s later the client renews by unicast; were that not answered, it would be deconfigured.
    lab.now += secs(1801);
    lab.step();
    lab.step();
    lab.now += secs(1801);
    lab.step();
    let event = lab.guests[0].sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll().map(|_| ());
    assert_eq!(event, None, "the lease was renewed without a change");
    let (address, router, dns, server) = leases.remove(0);
    assert_eq!(address.to_string(), "10.1.0.10/24");
    assert_eq!(router.unwrap().to_string(), "10.1.0.1");
    assert_eq!(server.to_string(), "10.1.0.1");
    assert_eq!(dns.iter().map(ToString::to_string).collect::<Vec<_>>(), ["9.9.9.9"]);
}

#[test]
fn ports_of_one_subnet_talk() {
    let mut lab = two_guests(0, &[], vec![]);
    assert!(lab.pings(v4(1, 0, 20)) && lab.pings(v6(1, 0, 20)));
    assert!(lab.fetches(v4(1, 0, 20), 80) && lab.fetches(v6(1, 0, 20), 81));
}

#[test]
fn ports_of_two_subnets_talk_through_the_router() {
    let mut lab = two_guests(1, &[], vec![]);
    assert!(lab.pings(v4(1, 1, 20)) && lab.pings(v6(1, 1, 20)));
    assert!(lab.fetches(v4(1, 1, 20), 80) && lab.fetches(v6(1, 1, 20), 81));
}

#[test]
fn the_router_answers_pings_on_every_gateway_of_its_network() {
    let mut lab = two_guests(1, &[5], vec![group(5, vec![])]);
    for gateway in ["10.1.0.1", "10.1.1.1", "fd00:1::1", "fd00:1:1::1"] {
        assert!(lab.pings(gateway.parse().unwrap()), "{gateway}");
    }
    assert!(!lab.pings("10.1.0.77".parse().unwrap()));
}

#[test]
fn members_of_a_group_reach_its_open_port_and_no_other() {
    let members = Remote::Group(numbered(5));
    let rules = vec![
        rule(Direction::Ingress, Protocol::Tcp, PortRange::one(8080), members),
        rule(Direction::Ingress, Protocol::Icmp, PortRange::ALL, members),
        all(Direction::Egress),
    ];
    for subnet in [0, 1] {
        let mut lab = two_guests(subnet, &[5], vec![group(5, rules.clone())]);
        for to in [v4(1, subnet, 20), v6(1, subnet, 20)] {
            assert!(lab.pings(to) && lab.fetches(to, 8080), "{to}");
            assert!(!lab.fetches(to, 8081), "{to}");
        }
        assert!(lab.pipeline.drops().of(Reason::Ingress) > 0);
    }
}

#[test]
fn a_stranger_to_the_group_reaches_nothing() {
    let members = Remote::Group(numbered(5));
    let rules =
        vec![rule(Direction::Ingress, Protocol::Any, PortRange::ALL, members), all(Direction::Egress)];
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[6]), port(1, 0, 20, &[5])]);
    objects.extend([group(5, rules), group(6, vec![all(Direction::Egress), all(Direction::Ingress)])]);
    let mut lab =
        Lab::new(objects, &[10, 20], vec![Guest::configured(1, 0, 10), Guest::configured(1, 0, 20)]);
    assert!(!lab.pings(v4(1, 0, 20)) && !lab.fetches(v6(1, 0, 20), 8080));
    // The other direction is open: group 6 takes everything, and replies pass.
    lab.guests.swap(0, 1);
    lab.pipeline = plugged(lab.pipeline_objects(), &[20, 10]);
    assert!(lab.pings(v4(1, 0, 10)) && lab.fetches(v4(1, 0, 10), 9000));
}

#[test]
fn nothing_crosses_to_another_vpc() {
    let mut objects = vpc(1);
    objects.extend(vpc(2));
    objects.extend([port(1, 0, 10, &[]), port(2, 0, 20, &[])]);
    let mut lab =
        Lab::new(objects, &[10, 20], vec![Guest::configured(1, 0, 10), Guest::configured(2, 0, 20)]);
    assert!(!lab.pings(v4(2, 0, 20)) && !lab.pings(v6(2, 0, 20)) && !lab.fetches(v4(2, 0, 20), 80));
}

#[test]
fn a_connection_outlives_a_restart_of_the_switch() {
    let rules = vec![
        rule(Direction::Ingress, Protocol::Tcp, PortRange::one(80), Remote::Group(numbered(5))),
        rule(Direction::Egress, Protocol::Tcp, PortRange::one(80), Remote::Any),
    ];
    let mut lab = two_guests(0, &[5], vec![group(5, rules)]);
    let to = v4(1, 0, 20);
    let (client, server) = (lab.guests[0].tcp(), lab.guests[1].tcp());
    lab.guests[1].sockets.get_mut::<tcp::Socket<'_>>(server).listen(80).unwrap();
    let guest = &mut lab.guests[0];
    let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(client);
    socket.connect(guest.iface.context(), (IpAddress::from(to), 80), 40_000).unwrap();
    assert!(lab.until(|g| g[1].sockets.get_mut::<tcp::Socket<'_>>(server).may_send()));
    let old = std::mem::replace(&mut lab.pipeline, Pipeline::new(Limits::default(), Offloads::default(), 2));
    lab.pipeline.install(old.program().clone());
    lab.pipeline.plug(id_of(10));
    lab.pipeline.plug(id_of(20));
    // The server speaks first: only the rules of the other direction allow its packet.
    lab.guests[1].sockets.get_mut::<tcp::Socket<'_>>(server).send_slice(b"still here").unwrap();
    assert!(lab.until(|g| g[0].sockets.get_mut::<tcp::Socket<'_>>(client).can_recv()));
}

impl Lab {
    /// The wire objects of the test with two groups, for a pipeline with the ports the other way round.
    fn pipeline_objects(&self) -> Vec<NetObject> {
        let members = Remote::Group(numbered(5));
        let mut objects = vpc(1);
        objects.extend([port(1, 0, 10, &[6]), port(1, 0, 20, &[5])]);
        objects.push(group(
            5,
            vec![rule(Direction::Ingress, Protocol::Any, PortRange::ALL, members), all(Direction::Egress)],
        ));
        objects.push(group(6, vec![all(Direction::Egress), all(Direction::Ingress)]));
        objects
    }
}
