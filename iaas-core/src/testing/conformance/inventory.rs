//! The contract of [`HostInventory`].

use std::time::Duration;

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::fresh;
use super::calls::ours;
use super::demand;
use super::provider;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use crate::Result;
use crate::spi::Stamp;
use crate::spi::host::HostFacts;
use crate::spi::host::HostInventory;

/// An inventory under test.
#[async_trait]
pub trait InventoryRig: Rig<Provider = dyn HostInventory> {
    /// The host's clocks at this moment.
    async fn stamp(&self) -> Result<Stamp>;
}

#[async_trait]
impl<R: InventoryRig, W: Wrap<dyn HostInventory>> InventoryRig for Wrapped<R, W> {
    async fn stamp(&self) -> Result<Stamp> {
        self.inner.stamp().await
    }
}

/// The checks, in the order of the contracts. A lease has no effect that outlives it, so nothing drains.
pub fn suite() -> Vec<Check<dyn InventoryRig>> {
    let mut all = provider::checks::<dyn InventoryRig>();
    all.retain(|check| check.clause != "claim-drains");
    all.extend([
        Check::<dyn InventoryRig> {
            clause: "facts-absent-not-zero",
            run: |rig| Box::pin(absent_not_zero(rig)),
        },
        Check { clause: "lease-answers-host-time", run: |rig| Box::pin(lease_answers_host_time(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl InventoryRig) -> Report {
    super::run::<dyn InventoryRig>("inventory", &suite(), rig).await
}

type Rigged<'a> = &'a dyn InventoryRig;

async fn absent_not_zero(rig: Rigged<'_>) -> Verdict {
    let inventory = fresh(rig).await?;
    let facts = should("facts", inventory.facts(&ours(1)).await)?;
    let zero = zeroes(&facts);
    demand!(zero.is_empty(), "these are said to be zero, which no machine has: {}", zero.join(", "));
    Ok(())
}

/// The facts that are said to be zero, and cannot be.
fn zeroes(facts: &HostFacts) -> Vec<String> {
    let cpu = facts.cpu.clone().unwrap_or_default();
    let threads = facts.cpu.as_ref().map(|c| u64::from(c.threads));
    let wide = |n: Option<u32>| n.map(u64::from);
    let mut all: Vec<(String, Option<u64>)> = vec![
        ("memory".into(), facts.memory),
        ("threads".into(), threads),
        ("cores".into(), wide(cpu.cores)),
        ("sockets".into(), wide(cpu.sockets)),
        ("nodes".into(), wide(cpu.nodes)),
    ];
    all.extend(facts.disks.iter().map(|d| (format!("size of {}", d.name), d.size)));
    all.extend(facts.nics.iter().map(|n| (format!("speed of {}", n.name), wide(n.speed))));
    all.into_iter().filter(|(_, n)| *n == Some(0)).map(|(name, _)| name).collect()
}

async fn lease_answers_host_time(rig: Rigged<'_>) -> Verdict {
    let inventory = fresh(rig).await?;
    for _ in 0..2 {
        let before = should("the host's clock", rig.stamp().await)?;
        let lease = should("lease", inventory.lease(&ours(1), Duration::from_secs(5)).await)?;
        let after = should("the host's clock", rig.stamp().await)?;
        demand!(lease.boot_id == before.boot_id, "the lease is of the boot {}", lease.boot_id);
        let between = before.mono_ns <= lease.mono_ns && lease.mono_ns <= after.mono_ns;
        demand!(
            between,
            "the lease is of {}, not from {} to {}",
            lease.mono_ns,
            before.mono_ns,
            after.mono_ns
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
