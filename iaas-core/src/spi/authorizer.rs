//! Who may do what: policies in, decisions out.

use std::collections::BTreeMap;
use std::fmt::Debug;

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;

use super::network::Synced;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;

/// Who acts. The program that embeds the cloud vouches for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Principal {
    /// A name that is unique in the cloud: a user, a service.
    pub name: String,
    /// Groups that it belongs to.
    #[serde(default)]
    pub groups: Vec<String>,
    /// For background work: on whose behalf.
    #[serde(default)]
    pub on_behalf_of: Option<String>,
}

/// The policies, or a change of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyUpdate {
    /// The revision that it changes; `None`: `put` is everything.
    pub from: Option<Rev>,
    /// The revision that it leads to.
    pub to: Rev,
    /// Roles and bindings that are new or changed.
    pub put: Vec<PolicyObject>,
    /// Those that are gone.
    pub drop: Vec<ObjectRef>,
}

/// A part of the policies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PolicyObject {
    /// A role: names of actions, or `noun.*`, or `*`, or `*.verb`.
    Role {
        /// Which.
        id: ObjectRef,
        /// What it allows.
        actions: Vec<String>,
    },
    /// A role given to a principal or `group:NAME` on an entity and all below it.
    Binding {
        /// Which.
        id: ObjectRef,
        /// To whom.
        to: String,
        /// Which role.
        role: ObjectRef,
        /// Where.
        on: ObjectRef,
    },
}

/// Questions to decide at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub who: Principal,
    /// Which action on which entity.
    pub queries: Vec<(String, ObjectRef)>,
    /// The parents of each entity named, up to the cloud.
    pub parents: BTreeMap<ObjectRef, Vec<ObjectRef>>,
    /// The revision of the policies that must be used, or a newer one.
    pub policy: Rev,
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// Which policy decided, in words.
    pub because: String,
}

/// Decides who may do what.
///
/// # Contract
/// 1. `default-deny`: what no policy allows is denied.
/// 2. `one-decision-per-query`: in the order of the queries.
/// 3. `policy-revision`: a question about a newer revision than was loaded fails with `Conflict`; a change of a revision
///    that is not loaded is answered with `NeedFull`.
/// 4. `load-atomic`: a bad update fails with `Invalid` and the old policies stay.
///
/// Prove yours with `testing::conformance::authorizer`.
#[async_trait]
pub trait Authorizer: Debug + Send + Sync + 'static {
    /// Takes policies, whole or not at all.
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced>;

    /// Decides.
    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>>;
}
