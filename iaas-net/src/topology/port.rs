//! A port: whose addresses are its own, in which groups it is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::Result;
use iaas_core::model::Port;
use iaas_core::model::SecurityGroup;
use iaas_core::model::Subnet;

use super::Build;
use super::ROUTER_MAC;
use super::link_local;
use super::mapped;
use super::next_number;
use super::number_of;
use crate::program::PortPart;
use crate::program::Prefix;
use crate::program::SubnetPart;

/// Adds a port with its addresses.
pub(super) fn compile(
    build: &mut Build,
    id: Id<Port>,
    subnet: Id<Subnet>,
    mac: Mac,
    addrs: &[IpAddr],
    groups: &BTreeSet<Id<SecurityGroup>>,
) -> Result<()> {
    let subnet = number_of(&build.subnets, subnet, id)?;
    let number = next_number(&build.program.ports, id)?;
    let groups =
        groups.iter().map(|g| number_of(&build.groups, *g, id)).collect::<Result<BTreeSet<u32>>>()?;
    let part = build.program.subnet(subnet);
    let vpc = part.vpc;
    for address in addrs {
        check_address(part, *address).map_err(|why| Error::invalid(why).about(id.object()))?;
    }
    let unicast = mac.0[0] & 1 == 0 && mac.0 != [0; 6];
    if !unicast || mac == ROUTER_MAC {
        return Err(Error::invalid(format!("`{mac}` cannot be a port's Ethernet address")).about(id.object()));
    }
    if build.program.by_mac.insert((vpc, mac), number).is_some() {
        return Err(Error::invalid(format!("two ports of the network have `{mac}`")).about(id.object()));
    }
    let link_local = mapped(link_local(mac).into());
    for address in addrs.iter().map(|a| mapped(*a)).chain([link_local]) {
        if build.program.by_addr.insert((vpc, address), number).is_some() {
            let address = super::unmapped(address);
            return Err(
                Error::invalid(format!("two ports of the network have `{address}`")).about(id.object())
            );
        }
    }
    let v4 = addrs.iter().find_map(|a| if let IpAddr::V4(v4) = a { Some(*v4) } else { None });
    build.program.by_id.insert(id, number);
    build.program.ports.push(PortPart {
        id,
        subnet,
        vpc,
        mac,
        v4,
        link_local,
        addrs: addrs.iter().map(|a| mapped(*a)).collect(),
        groups: groups.into_iter().collect(),
    });
    Ok(())
}

/// Why `address` cannot be a port's in this subnet.
fn check_address(subnet: &SubnetPart, address: IpAddr) -> Result<(), String> {
    let prefix = subnet
        .prefixes()
        .find(|p| p.cidr.contains(address))
        .ok_or_else(|| format!("`{address}` is in no prefix of the port's subnet"))?;
    if address == prefix.gateway {
        return Err(format!("`{address}` is the router's"));
    }
    if is_edge(prefix, address) {
        return Err(format!("`{address}` is not a host's address in `{}`", prefix.cidr));
    }
    Ok(())
}

/// Whether this is the network's own address or the broadcast address.
///
/// # Source
/// RFC 1122 §3.2.1.3 (IPv4), RFC 4291 §2.6.1 (IPv6: the all-zeros interface is the routers' anycast).
fn is_edge(prefix: &Prefix, address: IpAddr) -> bool {
    let last = match address {
        IpAddr::V4(v4) => {
            let host = u32::MAX.checked_shr(prefix.cidr.length().into()).unwrap_or(0);
            host != 0 && u32::from(v4) & host == host
        }
        IpAddr::V6(_) => false,
    };
    address == prefix.cidr.network() || last
}
