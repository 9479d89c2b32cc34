//! The reference evaluation of a network program: one object after the other, rule by rule, in the order of the book.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::Cidr;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::Mac;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::Network;
use crate::model::Port;
use crate::model::SecurityGroup;
use crate::model::Subnet;
use crate::model::security_group::Direction;
use crate::model::security_group::Protocol;
use crate::model::security_group::Remote;
use crate::model::security_group::Rule;
use crate::spi::network::NetObject;
use crate::spi::network::PacketQuery;
use crate::spi::network::Trace;
use crate::spi::network::TraceStage;
use crate::spi::network::Verdict;

/// IP protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// A whole program, checked.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    pub(super) rev: Rev,
    networks: BTreeMap<Id<Network>, u32>,
    subnets: BTreeMap<Id<Subnet>, (Id<Network>, Vec<Cidr>)>,
    groups: BTreeMap<Id<SecurityGroup>, Vec<Rule>>,
    ports: BTreeMap<Id<Port>, PortEntry>,
}

/// A port as the program has it.
#[derive(Clone, Debug)]
pub(super) struct PortEntry {
    pub(super) subnet: Id<Subnet>,
    pub(super) mac: Mac,
    pub(super) addrs: Vec<IpAddr>,
    groups: BTreeSet<Id<SecurityGroup>>,
}

/// The name of an object of a program.
pub(super) fn name(object: &NetObject) -> ObjectRef {
    match object {
        NetObject::Network { id, .. } => id.object(),
        NetObject::Subnet { id, .. } => id.object(),
        NetObject::SecurityGroup { id, .. } => id.object(),
        NetObject::Port { id, .. } => id.object(),
    }
}

impl Program {
    /// Checks the objects and makes them a program.
    pub(super) fn new<'a>(rev: Rev, objects: impl IntoIterator<Item = &'a NetObject>) -> Result<Self> {
        let mut program = Self { rev, ..Self::default() };
        for object in objects {
            program.add(object)?;
        }
        program.check_subnets()?;
        program.check_groups()?;
        program.check_ports()?;
        Ok(program)
    }

    fn add(&mut self, object: &NetObject) -> Result<()> {
        let twice = match object.clone() {
            NetObject::Network { id, vni, .. } => self.networks.insert(id, vni).is_some(),
            NetObject::Subnet { id, network, cidrs, .. } => {
                self.subnets.insert(id, (network, cidrs)).is_some()
            }
            NetObject::SecurityGroup { id, rules } => self.groups.insert(id, rules).is_some(),
            NetObject::Port { id, subnet, mac, addrs, groups } => {
                self.ports.insert(id, PortEntry { subnet, mac, addrs, groups }).is_some()
            }
        };
        if twice {
            return Err(Error::invalid("the program names an object twice").about(name(object)));
        }
        Ok(())
    }

    fn check_subnets(&self) -> Result<()> {
        let mut vnis = BTreeSet::new();
        for (id, vni) in &self.networks {
            if *vni >= 1 << 24 || !vnis.insert(*vni) {
                return Err(
                    Error::invalid(format!("the VNI {vni} is not 24 bits, or used twice")).about(id.object())
                );
            }
        }
        let mut taken: Vec<(Id<Network>, Cidr)> = Vec::new();
        for (id, (network, cidrs)) in &self.subnets {
            if !self.networks.contains_key(network) {
                return Err(dangling(network.object()).about(id.object()));
            }
            for cidr in cidrs {
                if taken.iter().any(|(n, c)| n == network && overlap(*c, *cidr)) {
                    return Err(Error::invalid(format!("the subnet {cidr} overlaps another of its network"))
                        .about(id.object()));
                }
                taken.push((*network, *cidr));
            }
        }
        Ok(())
    }

    fn check_groups(&self) -> Result<()> {
        for (id, rules) in &self.groups {
            for rule in rules {
                if let Remote::Group(other) = rule.remote
                    && !self.groups.contains_key(&other)
                {
                    return Err(dangling(other.object()).about(id.object()));
                }
            }
        }
        Ok(())
    }

    fn check_ports(&self) -> Result<()> {
        let mut taken = BTreeSet::new();
        for (id, port) in &self.ports {
            let Some((network, cidrs)) = self.subnets.get(&port.subnet) else {
                return Err(dangling(port.subnet.object()).about(id.object()));
            };
            if let Some(group) = port.groups.iter().find(|g| !self.groups.contains_key(*g)) {
                return Err(dangling(group.object()).about(id.object()));
            }
            for addr in &port.addrs {
                if !cidrs.iter().any(|c| c.contains(*addr)) || !taken.insert((*network, *addr)) {
                    return Err(Error::invalid(format!("the address {addr} is not of the subnet, or taken"))
                        .about(id.object()));
                }
            }
        }
        Ok(())
    }

    pub(super) fn port(&self, id: Id<Port>) -> Option<&PortEntry> {
        self.ports.get(&id)
    }

    /// The network of a port.
    pub(super) fn network_of(&self, port: &PortEntry) -> Option<Id<Network>> {
        self.subnets.get(&port.subnet).map(|(network, _)| *network)
    }

    /// Whether `addr` is a router's in this network.
    pub(super) fn is_router(&self, network: Id<Network>, addr: IpAddr) -> bool {
        let cidrs = self.subnets.values().filter(|(n, _)| *n == network).flat_map(|(_, cidrs)| cidrs);
        cidrs.into_iter().any(|c| c.nth(1) == Some(addr))
    }

    /// The port of this network that has `addr`.
    pub(super) fn holder(&self, network: Id<Network>, addr: IpAddr) -> Option<(Id<Port>, &PortEntry)> {
        let inside = |p: &&PortEntry| self.network_of(p) == Some(network) && p.addrs.contains(&addr);
        self.ports.iter().find(|(_, p)| inside(p)).map(|(id, p)| (*id, p))
    }

    /// What becomes of a packet, and why. `reply`: it belongs to a flow that was allowed the other way.
    pub(super) fn explain(&self, query: &PacketQuery, reply: bool) -> Result<Trace> {
        let from = self
            .ports
            .get(&query.from)
            .ok_or_else(|| Error::not_found("the program has no such port").about(query.from.object()))?;
        let mut stages = Vec::new();
        let verdict = self.walk(query, from, reply, &mut stages);
        Ok(Trace { program: self.rev, stages, verdict })
    }

    fn walk(&self, q: &PacketQuery, from: &PortEntry, reply: bool, stages: &mut Vec<TraceStage>) -> Verdict {
        let mut stage = |name: &str, passed: bool, because: String, by: Option<ObjectRef>| {
            stages.push(TraceStage { stage: name.to_owned(), passed, because, by });
            passed
        };
        let own = from.addrs.iter().find(|a| a.is_ipv4() == q.dst.is_ipv4()).copied();
        let Some(src) = q.src.or(own).filter(|s| from.addrs.contains(s) && s.is_ipv4() == q.dst.is_ipv4())
        else {
            stage(
                "antispoof",
                false,
                "the source is not an address of the port".into(),
                Some(q.from.object()),
            );
            return Verdict::Dropped;
        };
        stage("antispoof", true, format!("{src} is the port's"), Some(q.from.object()));
        let Some(network) = self.network_of(from) else { return Verdict::Dropped };
        if self.is_router(network, q.dst) {
            let ping = q.protocol == if q.dst.is_ipv4() { ICMP } else { ICMPV6 };
            stage("route", ping, format!("{} is the router", q.dst), Some(network.object()));
            return if ping { Verdict::Answered } else { Verdict::Dropped };
        }
        let Some((to, port)) = self.holder(network, q.dst) else {
            stage("route", false, format!("no port of the network has {}", q.dst), Some(network.object()));
            return Verdict::Dropped;
        };
        stage("route", true, format!("{} is a port's", q.dst), Some(port.subnet.object()));
        for (direction, mine, remote, other) in
            [(Direction::Egress, from, q.dst, port), (Direction::Ingress, port, src, from)]
        {
            let (passed, because, by) = if reply {
                (true, "a reply of an allowed flow".to_owned(), None)
            } else {
                self.admits(q, direction, mine, remote, other)
            };
            if !stage("security_group", passed, because, by) {
                return Verdict::Dropped;
            }
        }
        Verdict::Delivered(to)
    }

    /// Whether a rule of the port's groups allows the packet.
    fn admits(
        &self,
        query: &PacketQuery,
        direction: Direction,
        mine: &PortEntry,
        remote: IpAddr,
        other: &PortEntry,
    ) -> (bool, String, Option<ObjectRef>) {
        if mine.groups.is_empty() {
            return (true, format!("{direction:?}: the port has no group"), None);
        }
        for id in &mine.groups {
            let rules = self.groups.get(id).map(Vec::as_slice).unwrap_or_default();
            let hit = rules.iter().enumerate().find(|(_, rule)| {
                rule.direction == direction && covers(rule, query) && reaches(rule.remote, remote, other)
            });
            if let Some((number, rule)) = hit {
                return (true, format!("{direction:?}: rule {number}: {rule:?}"), Some(id.object()));
            }
        }
        (false, format!("{direction:?}: no rule of the port's groups allows it"), None)
    }
}

/// Whether a rule is about the packet's protocol and port.
fn covers(rule: &Rule, query: &PacketQuery) -> bool {
    let port = || rule.ports.contains(query.dst_port);
    match rule.protocol {
        Protocol::Any => true,
        Protocol::Icmp => query.protocol == if query.dst.is_ipv4() { ICMP } else { ICMPV6 },
        Protocol::Tcp => query.protocol == TCP && port(),
        Protocol::Udp => query.protocol == UDP && port(),
    }
}

/// Whether the other end is whom a rule means.
fn reaches(remote: Remote, addr: IpAddr, other: &PortEntry) -> bool {
    match remote {
        Remote::Any => true,
        Remote::Cidr(cidr) => cidr.contains(addr),
        Remote::Group(group) => other.groups.contains(&group),
    }
}

fn overlap(a: Cidr, b: Cidr) -> bool {
    a.contains(b.network()) || b.contains(a.network())
}

fn dangling(object: ObjectRef) -> Error {
    Error::invalid(format!("the program names a {} that it does not have", object.kind))
        .remedy(format!("put {object} into the same update"))
}

/// A kind that stands in an [`ObjectRef`] of a program.
pub(super) fn is_net(object: &ObjectRef) -> bool {
    [Network::NAME, Subnet::NAME, SecurityGroup::NAME, Port::NAME].contains(&object.kind.as_str())
}
