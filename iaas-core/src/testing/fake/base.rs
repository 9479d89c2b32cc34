//! What every fake provider has: its site, its fence, and the way in for calls.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;

use tokio::sync::RwLock;
use tokio::sync::RwLockReadGuard;
use tokio::sync::broadcast;
use uuid::Uuid;

use super::world::World;
use super::world::lock;
use crate::Epoch;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::Call;
use crate::spi::Ctx;
use crate::spi::Feed;
use crate::spi::Hello;
use crate::spi::Site;
use crate::spi::base::Leaders;

/// The protocols that the fakes speak.
const PROTOCOL: (u16, u16) = (1, 1);

/// A provider's handle on its site.
#[derive(Clone, Debug)]
pub(super) struct Base {
    pub(super) world: World,
    pub(super) site: Site,
    pub(super) fence: Arc<Fence>,
    product: String,
    kinds: BTreeSet<String>,
    caps: BTreeSet<String>,
}

impl Base {
    pub(super) fn new(world: &World, site: Site, name: &str, fence: Arc<Fence>) -> Self {
        let product = format!("iaas-core fake {name}");
        Self { world: world.clone(), site, fence, product, kinds: BTreeSet::new(), caps: BTreeSet::new() }
    }

    pub(super) fn with_kind(mut self, kind: &str) -> Self {
        self.kinds.insert(kind.to_owned());
        self
    }

    pub(super) fn with_caps(mut self, caps: &[&str]) -> Self {
        self.caps.extend(caps.iter().map(|&c| c.to_owned()));
        self
    }

    pub(super) async fn hello(&self) -> Result<Hello> {
        self.world.alive().await;
        Ok(self.card(lock(&self.fence.seen).newest()))
    }

    pub(super) async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.world.alive().await;
        // Calls hold the gate shared while they act; having it alone means that all of them have ended.
        let _alone = self.fence.gate.write().await;
        let mut seen = lock(&self.fence.seen);
        seen.claim(&cx.call)?;
        Ok(self.card(seen.newest()))
    }

    /// Lets a changing call in: the epoch is checked, and stays as it is until the guard is dropped.
    pub(super) async fn enter(&self, cx: &Ctx) -> Result<RwLockReadGuard<'_, ()>> {
        self.world.alive().await;
        let inside = self.fence.gate.read().await;
        lock(&self.fence.seen).admit(&cx.call)?;
        self.world.linger(cx).await?;
        Ok(inside)
    }

    pub(super) async fn changes(&self) -> Result<Feed<ObjectRef>> {
        self.world.alive().await;
        Ok(crate::spi::base::changes(&self.fence.changed))
    }

    /// Wakes those who listen.
    pub(super) fn wake(&self, object: ObjectRef) {
        // Nobody listening is fine.
        let _ = self.fence.changed.send(object);
    }

    fn card(&self, newest: Option<(Uuid, Epoch, Rev)>) -> Hello {
        Hello {
            product: self.product.clone(),
            protocol: PROTOCOL,
            site: self.site,
            install: self.fence.install,
            newest,
            seal_to: None,
            kinds: self.kinds.clone(),
            caps: self.caps.clone(),
        }
    }
}

/// What a site remembers about its leaders, whatever becomes of its provider.
#[derive(Debug)]
pub(super) struct Fence {
    install: Uuid,
    gate: RwLock<()>,
    seen: Mutex<Leaders>,
    changed: broadcast::Sender<ObjectRef>,
}

impl Fence {
    pub(super) fn new(world: &World) -> Self {
        let (changed, _) = broadcast::channel(256);
        Self { install: world.clock().uuid(), gate: RwLock::default(), seen: Mutex::default(), changed }
    }

    /// Remembers the newest revision that was applied.
    pub(super) fn applied(&self, call: &Call, rev: Rev) {
        lock(&self.seen).applied(call, rev);
    }
}

/// Implements [`Provider`](crate::spi::Provider) by the field `base`, for providers without usage.
macro_rules! provider_by_base {
    ($name:ty) => {
        #[async_trait::async_trait]
        impl $crate::spi::Provider for $name {
            async fn hello(&self) -> $crate::Result<$crate::spi::Hello> {
                self.base.hello().await
            }
            async fn claim(&self, cx: &$crate::spi::Ctx) -> $crate::Result<$crate::spi::Hello> {
                self.base.claim(cx).await
            }
            async fn changes(
                &self,
                _: &$crate::spi::Ctx,
            ) -> $crate::Result<$crate::spi::Feed<$crate::ObjectRef>> {
                self.base.changes().await
            }
            async fn usage(
                &self,
                _: &$crate::spi::Ctx,
                _: Option<$crate::ObjectRef>,
                _: usize,
            ) -> $crate::Result<Vec<$crate::spi::Reading>> {
                self.base.world.alive().await;
                Ok(Vec::new())
            }
        }
    };
}
pub(super) use provider_by_base;
