//! The operator's machines: regions, zones, hosts.

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::record::Empty;
use super::record::resource;
use crate::Id;
use crate::spi::host::HostFacts;

resource!(
    /// A place with its own control plane.
    Region, "region", Empty, Empty, Empty
);
resource!(
    /// A part of a region that fails as one.
    Zone, "zone", ZoneSpec, Empty, Empty
);
resource!(
    /// A machine that runs instances.
    Host, "host", HostSpec, Empty, HostStatus
);

/// A zone's wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZoneSpec {
    /// The region.
    pub region: Id<Region>,
}

/// A host's wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSpec {
    /// The zone.
    pub zone: Id<Zone>,
    /// Takes nothing new.
    #[serde(default)]
    pub cordoned: bool,
    /// Virtual CPUs to give out.
    pub vcpus: u32,
    /// Bytes of memory to give out.
    pub memory: u64,
}

/// A host as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// What it is made of.
    pub facts: Option<HostFacts>,
    /// Since when it does not answer.
    pub silent_since: Option<Timestamp>,
}
