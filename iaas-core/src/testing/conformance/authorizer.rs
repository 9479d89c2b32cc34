//! The contract of [`Authorizer`], clause by clause.

mod sabotage;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::Check;
use super::Report;
use super::Verdict;
use super::checks;
use super::demand;
use super::should;
use super::should_fail;
use crate::ErrorKind;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::security::rbac::Rbac;
use crate::spi::authorizer::Ask;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::PolicyObject;
use crate::spi::authorizer::PolicyUpdate;
use crate::spi::authorizer::Principal;
use crate::spi::network::Synced;
use crate::testing::fake::FakeAuthorizer;

pub use sabotage::saboteurs;

/// What the suite needs to know about your authorizer.
#[async_trait]
pub trait Rig: Send + Sync + 'static {
    /// A new one, without policies.
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>>;
}

/// A closure that makes one is a rig.
#[async_trait]
impl<A: Authorizer, F: Fn() -> A + Send + Sync + 'static> Rig for F {
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>> {
        Ok(Arc::new(self()))
    }
}

/// The checks, in the order of the contract.
pub fn suite() -> &'static [Check<dyn Rig>] {
    checks![dyn Rig:
        "default-deny" => default_deny,
        "one-decision-per-query" => one_decision_per_query,
        "policy-revision" => policy_revision,
        "load-atomic" => load_atomic,
    ]
}

/// Runs the suite.
pub async fn run(rig: &impl Rig) -> Report {
    super::run::<dyn Rig>("authorizer", suite(), rig).await
}

/// The rig of [`FakeAuthorizer`].
#[derive(Debug, Default)]
pub struct FakeAuthorizerRig;

#[async_trait]
impl Rig for FakeAuthorizerRig {
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>> {
        Ok(Arc::new(FakeAuthorizer::new()))
    }
}

/// The rig of [`Rbac`].
#[derive(Debug, Default)]
pub struct RbacRig;

#[async_trait]
impl Rig for RbacRig {
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>> {
        Ok(Arc::new(Rbac::new()))
    }
}

// ---- the checks -------------------------------------------------------------------------------------------------

async fn default_deny(rig: &dyn Rig) -> Verdict {
    let authorizer = should("fresh", rig.fresh().await)?;
    demand!(!may(&*authorizer, "ann", START, &here()).await?, "it allows something before it has policies");
    full(&*authorizer, 1, policies()).await?;
    // Who, which action and where, and whether the policies allow it.
    let questions = [
        ("ann", "instance.start", here(), true),
        ("ann", "instance.stop", here(), false),
        ("ann", "volume.start", here(), false),
        ("ann", START, beside(), false),
        ("ann", START, organization(), false),
        ("bob", START, here(), false),
        ("ops", START, here(), false),
        ("group:ops", START, here(), false),
        ("", START, here(), false),
    ];
    for (who, action, on, expected) in questions {
        let allowed = may(&*authorizer, who, action, &on).await?;
        demand!(allowed == expected, "`{who}` {action} on {on}: {allowed} instead of {expected}");
    }
    let mut member = ask("bob", START, &here());
    member.who.groups = vec!["ops".to_owned()];
    let decisions = should("decide", authorizer.decide(&member).await)?;
    demand!(
        decisions.iter().all(|d| d.allowed),
        "a role that was given to a group does not reach its member"
    );
    full(&*authorizer, 2, Vec::new()).await?;
    demand!(!may(&*authorizer, "ann", START, &here()).await?, "it allows what the policies no longer say");
    Ok(())
}

async fn one_decision_per_query(rig: &dyn Rig) -> Verdict {
    let authorizer = should("fresh", rig.fresh().await)?;
    full(&*authorizer, 1, policies()).await?;
    let mut ask = ask("ann", START, &here());
    ask.queries =
        [(START, here()), ("instance.stop", here()), (START, here()), (START, beside()), (START, here())]
            .map(|(action, on)| (action.to_owned(), on))
            .into();
    let decisions = should("decide", authorizer.decide(&ask).await)?;
    let allowed: Vec<_> = decisions.iter().map(|d| d.allowed).collect();
    demand!(allowed == [true, false, true, false, true], "five questions are answered by {allowed:?}");
    demand!(decisions.iter().all(|d| !d.because.is_empty()), "an answer gives no reason: {decisions:?}");
    ask.queries.clear();
    let none = should("decide nothing", authorizer.decide(&ask).await)?;
    demand!(none.is_empty(), "no question is answered by {none:?}");
    Ok(())
}

async fn policy_revision(rig: &dyn Rig) -> Verdict {
    let authorizer = should("fresh", rig.fresh().await)?;
    full(&*authorizer, 5, policies()).await?;
    for (needs, known) in [(4, true), (5, true), (6, false)] {
        let ask = Ask { policy: Rev(needs), ..ask("ann", START, &here()) };
        let decided = authorizer.decide(&ask).await;
        if known {
            should("a question about policies that are loaded", decided)?;
        } else {
            should_fail("a question about newer policies", ErrorKind::Conflict, decided)?;
        }
    }
    let delta = |from, to| PolicyUpdate { from: Some(Rev(from)), to: Rev(to), put: vec![], drop: vec![] };
    let beyond = should("a change of other policies", authorizer.load(&delta(6, 7)).await)?;
    demand!(beyond == Synced::NeedFull, "a change of policies that are not loaded gives {beyond:?}");
    let next = should("a change", authorizer.load(&delta(5, 7)).await)?;
    demand!(next == Synced::At(Rev(7)), "a change of the policies gives {next:?}");
    let ask = Ask { policy: Rev(7), ..ask("ann", START, &here()) };
    should("a question about the change", authorizer.decide(&ask).await)?;
    Ok(())
}

async fn load_atomic(rig: &dyn Rig) -> Verdict {
    let authorizer = should("fresh", rig.fresh().await)?;
    full(&*authorizer, 1, policies()).await?;
    let bad = [
        binding(9, "eve", object("role", 77), here()),
        role(9, &["in*.start"]),
        role(9, &["instance.start", ""]),
    ];
    for bad in bad {
        for from in [None, Some(Rev(1))] {
            // The first part alone would be good, and would let eve in.
            let put = vec![role(1, &["*"]), binding(2, "eve", object("role", 1), here()), bad.clone()];
            let update = PolicyUpdate { from, to: Rev(2), put, drop: vec![object("binding", 1)] };
            should_fail("a bad update", ErrorKind::Invalid, authorizer.load(&update).await)?;
            demand!(!may(&*authorizer, "eve", START, &here()).await?, "part of a bad update holds: {bad:?}");
            demand!(
                may(&*authorizer, "ann", START, &here()).await?,
                "a bad update took a right away: {bad:?}"
            );
            let ask = Ask { policy: Rev(2), ..ask("ann", START, &here()) };
            should_fail("the bad revision", ErrorKind::Conflict, authorizer.decide(&ask).await)?;
        }
    }
    Ok(())
}

// ---- what the checks are made of --------------------------------------------------------------------------------

/// Ann may start instances in project 1, and so may the group `ops`.
fn policies() -> Vec<PolicyObject> {
    let project = object("project", 1);
    vec![
        role(1, &["instance.start"]),
        binding(1, "ann", object("role", 1), project.clone()),
        binding(3, "group:ops", object("role", 1), project),
    ]
}

fn role(n: u128, actions: &[&str]) -> PolicyObject {
    PolicyObject::Role { id: object("role", n), actions: actions.iter().map(|a| (*a).to_owned()).collect() }
}

fn binding(n: u128, to: &str, role: ObjectRef, on: ObjectRef) -> PolicyObject {
    PolicyObject::Binding { id: object("binding", n), to: to.to_owned(), role, on }
}

fn object(kind: &str, n: u128) -> ObjectRef {
    ObjectRef { kind: kind.to_owned(), id: Uuid::from_u128(n) }
}

/// An instance in project 1.
fn here() -> ObjectRef {
    object("instance", 1)
}

/// An instance in project 2 of the same organization.
fn beside() -> ObjectRef {
    object("instance", 2)
}

fn organization() -> ObjectRef {
    object("organization", 1)
}

fn ask(who: &str, action: &str, on: &ObjectRef) -> Ask {
    let above = |project| vec![object("project", project), organization(), object("cloud", 0)];
    let parents = BTreeMap::from([(here(), above(1)), (beside(), above(2))]);
    let who = Principal { name: who.to_owned(), groups: Vec::new(), on_behalf_of: None };
    Ask { who, queries: vec![(action.to_owned(), on.clone())], parents, policy: Rev(0) }
}

async fn may(authorizer: &dyn Authorizer, who: &str, action: &str, on: &ObjectRef) -> Result<bool, String> {
    let decisions = should("decide", authorizer.decide(&ask(who, action, on)).await)?;
    demand_one(decisions.len())?;
    Ok(decisions.iter().all(|d| d.allowed))
}

fn demand_one(answers: usize) -> Verdict {
    demand!(answers == 1, "one question got {answers} answers");
    Ok(())
}

async fn full(authorizer: &dyn Authorizer, to: u64, put: Vec<PolicyObject>) -> Verdict {
    let update = PolicyUpdate { from: None, to: Rev(to), put, drop: Vec::new() };
    let synced = should("load", authorizer.load(&update).await)?;
    demand!(synced == Synced::At(Rev(to)), "a full update gives {synced:?}");
    Ok(())
}

const START: &str = "instance.start";
