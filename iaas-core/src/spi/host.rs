//! One host: what it is made of, and the providers that act on it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;

use super::Ctx;
use super::Provider;
use super::Stamp;
use super::artifact::Artifacts;
use super::block::VolumeAccess;
use super::hypervisor::Hypervisor;
use super::network::Plugs;
use crate::Id;
use crate::Result;
use crate::id::Fabric;
use crate::id::Pool;
use crate::model;

/// What a machine is made of. `None` means that it is not known, which is not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The host's own name.
    pub hostname: Option<String>,
    /// The kernel's release.
    pub kernel: Option<String>,
    /// The CPUs.
    pub cpu: Option<CpuFacts>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of memory that could be given out now.
    pub memory_available: Option<u64>,
    /// Disks.
    pub disks: Vec<DiskFacts>,
    /// Network interfaces of hardware or of the machine's hypervisor.
    pub nics: Vec<NicFacts>,
    /// How VMs can run here, and if not at full speed, why and what to do.
    pub virtualization: Option<String>,
}

/// The CPUs of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// The model's name.
    pub model: Option<String>,
    /// Hardware threads that are online.
    pub threads: u32,
    /// Cores.
    pub cores: Option<u32>,
    /// Packages.
    pub sockets: Option<u32>,
    /// NUMA nodes.
    pub nodes: Option<u32>,
}

/// A disk of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// The kernel's name for it.
    pub name: String,
    /// Bytes.
    pub size: Option<u64>,
    /// Whether it turns.
    pub rotational: Option<bool>,
    /// The model.
    pub model: Option<String>,
}

/// A network interface of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicFacts {
    /// The kernel's name for it.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Option<String>,
    /// Megabits a second.
    pub speed: Option<u32>,
    /// Whether a carrier is seen.
    pub up: Option<bool>,
}

/// Knows what a host is made of and keeps its lease.
///
/// # Contract
/// The clauses of [`Provider`], and:
/// 1. `facts-absent-not-zero`: what could not be read is `None` or missing, never zero.
/// 2. `lease-answers-host-time`: [`lease`](Self::lease) answers the host's clocks at the moment it was taken.
///
/// Prove yours with `testing::conformance::inventory` (feature `conformance`).
#[async_trait]
pub trait HostInventory: Provider {
    /// Reads the machine.
    async fn facts(&self, cx: &Ctx) -> Result<HostFacts>;

    /// Renews the host's lease for `ttl`.
    async fn lease(&self, cx: &Ctx, ttl: Duration) -> Result<Stamp>;
}

/// Turns a host's power on and off, through its management controller.
#[async_trait]
pub trait Power: Provider {
    /// Whether `host` has power.
    async fn is_on(&self, cx: &Ctx, host: Id<model::Host>) -> Result<bool>;

    /// Turns the power of `host` on or off.
    async fn set(&self, cx: &Ctx, host: Id<model::Host>, on: bool) -> Result<()>;
}

/// The providers of one host.
#[derive(Clone, Debug)]
pub struct HostProviders {
    /// Which host.
    pub id: Id<model::Host>,
    /// What it is made of.
    pub inventory: Arc<dyn HostInventory>,
    /// Its VMs.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Its kernels and initrds.
    pub artifacts: Arc<dyn Artifacts>,
    /// The pools that it reaches.
    pub access: BTreeMap<Id<Pool>, Arc<dyn VolumeAccess>>,
    /// Its ports.
    pub plugs: Arc<dyn Plugs>,
    /// The fabric that it is part of.
    pub fabric: Id<Fabric>,
    /// Its power, if we can turn it.
    pub power: Option<Arc<dyn Power>>,
}
