//! Builders of wire objects, for the tests of every stage and for benches.
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::spi::network::NetObject;

use super::slaac;

/// An id that a small number names.
pub(crate) fn numbered<K>(n: u128) -> Id<K> {
    Id::from_uuid(uuid::Uuid::from_u128(n))
}

/// Ethernet address `n`.
pub(crate) fn mac_of(n: u8) -> Mac {
    Mac([0x02, 0, 0, 0, 0, n])
}

/// VPC `n` with MTU 1500 and dual-stack subnets `n0` (10.n.0.0/24, fd00:n::/64) and `n1` (10.n.1.0/24, fd00:n:1::/64).
pub(crate) fn vpc(n: u8) -> Vec<NetObject> {
    let subnet = |s: u8| {
        let v6 = Ipv6Addr::new(0xfd00, n.into(), s.into(), 0, 0, 0, 0, 0);
        NetObject::Subnet {
            id: numbered(u128::from(n) * 10 + u128::from(s)),
            network: numbered(n.into()),
            cidrs: [(IpAddr::V4(Ipv4Addr::new(10, n, s, 0)), 24), (IpAddr::V6(v6), 64)]
                .into_iter()
                .filter_map(|(a, l)| iaas_core::Cidr::new(a, l).ok())
                .collect(),
            dns: vec![IpAddr::V4(Ipv4Addr::new(9, 9, 9, 9)), "2620:fe::fe".parse().unwrap_or(IpAddr::V6(v6))],
        }
    };
    vec![NetObject::Network { id: numbered(n.into()), vni: n.into(), mtu: 1500 }, subnet(0), subnet(1)]
}

/// Port `p` in subnet `s` of VPC `n`: address .p and the SLAAC address of its MAC.
pub(crate) fn port(n: u8, s: u8, p: u8, groups: &[u128]) -> NetObject {
    let v6 = Ipv6Addr::new(0xfd00, n.into(), s.into(), 0, 0, 0, 0, 0);
    NetObject::Port {
        id: numbered(p.into()),
        subnet: numbered(u128::from(n) * 10 + u128::from(s)),
        mac: mac_of(p),
        addrs: vec![IpAddr::V4(Ipv4Addr::new(10, n, s, p)), IpAddr::V6(slaac(v6, mac_of(p)))],
        groups: groups.iter().map(|g| numbered(*g)).collect(),
    }
}
