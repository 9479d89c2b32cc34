//! Says what is left that no record wants, and what is missing: from the store and the world, not from the engine.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use iaas_core::ObjectRef;
use iaas_core::engine::adopt;
use iaas_core::engine::sites::artifact_id;
use iaas_core::engine::state::State;
use iaas_core::model::*;
use iaas_core::spi::Site;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::network::Plug;
use iaas_core::spi::state_store::StateStore;
use iaas_core::testing::fake::FakeMeter;

use super::Rig;
use super::faulty_store::entries;

/// Each line is a defect.
pub async fn judge(rig: &Rig) -> Vec<String> {
    let state = adopt::load(&rig.store).await.unwrap();
    let mut all = things(rig, &state);
    all.extend(ledgers(&state));
    all.extend(work_left(&state, &rig.store).await);
    all.extend(paid_for(rig, &state));
    all
}

/// What exists is what the records want: no more, no less.
fn things(rig: &Rig, state: &State) -> Vec<String> {
    let wanted = wanted(state);
    let kept: BTreeSet<_> = artifacts(state);
    let is: BTreeSet<(Site, ObjectRef)> =
        rig.world.things().into_iter().map(|thing| (thing.site, thing.object)).collect();
    let more = is.difference(&wanted).filter(|(_, object)| !kept.contains(object));
    let less = wanted.difference(&is);
    more.map(|(site, object)| format!("left over: {object} on {site:?}"))
        .chain(less.map(|(site, object)| format!("missing: {object} on {site:?}")))
        .collect()
}

fn wanted(state: &State) -> BTreeSet<(Site, ObjectRef)> {
    let mut wanted = BTreeSet::new();
    let host = |id| state.get::<Instance>(id).and_then(|i| i.bind.host).map(|(host, _)| Site::Host(host));
    for instance in state.instances.values() {
        wanted.extend(host(instance.meta.id).map(|site| (site, instance.meta.id.cast::<Vm>().object())));
    }
    for attachment in state.attachments.values() {
        let object = match attachment.spec.what {
            Attached::Volume { .. } => attachment.meta.id.cast::<Access>().object(),
            Attached::Port(_) => attachment.meta.id.cast::<Plug>().object(),
        };
        wanted.extend(host(attachment.spec.instance).map(|site| (site, object)));
    }
    for volume in state.volumes.values() {
        let object = volume.meta.id.cast::<PoolVolume>().object();
        wanted.extend(volume.bind.pool.map(|pool| (Site::Pool(pool), object)));
    }
    wanted
}

/// Kernels and initrds may lie on a host as long as an image names them.
fn artifacts(state: &State) -> BTreeSet<ObjectRef> {
    let digests = state.images.values().flat_map(|image| match &image.spec {
        ImageSpec::Kernel { kernel, initrd, .. } => std::iter::once(*kernel).chain(*initrd),
        _ => unreachable!("a kind of image that these tests do not make"),
    });
    digests.map(|digest| artifact_id(digest).object()).collect()
}

/// The ledgers, counted anew from what was wished for.
pub fn recount(state: &State, project: iaas_core::Id<Project>) -> BTreeMap<String, u64> {
    let own = |owner: Owner| owner == Owner::Project(project);
    let mut sums = BTreeMap::new();
    let mut add = |name: &str, amount: u64| {
        if amount > 0 {
            *sums.entry(name.to_owned()).or_insert(0) += amount;
        }
    };
    for instance in state.instances.values().filter(|r| own(r.meta.owner)) {
        let size = &state.get(instance.spec.instance_type).unwrap().spec;
        add("instances", 1);
        add("vcpus", size.vcpus().into());
        add("memory-bytes", size.memory().0);
    }
    for volume in state.volumes.values().filter(|r| own(r.meta.owner)) {
        add("volumes", 1);
        add("volume-bytes", volume.spec.size().0);
    }
    add("networks", state.networks.values().filter(|r| own(r.meta.owner)).count() as u64);
    add("subnets", state.subnets.values().filter(|r| own(r.meta.owner)).count() as u64);
    add("ports", state.ports.values().filter(|r| own(r.meta.owner)).count() as u64);
    add("security-groups", state.security_groups.values().filter(|r| own(r.meta.owner)).count() as u64);
    sums
}

fn ledgers(state: &State) -> Vec<String> {
    let mut wrong = Vec::new();
    for project in state.projects.keys() {
        let (is, shall) = (state.used(*project), recount(state, *project));
        if is != shall {
            wrong.push(format!("quota of {project}: {is:?} instead of {shall:?}"));
        }
    }
    for host in state.hosts.keys() {
        let here = state.instances.values().filter(|i| i.bind.host.is_some_and(|(h, _)| h == *host));
        let size = |i: &Arc<Record<Instance>>| state.get(i.spec.instance_type).unwrap().spec.clone();
        let shall = here
            .map(size)
            .fold((0, 0), |(cpus, memory), s| (cpus + u64::from(s.vcpus()), memory + s.memory().0));
        let is = state.given(*host);
        if is != shall {
            wrong.push(format!("capacity of {host}: {is:?} instead of {shall:?}"));
        }
    }
    // A port without an attachment was made by hand, or is left over; these tests make none by hand.
    for port in state.ports.values().filter(|p| state.attachment_to(&p.meta.id.object()).is_none()) {
        wrong.push(format!("quota: port `{}` counts and nobody uses it", port.meta.name));
    }
    wrong
}

async fn work_left(state: &State, store: &Arc<dyn StateStore>) -> Vec<String> {
    let open = state.operations.values().filter(|o| o.status.state == OperationState::Open);
    let mut left: Vec<String> =
        open.map(|o| format!("open: {} on {}", o.spec.action, o.spec.target)).collect();
    for (prefix, what) in [("l/", "audit leaves without a place"), ("o/", "usage on its way")] {
        let found = entries(store, prefix).await;
        if !found.is_empty() {
            left.push(format!("{} {what}", found.len()));
        }
    }
    left
}

/// Nobody pays for what is not there.
fn paid_for(rig: &Rig, state: &State) -> Vec<String> {
    let mut last: BTreeMap<(ObjectRef, String), (u64, u64)> = BTreeMap::new();
    for event in FakeMeter::open(&rig.world).events() {
        if let Usage::Allocated { of, meter, quantity, order, .. } = event.what {
            let entry = last.entry((of, meter)).or_insert((order, quantity));
            if order >= entry.0 {
                *entry = (order, quantity);
            }
        }
    }
    let exists = |object: &ObjectRef| state.brief(object).is_some();
    last.into_iter()
        .filter(|((of, _), (_, quantity))| *quantity > 0 && !exists(of))
        .map(|((of, meter), (_, quantity))| format!("billed for ever: {quantity} {meter} of {of}"))
        .collect()
}
