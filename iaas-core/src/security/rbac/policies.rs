//! A whole set of policies, and the index by which a decision finds the few that matter.

use std::collections::HashMap;
use std::fmt;

use super::pattern::Pattern;
use crate::Error;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::authorizer::PolicyObject;
use crate::spi::authorizer::PolicyUpdate;

/// Policies of one revision; never changed, only replaced.
#[derive(Clone, Debug, Default)]
pub(super) struct Policies {
    rev: Option<Rev>,
    roles: HashMap<ObjectRef, Vec<Pattern>>,
    bindings: HashMap<ObjectRef, Binding>,
    /// From the bindings: by whom and where. Each list is ordered by binding, so that equal policies answer equally.
    index: HashMap<Subject, HashMap<ObjectRef, Vec<Grant>>>,
}

#[derive(Clone, Debug)]
struct Binding {
    to: Subject,
    role: ObjectRef,
    on: ObjectRef,
}

/// To whom a role is given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Name(String),
    Group(String),
}

/// What a binding gives to its subject at its scope.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Grant {
    pub(super) binding: ObjectRef,
    pub(super) role: ObjectRef,
}

impl Policies {
    pub(super) fn rev(&self) -> Option<Rev> {
        self.rev
    }

    /// What is given to `subject` at `scope` itself.
    pub(super) fn grants(&self, subject: &Subject, scope: &ObjectRef) -> &[Grant] {
        self.index.get(subject).and_then(|scopes| scopes.get(scope)).map_or(&[], Vec::as_slice)
    }

    pub(super) fn allows(&self, role: &ObjectRef, action: &str) -> bool {
        self.roles.get(role).is_some_and(|patterns| patterns.iter().any(|p| p.covers(action)))
    }

    /// These policies after `up`, which must fit them; or an error, and they are as they were.
    pub(super) fn updated(&self, up: &PolicyUpdate) -> Result<Self> {
        let mut next = if up.from.is_none() { Self::default() } else { self.clone() };
        for id in &up.drop {
            next.roles.remove(id);
            next.bindings.remove(id);
        }
        for object in &up.put {
            next.put(object)?;
        }
        next.check_bindings()?;
        next.build_index();
        next.rev = Some(up.to);
        Ok(next)
    }

    fn put(&mut self, object: &PolicyObject) -> Result<()> {
        match object {
            PolicyObject::Role { id, actions } => {
                let patterns = actions.iter().map(|a| Pattern::parse(a).ok_or_else(|| no_pattern(id, a)));
                let patterns = patterns.collect::<Result<Vec<_>>>()?;
                self.roles.insert(id.clone(), patterns);
            }
            PolicyObject::Binding { id, to, role, on } => {
                let to = Subject::parse(to).ok_or_else(|| {
                    Error::invalid("a binding gives a role to nobody")
                        .about(id.clone())
                        .remedy("name a principal, or a group as `group:NAME`")
                })?;
                self.bindings.insert(id.clone(), Binding { to, role: role.clone(), on: on.clone() });
            }
        }
        Ok(())
    }

    fn check_bindings(&self) -> Result<()> {
        // The least one, so that the same update always gets the same answer.
        let dangling =
            self.bindings.iter().filter(|(_, b)| !self.roles.contains_key(&b.role)).min_by_key(|(id, _)| *id);
        dangling.map_or(Ok(()), |(id, binding)| {
            Err(Error::invalid(format!("a binding gives {}, which is not there", binding.role))
                .about(id.clone())
                .remedy("create the role first, or remove the binding with it"))
        })
    }

    fn build_index(&mut self) {
        self.index.clear();
        for (id, Binding { to, role, on }) in &self.bindings {
            let scopes = self.index.entry(to.clone()).or_default();
            scopes.entry(on.clone()).or_default().push(Grant { binding: id.clone(), role: role.clone() });
        }
        self.index.values_mut().flat_map(HashMap::values_mut).for_each(|grants| grants.sort());
    }
}

impl Subject {
    fn parse(text: &str) -> Option<Self> {
        let (name, subject): (&str, fn(String) -> Self) = match text.strip_prefix("group:") {
            Some(group) => (group, Self::Group),
            None => (text, Self::Name),
        };
        (!name.is_empty()).then(|| subject(name.to_owned()))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Group(name) => write!(f, "group:{name}"),
        }
    }
}

fn no_pattern(role: &ObjectRef, action: &str) -> Error {
    let shown: String = action.chars().take(80).collect();
    Error::invalid(format!("`{shown}` is no action or pattern of actions"))
        .about(role.clone())
        .remedy("write `noun.verb`, `noun.*`, `*.verb` or `*`, as in `instance.start`")
}
