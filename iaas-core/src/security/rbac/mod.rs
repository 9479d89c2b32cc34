//! The built-in authorizer: roles, given to principals and groups on an entity and everything below it.

pub mod builtin;
mod pattern;
mod policies;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;

use async_trait::async_trait;

use self::policies::Grant;
use self::policies::Policies;
use self::policies::Subject;
use crate::Error;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::authorizer::Ask;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::Decision;
use crate::spi::authorizer::PolicyUpdate;
use crate::spi::authorizer::Principal;
use crate::spi::network::Synced;

/// Role-based access control, in memory. Allows nothing until policies are loaded.
///
/// There is no rule that forbids: a question is allowed if some binding allows it, else denied. A decision looks only at
/// the bindings of the asker and their groups that are on the entity or above it, however many others there are.
/// [`Principal::on_behalf_of`] gives no rights; it is for the record.
///
/// Callable from many threads; a decision sees one whole set of policies, never half of an update.
#[derive(Debug, Default)]
pub struct Rbac {
    policies: RwLock<Arc<Policies>>,
}

impl Rbac {
    /// One that allows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    fn current(&self) -> Arc<Policies> {
        Arc::clone(&self.policies.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Authorizer for Rbac {
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) names the role or binding that is wrong: an action that is no
    /// pattern, a binding to nobody or to a role that is not there.
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced> {
        // Held for the whole change: two updates from one revision must not both apply.
        let mut policies = self.policies.write().unwrap_or_else(PoisonError::into_inner);
        if up.from.is_some_and(|from| Some(from) != policies.rev()) {
            return Ok(Synced::NeedFull);
        }
        *policies = Arc::new(policies.updated(up)?);
        Ok(Synced::At(up.to))
    }

    /// # Errors
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) if the question needs newer policies than were loaded.
    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>> {
        let policies = self.current();
        if policies.rev().unwrap_or(Rev(0)) < ask.policy {
            return Err(Error::conflict(format!("the policies of revision {} are not loaded", ask.policy))
                .remedy("load them first"));
        }
        let subjects = subjects(&ask.who);
        let decide = |(action, on): &(String, ObjectRef)| {
            let scopes = scopes(ask, on);
            match allowing(&policies, &subjects, &scopes, action) {
                Some((subject, scope, grant)) => Decision {
                    allowed: true,
                    because: format!(
                        "{} gives {} to {subject} on {scope}, which allows {action}",
                        grant.binding, grant.role
                    ),
                },
                None => Decision {
                    allowed: false,
                    because: format!(
                        "no binding of {} or their groups on {on} or above it allows {action}",
                        ask.who.name
                    ),
                },
            }
        };
        Ok(ask.queries.iter().map(decide).collect())
    }
}

/// The first grant that allows `action`, nearest scope first.
fn allowing<'a>(
    policies: &'a Policies,
    subjects: &'a [Subject],
    scopes: &'a [&ObjectRef],
    action: &str,
) -> Option<(&'a Subject, &'a ObjectRef, &'a Grant)> {
    for scope in scopes {
        for subject in subjects {
            let grants = policies.grants(subject, scope);
            if let Some(grant) = grants.iter().find(|g| policies.allows(&g.role, action)) {
                return Some((subject, scope, grant));
            }
        }
    }
    None
}

/// The asker and their groups. Someone whose *name* is `group:x` is not in the group `x`.
fn subjects(who: &Principal) -> Vec<Subject> {
    let groups = who.groups.iter().cloned().map(Subject::Group);
    let mut all = vec![Subject::Name(who.name.clone())];
    let mut known = HashSet::new();
    all.extend(groups.filter(|g| known.insert(g.clone())));
    all
}

/// `on` and everything above it, nearest first. A ring of parents is walked once.
fn scopes<'a>(ask: &'a Ask, on: &'a ObjectRef) -> Vec<&'a ObjectRef> {
    let (mut all, mut known) = (vec![on], HashSet::from([on]));
    let mut next = 0;
    while let Some(object) = all.get(next) {
        let parents = ask.parents.get(*object).into_iter().flatten();
        all.extend(parents.filter(|p| known.insert(*p)));
        next += 1;
    }
    all
}

#[cfg(test)]
mod tests;
