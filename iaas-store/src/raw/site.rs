//! What the pool and the access have in common: the fence of their site, changes, and work on a thread that may block.

use std::path::Path;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::id::Cloud;
use iaas_core::process::HostFence;
use iaas_core::spi::Call;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Hello;
use iaas_core::spi::Pull;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::Tag;
use jiff::Timestamp;
use nix::time::ClockId;
use nix::time::clock_gettime;
use tokio::sync::broadcast;
use uuid::Uuid;

/// The site of one provider.
#[derive(Debug)]
pub(crate) struct SiteBase {
    site: Site,
    fence: HostFence,
    cloud: Id<Cloud>,
    install: Uuid,
    kind: &'static str,
    caps: &'static [&'static str],
    changed: broadcast::Sender<ObjectRef>,
    /// One call at a time per id: ids share these locks by their last byte.
    turns: Vec<Mutex<()>>,
}

impl SiteBase {
    /// The site `site` of `cloud`, fenced in the host's folder `state`.
    pub(crate) fn open(
        state: &Path,
        cloud: Id<Cloud>,
        site: Site,
        install: Uuid,
        kind: &'static str,
        caps: &'static [&'static str],
    ) -> Result<Self> {
        let fence = HostFence::open(state, cloud, site)?;
        let (changed, _) = broadcast::channel(256);
        let turns = (0..TURNS).map(|_| Mutex::default()).collect();
        Ok(Self { site, fence, cloud, install, kind, caps, changed, turns })
    }

    pub(crate) fn cloud(&self) -> Id<Cloud> {
        self.cloud
    }

    /// Who this is; `newest_tag` finds the newest revision among the tags of an incarnation.
    pub(crate) fn hello(&self, newest_tag: impl FnOnce(Uuid) -> Result<Rev>) -> Result<Hello> {
        let newest = match self.fence.newest()? {
            Some((incarnation, epoch, rev)) => Some((incarnation, epoch, rev.max(newest_tag(incarnation)?))),
            None => None,
        };
        Ok(Hello {
            product: concat!("iaas-store raw ", env!("CARGO_PKG_VERSION")).into(),
            protocol: (1, 1),
            site: self.site,
            install: self.install,
            newest,
            seal_to: None,
            kinds: [self.kind.to_owned()].into(),
            caps: self.caps.iter().map(|&cap| cap.to_owned()).collect(),
        })
    }

    pub(crate) async fn claim(&self, cx: &Ctx) -> Result<()> {
        self.fence.claim(&cx.call).await.map(drop)
    }

    pub(crate) fn changes(&self) -> Feed<ObjectRef> {
        Box::new(Changes(self.changed.subscribe()))
    }

    pub(crate) fn wake(&self, object: ObjectRef) {
        // Nobody listening is fine.
        let _ = self.changed.send(object);
    }

    /// Runs `effect` as the only call on `id`, while no newer leader can come in.
    pub(crate) fn act<T>(&self, call: &Call, id: Uuid, effect: impl FnOnce() -> Result<T>) -> Result<T> {
        let _turn = self.turn(id);
        let _inside = self.fence.enter_now(call)?;
        effect()
    }

    fn turn(&self, id: Uuid) -> MutexGuard<'_, ()> {
        let place = usize::from(id.as_bytes()[15]) % TURNS;
        // `place` is below the number of turns by construction.
        self.turns[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what is another cloud's.
    pub(crate) fn own(&self, tag: &Tag) -> Result<()> {
        if tag.cloud == self.cloud {
            return Ok(());
        }
        Err(Error::conflict("this id is taken by something that is not ours").remedy("use another id"))
    }
}

/// Refuses a wish that is older than what was applied.
pub(crate) fn not_older(tag: &Tag, call: &Call, rev: Rev) -> Result<()> {
    if tag.incarnation == call.incarnation && rev < tag.rev {
        return Err(Error::conflict(format!("revision {rev} is older than the applied {}", tag.rev)));
    }
    Ok(())
}

/// Refuses to remove what is newer than the wish, or another store's.
pub(crate) fn removable(tag: &Tag, call: &Call, upto: Rev) -> Result<()> {
    if tag.incarnation == call.incarnation && tag.rev <= upto {
        return Ok(());
    }
    Err(Error::conflict("its tag is newer, or of another incarnation of the store")
        .remedy("adopt it first, or remove it with the revision that made it"))
}

/// Runs `work` on a thread where blocking is fine; it goes on if the caller goes away.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on the pool ended abruptly").because(&e)),
    }
}

/// This moment on the host's clocks.
pub(crate) fn stamp() -> Stamp {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot_id = boot.ok().and_then(|text| Uuid::parse_str(text.trim()).ok()).unwrap_or_default();
    let mono = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    Stamp { wall: Timestamp::now(), boot_id, mono_ns: u64::try_from(mono.as_nanos()).unwrap_or(u64::MAX) }
}

struct Changes(broadcast::Receiver<ObjectRef>);

#[async_trait]
impl Pull<ObjectRef> for Changes {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        loop {
            match self.0.recv().await {
                Ok(object) => return Some(Ok(object)),
                // Lossy by contract.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// Implements [`Provider`](iaas_core::spi::Provider) for a handle with `inner: Arc<…>` that has `base` and `newest_tag`.
macro_rules! provider {
    ($name:ty) => {
        #[async_trait::async_trait]
        impl iaas_core::spi::Provider for $name {
            async fn hello(&self) -> iaas_core::Result<iaas_core::spi::Hello> {
                let inner = self.inner.clone();
                $crate::raw::site::blocking(move || {
                    inner.base.hello(|incarnation| inner.newest_tag(incarnation))
                })
                .await
            }
            async fn claim(&self, cx: &iaas_core::spi::Ctx) -> iaas_core::Result<iaas_core::spi::Hello> {
                self.inner.base.claim(cx).await?;
                self.hello().await
            }
            async fn changes(
                &self,
                _: &iaas_core::spi::Ctx,
            ) -> iaas_core::Result<iaas_core::spi::Feed<iaas_core::ObjectRef>> {
                Ok(self.inner.base.changes())
            }
            /// Nothing: space is metered by the events of its allocation.
            async fn usage(
                &self,
                _: &iaas_core::spi::Ctx,
                _: Option<iaas_core::ObjectRef>,
                _: usize,
            ) -> iaas_core::Result<Vec<iaas_core::spi::Reading>> {
                Ok(Vec::new())
            }
        }
    };
}
pub(crate) use provider;

/// How many calls on different ids run at once.
const TURNS: usize = 64;
