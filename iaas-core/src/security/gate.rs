//! The gate: asks the authorizer, and tells a stranger nothing.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::Action;
use super::Permit;
use crate::Error;
use crate::ErrorKind;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::authorizer::Ask;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::Principal;

/// What the gate needs to know of the objects: the side that keeps them implements it.
pub trait Entities: std::fmt::Debug + Send + Sync + 'static {
    /// The version and the parents of `object`, nearest first, up to the cloud. `None` if there is no such object.
    fn lineage(&self, object: &ObjectRef) -> Option<(Rev, Vec<ObjectRef>)>;

    /// The revision of the newest role or binding.
    fn policy(&self) -> Rev;
}

/// Decides who may do what, and makes the permits.
#[derive(Clone, Debug)]
pub struct Gate {
    authorizer: Arc<dyn Authorizer>,
    entities: Arc<dyn Entities>,
}

impl Gate {
    /// A gate that asks `authorizer` about `entities`.
    pub fn new(authorizer: Arc<dyn Authorizer>, entities: Arc<dyn Entities>) -> Self {
        Self { authorizer, entities }
    }

    /// Allows `request` for `who`, or says why not.
    ///
    /// # Errors
    /// - [`ErrorKind::Unauthenticated`]: `who` has no name.
    /// - [`ErrorKind::NotFound`]: an object does not exist or `who` may not read it: the two answers are the same.
    /// - [`ErrorKind::Denied`]: `who` may read the object but not do this.
    pub async fn check<A: Action>(&self, who: &Arc<Principal>, request: A) -> Result<Permit<A>> {
        if who.name.is_empty() {
            return Err(Error::new(ErrorKind::Unauthenticated, "nobody vouches for this caller")
                .remedy("open the session with a principal that has a name"));
        }
        let wanted: Vec<(String, ObjectRef)> =
            request.asks().into_iter().map(|(action, object)| (action.to_owned(), object)).collect();
        let policy = self.entities.policy();
        let mut basis = Vec::new();
        let mut parents = BTreeMap::new();
        // An absent object is answered only below, on the same path as an unreadable one.
        for (_, object) in &wanted {
            if let Some((rev, line)) = self.entities.lineage(object) {
                basis.push((object.clone(), rev));
                parents.insert(object.clone(), line);
            }
        }
        let mut queries: Vec<_> = wanted.iter().filter(|(_, o)| parents.contains_key(o)).cloned().collect();
        let asked = queries.len();
        let reads: Vec<_> =
            queries.iter().map(|(_, object)| (format!("{}.get", object.kind), object.clone())).collect();
        queries.extend(reads);
        let mut asker = (**who).clone();
        asker.groups.push(EVERYONE.to_owned());
        let ask = Ask { who: asker, queries, parents, policy };
        let decisions = self.authorizer.decide(&ask).await?;
        if decisions.len() != ask.queries.len() {
            return Err(Error::internal("the authorizer did not answer each question").detail(format!(
                "{} questions, {} answers",
                ask.queries.len(),
                decisions.len()
            )));
        }
        let (acts, reads) = decisions.split_at(asked);
        let readable: BTreeSet<&ObjectRef> = ask
            .queries
            .iter()
            .zip(reads)
            .filter(|(_, read)| read.allowed)
            .map(|((_, object), _)| object)
            .collect();
        // In the order of the request, whether absent or unreadable: else the order would tell which of the two.
        if let Some((_, object)) = wanted.iter().find(|(_, object)| !readable.contains(object)) {
            return Err(not_found(object));
        }
        for ((action, object), act) in ask.queries.iter().zip(acts) {
            if !act.allowed {
                return Err(Error::denied(format!("{} may not {action}", who.name))
                    .about(object.clone())
                    .remedy("ask an administrator for a role that allows it")
                    .detail(act.because.clone()));
            }
        }
        Ok(Permit::new(request, Arc::clone(who), basis, policy))
    }

    /// Decides once more on what `permit` allows, by the policies that hold now.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub async fn renew<A: Action>(&self, permit: Permit<A>) -> Result<Permit<A>> {
        let (who, request) = permit.into_parts();
        self.check(&who, request).await
    }
}

/// The group that every caller with a name belongs to.
pub const EVERYONE: &str = "everyone";

/// The one answer for what does not exist and for what may not be seen.
pub(crate) fn not_found(object: &ObjectRef) -> Error {
    Error::not_found(format!("there is no such {}", object.kind))
        .about(object.clone())
        .remedy("check the id, and whether you may see it")
}
