//! The compiled program of one fabric: immutable, with a revision, made for looking things up.

use std::net::IpAddr;
use std::net::Ipv4Addr;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use iaas_core::Cidr;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::PortRange;
use iaas_core::Rev;
use iaas_core::model::Network;
use iaas_core::model::Port;
use iaas_core::model::SecurityGroup;
use iaas_core::model::Subnet;
use iaas_core::model::security_group::Protocol;

/// A map whose keys the control plane chose, so its hash needs no secret.
type Map<K, V> = HashMap<K, V, FixedState>;

/// What a fabric does with packets. Made by [`Topology::compile`](crate::Topology::compile); shared by `Arc`.
///
/// Every number that an element holds is an index into the list of its kind; `compile` proves it.
#[derive(Debug, Default)]
pub struct Program {
    rev: Rev,
    pub(crate) vpcs: Vec<Vpc>,
    pub(crate) subnets: Vec<SubnetPart>,
    pub(crate) groups: Vec<Group>,
    pub(crate) ports: Vec<PortPart>,
    pub(crate) by_id: Map<Id<Port>, u32>,
    pub(crate) by_mac: Map<(u32, Mac), u32>,
    pub(crate) by_addr: Map<(u32, u128), u32>,
    pub(crate) gateways: Map<(u32, u128), u32>,
}

/// A VPC.
#[derive(Debug)]
pub(crate) struct Vpc {
    pub(crate) id: Id<Network>,
    pub(crate) mtu: u16,
    pub(crate) subnets: Vec<u32>,
}

/// A subnet.
#[derive(Debug)]
pub(crate) struct SubnetPart {
    pub(crate) id: Id<Subnet>,
    pub(crate) vpc: u32,
    pub(crate) v4: Option<Prefix>,
    pub(crate) v6: Option<Prefix>,
    pub(crate) dns: Vec<IpAddr>,
}

/// A prefix and the router's address in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix {
    pub(crate) cidr: Cidr,
    pub(crate) gateway: IpAddr,
}

/// A port.
#[derive(Debug)]
pub(crate) struct PortPart {
    pub(crate) id: Id<Port>,
    pub(crate) subnet: u32,
    pub(crate) vpc: u32,
    pub(crate) mac: Mac,
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) link_local: u128,
    pub(crate) addrs: Vec<u128>,
    /// Sorted numbers; at most 16, so a search beats a bit set over all groups of the fabric.
    pub(crate) groups: Vec<u32>,
}

/// A security group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) id: Id<SecurityGroup>,
    pub(crate) ingress: Vec<PolicyRule>,
    pub(crate) egress: Vec<PolicyRule>,
}

/// A rule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PolicyRule {
    pub(crate) protocol: Protocol,
    pub(crate) ports: PortRange,
    pub(crate) peer: Peer,
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    Any,
    Cidr(Cidr),
    Group(u32),
}

impl Program {
    /// A program that knows no port.
    pub fn empty(rev: Rev) -> Self {
        Self { rev, ..Self::default() }
    }

    /// Its revision.
    pub fn rev(&self) -> Rev {
        self.rev
    }

    /// How many ports it has.
    pub fn ports(&self) -> usize {
        self.ports.len()
    }

    /// The number of a port.
    pub(crate) fn port(&self, id: Id<Port>) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn port_at(&self, number: u32) -> &PortPart {
        // Invariant of the type: numbers are indices that `compile` made.
        &self.ports[number as usize]
    }

    pub(crate) fn subnet(&self, number: u32) -> &SubnetPart {
        // As in `port_at`.
        &self.subnets[number as usize]
    }

    pub(crate) fn vpc(&self, number: u32) -> &Vpc {
        // As in `port_at`.
        &self.vpcs[number as usize]
    }

    pub(crate) fn group(&self, number: u32) -> &Group {
        // As in `port_at`.
        &self.groups[number as usize]
    }

    /// The port that has `address` in that VPC.
    pub(crate) fn owner(&self, vpc: u32, address: u128) -> Option<u32> {
        self.by_addr.get(&(vpc, address)).copied()
    }

    /// The subnet whose router has `address` in that VPC.
    pub(crate) fn gateway(&self, vpc: u32, address: u128) -> Option<u32> {
        self.gateways.get(&(vpc, address)).copied()
    }
}

impl SubnetPart {
    /// Its prefixes.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = &Prefix> {
        self.v4.iter().chain(&self.v6)
    }
}

impl PortPart {
    /// Whether it is a member of that group.
    pub(crate) fn member(&self, group: u32) -> bool {
        self.groups.binary_search(&group).is_ok()
    }

    /// Whether it may send from `address`.
    pub(crate) fn owns(&self, address: u128) -> bool {
        self.addrs.contains(&address) || self.link_local == address
    }
}
