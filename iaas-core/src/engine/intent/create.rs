//! Making resources: one rule per type for who may own it, what must hold, and what is decided with it.

use super::Intent;
use super::Meant;
use super::owned_by;
use crate::Id;
use crate::Result;
use crate::engine::draft::Draft;
use crate::engine::state::Stored;
use crate::model::*;
use crate::security::Action;
use crate::security::actions::Create;

/// How a type of resource is made.
pub(super) trait Creatable: Stored {
    /// The types of owner: `cloud`, `organization`, `project`.
    const OWNERS: &'static [&'static str];
    /// Whether something is left to do after the commit.
    const OPEN: bool = false;

    /// Checks the wish against what exists, and decides.
    fn decide(draft: &mut Draft<'_>, id: Id<Self>, request: &Create<Self>) -> Result<Self::Bind>;
}

impl<R: Creatable> Intent for Create<R>
where
    Create<R>: Action<Out = Id<R>>,
{
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<R>>> {
        let id = Id::from_uuid(draft.uuid());
        owned_by(R::NAME, self.owner, R::OWNERS)?;
        owner_present(draft, self.owner)?;
        let bind = R::decide(draft, id, self)?;
        draft.create(id, self.owner, self.name.clone(), self.labels.clone(), self.spec.clone(), bind)?;
        Ok(Meant { out: id, target: id.object(), open: R::OPEN })
    }
}

/// The owner exists, is not going, and stays so until the commit.
pub(super) fn owner_present(draft: &mut Draft<'_>, owner: Owner) -> Result<()> {
    match owner {
        Owner::Cloud => Ok(()),
        Owner::Organization(id) => draft.present(id).map(|_| draft.depend(id)),
        Owner::Project(id) => draft.present(id).map(|_| draft.depend(id)),
    }
}

/// A charge of one of `name`, and more.
pub(super) fn charge(items: &[(&str, u64)]) -> Charge {
    Charge(items.iter().map(|(name, amount)| ((*name).to_owned(), *amount)).collect())
}
