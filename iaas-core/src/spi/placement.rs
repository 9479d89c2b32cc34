//! Where an instance goes: pure, so that it can be measured and replayed.

use std::collections::BTreeSet;
use std::fmt::Debug;

use serde::Deserialize;
use serde::Serialize;

use crate::Id;
use crate::id::Pool;
use crate::model::Host;
use crate::model::Zone;

/// What is to be placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceRequest {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Only in this zone, if named.
    pub zone: Option<Id<Zone>>,
    /// The pools that the host must reach.
    pub pools: BTreeSet<Id<Pool>>,
}

/// A host that may take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Which.
    pub id: Id<Host>,
    /// Where.
    pub zone: Id<Zone>,
    /// Takes nothing new.
    pub cordoned: bool,
    /// Virtual CPUs not given out.
    pub free_vcpus: u32,
    /// Bytes of memory not given out.
    pub free_memory: u64,
    /// The pools that it reaches.
    pub pools: BTreeSet<Id<Pool>>,
}

/// All hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    /// In order of id.
    pub hosts: Vec<Candidate>,
}

/// Hosts that fit, best first, and why others do not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// Best first.
    pub ranked: Vec<Id<Host>>,
    /// Why not, per host that does not fit.
    pub refused: Vec<(Id<Host>, String)>,
}

/// Ranks hosts.
///
/// # Contract
/// 1. `pure`: the same request, fleet and seed give the same answer.
/// 2. `fits`: a ranked host has room, is not cordoned, and reaches the pools.
/// 3. `explains`: a host that is not ranked is refused with a reason.
///
/// Prove yours with `testing::conformance::small` (feature `conformance`).
pub trait Placement: Debug + Send + Sync + 'static {
    /// Ranks the hosts of `fleet` for `want`.
    fn rank(&self, want: &PlaceRequest, fleet: &Fleet, seed: u64) -> Placed;
}
