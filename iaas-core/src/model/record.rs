//! The record: `meta` and three parts, each written by one hand only.

use std::collections::BTreeMap;
use std::fmt::Debug;

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::Operation;
use super::Organization;
use super::Project;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::Rev;
use crate::spi::Value;

/// A type of resource.
pub trait Resource: Entity + Sized + Clone + Debug + PartialEq + Send + Sync {
    /// What the user wants; only calls write it.
    type Spec: Value;
    /// What we decided: host, addresses, writer; written only together with an intent.
    type Bind: Value + Default;
    /// What was observed; only the reconciler writes it.
    type Status: Value + Default;
}

/// A resource as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Record<R: Resource> {
    /// Identity, owner, versions.
    pub meta: Meta<R>,
    /// The wish.
    pub spec: R::Spec,
    /// The decisions.
    #[serde(default)]
    pub bind: R::Bind,
    /// The observation.
    #[serde(default)]
    pub status: R::Status,
}

/// What every record has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Meta<R: Resource> {
    /// Its id.
    pub id: Id<R>,
    /// Whose it is.
    pub owner: Owner,
    /// Unique among the owner's resources of its type.
    pub name: Name,
    /// Free labels.
    #[serde(default)]
    pub labels: Labels,
    /// When the intent was committed.
    pub created: Timestamp,
    /// The commit that changed the record last: its etag. Filled in when the record is read.
    #[serde(skip)]
    pub version: Rev,
    /// The commit of the last change that providers must see.
    #[serde(default)]
    pub effect: Rev,
    /// Set when the record shall go: the operation that removes it.
    #[serde(default)]
    pub absent: Option<Id<Operation>>,
    /// Why it does not converge, as long as it does not.
    #[serde(default)]
    pub trouble: Option<Trouble>,
    /// The version of this record's schema.
    #[serde(default)]
    pub schema: u16,
}

/// Whose a resource is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Owner {
    /// The operator's.
    Cloud,
    /// An organization's.
    Organization(Id<Organization>),
    /// A project's.
    Project(Id<Project>),
}

impl From<Id<Project>> for Owner {
    fn from(id: Id<Project>) -> Self {
        Self::Project(id)
    }
}

impl From<Id<Organization>> for Owner {
    fn from(id: Id<Organization>) -> Self {
        Self::Organization(id)
    }
}

impl Owner {
    /// The project, if it is one's.
    pub fn project(self) -> Option<Id<Project>> {
        match self {
            Self::Project(id) => Some(id),
            Self::Cloud | Self::Organization(_) => None,
        }
    }
}

/// Why a record does not converge; it is retried for ever and can always be deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Since when.
    pub since: Timestamp,
    /// Attempts so far.
    pub attempts: u32,
    /// When the next one is due.
    pub next_try: Timestamp,
    /// What the last one said.
    pub reason: Error,
}

/// What a record counts for in quotas and capacity, by the name of the limit.
///
/// Held until the commit that deletes the record; the leader's ledgers are sums of these, never stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Charge(pub BTreeMap<String, u64>);

/// A part that a resource does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Declares a resource.
macro_rules! resource {
    ($(#[$doc:meta])* $name:ident, $noun:literal, $spec:ty, $bind:ty, $status:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {}
        impl $crate::Entity for $name {
            const NAME: &'static str = $noun;
        }
        impl $crate::model::Resource for $name {
            type Spec = $spec;
            type Bind = $bind;
            type Status = $status;
        }
    };
}
pub(crate) use resource;
