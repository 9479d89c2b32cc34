//! An authorizer: a list of what is allowed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::authorizer::Ask;
use iaas_core::spi::authorizer::Authorizer;
use iaas_core::spi::authorizer::Decision;
use iaas_core::spi::authorizer::PolicyObject;
use iaas_core::spi::authorizer::PolicyUpdate;
use iaas_core::spi::network::Synced;
use iaas_core::testing::conformance::authorizer;

use crate::lock;

/// Roles and bindings, and no rule that forbids.
#[derive(Debug, Default)]
pub(crate) struct AllowList(Mutex<Policies>);

/// The revision, and everything that was loaded.
#[derive(Clone, Debug, Default)]
struct Policies(Option<Rev>, BTreeMap<ObjectRef, PolicyObject>);

/// `*`, or noun and verb, each of which may be `*`.
fn is_pattern(text: &str) -> bool {
    let word =
        |w: &str| w == "*" || (!w.is_empty() && w.bytes().all(|c| c.is_ascii_lowercase() || c == b'-'));
    text == "*" || text.split_once('.').is_some_and(|(noun, verb)| word(noun) && word(verb))
}

fn covers(pattern: &str, action: &str) -> bool {
    let (Some((noun, verb)), Some(is)) = (pattern.split_once('.'), action.split_once('.')) else {
        return pattern == "*";
    };
    [(noun, is.0), (verb, is.1)].iter().all(|(want, is)| *want == "*" || want == is)
}

impl Policies {
    fn allows(&self, ask: &Ask, action: &str, on: &ObjectRef) -> bool {
        let who = |to: &str| match to.strip_prefix("group:") {
            Some(group) => ask.who.groups.iter().any(|g| g == group),
            None => to == ask.who.name,
        };
        let reaches =
            |above: &ObjectRef| above == on || ask.parents.get(on).is_some_and(|all| all.contains(above));
        self.1.values().any(|object| match object {
            PolicyObject::Binding { to, role, on, .. } if who(to) && reaches(on) => {
                matches!(self.1.get(role), Some(PolicyObject::Role { actions, .. }) if actions.iter().any(|p| covers(p, action)))
            }
            _ => false,
        })
    }
}

#[async_trait]
impl Authorizer for AllowList {
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced> {
        let mut now = lock(&self.0);
        if up.from.is_some() && up.from != now.0 {
            return Ok(Synced::NeedFull);
        }
        let mut next = if up.from.is_some() { now.clone() } else { Policies::default() };
        next.1.retain(|id, _| !up.drop.contains(id));
        for object in &up.put {
            let (PolicyObject::Role { id, .. } | PolicyObject::Binding { id, .. }) = object;
            next.1.insert(id.clone(), object.clone());
        }
        let good = next.1.values().all(|object| match object {
            PolicyObject::Role { actions, .. } => actions.iter().all(|p| is_pattern(p)),
            PolicyObject::Binding { to, role, .. } => !to.is_empty() && next.1.contains_key(role),
        });
        if !good {
            return Err(Error::invalid("a pattern or a binding is wrong")
                .remedy("write `noun.verb`; make the role first"));
        }
        *now = Policies(Some(up.to), next.1);
        Ok(Synced::At(up.to))
    }

    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>> {
        let now = lock(&self.0).clone();
        if now.0.unwrap_or(Rev(0)) < ask.policy {
            return Err(Error::conflict("these policies are not loaded").remedy("load them first"));
        }
        let decide = |(action, on): &(String, ObjectRef)| match now.allows(ask, action, on) {
            true => Decision { allowed: true, because: format!("the list allows {action}") },
            false => Decision { allowed: false, because: format!("nothing on the list allows {action}") },
        };
        Ok(ask.queries.iter().map(decide).collect())
    }
}

#[async_trait]
impl authorizer::Rig for AllowList {
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>> {
        Ok(Arc::new(AllowList::default()))
    }
}
