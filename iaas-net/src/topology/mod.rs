//! What the network is: one file per noun. A [`Topology`] is checked and compiled to a [`Program`], whole or not at all.

mod network;
mod port;
mod security_group;
mod subnet;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::net::Ipv6Addr;

use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::model::Network;
use iaas_core::model::SecurityGroup;
use iaas_core::model::Subnet;
use iaas_core::spi::network::NetObject;

use crate::program::Program;

/// The router's Ethernet address, the same in every VPC: its answers never leave the switch, so it needs no other.
///
/// Locally administered and unicast (IEEE 802 §8.4).
pub const ROUTER_MAC: Mac = Mac([0x02, 0x00, 0x5e, 0x00, 0x00, 0x01]);

/// The desired objects of one fabric, by identity. Not yet checked against each other.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    objects: BTreeMap<ObjectRef, NetObject>,
}

impl Topology {
    /// Takes the objects of a full update.
    ///
    /// # Errors
    /// `Invalid` if an object is named twice.
    pub fn new(objects: impl IntoIterator<Item = NetObject>) -> Result<Self> {
        let mut topology = Self::default();
        for object in objects {
            let name = name_of(&object);
            if topology.objects.insert(name.clone(), object).is_some() {
                return Err(Error::invalid("the program names an object twice").about(name));
            }
        }
        Ok(topology)
    }

    /// This topology with `put` added or replaced, then `drop` taken out. Absent names in `drop` are no error.
    #[must_use]
    pub fn changed(&self, put: &[NetObject], drop: &[ObjectRef]) -> Self {
        let mut next = self.clone();
        next.objects.extend(put.iter().map(|object| (name_of(object), object.clone())));
        next.objects.retain(|name, _| !drop.contains(name));
        next
    }

    /// The objects in the order of their names.
    pub fn objects(&self) -> impl Iterator<Item = &NetObject> {
        self.objects.values()
    }

    /// Checks all objects against each other and compiles them.
    ///
    /// # Errors
    /// `Invalid`, about the object at fault: a reference to an object that is not there, two prefixes of one VPC that
    /// overlap, an address or Ethernet address that two ports of one VPC have or that is the router's, an MTU or network
    /// identifier out of range.
    pub fn compile(&self, rev: Rev) -> Result<Program> {
        let mut build = Build { program: Program::empty(rev), ..Build::default() };
        for object in self.objects.values() {
            if let NetObject::Network { id, vni, mtu } = object {
                network::compile(&mut build, *id, *vni, *mtu)?;
            }
        }
        for object in self.objects.values() {
            if let NetObject::Subnet { id, network, cidrs, dns } = object {
                subnet::compile(&mut build, *id, *network, cidrs, dns)?;
            }
        }
        // Groups refer to each other, so all get their number first.
        for object in self.objects.values() {
            if let NetObject::SecurityGroup { id, .. } = object {
                security_group::declare(&mut build, *id);
            }
        }
        for object in self.objects.values() {
            if let NetObject::SecurityGroup { id, rules } = object {
                security_group::compile(&mut build, *id, rules)?;
            }
        }
        for object in self.objects.values() {
            if let NetObject::Port { id, subnet, mac, addrs, groups } = object {
                port::compile(&mut build, *id, *subnet, *mac, addrs, groups)?;
            }
        }
        Ok(build.program)
    }
}

/// A program under construction, and the numbers that objects got in it.
#[derive(Default)]
struct Build {
    program: Program,
    networks: BTreeMap<Id<Network>, u32>,
    subnets: BTreeMap<Id<Subnet>, u32>,
    groups: BTreeMap<Id<SecurityGroup>, u32>,
    vnis: BTreeSet<u32>,
}

/// The name of an object.
fn name_of(object: &NetObject) -> ObjectRef {
    match object {
        NetObject::Network { id, .. } => id.object(),
        NetObject::Subnet { id, .. } => id.object(),
        NetObject::SecurityGroup { id, .. } => id.object(),
        NetObject::Port { id, .. } => id.object(),
    }
}

/// The number that `id` got, or the error that `user` refers to something that is not there.
fn number_of<K: Entity, U: Entity>(map: &BTreeMap<Id<K>, u32>, id: Id<K>, user: Id<U>) -> Result<u32> {
    map.get(&id).copied().ok_or_else(|| {
        Error::invalid(format!("the program has no {} {id}, which this object refers to", K::NAME))
            .about(user.object())
    })
}

/// The number of the next element of `list`.
fn next_number<T, U: Entity>(list: &[T], user: Id<U>) -> Result<u32> {
    u32::try_from(list.len())
        .map_err(|_| Error::invalid("the program has too many objects").about(user.object()))
}

/// An address as the tables keep it: IPv4 mapped into IPv6.
///
/// # Source
/// RFC 4291 §2.5.5.2.
pub(crate) fn mapped(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The address that [`mapped`] came from.
pub(crate) fn unmapped(address: u128) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(address)).to_canonical()
}

/// The address that an interface with `mac` forms under an IPv6 prefix of 64 bits.
///
/// # Source
/// RFC 4291 appendix A (modified EUI-64), RFC 4862 §5.5.3.
pub fn slaac(prefix: Ipv6Addr, mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let interface = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from(u128::from(prefix) >> 64 << 64 | u128::from(interface))
}

/// The link-local address of an interface with `mac`.
///
/// # Source
/// RFC 4862 §5.3.
pub fn link_local(mac: Mac) -> Ipv6Addr {
    slaac(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), mac)
}

#[cfg(test)]
pub(crate) use samples::*;
#[cfg(test)]
mod samples;

#[cfg(test)]
mod tests {
    use super::*;
    use iaas_core::Cidr;
    use iaas_core::ErrorKind;
    use iaas_core::model::Port;
    use iaas_core::model::security_group::Direction;
    use iaas_core::model::security_group::Protocol;
    use iaas_core::model::security_group::Remote;
    use iaas_core::model::security_group::Rule;

    fn compile(objects: Vec<NetObject>) -> Result<Program> {
        Topology::new(objects)?.compile(Rev(7))
    }

    fn with(extra: Vec<NetObject>) -> Vec<NetObject> {
        let mut all = vpc(1);
        all.push(port(1, 0, 10, &[]));
        all.extend(extra);
        all
    }

    #[test]
    fn a_whole_topology_compiles() {
        let program = compile(with(vec![port(1, 1, 11, &[])])).unwrap();
        assert_eq!((program.rev(), program.ports()), (Rev(7), 2));
    }

    #[test]
    fn a_wrong_program_is_refused_and_the_object_named() {
        let cidr = |t: &str| vec![t.parse::<Cidr>().unwrap()];
        let subnet = |id: u128, network: u128, cidrs| NetObject::Subnet {
            id: numbered(id),
            network: numbered(network),
            cidrs,
            dns: vec![],
        };
        let changed_port = |change: &dyn Fn(&mut Mac, &mut Vec<IpAddr>)| {
            let mut object = port(1, 0, 20, &[]);
            if let NetObject::Port { mac, addrs, .. } = &mut object {
                change(mac, addrs);
            }
            vec![object]
        };
        let rule = |remote| Rule {
            direction: Direction::Ingress,
            protocol: Protocol::Any,
            ports: iaas_core::PortRange::ALL,
            remote,
        };
        let cases: Vec<(&str, Vec<NetObject>)> = vec![
            ("overlapping subnets", vec![subnet(90, 1, cidr("10.1.0.128/25"))]),
            ("subnet of no network", vec![subnet(90, 99, cidr("10.9.0.0/24"))]),
            ("port of no subnet", vec![port(3, 0, 20, &[])]),
            ("port of no group", vec![port(1, 0, 20, &[77])]),
            (
                "rule of no group",
                vec![NetObject::SecurityGroup {
                    id: numbered(78),
                    rules: vec![rule(Remote::Group(numbered(77)))],
                }],
            ),
            ("same mac", changed_port(&|mac, _| *mac = mac_of(10))),
            ("router's mac", changed_port(&|mac, _| *mac = ROUTER_MAC)),
            ("group mac", changed_port(&|mac, _| mac.0[0] = 1)),
            ("same address", changed_port(&|_, addrs| addrs[0] = "10.1.0.10".parse().unwrap())),
            ("router's address", changed_port(&|_, addrs| addrs[0] = "10.1.0.1".parse().unwrap())),
            ("broadcast address", changed_port(&|_, addrs| addrs[0] = "10.1.0.255".parse().unwrap())),
            ("foreign address", changed_port(&|_, addrs| addrs[0] = "10.1.1.20".parse().unwrap())),
            ("twice", vpc(1)),
            ("same vni", vec![NetObject::Network { id: numbered(5), vni: 1, mtu: 1500 }]),
            ("large vni", vec![NetObject::Network { id: numbered(5), vni: 1 << 24, mtu: 1500 }]),
            ("small mtu", vec![NetObject::Network { id: numbered(5), vni: 5, mtu: 1279 }]),
        ];
        for (what, extra) in cases {
            let error = compile(with(extra)).map(|_| ()).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{what}: {error}");
            assert!(error.object().is_some(), "{what}: {error}");
        }
    }

    #[test]
    fn two_vpcs_may_use_the_same_addresses() {
        let mut second = vpc(1);
        second.push(port(1, 0, 10, &[]));
        let shift = |object: NetObject| match object {
            NetObject::Network { mtu, .. } => NetObject::Network { id: numbered(2), vni: 2, mtu },
            NetObject::Subnet { id, cidrs, dns, .. } => NetObject::Subnet {
                id: numbered(id.uuid().as_u128() + 100),
                network: numbered(2),
                cidrs,
                dns,
            },
            NetObject::Port { subnet, mac, addrs, groups, .. } => NetObject::Port {
                id: numbered(200),
                subnet: numbered(subnet.uuid().as_u128() + 100),
                mac,
                addrs,
                groups,
            },
            other => other,
        };
        let twin: Vec<NetObject> = second.into_iter().map(shift).collect();
        assert_eq!(compile(with(twin)).unwrap().ports(), 2);
    }

    #[test]
    fn changes_apply_on_top() {
        let old = Topology::new(with(vec![])).unwrap();
        let gone: Id<Port> = numbered(10);
        let next = old.changed(&[port(1, 1, 11, &[])], &[gone.object()]);
        let program = next.compile(Rev(8)).unwrap();
        assert_eq!(program.ports(), 1);
        assert!(program.port(gone).is_none());
    }

    #[test]
    fn a_host_forms_this_address_from_its_mac() {
        // RFC 2464 §4: 34-56-78-9A-BC-DE forms ...:3656:78FF:FE9A:BCDE.
        let mac = Mac([0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(link_local(mac).to_string(), "fe80::3656:78ff:fe9a:bcde");
    }
}
