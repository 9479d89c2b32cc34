//! Virtual networks: VPCs, subnets and ports.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::Deserialize;
use serde::Serialize;

use super::record::Charge;
use super::record::Empty;
use super::record::resource;
use super::security_group::SecurityGroup;
use crate::Cidr;
use crate::Error;
use crate::Id;
use crate::Mac;
use crate::Result;
use crate::Rev;

resource!(
    /// A VPC: subnets that route to each other and to nothing else.
    Network, "network", NetworkSpec, NetworkBind, Empty
);
resource!(
    /// A part of a VPC with its prefixes.
    Subnet, "subnet", SubnetSpec, NetworkBind, Empty
);
resource!(
    /// The place of an interface in a subnet.
    Port, "port", PortSpec, PortBind, PortStatus
);

/// A network's wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawNetwork", into = "RawNetwork")]
pub struct NetworkSpec {
    mtu: u16,
}

#[derive(Serialize, Deserialize)]
struct RawNetwork {
    mtu: u16,
}

impl NetworkSpec {
    /// A network whose IP packets have up to `mtu` bytes, 1280 to 9000.
    ///
    /// # Errors
    /// `Invalid` if it is out of range.
    ///
    /// # Source
    /// RFC 8200 §5: no link with IPv6 has less than 1280.
    pub fn new(mtu: u16) -> Result<Self> {
        if !(1280..=9000).contains(&mtu) {
            return Err(Error::invalid(format!("{mtu} is not an MTU")).remedy("use 1280 to 9000 bytes"));
        }
        Ok(Self { mtu })
    }

    /// The largest IP packet in bytes.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self { mtu: 1500 }
    }
}
impl TryFrom<RawNetwork> for NetworkSpec {
    type Error = Error;
    fn try_from(raw: RawNetwork) -> Result<Self> {
        Self::new(raw.mtu)
    }
}
impl From<NetworkSpec> for RawNetwork {
    fn from(spec: NetworkSpec) -> Self {
        Self { mtu: spec.mtu }
    }
}

/// What was decided for a network or subnet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkBind {
    /// Virtual network identifier, 24 bits; a network's only.
    pub vni: u32,
    /// What it counts for.
    pub charge: Charge,
}

/// A subnet's wish: a prefix of IPv4, of IPv6 or of both. The first host address of each is the router's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSubnet", into = "RawSubnet")]
pub struct SubnetSpec {
    network: Id<Network>,
    cidrs: Vec<Cidr>,
}

#[derive(Serialize, Deserialize)]
struct RawSubnet {
    network: Id<Network>,
    cidrs: Vec<Cidr>,
}

impl SubnetSpec {
    /// A subnet of `network`: IPv4 prefixes of 8 to 29 bits, IPv6 prefixes of 64 bits.
    ///
    /// # Errors
    /// `Invalid` if there is none, or two of a family, or a length is out of range.
    ///
    /// # Source
    /// RFC 4862 §5.5.3: stateless address configuration needs 64 bits for the interface.
    pub fn new(network: Id<Network>, mut cidrs: Vec<Cidr>) -> Result<Self> {
        cidrs.sort();
        let fours = cidrs.iter().filter(|c| c.is_ipv4()).count();
        if cidrs.is_empty() || fours > 1 || cidrs.len() - fours > 1 {
            return Err(Error::invalid("a subnet has one prefix of IPv4, of IPv6, or one of each"));
        }
        for cidr in &cidrs {
            let good = if cidr.is_ipv4() { (8..=29).contains(&cidr.length()) } else { cidr.length() == 64 };
            let usable = !cidr.network().is_multicast() && !cidr.network().is_loopback();
            if !good || !usable {
                return Err(Error::invalid(format!("`{cidr}` cannot be a subnet"))
                    .remedy("use /8 to /29 for IPv4 and /64 for IPv6, of unicast addresses"));
            }
        }
        Ok(Self { network, cidrs })
    }

    /// Its VPC.
    pub fn network(&self) -> Id<Network> {
        self.network
    }

    /// Its prefixes, IPv4 first.
    pub fn cidrs(&self) -> &[Cidr] {
        &self.cidrs
    }
}

impl TryFrom<RawSubnet> for SubnetSpec {
    type Error = Error;
    fn try_from(raw: RawSubnet) -> Result<Self> {
        Self::new(raw.network, raw.cidrs)
    }
}
impl From<SubnetSpec> for RawSubnet {
    fn from(spec: SubnetSpec) -> Self {
        Self { network: spec.network, cidrs: spec.cidrs }
    }
}

/// A port's wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// Its subnet.
    pub subnet: Id<Subnet>,
    /// Its security groups, at most 16; with none, all traffic is allowed.
    #[serde(default)]
    pub groups: BTreeSet<Id<SecurityGroup>>,
    /// Addresses that it shall have; chosen for each prefix that none is named of.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// What was decided for a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortBind {
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// What it counts for.
    pub charge: Charge,
}

/// A port as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// The program that it forwards by.
    pub program: Rev,
    /// Whether the VM's side is connected.
    pub up: bool,
}
