//! What the router of a subnet answers itself, inside the pipeline: one file per protocol.
//!
//! Each service reads one packet and writes at most one answer; none keeps state.

pub(crate) mod arp;
pub(crate) mod dhcp;
pub(crate) mod icmp;
pub(crate) mod ndp;
pub(crate) mod ra;

use crate::program::PortPart;
use crate::program::Program;
use crate::program::SubnetPart;
use crate::topology::ROUTER_MAC;
use crate::topology::mapped;
use iaas_core::Mac;

/// What became of a packet that a service looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The answer was written.
    Reply(&'static str),
    /// There is nothing to answer, and nobody else shall see the packet.
    Absorb(&'static str),
}

/// The port that asks, and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker<'a> {
    pub(crate) program: &'a Program,
    pub(crate) port: &'a PortPart,
    pub(crate) subnet: &'a SubnetPart,
}

impl<'a> Asker<'a> {
    pub(crate) fn new(program: &'a Program, number: u32) -> Self {
        let port = program.port_at(number);
        Self { program, port, subnet: program.subnet(port.subnet) }
    }

    pub(crate) fn mtu(&self) -> u16 {
        self.program.vpc(self.port.vpc).mtu
    }

    /// The Ethernet address of a neighbour in the asker's subnet: the router or another port.
    pub(crate) fn neighbour(&self, address: u128) -> Option<(Mac, bool)> {
        let router = |p: &crate::program::Prefix| mapped(p.gateway) == address;
        if self.subnet.prefixes().any(router) || address == router_link_local() {
            return Some((ROUTER_MAC, true));
        }
        let port = self.program.port_at(self.program.owner(self.port.vpc, address)?);
        (port.subnet == self.port.subnet && port.id != self.port.id).then_some((port.mac, false))
    }
}

/// The router's link-local address.
pub(crate) fn router_link_local() -> u128 {
    mapped(crate::topology::link_local(ROUTER_MAC).into())
}
