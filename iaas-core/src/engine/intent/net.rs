//! Networks, subnets, ports, security groups: addresses are chosen here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::net::Ipv6Addr;

use super::create::Creatable;
use super::create::charge;
use crate::Cidr;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Mac;
use crate::Result;
use crate::engine::draft::Draft;
use crate::model::security_group::Remote;
use crate::model::tenancy::limit;
use crate::model::*;
use crate::security::actions::Create;

impl Creatable for Network {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<NetworkBind> {
        let charge = charge(&[(limit::NETWORKS, 1)]);
        draft.check_quota(request.owner, &charge)?;
        let taken: BTreeSet<u32> = draft.all::<Network>().iter().map(|n| n.bind.vni).collect();
        // RFC 7348 §5: 24 bits; the first 4096 are left to others.
        let vni = (4096..1 << 24).find(|vni| !taken.contains(vni));
        let vni =
            vni.ok_or_else(|| Error::new(ErrorKind::NoCapacity, "no virtual network identifier is free"))?;
        Ok(NetworkBind { vni, charge })
    }
}

impl Creatable for Subnet {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<NetworkBind> {
        let network = draft.present(request.spec.network())?;
        draft.depend(network.meta.id);
        same_owner("network", network.meta.owner, request.owner)?;
        for other in draft.all::<Subnet>().iter().filter(|s| s.spec.network() == network.meta.id) {
            let clash = |c: &&Cidr| other.spec.cidrs().iter().any(|o| o.overlaps(**c));
            if let Some(cidr) = request.spec.cidrs().iter().find(clash) {
                return Err(Error::invalid(format!(
                    "`{cidr}` overlaps with the subnet `{}`",
                    other.meta.name
                ))
                .about(other.meta.id.object())
                .remedy("choose a prefix that no subnet of this network has"));
            }
        }
        let charge = charge(&[(limit::SUBNETS, 1)]);
        draft.check_quota(request.owner, &charge)?;
        Ok(NetworkBind { vni: 0, charge })
    }
}

impl Creatable for SecurityGroup {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<NetworkBind> {
        check_rules(draft, request.owner, &request.spec)?;
        let charge = charge(&[(limit::SECURITY_GROUPS, 1)]);
        draft.check_quota(request.owner, &charge)?;
        Ok(NetworkBind { vni: 0, charge })
    }
}

/// The groups that rules name exist in the same project.
pub(super) fn check_rules(draft: &mut Draft<'_>, owner: Owner, spec: &SecurityGroupSpec) -> Result<()> {
    for rule in spec.rules() {
        if let Remote::Group(id) = rule.remote {
            let group = draft.present(id)?;
            draft.depend(id);
            same_owner("security group", group.meta.owner, owner)?;
        }
    }
    Ok(())
}

impl Creatable for Port {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(draft: &mut Draft<'_>, id: Id<Self>, request: &Create<Self>) -> Result<PortBind> {
        decide_port(draft, id, request.owner, &request.spec)
    }
}

/// Chooses a port's addresses.
pub(super) fn decide_port(
    draft: &mut Draft<'_>,
    id: Id<Port>,
    owner: Owner,
    spec: &PortSpec,
) -> Result<PortBind> {
    let subnet = draft.present(spec.subnet)?;
    draft.depend(spec.subnet);
    same_owner("subnet", subnet.meta.owner, owner)?;
    if spec.groups.len() > 16 {
        return Err(Error::invalid("a port has at most 16 security groups").remedy("merge some"));
    }
    for group in &spec.groups {
        let record = draft.present(*group)?;
        draft.depend(*group);
        same_owner("security group", record.meta.owner, owner)?;
    }
    let charge = charge(&[(limit::PORTS, 1)]);
    draft.check_quota(owner, &charge)?;
    let others: Vec<_> = draft.all::<Port>().into_iter().filter(|p| p.spec.subnet == spec.subnet).collect();
    let taken: BTreeSet<IpAddr> = others.iter().flat_map(|p| p.bind.addrs.clone()).collect();
    let mac = mac_of(id);
    let mut addrs = Vec::new();
    for wanted in &spec.addresses {
        let home = subnet.spec.cidrs().iter().find(|c| c.contains(*wanted));
        let Some(cidr) = home.filter(|c| usable(**c, *wanted)) else {
            return Err(Error::invalid(format!("{wanted} is not an address for ports of this subnet"))
                .remedy("choose one of its prefixes that is neither its first two nor its last"));
        };
        if taken.contains(wanted) || addrs.iter().any(|a| cidr.contains(*a)) {
            return Err(
                Error::conflict(format!("{wanted} is taken")).remedy("choose another, or let one be chosen")
            );
        }
        addrs.push(*wanted);
    }
    for cidr in subnet.spec.cidrs() {
        if !addrs.iter().any(|a| cidr.contains(*a)) {
            addrs.push(choose(*cidr, mac, &taken)?);
        }
    }
    addrs.sort();
    Ok(PortBind { mac: Some(mac), addrs, charge })
}

/// A locally administered unicast address from the random part of the port's UUID.
///
/// # Source
/// IEEE 802-2014 §8.4: bit 1 of the first octet is "local", bit 0 is "group".
fn mac_of(id: Id<Port>) -> Mac {
    let [.., a, b, c, d, e] = *id.uuid().as_bytes();
    Mac([0x02, a, b, c, d, e])
}

/// Whether ports may have the address: not the subnet's own, its router's, or its broadcast address.
fn usable(cidr: Cidr, address: IpAddr) -> bool {
    let last = match cidr.network() {
        IpAddr::V4(_) => cidr.nth((1u64 << (32 - cidr.length())) - 1),
        IpAddr::V6(_) => None,
    };
    Some(address) != cidr.nth(0) && Some(address) != cidr.nth(1) && Some(address) != last
}

/// The first free IPv4 address, or the IPv6 address that the guest gives itself from its Ethernet address.
fn choose(cidr: Cidr, mac: Mac, taken: &BTreeSet<IpAddr>) -> Result<IpAddr> {
    let full = || {
        Error::new(ErrorKind::NoCapacity, format!("no address of `{cidr}` is free"))
            .remedy("delete a port of this subnet, or make another subnet")
    };
    match cidr.network() {
        IpAddr::V4(_) => {
            let size = 1u64 << (32 - cidr.length());
            (2..size - 1).filter_map(|n| cidr.nth(n)).find(|a| !taken.contains(a)).ok_or_else(full)
        }
        IpAddr::V6(net) => {
            // RFC 4291, appendix A: modified EUI-64.
            let [a, b, c, d, e, f] = mac.0;
            let low = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
            let address = IpAddr::V6(Ipv6Addr::from(u128::from(net) | u128::from(low)));
            (!taken.contains(&address)).then_some(address).ok_or_else(full)
        }
    }
}

/// Refuses to join resources of different owners.
pub(super) fn same_owner(noun: &str, is: Owner, wanted: Owner) -> Result<()> {
    if is == wanted {
        return Ok(());
    }
    Err(Error::invalid(format!("the {noun} belongs to another project"))
        .remedy("use one of the same project"))
}
