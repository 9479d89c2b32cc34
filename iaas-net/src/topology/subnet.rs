//! A subnet: its prefixes and, on the first host address of each, the router.

use std::net::IpAddr;

use iaas_core::Cidr;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::Network;
use iaas_core::model::Subnet;

use super::Build;
use super::mapped;
use super::next_number;
use super::number_of;
use crate::program::Prefix;
use crate::program::SubnetPart;

/// Adds a subnet and its router's addresses.
pub(super) fn compile(
    build: &mut Build,
    id: Id<Subnet>,
    network: Id<Network>,
    cidrs: &[Cidr],
    dns: &[IpAddr],
) -> Result<()> {
    let vpc = number_of(&build.networks, network, id)?;
    let number = next_number(&build.program.subnets, id)?;
    let mut part = SubnetPart { id, vpc, v4: None, v6: None, dns: dns.to_vec() };
    for cidr in cidrs {
        disjoint(build, vpc, *cidr, id)?;
        let slot = if cidr.is_ipv4() { &mut part.v4 } else { &mut part.v6 };
        if slot.is_some() {
            return Err(Error::invalid("a subnet has at most one prefix of each family").about(id.object()));
        }
        let gateway = cidr.nth(1).filter(|address| cidr.contains(*address)).ok_or_else(|| {
            Error::invalid(format!("`{cidr}` has no address for the router")).about(id.object())
        })?;
        *slot = Some(Prefix { cidr: *cidr, gateway });
        build.program.gateways.insert((vpc, mapped(gateway)), number);
    }
    build.subnets.insert(id, number);
    build.program.subnets.push(part);
    if let Some(vpc) = build.program.vpcs.get_mut(vpc as usize) {
        vpc.subnets.push(number);
    }
    Ok(())
}

/// Refuses a prefix that shares an address with another of the VPC.
fn disjoint(build: &Build, vpc: u32, cidr: Cidr, id: Id<Subnet>) -> Result<()> {
    let taken = build.program.subnets.iter().filter(|s| s.vpc == vpc).flat_map(SubnetPart::prefixes);
    match taken.map(|p| p.cidr).find(|other| other.overlaps(cidr)) {
        Some(other) => Err(Error::invalid(format!("`{cidr}` overlaps `{other}` of the same network"))
            .remedy("choose prefixes that share no address")
            .about(id.object())),
        None => Ok(()),
    }
}
