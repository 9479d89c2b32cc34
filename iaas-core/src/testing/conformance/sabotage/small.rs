//! Saboteurs of the traits that own nothing on a host: audit sink, key manager, placement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use bytes::Bytes;

use crate::Result;
use crate::spi::audit::AuditSink;
use crate::spi::contract::SealKey;
use crate::spi::contract::Sealed;
use crate::spi::key::KeyManager;
use crate::spi::key::KeyName;
use crate::spi::key::WrappedKey;
use crate::spi::placement::Fleet;
use crate::spi::placement::PlaceRequest;
use crate::spi::placement::Placed;
use crate::spi::placement::Placement;
use crate::testing::conformance::Saboteur;
use crate::testing::conformance::fakes::FakeAuditRig;
use crate::testing::conformance::fakes::FakeKeysRig;
use crate::testing::conformance::fakes::FakePlacementRig;
use crate::testing::conformance::small::AuditRig;
use crate::testing::conformance::small::KeysRig;
use crate::testing::conformance::small::PlacementRig;

macro_rules! rows {
    ($dyn:ty, $make:expr, $($clause:literal: $does:literal),+ $(,)?) => {
        vec![$(Saboteur::<$dyn> { clause: $clause, does: $does, rig: || Box::new($make($clause)) }),+]
    };
}

/// The saboteurs of an audit sink.
pub fn audit_saboteurs() -> Vec<Saboteur<dyn AuditRig>> {
    rows![dyn AuditRig, |clause| SpoiledAuditRig { clause, inner: FakeAuditRig::default(), extra: Arc::default() },
        "append-idempotent": "takes leaves twice",
        "append-gapless": "takes a batch behind a gap",
    ]
}

/// The saboteurs of a key manager.
pub fn keys_saboteurs() -> Vec<Saboteur<dyn KeysRig>> {
    rows![dyn KeysRig, |clause| SpoiledKeysRig { clause, inner: FakeKeysRig::default() },
        "aad-binds": "binds every key to the same thing",
        "seal-to-one": "seals everything to the first host",
    ]
}

/// The saboteurs of a placement.
pub fn placement_saboteurs() -> Vec<Saboteur<dyn PlacementRig>> {
    rows![dyn PlacementRig, SpoiledPlacementRig,
        "pure": "ranks differently every time",
        "fits": "ranks every host",
        "explains": "gives no reasons",
    ]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- audit sink ---------------------------------------------------------------------------------------------------

struct SpoiledAuditRig {
    clause: &'static str,
    inner: FakeAuditRig,
    extra: Arc<Mutex<Vec<Bytes>>>,
}

#[async_trait]
impl AuditRig for SpoiledAuditRig {
    async fn fresh(&self) -> Result<Arc<dyn AuditSink>> {
        lock(&self.extra).clear();
        let inner = self.inner.fresh().await?;
        Ok(Arc::new(SpoiledSink {
            clause: self.clause,
            inner,
            extra: self.extra.clone(),
            end: AtomicU64::new(0),
        }))
    }
    async fn leaves(&self) -> Result<Vec<Bytes>> {
        let mut leaves = self.inner.leaves().await?;
        leaves.extend(lock(&self.extra).clone());
        Ok(leaves)
    }
}

#[derive(Debug)]
struct SpoiledSink {
    clause: &'static str,
    inner: Arc<dyn AuditSink>,
    extra: Arc<Mutex<Vec<Bytes>>>,
    end: AtomicU64,
}

#[async_trait]
impl AuditSink for SpoiledSink {
    async fn append(&self, first: u64, leaves: &[Bytes], checkpoint: &str) -> Result<()> {
        let end = self.end.fetch_max(first + leaves.len() as u64, Ordering::Relaxed);
        let repeated = first < end && self.clause == "append-idempotent";
        let gap = first > end && self.clause == "append-gapless";
        if repeated || gap {
            lock(&self.extra).extend_from_slice(leaves);
            return Ok(());
        }
        self.inner.append(first, leaves, checkpoint).await
    }
}

// ---- key manager --------------------------------------------------------------------------------------------------

struct SpoiledKeysRig {
    clause: &'static str,
    inner: FakeKeysRig,
}

#[async_trait]
impl KeysRig for SpoiledKeysRig {
    async fn fresh(&self) -> Result<Arc<dyn KeyManager>> {
        let (inner, first) = (self.inner.fresh().await?, self.inner.host(1));
        Ok(Arc::new(SpoiledKeys { clause: self.clause, inner, first }))
    }
    fn key(&self) -> KeyName {
        self.inner.key()
    }
    fn host(&self, number: u8) -> SealKey {
        self.inner.host(number)
    }
    async fn open(&self, sealed: &Sealed, number: u8) -> Result<Vec<u8>> {
        self.inner.open(sealed, number).await
    }
}

#[derive(Debug)]
struct SpoiledKeys {
    clause: &'static str,
    inner: Arc<dyn KeyManager>,
    first: SealKey,
}

impl SpoiledKeys {
    fn aad<'a>(&self, aad: &'a [u8]) -> &'a [u8] {
        if self.clause == "aad-binds" { b"" } else { aad }
    }
}

#[async_trait]
impl KeyManager for SpoiledKeys {
    async fn generate(&self, key: &KeyName, aad: &[u8]) -> Result<WrappedKey> {
        self.inner.generate(key, self.aad(aad)).await
    }
    async fn rewrap(&self, wrapped: &WrappedKey, aad: &[u8]) -> Result<WrappedKey> {
        self.inner.rewrap(wrapped, self.aad(aad)).await
    }
    async fn seal(&self, wrapped: &WrappedKey, aad: &[u8], to: &SealKey) -> Result<Sealed> {
        let to = if self.clause == "seal-to-one" { &self.first } else { to };
        self.inner.seal(wrapped, self.aad(aad), to).await
    }
}

// ---- placement ----------------------------------------------------------------------------------------------------

struct SpoiledPlacementRig(&'static str);

impl PlacementRig for SpoiledPlacementRig {
    fn placement(&self) -> Arc<dyn Placement> {
        let inner = FakePlacementRig.placement();
        Arc::new(SpoiledPlacement { clause: self.0, inner, calls: AtomicU64::new(0) })
    }
}

#[derive(Debug)]
struct SpoiledPlacement {
    clause: &'static str,
    inner: Arc<dyn Placement>,
    calls: AtomicU64,
}

impl Placement for SpoiledPlacement {
    fn rank(&self, want: &PlaceRequest, fleet: &Fleet, seed: u64) -> Placed {
        let mut placed = self.inner.rank(want, fleet, seed);
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match self.clause {
            "pure" if call % 2 == 1 => placed.ranked.reverse(),
            "fits" => {
                let refused: BTreeMap<_, _> = placed.refused.drain(..).collect();
                placed.ranked.extend(refused.keys());
            }
            "explains" => placed.refused.clear(),
            _ => {}
        }
        placed
    }
}
