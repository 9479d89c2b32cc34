//! The network program of a fabric: built from the records as a whole, sent as a whole.

use super::Next;
use super::RESYNC;
use super::Work;
use crate::Id;
use crate::Result;
use crate::engine::state::State;
use crate::id::Fabric;
use crate::spi::network::NetObject;
use crate::spi::network::NetUpdate;

pub(super) async fn look(work: &Work, id: Id<Fabric>) -> Result<Next> {
    let Some(fabric) = work.sites.fabrics.get(&id) else { return Ok(Next::Rest) };
    let update = work.committer.read(program);
    // The network wakes us for what we do ourselves: a program that it has is sent again only now and then.
    if let Some(wait) = work.sent_lately(id.uuid(), update.to) {
        return Ok(Next::Check(wait));
    }
    fabric.sync(&work.caller.own(), &update).await.inspect_err(|_| work.forget_asking(id.uuid()))?;
    Ok(Next::Check(RESYNC))
}

/// Everything that the network shall do, in the order in which things refer to each other.
pub(crate) fn program(state: &State) -> NetUpdate {
    let networks = state.networks.values().map(|n| NetObject::Network {
        id: n.meta.id,
        vni: n.bind.vni,
        mtu: n.spec.mtu(),
    });
    let subnets = state.subnets.values().map(|s| NetObject::Subnet {
        id: s.meta.id,
        network: s.spec.network(),
        cidrs: s.spec.cidrs().to_vec(),
        dns: Vec::new(),
    });
    let groups = state
        .security_groups
        .values()
        .map(|g| NetObject::SecurityGroup { id: g.meta.id, rules: g.spec.rules().to_vec() });
    let ports = state.ports.values().filter_map(|p| {
        Some(NetObject::Port {
            id: p.meta.id,
            subnet: p.spec.subnet,
            mac: p.bind.mac?,
            addrs: p.bind.addrs.clone(),
            groups: p.spec.groups.clone(),
        })
    });
    let put = networks.chain(subnets).chain(groups).chain(ports).collect();
    NetUpdate { from: None, to: state.net_rev, put, drop: Vec::new() }
}
