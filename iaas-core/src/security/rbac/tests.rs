//! Who may do what, told as stories; and the index against a slow model that looks at every binding.

use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::ErrorKind;
use crate::spi::authorizer::PolicyObject;

fn object(kind: &str, n: u128) -> ObjectRef {
    ObjectRef { kind: kind.to_owned(), id: Uuid::from_u128(n) }
}

fn role(n: u128, actions: &[&str]) -> PolicyObject {
    PolicyObject::Role { id: object("role", n), actions: actions.iter().map(|a| (*a).to_owned()).collect() }
}

fn binding(n: u128, to: &str, of: u128, on: ObjectRef) -> PolicyObject {
    PolicyObject::Binding { id: object("binding", n), to: to.to_owned(), role: object("role", of), on }
}

fn full(to: u64, put: Vec<PolicyObject>) -> PolicyUpdate {
    PolicyUpdate { from: None, to: Rev(to), put, drop: Vec::new() }
}

fn who(name: &str, groups: &[&str]) -> Principal {
    let groups = groups.iter().map(|g| (*g).to_owned()).collect();
    Principal { name: name.to_owned(), groups, on_behalf_of: None }
}

/// Instance 1 in project 1, instance 2 in project 2, both projects in organization 1, in the cloud.
fn parents() -> BTreeMap<ObjectRef, Vec<ObjectRef>> {
    let above = |project| vec![object("project", project), object("organization", 1), object("cloud", 0)];
    [(1, 1), (2, 2)].map(|(instance, project)| (object("instance", instance), above(project))).into()
}

async fn ask(rbac: &Rbac, who: Principal, action: &str, on: ObjectRef) -> Decision {
    let ask = Ask { who, queries: vec![(action.to_owned(), on)], parents: parents(), policy: Rev(0) };
    rbac.decide(&ask).await.unwrap().remove(0)
}

async fn may(rbac: &Rbac, who: Principal, action: &str, on: ObjectRef) -> bool {
    ask(rbac, who, action, on).await.allowed
}

async fn rbac(put: Vec<PolicyObject>) -> Rbac {
    let rbac = Rbac::new();
    assert_eq!(rbac.load(&full(5, put)).await.unwrap(), Synced::At(Rev(5)));
    rbac
}

#[tokio::test]
async fn nothing_is_allowed_until_somebody_allows_it() {
    let empty = Rbac::new();
    assert!(!may(&empty, who("ann", &[]), "instance.get", object("instance", 1)).await);
    let rbac = rbac(vec![role(1, &["*"])]).await;
    let denied = ask(&rbac, who("ann", &[]), "instance.get", object("instance", 1)).await;
    assert!(!denied.allowed);
    assert!(denied.because.contains("no binding of ann"), "{}", denied.because);
}

#[tokio::test]
async fn a_role_reaches_what_is_below_its_scope_and_nothing_beside_it() {
    let rbac = rbac(vec![role(1, &["instance.start"]), binding(1, "ann", 1, object("project", 1))]).await;
    assert!(may(&rbac, who("ann", &[]), "instance.start", object("instance", 1)).await);
    assert!(!may(&rbac, who("ann", &[]), "instance.stop", object("instance", 1)).await);
    assert!(!may(&rbac, who("ann", &[]), "instance.start", object("instance", 2)).await);
    assert!(!may(&rbac, who("ann", &[]), "instance.start", object("organization", 1)).await);
    assert!(!may(&rbac, who("bob", &[]), "instance.start", object("instance", 1)).await);
}

#[tokio::test]
async fn the_answer_names_the_binding_the_role_and_the_scope() {
    let rbac =
        rbac(vec![role(7, &["instance.*"]), binding(9, "group:ops", 7, object("organization", 1))]).await;
    let decision = ask(&rbac, who("ann", &["dev", "ops"]), "instance.start", object("instance", 1)).await;
    let expected = format!(
        "{} gives {} to group:ops on {}, which allows instance.start",
        object("binding", 9),
        object("role", 7),
        object("organization", 1)
    );
    assert_eq!((decision.allowed, decision.because), (true, expected));
}

#[tokio::test]
async fn a_name_that_looks_like_a_group_is_not_in_it() {
    let rbac = rbac(vec![role(1, &["*"]), binding(1, "group:ops", 1, object("cloud", 0))]).await;
    assert!(may(&rbac, who("ann", &["ops"]), "instance.start", object("instance", 1)).await);
    assert!(!may(&rbac, who("group:ops", &[]), "instance.start", object("instance", 1)).await);
    assert!(!may(&rbac, who("ops", &[]), "instance.start", object("instance", 1)).await);
    assert!(!may(&rbac, who("ann", &["group:ops"]), "instance.start", object("instance", 1)).await);
    // Acting on behalf of somebody gives none of their rights.
    let service = Principal { on_behalf_of: Some("ann".to_owned()), ..who("sweeper", &[]) };
    assert!(!may(&rbac, service, "instance.start", object("instance", 1)).await);
}

#[tokio::test]
async fn a_bad_update_is_refused_whole() {
    let rbac = rbac(vec![role(1, &["instance.start"]), binding(1, "ann", 1, object("project", 1))]).await;
    let bad = [
        vec![role(1, &["*"]), role(2, &["instance"])],
        vec![role(1, &["*"]), role(2, &["in*.start"])],
        vec![role(1, &["*"]), role(2, &["a.b.c"])],
        vec![role(1, &["*"]), role(2, &[""])],
        vec![role(1, &["*"]), binding(2, "bob", 3, object("project", 1))],
        vec![role(1, &["*"]), binding(2, "", 1, object("project", 1))],
        vec![role(1, &["*"]), binding(2, "group:", 1, object("project", 1))],
    ];
    for put in bad {
        for from in [None, Some(Rev(5))] {
            let update = PolicyUpdate { from, to: Rev(6), put: put.clone(), drop: Vec::new() };
            let error = rbac.load(&update).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{put:?}");
            assert!(error.object().is_some() && error.what_to_do().is_some(), "{error}");
        }
        assert!(may(&rbac, who("ann", &[]), "instance.start", object("instance", 1)).await);
        assert!(!may(&rbac, who("ann", &[]), "instance.stop", object("instance", 1)).await);
        // Still at the revision of before.
        let delta = PolicyUpdate { from: Some(Rev(6)), to: Rev(7), put: Vec::new(), drop: Vec::new() };
        assert_eq!(rbac.load(&delta).await.unwrap(), Synced::NeedFull);
    }
    // A role that is still given cannot go alone.
    let drop = |drop| PolicyUpdate { from: Some(Rev(5)), to: Rev(6), put: Vec::new(), drop };
    assert!(rbac.load(&drop(vec![object("role", 1)])).await.is_err());
    let both = drop(vec![object("role", 1), object("binding", 1)]);
    assert_eq!(rbac.load(&both).await.unwrap(), Synced::At(Rev(6)));
    assert!(!may(&rbac, who("ann", &[]), "instance.start", object("instance", 1)).await);
}

#[tokio::test]
async fn a_question_about_newer_policies_is_not_answered_by_older_ones() {
    let rbac = rbac(Vec::new()).await;
    let mut ask = Ask { who: who("ann", &[]), queries: Vec::new(), parents: parents(), policy: Rev(5) };
    assert_eq!(rbac.decide(&ask).await.unwrap(), []);
    ask.policy = Rev(6);
    assert_eq!(rbac.decide(&ask).await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn parents_may_be_told_one_step_at_a_time() {
    let rbac = rbac(vec![role(1, &["*"]), binding(1, "ann", 1, object("cloud", 0))]).await;
    let line = [object("instance", 1), object("project", 1), object("organization", 1), object("cloud", 0)];
    let parents = line.windows(2).map(|two| (two[0].clone(), vec![two[1].clone()])).collect();
    let queries = vec![("x.y".to_owned(), object("instance", 1)), ("x.y".to_owned(), object("instance", 2))];
    let ask = Ask { who: who("ann", &[]), queries, parents, policy: Rev(0) };
    let decided: Vec<_> = rbac.decide(&ask).await.unwrap().iter().map(|d| d.allowed).collect();
    assert_eq!(decided, [true, false]);
}

#[tokio::test]
async fn a_full_update_is_everything() {
    let ann = binding(1, "ann", 1, object("project", 1));
    let rbac = rbac(vec![role(1, &["*"]), ann]).await;
    let bob = binding(2, "bob", 1, object("project", 1));
    rbac.load(&full(6, vec![role(1, &["*"]), bob])).await.unwrap();
    assert!(!may(&rbac, who("ann", &[]), "instance.start", object("instance", 1)).await);
    assert!(may(&rbac, who("bob", &[]), "instance.start", object("instance", 1)).await);
}

#[tokio::test]
async fn parents_in_a_ring_do_not_hang_a_decision() {
    let rbac = rbac(vec![role(1, &["*"]), binding(1, "ann", 1, object("cloud", 0))]).await;
    let (a, b) = (object("project", 1), object("project", 2));
    let parents = BTreeMap::from([(a.clone(), vec![b.clone()]), (b, vec![a.clone()])]);
    let ask = Ask { who: who("ann", &[]), queries: vec![("x.y".to_owned(), a)], parents, policy: Rev(0) };
    assert!(!rbac.decide(&ask).await.unwrap()[0].allowed);
}

#[tokio::test]
async fn the_built_in_roles_hold_what_their_names_promise() {
    let cloud = object("cloud", 0);
    let mut put = Vec::new();
    for (n, (name, actions)) in (1..).zip(builtin::ALL) {
        put.extend([role(n, actions), binding(n, name, n, cloud.clone())]);
    }
    let rbac = rbac(put).await;
    // Action, then whether viewer, operator and admin may.
    let matrix = [
        ("instance.get", [true, true, true]),
        ("volume.list", [true, true, true]),
        ("audit.read", [true, true, true]),
        ("project.bill", [true, true, true]),
        ("port.explain-packet", [true, true, true]),
        ("instance.console", [false, true, true]),
        ("instance.create", [false, true, true]),
        ("instance.reboot", [false, true, true]),
        ("volume.attach", [false, true, true]),
        ("security-group.replace", [false, true, true]),
        ("network.delete", [false, true, true]),
        ("project.create", [false, false, true]),
        ("binding.create", [false, false, true]),
        ("role.update", [false, false, true]),
        ("quota.replace", [false, false, true]),
        ("price-book.create", [false, false, true]),
        ("host.delete", [false, false, true]),
    ];
    for (action, expected) in matrix {
        for ((name, _), expected) in builtin::ALL.iter().zip(expected) {
            let may = may(&rbac, who(name, &[]), action, object("instance", 1)).await;
            assert_eq!(may, expected, "{name} {action}");
        }
    }
}

const NAMES: [&str; 3] = ["ann", "bob", "group:ops"];
const ACTIONS: [&str; 4] = ["instance.start", "instance.stop", "volume.start", "volume.stop"];
const PATTERNS: [&str; 6] = ["*", "instance.*", "*.start", "*.*", "volume.stop", "instance.stop"];

fn scope(n: usize) -> ObjectRef {
    [object("instance", 1), object("project", 1), object("project", 2), object("organization", 1)][n].clone()
}

#[derive(Clone, Debug)]
enum Change {
    Role(u128, Vec<usize>),
    Bind(u128, usize, u128, usize),
    Drop(&'static str, u128),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0u128..3, proptest::collection::vec(0usize..6, 0..3)).prop_map(|(n, p)| Change::Role(n, p)),
        (0u128..5, 0usize..3, 0u128..3, 0usize..4).prop_map(|(n, to, of, on)| Change::Bind(n, to, of, on)),
        (0u128..3).prop_map(|n| Change::Drop("role", n)),
        (0u128..5).prop_map(|n| Change::Drop("binding", n)),
    ]
}

fn update(from: Option<u64>, to: u64, changes: &[Change]) -> PolicyUpdate {
    let mut update = PolicyUpdate { from: from.map(Rev), to: Rev(to), put: Vec::new(), drop: Vec::new() };
    for change in changes {
        match change {
            Change::Role(n, patterns) => {
                let actions: Vec<_> = patterns.iter().map(|p| PATTERNS[*p]).collect();
                update.put.push(role(*n, &actions));
            }
            Change::Bind(n, to, of, on) => update.put.push(binding(*n, NAMES[*to], *of, scope(*on))),
            Change::Drop(kind, n) => update.drop.push(object(kind, *n)),
        }
    }
    update
}

/// Every binding, one after the other, by the words of the contract.
fn model(objects: &BTreeMap<ObjectRef, PolicyObject>, who: &Principal, action: &str, on: &ObjectRef) -> bool {
    let mut scopes = parents().remove(on).unwrap_or_default();
    scopes.push(on.clone());
    objects.values().any(|object| {
        let PolicyObject::Binding { to, role, on, .. } = object else { return false };
        let theirs =
            who.groups.iter().map(|g| format!("group:{g}")).chain([who.name.clone()]).any(|s| s == *to);
        let Some(PolicyObject::Role { actions, .. }) = objects.get(role) else { return false };
        let (noun, verb) = action.split_once('.').unwrap();
        let ways =
            ["*".to_owned(), "*.*".to_owned(), format!("{noun}.*"), format!("*.{verb}"), action.to_owned()];
        theirs && scopes.contains(on) && actions.iter().any(|a| ways.contains(a))
    })
}

proptest! {
    #[test]
    fn decisions_equal_those_of_a_slow_model_after_any_updates(
        updates in proptest::collection::vec(proptest::collection::vec(change(), 1..6), 1..6),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let rbac = Rbac::new();
        let mut objects = BTreeMap::new();
        let mut rev = None;
        for changes in updates {
            let to = rev.unwrap_or(0) + 1;
            let update = update(rev, to, &changes);
            let mut next: BTreeMap<ObjectRef, PolicyObject> = objects.clone();
            update.drop.iter().for_each(|id| drop(next.remove(id)));
            for object in &update.put {
                let (PolicyObject::Role { id, .. } | PolicyObject::Binding { id, .. }) = object;
                next.insert(id.clone(), object.clone());
            }
            let good = next.values().all(|o| match o {
                PolicyObject::Binding { role, .. } => next.contains_key(role),
                PolicyObject::Role { .. } => true,
            });
            let loaded = runtime.block_on(rbac.load(&update));
            prop_assert_eq!(loaded.is_ok(), good);
            if good {
                (objects, rev) = (next, Some(to));
            }
            for who in [who("ann", &[]), who("bob", &["ops"]), who("eve", &["ops", "ops", "dev"])] {
                for (on, action) in [1, 2].iter().flat_map(|i| ACTIONS.map(|a| (object("instance", *i), a))) {
                    let decided = runtime.block_on(may(&rbac, who.clone(), action, on.clone()));
                    prop_assert_eq!(decided, model(&objects, &who, action, &on));
                }
            }
        }
    }
}
