//! Tenants: organizations, projects, what they may use and what it costs.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::record::Empty;
use super::record::resource;
use crate::Id;
use crate::unit::DecimalText;

resource!(
    /// A tenant.
    Organization, "organization", Empty, Empty, Empty
);
resource!(
    /// A part of a tenant that owns resources and gets a bill.
    Project, "project", ProjectSpec, Empty, Empty
);
resource!(
    /// Limits of a project. Without one, nothing is limited.
    Quota, "quota", QuotaSpec, Empty, Empty
);
resource!(
    /// Prices that hold from a moment on.
    PriceBook, "price-book", PriceBookSpec, Empty, Empty
);

/// A project's wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectSpec {
    /// The tenant.
    pub organization: Id<Organization>,
}

/// The names of limits.
pub mod limit {
    /// Instances.
    pub const INSTANCES: &str = "instances";
    /// Virtual CPUs of instances, running or not.
    pub const VCPUS: &str = "vcpus";
    /// Bytes of memory of instances.
    pub const MEMORY: &str = "memory-bytes";
    /// Volumes.
    pub const VOLUMES: &str = "volumes";
    /// Bytes of volumes.
    pub const VOLUME_BYTES: &str = "volume-bytes";
    /// Networks.
    pub const NETWORKS: &str = "networks";
    /// Subnets.
    pub const SUBNETS: &str = "subnets";
    /// Ports.
    pub const PORTS: &str = "ports";
    /// Security groups.
    pub const SECURITY_GROUPS: &str = "security-groups";
    /// All of them.
    pub const ALL: [&str; 9] =
        [INSTANCES, VCPUS, MEMORY, VOLUMES, VOLUME_BYTES, NETWORKS, SUBNETS, PORTS, SECURITY_GROUPS];
}

/// Limits by name ([`limit`]); a name that is missing is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaSpec {
    /// The limits.
    pub limits: BTreeMap<String, u64>,
}

/// Prices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceBookSpec {
    /// ISO 4217 code, three capital letters.
    pub currency: String,
    /// The first moment at which they hold.
    pub from: Timestamp,
    /// One per meter.
    pub prices: BTreeMap<String, Price>,
}

/// The price of one meter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    /// What one unit costs.
    pub amount: DecimalText,
    /// The unit that the meter's quantity is converted to.
    pub unit: Unit,
}

/// The unit of a price.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// The meter's own: vCPU-seconds, byte-seconds, bytes, items.
    One,
    /// 3600 of them: vCPU-hours.
    Hour,
    /// 2³⁰ of them: GiB.
    Gib,
    /// 2³⁰ × 3600 of them: GiB-hours.
    GibHour,
}
