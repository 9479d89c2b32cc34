//! Changing labels, and replacing the wishes of those resources whose wish may change.

use super::Intent;
use super::Meant;
use super::net::check_rules;
use super::tenancy::check_limits;
use super::tenancy::check_role;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::engine::draft::Draft;
use crate::engine::state::Stored;
use crate::model::*;
use crate::security::Action;
use crate::security::actions::Replace;
use crate::security::actions::Update;

impl<R: Stored> Intent for Update<R>
where
    Update<R>: Action<Out = Id<R>>,
{
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<R>>> {
        let mut record = draft.present(self.id)?;
        record.meta.labels = self.labels.clone();
        draft.keep(record)?;
        Ok(Meant { out: self.id, target: self.id.object(), open: false })
    }
}

/// A type whose wish may be replaced.
trait Replaceable: Stored {
    /// Checks the new wish against the record.
    fn check(draft: &mut Draft<'_>, record: &Record<Self>, spec: &Self::Spec) -> Result<()>;
}

impl<R: Replaceable> Intent for Replace<R>
where
    Replace<R>: Action<Out = Id<R>>,
{
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<R>>> {
        let mut record = draft.present(self.id)?;
        R::check(draft, &record, &self.spec)?;
        record.spec = self.spec.clone();
        draft.change(record)?;
        Ok(Meant { out: self.id, target: self.id.object(), open: false })
    }
}

impl Replaceable for Host {
    fn check(draft: &mut Draft<'_>, record: &Record<Self>, spec: &HostSpec) -> Result<()> {
        draft.present(spec.zone)?;
        let (cpus, memory) = draft.state().given(record.meta.id);
        if u64::from(spec.vcpus) < cpus || spec.memory < memory {
            return Err(Error::conflict("the host's instances have more than that")
                .about(record.meta.id.object())
                .remedy("delete instances of this host first"));
        }
        Ok(())
    }
}

impl Replaceable for Role {
    fn check(_: &mut Draft<'_>, _: &Record<Self>, spec: &RoleSpec) -> Result<()> {
        check_role(spec)
    }
}

impl Replaceable for Quota {
    fn check(_: &mut Draft<'_>, _: &Record<Self>, spec: &QuotaSpec) -> Result<()> {
        check_limits(spec)
    }
}

impl Replaceable for SecurityGroup {
    fn check(draft: &mut Draft<'_>, record: &Record<Self>, spec: &SecurityGroupSpec) -> Result<()> {
        check_rules(draft, record.meta.owner, spec)
    }
}
