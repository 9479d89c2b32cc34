//! What the pool and the access have in common: the fence of their site, changes, and work on a thread that may block.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::LazyLock;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::id::Cloud;
use iaas_core::process::HostFence;
use iaas_core::spi::Call;
use iaas_core::spi::Feed;
use iaas_core::spi::Hello;
use iaas_core::spi::Pull;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::Tag;
use jiff::Timestamp;
use nix::time::ClockId;
use nix::time::clock_gettime;
use tokio::sync::Mutex;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// The site of one provider.
#[derive(Debug)]
pub(crate) struct SiteBase {
    state: PathBuf,
    site: Site,
    home: Id<Cloud>,
    install: Uuid,
    kind: &'static str,
    caps: &'static [&'static str],
    changed: broadcast::Sender<ObjectRef>,
}

impl SiteBase {
    /// The site `site`, fenced in the host's folder `state`. `home` is the cloud that a call without a caller is about.
    pub(crate) fn open(
        state: &Path,
        home: Id<Cloud>,
        site: Site,
        install: Uuid,
        kind: &'static str,
        caps: &'static [&'static str],
    ) -> Result<Self> {
        HostFence::open(state, home, site)?;
        let (changed, _) = broadcast::channel(256);
        Ok(Self { state: state.to_owned(), site, home, install, kind, caps, changed })
    }

    pub(crate) fn home(&self) -> Id<Cloud> {
        self.home
    }

    /// The fence of the leaders of `cloud`.
    pub(crate) fn fence(&self, cloud: Id<Cloud>) -> Result<HostFence> {
        HostFence::open(&self.state, cloud, self.site)
    }

    /// Who this is, to `cloud`; `newest_tag` finds the newest revision among its tags of an incarnation.
    pub(crate) fn hello(
        &self,
        cloud: Id<Cloud>,
        newest_tag: impl FnOnce(Uuid) -> Result<Rev>,
    ) -> Result<Hello> {
        let newest = match self.fence(cloud)?.newest()? {
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

    pub(crate) fn changes(&self) -> Feed<ObjectRef> {
        Box::new(Changes(self.changed.subscribe()))
    }

    /// Runs `effect` as the only call of this process on `object`, while no newer leader can come in. It goes on if the
    /// caller goes away; whoever calls next for the same object waits for it, through this provider or another.
    pub(crate) async fn act<T: Send + 'static>(
        self: &Arc<Self>,
        call: &Call,
        object: ObjectRef,
        effect: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // Taken before the work is handed over: work that was never begun goes with its caller.
        let turn = turn(object.id).lock_owned().await;
        let (this, call) = (self.clone(), call.clone());
        blocking(move || {
            let _turn = turn;
            let _inside = this.fence(call.cloud)?.enter_now(&call)?;
            let done = effect();
            // Nobody listening is fine.
            let _ = this.changed.send(object.clone());
            done.map_err(|e| e.about(object))
        })
        .await
    }
}

/// Calls of this process on one object take turns; objects share these by the last byte of their id.
fn turn(id: Uuid) -> Arc<Mutex<()>> {
    static TURNS: LazyLock<Vec<Arc<Mutex<()>>>> =
        LazyLock::new(|| (0..=u8::MAX).map(|_| Arc::default()).collect());
    let place = id.as_bytes().last().copied().unwrap_or_default();
    TURNS.get(usize::from(place)).cloned().unwrap_or_default()
}

/// Refuses what is another cloud's.
pub(crate) fn own(tag: &Tag, cloud: Id<Cloud>) -> Result<()> {
    if tag.cloud == cloud {
        return Ok(());
    }
    Err(Error::conflict("this id is taken by something that is not ours").remedy("use another id"))
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
    let mut task = Abort(tokio::task::spawn_blocking(work));
    match (&mut task.0).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on the pool ended abruptly").because(&e)),
    }
}

/// A task that is called off with its caller.
struct Abort<T>(JoinHandle<T>);

impl<T> Drop for Abort<T> {
    fn drop(&mut self) {
        self.0.abort();
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

/// Implements [`Provider`](iaas_core::spi::Provider) for a handle with an `inner: Arc<…>` that has a `base` and says `hello`.
macro_rules! provider {
    ($name:ty) => {
        #[async_trait::async_trait]
        impl iaas_core::spi::Provider for $name {
            async fn hello(&self) -> iaas_core::Result<iaas_core::spi::Hello> {
                let inner = self.inner.clone();
                $crate::raw::site::blocking(move || inner.hello(inner.base.home())).await
            }
            async fn claim(&self, cx: &iaas_core::spi::Ctx) -> iaas_core::Result<iaas_core::spi::Hello> {
                self.inner.base.fence(cx.call.cloud)?.claim(&cx.call).await?;
                let (inner, cloud) = (self.inner.clone(), cx.call.cloud);
                $crate::raw::site::blocking(move || inner.hello(cloud)).await
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
