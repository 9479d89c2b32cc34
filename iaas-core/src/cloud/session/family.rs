//! What every family of resources can do.

use std::marker::PhantomData;

use super::Session;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::Result;
use crate::cloud::Change;
use crate::engine::intent::Intent;
use crate::engine::state::Stored;
use crate::model::Owner;
use crate::model::Record;
use crate::security::Action;
use crate::security::actions::Create;
use crate::security::actions::Delete;
use crate::security::actions::Get;
use crate::security::actions::List;
use crate::security::actions::Replace;
use crate::security::actions::Update;
use crate::security::gate::not_found;

/// The resources of one type.
#[derive(Clone, Debug)]
pub struct Family<R: Stored> {
    session: Session,
    kind: PhantomData<fn() -> R>,
}

impl<R: Stored> Family<R> {
    pub(crate) fn new(session: &Session) -> Self {
        Self { session: session.clone(), kind: PhantomData }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Makes a resource of `owner`. A wrong name is reported when the change is awaited.
    pub fn create(&self, owner: impl Into<Owner>, name: &str, spec: R::Spec) -> Change<Create<R>>
    where
        Create<R>: Intent,
    {
        let owner = owner.into();
        let request = Name::new(name).map(|name| Create { owner, name, labels: Labels::default(), spec });
        Change::new(&self.session, request)
    }

    /// Reads a resource.
    ///
    /// # Errors
    /// `NotFound` if there is none, or if the principal may not read it.
    pub async fn get(&self, id: Id<R>) -> Result<Record<R>>
    where
        Get<R>: Action,
    {
        let permit = self.session.cloud().gate().check(self.session.principal(), Get { id }).await?;
        let id = permit.request().id;
        let found = self.session.cloud().engine().committer().read(|s| s.get(id).cloned());
        found.map(|record| (*record).clone()).ok_or_else(|| not_found(&id.object()))
    }

    /// Up to `limit` (at most 1000) resources of `owner` after `after`, in order of id.
    ///
    /// # Errors
    /// `NotFound` if the principal may not see the owner, `Denied` if it may not list.
    pub async fn list(
        &self,
        owner: impl Into<Owner>,
        after: Option<Id<R>>,
        limit: u32,
    ) -> Result<Vec<Record<R>>>
    where
        List<R>: Action,
    {
        let request = List { owner: owner.into(), after, limit: limit.min(1000) };
        let permit = self.session.cloud().gate().check(self.session.principal(), request).await?;
        let List { owner, after, limit } = permit.request();
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        Ok(self.session.cloud().engine().committer().read(|s| {
            let all = R::table(s).range((from, std::ops::Bound::Unbounded)).map(|(_, r)| r);
            let own = all.filter(|r| r.meta.owner == *owner).map(|r| (**r).clone());
            own.take(usize::try_from(*limit).unwrap_or(0)).collect()
        }))
    }

    /// The resource of that name.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn named(&self, owner: impl Into<Owner>, name: &str) -> Result<Record<R>>
    where
        Get<R>: Action,
    {
        let (owner, name) = (owner.into(), Name::new(name)?);
        let id = self.session.cloud().engine().committer().read(|s| s.named::<R>(owner, &name));
        // An absent name is refused like an unreadable resource: by the same call, about an id that nothing has.
        self.get(id.unwrap_or(Id::from_uuid(uuid::Uuid::nil()))).await
    }

    /// Replaces the labels.
    pub fn update(&self, id: Id<R>, labels: Labels) -> Change<Update<R>>
    where
        Update<R>: Intent,
    {
        Change::new(&self.session, Ok(Update { id, labels }))
    }

    /// Replaces the wish, where a type's wish may change.
    pub fn replace(&self, id: Id<R>, spec: R::Spec) -> Change<Replace<R>>
    where
        Replace<R>: Intent,
    {
        Change::new(&self.session, Ok(Replace { id, spec }))
    }

    /// Removes a resource. Accepted in every state, unless something else uses it.
    pub fn delete(&self, id: Id<R>) -> Change<Delete<R>>
    where
        Delete<R>: Intent,
    {
        Change::new(&self.session, Ok(Delete { id }))
    }
}

// A family with more verbs is still a family.
macro_rules! extends {
    ($name:ident, $res:ident) => {
        impl std::ops::Deref for $name {
            type Target = Family<$res>;
            fn deref(&self) -> &Family<$res> {
                &self.0
            }
        }
        impl $name {
            pub(crate) fn new(session: &Session) -> Self {
                Self(Family::new(session))
            }
        }
    };
}
pub(super) use extends;
