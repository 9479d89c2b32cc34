//! What the checks share: who calls, fresh ids, and waiting for progress.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use uuid::Uuid;

use super::rig::ConvergeRig;
use super::rig::Rig;
use super::should;
use crate::Epoch;
use crate::Id;
use crate::Rev;
use crate::spi::Call;
use crate::spi::Cancel;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Provider;
use crate::spi::Seen;

/// Our cloud, as the leader with that epoch.
pub(crate) fn ours(epoch: u64) -> Ctx {
    caller(0xa, epoch)
}

/// Another cloud on the same site.
pub(crate) fn theirs(epoch: u64) -> Ctx {
    caller(0xb, epoch)
}

fn caller(cloud: u128, epoch: u64) -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(cloud)),
        incarnation: Uuid::from_u128(cloud << 8),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::from_u128(0x0b)),
        trace: None,
        budget: Duration::from_secs(30),
    };
    Ctx { call, cancel: Cancel::new() }
}

/// A fresh id; later ones are greater.
pub(crate) fn id<K>() -> Id<K> {
    Id::from_uuid(Uuid::now_v7())
}

/// A fresh provider that the leader with epoch 1 has claimed.
pub(crate) async fn fresh<R: Rig + ?Sized>(rig: &R) -> Result<Arc<R::Provider>, String> {
    let provider = should("a fresh provider", rig.fresh().await)?;
    should("the first claim", provider.claim(&ours(1)).await)?;
    Ok(provider)
}

/// A restart.
pub(crate) async fn reopen<R: Rig + ?Sized>(
    rig: &R,
    old: Arc<R::Provider>,
) -> Result<Arc<R::Provider>, String> {
    should("a reopen", rig.reopen(old).await)
}

/// An object that is there and settled.
pub(crate) async fn make<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
    number: u32,
    rev: Rev,
) -> Result<Id<K>, String> {
    let (id, spec) = (id(), rig.spec(number));
    put(rig, provider, cx, id, rev, &spec).await?;
    Ok(id)
}

/// Ensures, and waits until it has settled.
pub(crate) async fn put<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
    id: Id<K>,
    rev: Rev,
    spec: &K::Spec,
) -> Result<Seen<K>, String> {
    should("ensure", provider.ensure(cx, id, rev, spec).await)?;
    should("what it needs from outside", rig.drive(provider, cx, id, spec).await)?;
    until(rig, provider, cx, id, "settle", |seen| seen.phase == Phase::Settled).await
}

/// Polls until the object `is` as it must become.
pub(crate) async fn until<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
    id: Id<K>,
    what: &str,
    is: impl Fn(&Seen<K>) -> bool + Send,
) -> Result<Seen<K>, String> {
    let patience = Patience::new(rig.patience());
    loop {
        let seen = should("observe", provider.observe(cx, id).await)?;
        let seen = seen.ok_or_else(|| format!("the {} was to {what} and is not there", K::NAME))?;
        if is(&seen) {
            return Ok(seen);
        }
        patience.wait(|| format!("the {} did not {what}; it is {seen:?}", K::NAME)).await?;
    }
}

/// Polls until nothing is left, and looks behind the provider whether that is true.
pub(crate) async fn gone<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
    id: Id<K>,
) -> Result<(), String> {
    let patience = Patience::new(rig.patience());
    while let Some(seen) = should("observe", provider.observe(cx, id).await)? {
        patience.wait(|| format!("the {} did not go; it is {seen:?}", K::NAME)).await?;
    }
    absent(rig, provider, cx, id).await
}

/// Fails if anything of `id` exists.
pub(crate) async fn absent<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
    cx: &Ctx,
    id: Id<K>,
) -> Result<(), String> {
    let seen = should("observe", provider.observe(cx, id).await)?;
    if seen.is_some() {
        return Err(format!("observe still sees {seen:?}"));
    }
    let listed = should("inventory", provider.inventory(cx, None, 1000).await)?;
    if listed.iter().any(|f| f.id == id) {
        return Err(format!("inventory still lists the {}", K::NAME));
    }
    let world = should("a look at the world", rig.world().await)?;
    if world.is_some_and(|world| world.contains(&id.object())) {
        return Err(format!("the provider says that the {} is gone, and it still exists", K::NAME));
    }
    Ok(())
}

/// How many objects of kind `K` exist; by the provider's own list if there are no other eyes.
pub(crate) async fn count<K: Kind, R: ConvergeRig<K> + ?Sized>(
    rig: &R,
    provider: &R::Provider,
) -> Result<usize, String> {
    if let Some(world) = should("a look at the world", rig.world().await)? {
        return Ok(world.iter().filter(|o| o.kind == K::NAME).count());
    }
    Ok(should("inventory", provider.inventory(&ours(1), None, 1000).await)?.len())
}

/// A bounded wait for something that must happen.
pub(crate) struct Patience {
    until: Instant,
    span: Duration,
}

impl Patience {
    pub(crate) fn new(span: Duration) -> Self {
        Self { until: Instant::now() + span, span }
    }

    /// Waits a little, or fails with what did not happen.
    pub(crate) async fn wait(&self, what: impl FnOnce() -> String) -> Result<(), String> {
        if Instant::now() >= self.until {
            return Err(format!("{} within {:?}", what(), self.span));
        }
        tokio::time::sleep(STEP).await;
        Ok(())
    }
}

/// Between two looks.
const STEP: Duration = Duration::from_millis(5);
