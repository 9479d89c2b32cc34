//! What a suite needs to know about an implementation: how to make one, restart it, look behind it and break it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;

use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Kind;
use crate::spi::Provider;
use crate::testing::fake::Fault;

/// An implementation under test.
///
/// What you cannot do (`break_next`, `slow`, `world` …) you may leave at its default; the checks then see less.
#[async_trait]
pub trait Rig: Send + Sync + 'static {
    /// The trait object that the suite calls, as `dyn Hypervisor`.
    type Provider: ?Sized + Provider;

    /// A new provider on a site where nothing exists.
    async fn fresh(&self) -> Result<Arc<Self::Provider>>;

    /// As after a restart of the process: `old` goes, and a provider is opened on what it left.
    async fn reopen(&self, old: Arc<Self::Provider>) -> Result<Arc<Self::Provider>>;

    /// Any call that changes something and succeeds, unless the fence refuses it.
    async fn change(&self, provider: &Self::Provider, cx: &Ctx) -> Result<()>;

    /// What exists on the site of the newest provider, of every owner, found without asking the provider.
    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        Ok(None)
    }

    /// Something that is different after each effect.
    async fn fingerprint(&self) -> Result<Option<String>> {
        Ok(self.world().await?.map(|world| format!("{world:?}")))
    }

    /// Lets each changing call take `delay` before its effect; says whether that is possible.
    fn slow(&self, _delay: Duration) -> bool {
        false
    }

    /// Lets the next effect go wrong; says whether that is possible.
    fn break_next(&self, _fault: Fault) -> bool {
        false
    }

    /// How long something may take that must happen.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }
}

/// An implementation that makes objects of kind `K`.
#[async_trait]
pub trait ConvergeRig<K: Kind>: Rig<Provider: Converge<K>> {
    /// A good spec; different numbers give specs that do not exclude each other.
    fn spec(&self, number: u32) -> K::Spec;

    /// Specs that can never be met.
    fn bad(&self) -> Vec<K::Spec>;

    /// Does what an object needs from outside before and after `ensure`, until it can settle.
    async fn drive(&self, _provider: &Self::Provider, _cx: &Ctx, _id: Id<K>, _spec: &K::Spec) -> Result<()> {
        Ok(())
    }

    /// Puts a thing there that nobody has tagged; says whether that is possible.
    async fn plant(&self, _id: Id<K>) -> Result<bool> {
        Ok(false)
    }
}

/// Puts something between the suite and the provider: a saboteur, or a wire.
#[async_trait]
pub trait Wrap<P: ?Sized>: Send + Sync + 'static {
    /// Wraps `inner`. Called for each fresh provider and again, with `reopened`, after each restart.
    async fn wrap(&self, inner: Arc<P>, reopened: bool) -> Result<Arc<P>>;
}

/// A rig whose providers are wrapped by `W`; everything else is the inner rig's.
#[derive(Debug)]
pub struct Wrapped<R: Rig, W> {
    pub(crate) inner: R,
    pub(crate) by: W,
    current: Current<R::Provider>,
}

impl<R: Rig, W> Wrapped<R, W> {
    /// Wraps the providers of `inner` by `by`.
    pub fn new(inner: R, by: W) -> Self {
        Self { inner, by, current: Current::default() }
    }
}

#[async_trait]
impl<R: Rig, W: Wrap<R::Provider>> Rig for Wrapped<R, W> {
    type Provider = R::Provider;

    async fn fresh(&self) -> Result<Arc<R::Provider>> {
        let inner = self.inner.fresh().await?;
        self.current.keep(&inner);
        self.by.wrap(inner, false).await
    }

    async fn reopen(&self, old: Arc<R::Provider>) -> Result<Arc<R::Provider>> {
        drop(old);
        let inner = self.inner.reopen(self.current.take().await?).await?;
        self.current.keep(&inner);
        self.by.wrap(inner, true).await
    }

    async fn change(&self, provider: &R::Provider, cx: &Ctx) -> Result<()> {
        self.inner.change(provider, cx).await
    }
    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        self.inner.world().await
    }
    async fn fingerprint(&self) -> Result<Option<String>> {
        self.inner.fingerprint().await
    }
    fn slow(&self, delay: Duration) -> bool {
        self.inner.slow(delay)
    }
    fn break_next(&self, fault: Fault) -> bool {
        self.inner.break_next(fault)
    }
    fn patience(&self) -> Duration {
        self.inner.patience()
    }
}

#[async_trait]
impl<K: Kind, R: ConvergeRig<K>, W: Wrap<R::Provider>> ConvergeRig<K> for Wrapped<R, W> {
    fn spec(&self, number: u32) -> K::Spec {
        self.inner.spec(number)
    }
    fn bad(&self) -> Vec<K::Spec> {
        self.inner.bad()
    }
    async fn drive(&self, provider: &R::Provider, cx: &Ctx, id: Id<K>, spec: &K::Spec) -> Result<()> {
        self.inner.drive(provider, cx, id, spec).await
    }
    async fn plant(&self, id: Id<K>) -> Result<bool> {
        self.inner.plant(id).await
    }
}

/// The inner rig's newest provider, which that rig wants back as the only one who holds it.
#[derive(Debug)]
pub(crate) struct Current<P: ?Sized>(Mutex<Option<(Arc<P>, usize)>>);

impl<P: ?Sized> Default for Current<P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<P: ?Sized> Current<P> {
    /// Keeps what is about to be wrapped, and how many will hold it once whatever wraps it has gone.
    pub(crate) fn keep(&self, inner: &Arc<P>) {
        // The caller's handle goes into the wrap; in its place comes the one that is kept here.
        let holders = Arc::strong_count(inner);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((inner.clone(), holders));
    }

    /// The provider, once whatever wrapped it has let go: a session ends, and its last call, after its client has gone.
    ///
    /// # Errors
    /// `Conflict` if nothing was kept, or if somebody still holds it.
    pub(crate) async fn take(&self) -> Result<Arc<P>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (inner, holders) = kept.ok_or_else(|| Error::conflict("reopened before it was fresh"))?;
        for _ in 0..LETTING_GO.as_millis() {
            if Arc::strong_count(&inner) <= holders {
                return Ok(inner);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Err(Error::conflict("the old provider is still held").remedy("drop every handle before the restart"))
    }
}

/// How long a wrapped provider may be held after its wrap was dropped.
const LETTING_GO: Duration = Duration::from_secs(30);
