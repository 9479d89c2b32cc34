//! Deleting: at once where no host is concerned, else by wishing the record absent. Accepted in every state.

use super::Intent;
use super::Meant;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::engine::draft::Draft;
use crate::engine::state::Stored;
use crate::model::security_group::Remote;
use crate::model::*;
use crate::security::Action;
use crate::security::actions::Delete;

/// How a type of resource goes.
trait Deletable: Stored {
    /// Whether objects on hosts must go first.
    const EFFECT: bool = false;

    /// What still needs the record.
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef>;

    /// Wishes absent what goes with it.
    fn cascade(draft: &mut Draft<'_>, record: &Record<Self>) -> Result<()> {
        let _ = (draft, record);
        Ok(())
    }
}

impl<R: Deletable> Intent for Delete<R>
where
    Delete<R>: Action<Out = Id<R>>,
{
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<R>>> {
        let mut record = draft.record(self.id)?;
        let meant = Meant { out: self.id, target: self.id.object(), open: R::EFFECT };
        if record.meta.absent.is_some() {
            return Ok(meant);
        }
        if let Some(needer) = R::needed_by(draft, &record) {
            return Err(Error::conflict(format!("the {} is used by a {}", R::NAME, needer.kind))
                .about(needer)
                .remedy("delete or detach that first"));
        }
        R::cascade(draft, &record)?;
        if R::EFFECT {
            record.meta.absent = Some(draft.operation());
            draft.change(record)?;
        } else {
            draft.delete(self.id);
        }
        Ok(meant)
    }
}

/// Wishes an attachment absent, with the operation of the draft.
fn wish_absent(draft: &mut Draft<'_>, id: Id<Attachment>) -> Result<()> {
    let mut record = draft.record(id)?;
    if record.meta.absent.is_none() {
        record.meta.absent = Some(draft.operation());
        draft.change(record)?;
    }
    Ok(())
}

impl Deletable for Instance {
    const EFFECT: bool = true;
    fn needed_by(_: &Draft<'_>, _: &Record<Self>) -> Option<ObjectRef> {
        None
    }
    fn cascade(draft: &mut Draft<'_>, record: &Record<Self>) -> Result<()> {
        let all = draft.state().attachments_of(record.meta.id);
        all.iter().try_for_each(|a| wish_absent(draft, a.meta.id))
    }
}

impl Deletable for Volume {
    const EFFECT: bool = true;
    // An attachment that is going already does not block: the pool waits until its access is gone.
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let attachment = draft.state().attachment_to(&record.meta.id.object())?;
        attachment.meta.absent.is_none().then(|| attachment.meta.id.object())
    }
}

impl Deletable for Attachment {
    const EFFECT: bool = true;
    fn needed_by(_: &Draft<'_>, _: &Record<Self>) -> Option<ObjectRef> {
        None
    }
    // The instance's devices change: its hypervisor must see it.
    fn cascade(draft: &mut Draft<'_>, record: &Record<Self>) -> Result<()> {
        match draft.find(record.spec.instance) {
            Some(instance) => draft.change(instance),
            None => Ok(()),
        }
    }
}

impl Deletable for Port {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().attachment_to(&record.meta.id.object()).map(|a| a.meta.id.object())
    }
}

impl Deletable for Subnet {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().ports_of(record.meta.id).first().map(|id| id.object())
    }
}

impl Deletable for Network {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let subnets = &draft.state().subnets;
        subnets.values().find(|s| s.spec.network() == record.meta.id).map(|s| s.meta.id.object())
    }
}

impl Deletable for SecurityGroup {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let id = record.meta.id;
        let port = draft.state().ports.values().find(|p| p.spec.groups.contains(&id));
        let names = |g: &&std::sync::Arc<Record<Self>>| {
            g.meta.id != id && g.spec.rules().iter().any(|r| r.remote == Remote::Group(id))
        };
        let group = || draft.state().security_groups.values().find(names);
        port.map(|p| p.meta.id.object()).or_else(|| group().map(|g| g.meta.id.object()))
    }
}

impl Deletable for KeyPair {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let uses = |i: &&std::sync::Arc<Record<Instance>>| i.spec.key_pairs.contains(&record.meta.id);
        draft.state().instances.values().find(uses).map(|i| i.meta.id.object())
    }
}

impl Deletable for Image {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().instances.values().find(|i| i.spec.image == record.meta.id).map(|i| i.meta.id.object())
    }
}

impl Deletable for InstanceType {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let instances = &draft.state().instances;
        instances.values().find(|i| i.spec.instance_type == record.meta.id).map(|i| i.meta.id.object())
    }
}

impl Deletable for Host {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        let here =
            |i: &&std::sync::Arc<Record<Instance>>| i.bind.host.is_some_and(|(h, _)| h == record.meta.id);
        draft.state().instances.values().find(here).map(|i| i.meta.id.object())
    }
}

impl Deletable for Zone {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().hosts.values().find(|h| h.spec.zone == record.meta.id).map(|h| h.meta.id.object())
    }
}

impl Deletable for Region {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().zones.values().find(|z| z.spec.region == record.meta.id).map(|z| z.meta.id.object())
    }
}

impl Deletable for Project {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        owned(draft, Owner::Project(record.meta.id))
    }
    fn cascade(draft: &mut Draft<'_>, record: &Record<Self>) -> Result<()> {
        with_owner(draft, Owner::Project(record.meta.id));
        Ok(())
    }
}

impl Deletable for Organization {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        owned(draft, Owner::Organization(record.meta.id))
    }
    fn cascade(draft: &mut Draft<'_>, record: &Record<Self>) -> Result<()> {
        with_owner(draft, Owner::Organization(record.meta.id));
        Ok(())
    }
}

/// What keeps an owner from going: everything but what only describes it.
fn owned(draft: &Draft<'_>, owner: Owner) -> Option<ObjectRef> {
    let all = draft.state().owned_by(owner);
    let operations = &draft.state().operations;
    all.into_iter().find(|o| {
        let open =
            |id: Id<Operation>| operations.get(&id).is_some_and(|o| o.status.state == OperationState::Open);
        !GOES_WITH_OWNER.contains(&o.kind.as_str()) || o.typed().is_some_and(open)
    })
}

/// Deletes what only describes an owner, as far as one commit holds; the sweep takes the rest.
fn with_owner(draft: &mut Draft<'_>, owner: Owner) {
    for object in draft.state().owned_by(owner).into_iter().take(100) {
        if let Some(id) = object.typed::<Quota>() {
            draft.delete(id);
        } else if let Some(id) = object.typed::<Binding>() {
            draft.delete(id);
        } else if let Some(id) = object.typed::<Operation>() {
            draft.delete(id);
        }
    }
}

/// Nouns of records that go with their owner.
const GOES_WITH_OWNER: [&str; 3] = [Quota::NAME, Binding::NAME, Operation::NAME];

impl Deletable for Role {
    fn needed_by(draft: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        draft.state().bindings.values().find(|b| b.spec.role == record.meta.id).map(|b| b.meta.id.object())
    }
}

macro_rules! free {
    ($($res:ident),+) => {$(
        impl Deletable for $res {
            fn needed_by(_: &Draft<'_>, _: &Record<Self>) -> Option<ObjectRef> {
                None
            }
        }
    )+};
}

free!(Binding, Quota, PriceBook);

impl Deletable for Operation {
    fn needed_by(_: &Draft<'_>, record: &Record<Self>) -> Option<ObjectRef> {
        (record.status.state == OperationState::Open).then(|| record.spec.target.clone())
    }
}
