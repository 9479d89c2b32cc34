//! Authorizers that break one clause each.

use std::sync::Arc;

use async_trait::async_trait;

use super::Rig;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::authorizer::Ask;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::Decision;
use crate::spi::authorizer::PolicyUpdate;
use crate::spi::network::Synced;
use crate::testing::conformance::Saboteur;
use crate::testing::fake::FakeAuthorizer;

/// One saboteur or more for each clause.
pub fn saboteurs() -> Vec<Saboteur<dyn Rig>> {
    macro_rules! list {
        ($($clause:literal, $does:literal => $fault:ident;)+) => {
            vec![$(Saboteur { clause: $clause, does: $does, rig: || Box::new(BadRig(Fault::$fault)) }),+]
        };
    }
    list! {
        "default-deny", "allows what no policy speaks of" => Allows;
        "default-deny", "lets a role reach the projects beside its own" => ReachesBeside;
        "default-deny", "takes a name for a group" => NameIsGroup;
        "one-decision-per-query", "answers each question only once" => AnswersOnce;
        "one-decision-per-query", "answers in the order of the objects" => Sorts;
        "policy-revision", "does not look at the revision of a question" => AnyRevision;
        "policy-revision", "takes a change of policies that it does not have" => AnyBase;
        "load-atomic", "keeps the good part of a bad update" => KeepsPart;
        "load-atomic", "drops everything at a bad update" => DropsAll;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Allows,
    ReachesBeside,
    NameIsGroup,
    AnswersOnce,
    Sorts,
    AnyRevision,
    AnyBase,
    KeepsPart,
    DropsAll,
}

struct BadRig(Fault);

#[async_trait]
impl Rig for BadRig {
    async fn fresh(&self) -> Result<Arc<dyn Authorizer>> {
        Ok(Arc::new(BadAuthorizer { clean: FakeAuthorizer::new(), fault: self.0 }))
    }
}

#[derive(Debug)]
struct BadAuthorizer {
    clean: FakeAuthorizer,
    fault: Fault,
}

impl BadAuthorizer {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// The question as the clean one gets it.
    fn bend(&self, ask: &Ask) -> Ask {
        let mut ask = ask.clone();
        match self.fault {
            Fault::ReachesBeside => {
                let above: Vec<ObjectRef> = ask.parents.values().flatten().cloned().collect();
                ask.parents.values_mut().for_each(|parents| parents.clone_from(&above));
            }
            Fault::NameIsGroup => ask.who.groups.push(ask.who.name.clone()),
            Fault::AnswersOnce => {
                let mut once = Vec::new();
                ask.queries.drain(..).for_each(|q| {
                    if !once.contains(&q) {
                        once.push(q)
                    }
                });
                ask.queries = once;
            }
            Fault::Sorts => ask.queries.sort(),
            Fault::AnyRevision => ask.policy = Rev(0),
            _ => {}
        }
        ask
    }
}

#[async_trait]
impl Authorizer for BadAuthorizer {
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced> {
        let loaded = self.clean.load(up).await;
        match (self.fault, &loaded) {
            (Fault::AnyBase, Ok(Synced::NeedFull)) => return Ok(Synced::At(up.to)),
            (Fault::KeepsPart, Err(_)) => {
                let put = up.put.split_last().map(|(_, good)| good.to_vec()).unwrap_or_default();
                self.clean.load(&PolicyUpdate { put, drop: Vec::new(), ..up.clone() }).await?;
            }
            (Fault::DropsAll, Err(_)) => {
                let empty = PolicyUpdate { from: None, to: Rev(1), put: Vec::new(), drop: Vec::new() };
                self.clean.load(&empty).await?;
            }
            _ => {}
        }
        loaded
    }

    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>> {
        let mut decisions = self.clean.decide(&self.bend(ask)).await?;
        if self.is(Fault::Allows) {
            decisions.iter_mut().for_each(|d| d.allowed = true);
        }
        Ok(decisions)
    }
}
