//! Tenants, roles, quotas and prices.

use super::create::Creatable;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::engine::draft::Draft;
use crate::model::tenancy::limit;
use crate::model::*;
use crate::security::actions;
use crate::security::actions::Create;

impl Creatable for Organization {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, _: &Create<Self>) -> Result<Empty> {
        Ok(Empty {})
    }
}

impl Creatable for Project {
    const OWNERS: &'static [&'static str] = &["organization"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        draft.present(request.spec.organization)?;
        if request.owner != Owner::Organization(request.spec.organization) {
            return Err(Error::invalid("a project belongs to its organization")
                .remedy("name the same organization as owner and in the wish"));
        }
        Ok(Empty {})
    }
}

impl Creatable for Quota {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        check_limits(&request.spec).map(|()| Empty {})
    }
}

/// Refuses names of limits that nothing is counted by.
pub(super) fn check_limits(spec: &QuotaSpec) -> Result<()> {
    match spec.limits.keys().find(|name| !limit::ALL.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(Error::invalid(format!("`{name}` is not a limit"))
            .remedy(format!("use one of {}", limit::ALL.join(", ")))),
    }
}

impl Creatable for PriceBook {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        let code = &request.spec.currency;
        if code.len() != 3 || !code.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(Error::invalid(format!("`{code}` is not a currency"))
                .remedy("use an ISO 4217 code, as `EUR`"));
        }
        Ok(Empty {})
    }
}

impl Creatable for Role {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        check_role(&request.spec).map(|()| Empty {})
    }
}

/// Refuses patterns that match no action: a typing error must not look like a right.
pub(super) fn check_role(spec: &RoleSpec) -> Result<()> {
    let known = |pattern: &str| {
        let rows = actions::TABLE.iter().chain(actions::REFERRED);
        rows.map(|row| row.name).any(|name| pattern_matches(pattern, name))
    };
    match spec.actions.iter().find(|pattern| !known(pattern)) {
        None => Ok(()),
        Some(pattern) => Err(Error::invalid(format!("`{pattern}` matches no action"))
            .remedy("use `noun.verb`, `noun.*`, `*.verb` or `*` with names of the action table")),
    }
}

/// Whether a role's pattern covers an action.
fn pattern_matches(pattern: &str, action: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let (Some((noun, verb)), Some((is_noun, is_verb))) = (pattern.split_once('.'), action.split_once('.'))
    else {
        return false;
    };
    (noun == "*" || noun == is_noun) && (verb == "*" || verb == is_verb)
}

impl Creatable for Binding {
    const OWNERS: &'static [&'static str] = &["cloud", "organization", "project"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        let spec = &request.spec;
        draft.present(spec.role)?;
        draft.depend(spec.role);
        if spec.to.is_empty() || spec.to.len() > 256 {
            return Err(Error::invalid("a binding needs the name of a principal or `group:NAME`")
                .remedy("give one of 1 to 256 bytes"));
        }
        // The binding lives where it counts: it goes with its owner, and whoever may see the owner may see it.
        let owner = actions::owner_object(request.owner);
        let inside = draft
            .state()
            .lineage(&spec.on)
            .is_some_and(|(_, line)| spec.on == owner || line.contains(&owner));
        if !inside {
            return Err(Error::invalid("a binding must belong to the owner that its object lies in")
                .remedy("make it in the cloud, organization or project that it is about"));
        }
        Ok(Empty {})
    }
}
