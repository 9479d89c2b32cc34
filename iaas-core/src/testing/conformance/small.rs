//! The contracts of [`AuditSink`], [`KeyManager`] and [`Placement`].

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::Check;
use super::Report;
use super::Verdict;
use super::demand;
use super::should;
use super::should_fail;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::spi::audit::AuditSink;
use crate::spi::contract::SealKey;
use crate::spi::contract::Sealed;
use crate::spi::key::KeyManager;
use crate::spi::key::KeyName;
use crate::spi::placement::Candidate;
use crate::spi::placement::Fleet;
use crate::spi::placement::PlaceRequest;
use crate::spi::placement::Placement;

/// An audit sink under test.
#[async_trait]
pub trait AuditRig: Send + Sync + 'static {
    /// A new, empty one.
    async fn fresh(&self) -> Result<Arc<dyn AuditSink>>;

    /// The leaves that the newest one has taken.
    async fn leaves(&self) -> Result<Vec<Bytes>>;
}

/// The checks of an audit sink, in the order of the contract.
pub fn audit_suite() -> Vec<Check<dyn AuditRig>> {
    vec![
        Check::<dyn AuditRig> { clause: "append-idempotent", run: |rig| Box::pin(append_idempotent(rig)) },
        Check { clause: "append-gapless", run: |rig| Box::pin(append_gapless(rig)) },
    ]
}

/// Runs the suite of an audit sink.
pub async fn run_audit(rig: &impl AuditRig) -> Report {
    super::run::<dyn AuditRig>("audit sink", &audit_suite(), rig).await
}

fn leaves(range: std::ops::Range<u32>) -> Vec<Bytes> {
    range.map(|n| Bytes::from(format!("leaf {n}"))).collect()
}

async fn append_idempotent(rig: &dyn AuditRig) -> Verdict {
    let sink = should("a fresh sink", rig.fresh().await)?;
    for (first, range) in [(0, 0..3), (0, 0..3), (1, 1..5), (5, 5..6)] {
        should("append", sink.append(first, &leaves(range), "checkpoint").await)?;
    }
    let taken = should("a look at the copy", rig.leaves().await)?;
    demand!(taken == leaves(0..6), "six leaves were sent, some twice, and it has {taken:?}");
    Ok(())
}

async fn append_gapless(rig: &dyn AuditRig) -> Verdict {
    let sink = should("a fresh sink", rig.fresh().await)?;
    should("append", sink.append(0, &leaves(0..2), "checkpoint").await)?;
    let gap = sink.append(3, &leaves(3..4), "checkpoint").await;
    should_fail("a batch behind a gap", ErrorKind::Conflict, gap)?;
    let taken = should("a look at the copy", rig.leaves().await)?;
    demand!(taken == leaves(0..2), "a refused batch left {taken:?}");
    Ok(())
}

/// A key manager under test.
#[async_trait]
pub trait KeysRig: Send + Sync + 'static {
    /// A new one, with a key of the name that [`key`](Self::key) says.
    async fn fresh(&self) -> Result<Arc<dyn KeyManager>>;

    /// The name of a key that wraps others.
    fn key(&self) -> KeyName;

    /// The public key of host `number`.
    fn host(&self, number: u8) -> SealKey;

    /// Opens a secret as host `number` would.
    async fn open(&self, sealed: &Sealed, number: u8) -> Result<Vec<u8>>;
}

/// The checks of a key manager, in the order of the contract.
pub fn keys_suite() -> Vec<Check<dyn KeysRig>> {
    vec![
        Check::<dyn KeysRig> { clause: "aad-binds", run: |rig| Box::pin(aad_binds(rig)) },
        Check { clause: "seal-to-one", run: |rig| Box::pin(seal_to_one(rig)) },
    ]
}

/// Runs the suite of a key manager.
pub async fn run_keys(rig: &impl KeysRig) -> Report {
    super::run::<dyn KeysRig>("key manager", &keys_suite(), rig).await
}

async fn aad_binds(rig: &dyn KeysRig) -> Verdict {
    let keys = should("a fresh key manager", rig.fresh().await)?;
    let wrapped = should("generate", keys.generate(&rig.key(), b"volume 1").await)?;
    should("seal", keys.seal(&wrapped, b"volume 1", &rig.host(1)).await)?;
    let sealed = keys.seal(&wrapped, b"volume 2", &rig.host(1)).await;
    demand!(sealed.is_err(), "a key of volume 1 was sealed as one of volume 2");
    let rewrapped = keys.rewrap(&wrapped, b"volume 2").await;
    demand!(rewrapped.is_err(), "a key of volume 1 was wrapped anew as one of volume 2");
    Ok(())
}

async fn seal_to_one(rig: &dyn KeysRig) -> Verdict {
    let keys = should("a fresh key manager", rig.fresh().await)?;
    let wrapped = should("generate", keys.generate(&rig.key(), b"volume 1").await)?;
    let sealed = should("seal", keys.seal(&wrapped, b"volume 1", &rig.host(1)).await)?;
    let key = should("opening it on its host", rig.open(&sealed, 1).await)?;
    demand!(key.len() >= 16, "the data key has only {} bytes", key.len());
    demand!(rig.open(&sealed, 2).await.is_err(), "another host opened it");
    let again = should("rewrap", keys.rewrap(&wrapped, b"volume 1").await)?;
    let sealed = should("seal", keys.seal(&again, b"volume 1", &rig.host(2)).await)?;
    demand!(should("opening", rig.open(&sealed, 2).await)? == key, "wrapping anew changed the data key");
    let other = should("generate", keys.generate(&rig.key(), b"volume 1").await)?;
    let sealed = should("seal", keys.seal(&other, b"volume 1", &rig.host(1)).await)?;
    demand!(should("opening", rig.open(&sealed, 1).await)? != key, "two data keys are the same");
    Ok(())
}

/// A placement under test.
pub trait PlacementRig: Send + Sync + 'static {
    /// The placement.
    fn placement(&self) -> Arc<dyn Placement>;
}

/// The checks of a placement, in the order of the contract.
pub fn placement_suite() -> Vec<Check<dyn PlacementRig>> {
    vec![
        Check::<dyn PlacementRig> { clause: "pure", run: |rig| Box::pin(async { pure(rig) }) },
        Check { clause: "fits", run: |rig| Box::pin(async { fits(rig) }) },
        Check { clause: "explains", run: |rig| Box::pin(async { explains(rig) }) },
    ]
}

/// Runs the suite of a placement.
pub async fn run_placement(rig: &impl PlacementRig) -> Report {
    super::run::<dyn PlacementRig>("placement", &placement_suite(), rig).await
}

fn id<K>(number: u32) -> Id<K> {
    Id::from_uuid(Uuid::from_u128(number.into()))
}

/// Hosts of every sort: small, cordoned, elsewhere, without the pool.
fn fleet() -> Fleet {
    let host = |number: u32| Candidate {
        id: id(number),
        zone: id(1 + number % 2),
        cordoned: number.is_multiple_of(7),
        free_vcpus: number % 5 * 2,
        free_memory: u64::from(number % 3) << 30,
        pools: (0..number % 4).map(id).collect(),
    };
    Fleet { hosts: (1..=60).map(host).collect() }
}

fn request() -> PlaceRequest {
    PlaceRequest { vcpus: 4, memory: 1 << 30, zone: Some(id(1)), pools: BTreeSet::from([id(0), id(1)]) }
}

fn suits(want: &PlaceRequest, host: &Candidate) -> bool {
    !host.cordoned
        && want.zone.is_none_or(|zone| zone == host.zone)
        && host.free_vcpus >= want.vcpus
        && host.free_memory >= want.memory
        && want.pools.is_subset(&host.pools)
}

fn pure(rig: &dyn PlacementRig) -> Verdict {
    let placement = rig.placement();
    for seed in 0..4 {
        let first = placement.rank(&request(), &fleet(), seed);
        let second = placement.rank(&request(), &fleet(), seed);
        demand!(first == second, "seed {seed} gives {first:?} and {second:?}");
    }
    Ok(())
}

fn fits(rig: &dyn PlacementRig) -> Verdict {
    let (fleet, want) = (fleet(), request());
    let placed = rig.placement().rank(&want, &fleet, 1);
    demand!(!placed.ranked.is_empty(), "some hosts fit, and none is ranked");
    for id in &placed.ranked {
        let host = fleet.hosts.iter().find(|h| h.id == *id);
        demand!(host.is_some_and(|h| suits(&want, h)), "it ranks a host that does not fit: {host:?}");
    }
    Ok(())
}

fn explains(rig: &dyn PlacementRig) -> Verdict {
    let fleet = fleet();
    let placed = rig.placement().rank(&request(), &fleet, 1);
    for host in &fleet.hosts {
        let why = placed.refused.iter().find(|(id, _)| *id == host.id);
        let ranked = placed.ranked.contains(&host.id);
        let reason = why.is_some_and(|(_, why)| !why.is_empty());
        demand!(ranked != reason, "{host:?} is ranked: {ranked}, refused with a reason: {reason}");
    }
    Ok(())
}
