//! Security groups: what may reach a port, and where it may send.

use serde::Deserialize;
use serde::Serialize;

use super::network::NetworkBind;
use super::record::Empty;
use super::record::resource;
use crate::Cidr;
use crate::Error;
use crate::Id;
use crate::PortRange;
use crate::Result;

resource!(
    /// A set of rules for ports. Members are found by identity, never expanded to addresses.
    SecurityGroup, "security-group", SecurityGroupSpec, NetworkBind, Empty
);

/// A group's wish: up to 256 rules. What no rule allows is dropped; replies of allowed flows pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Rule>", into = "Vec<Rule>")]
pub struct SecurityGroupSpec {
    rules: Vec<Rule>,
}

impl SecurityGroupSpec {
    /// Checks the rules.
    ///
    /// # Errors
    /// `Invalid` if there are too many or a rule has ports without TCP or UDP.
    pub fn new(rules: Vec<Rule>) -> Result<Self> {
        if rules.len() > 256 {
            return Err(Error::invalid("more than 256 rules").remedy("split them over several groups"));
        }
        let portless =
            |r: &Rule| r.ports != PortRange::ALL && !matches!(r.protocol, Protocol::Tcp | Protocol::Udp);
        if let Some(rule) = rules.iter().find(|r| portless(r)) {
            return Err(Error::invalid(format!("a rule for {:?} has ports", rule.protocol))
                .remedy("give ports only for TCP and UDP"));
        }
        Ok(Self { rules })
    }

    /// The rules.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

impl TryFrom<Vec<Rule>> for SecurityGroupSpec {
    type Error = Error;
    fn try_from(rules: Vec<Rule>) -> Result<Self> {
        Self::new(rules)
    }
}
impl From<SecurityGroupSpec> for Vec<Rule> {
    fn from(spec: SecurityGroupSpec) -> Self {
        spec.rules
    }
}

/// Allows the first packets of flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// To the port or from it.
    pub direction: Direction,
    /// Which protocol.
    pub protocol: Protocol,
    /// Which destination ports.
    #[serde(default = "all_ports")]
    pub ports: PortRange,
    /// Who is at the other end.
    pub remote: Remote,
}

fn all_ports() -> PortRange {
    PortRange::ALL
}

/// To the port or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// To the port.
    Ingress,
    /// From the port.
    Egress,
}

/// A protocol of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Any.
    Any,
    /// ICMP for IPv4 and ICMPv6 for IPv6.
    Icmp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The other end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Remote {
    /// Addresses of a prefix.
    Cidr(Cidr),
    /// Ports that are members of a group.
    Group(Id<SecurityGroup>),
    /// Anyone.
    Any,
}
