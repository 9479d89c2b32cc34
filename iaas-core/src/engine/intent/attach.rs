//! Volumes, and joining them and ports to instances.

use super::create::Creatable;
use super::create::charge;
use super::net::same_owner;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::engine::draft::Draft;
use crate::engine::state::attached_object;
use crate::model::tenancy::limit;
use crate::model::*;
use crate::security::actions::Create;

/// The most disks, and the most interfaces, of one instance.
pub(super) const MOST_DEVICES: usize = 16;

impl Creatable for Volume {
    const OWNERS: &'static [&'static str] = &["project"];
    const OPEN: bool = true;
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<VolumeBind> {
        let charge = charge(&[(limit::VOLUMES, 1), (limit::VOLUME_BYTES, request.spec.size().0)]);
        draft.check_quota(request.owner, &charge)?;
        let pool = draft.sites().pools.first().copied().ok_or_else(|| {
            Error::new(ErrorKind::NoCapacity, "this cloud has no pool")
                .remedy("give one to the builder of the cloud")
        })?;
        Ok(VolumeBind { pool: Some(pool), charge, ..VolumeBind::default() })
    }
}

impl Creatable for Attachment {
    const OWNERS: &'static [&'static str] = &["project"];
    const OPEN: bool = true;
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<AttachmentBind> {
        let instance = draft.present(request.spec.instance)?;
        same_owner("instance", instance.meta.owner, request.owner)?;
        let term = join(draft, &instance, &request.spec.what)?;
        // The instance's devices change: its hypervisor must see it.
        draft.change(instance)?;
        Ok(AttachmentBind { term, cascade: false })
    }
}

/// Checks that `what` can be joined to `instance`, and takes the next writer's number of a volume.
pub(super) fn join(
    draft: &mut Draft<'_>,
    instance: &Record<Instance>,
    what: &Attached,
) -> Result<crate::Term> {
    let object = attached_object(what);
    let all = draft.all::<Attachment>();
    if let Some(other) = all.iter().find(|a| attached_object(&a.spec.what) == object) {
        return Err(Error::conflict(format!("the {} is attached already", object.kind))
            .about(other.meta.id.object())
            .remedy("detach it first, and wait until that is done"));
    }
    let kind = std::mem::discriminant(what);
    let same = |a: &&std::sync::Arc<Record<Attachment>>| {
        a.spec.instance == instance.meta.id && std::mem::discriminant(&a.spec.what) == kind
    };
    if all.iter().filter(same).count() >= MOST_DEVICES {
        return Err(Error::invalid(format!("an instance has at most {MOST_DEVICES} of these"))
            .about(instance.meta.id.object())
            .remedy("detach one first"));
    }
    match what {
        Attached::Port(port) => {
            let port = draft.present(*port)?;
            same_owner("port", port.meta.owner, instance.meta.owner)?;
            draft.depend(port.meta.id);
            Ok(instance.bind.term)
        }
        Attached::Volume { volume, .. } => {
            let mut volume = draft.present(*volume)?;
            same_owner("volume", volume.meta.owner, instance.meta.owner)?;
            reachable(draft, instance, &volume)?;
            volume.bind.writer = volume.bind.writer.next();
            let term = volume.bind.writer;
            draft.keep(volume)?;
            Ok(term)
        }
    }
}

fn reachable(draft: &Draft<'_>, instance: &Record<Instance>, volume: &Record<Volume>) -> Result<()> {
    let (Some((host, _)), Some(pool)) = (instance.bind.host, volume.bind.pool) else { return Ok(()) };
    if draft.sites().reach.get(&host).is_some_and(|pools| pools.contains(&pool)) {
        return Ok(());
    }
    Err(Error::conflict("the instance's host does not reach the volume's pool")
        .about(volume.meta.id.object())
        .remedy("create the instance together with the volume, so that it is placed where both are reached"))
}
