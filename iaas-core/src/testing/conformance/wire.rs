//! A wire between the suite and the provider: every suite also runs through [`spi::remote`](crate::spi::remote).

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::meter;
use super::net_program::WrapPort;
use super::rig::Current;
use super::rig::Wrap;
use super::volume_pool::WrapDevice;
use crate::Id;
use crate::Result;
use crate::SystemClock;
use crate::spi::artifact::Artifacts;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumePool;
use crate::spi::host::HostInventory;
use crate::spi::host::HostProviders;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::meter::MeterSink;
use crate::spi::network::NetProgram;
use crate::spi::network::Plugs;
use crate::spi::remote::Dialect;
use crate::spi::remote::Remote;
use crate::spi::remote::Served;
use crate::spi::remote::Server;
use crate::testing::fake;

/// Puts a unix socket between the suite and each provider.
///
/// `Wrapped::new(MyRig::default(), Wire)` is your rig over the wire.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire;

impl WrapDevice for Wire {}
impl WrapPort for Wire {}

/// Serves `served` on socket pairs, and connects.
///
/// # Errors
/// As [`Remote::connect`].
pub async fn connect(served: Served) -> Result<Remote> {
    let server = Server::new(served);
    let runtime = Handle::current();
    let dial = move || -> io::Result<StdStream> {
        let (ours, theirs) = StdStream::pair()?;
        theirs.set_nonblocking(true)?;
        let server = server.clone();
        runtime.spawn(async move {
            if let Ok(stream) = UnixStream::from_std(theirs) {
                // How a session ends is the client's to notice.
                let _ = server.session(stream).await;
            }
        });
        Ok(ours)
    };
    Remote::over(dial, Dialect::CURRENT).await
}

/// A host of fakes, to put one real provider into.
fn host() -> HostProviders {
    fake::Site::new(&fake::World::new(Arc::new(SystemClock::new()))).host()
}

macro_rules! wires {
    ($($provider:ident: |$inner:ident| $serve:expr, |$remote:ident| $take:expr;)+) => {$(
        #[async_trait]
        impl Wrap<dyn $provider> for Wire {
            async fn wrap(&self, $inner: Arc<dyn $provider>, _: bool) -> Result<Arc<dyn $provider>> {
                let $remote = connect($serve).await?;
                $take
            }
        }
    )+};
}

wires! {
    Hypervisor: |inner| Served::new().host(HostProviders { hypervisor: inner, ..host() }), |remote| Ok(remote.host()?.hypervisor);
    Artifacts: |inner| Served::new().host(HostProviders { artifacts: inner, ..host() }), |remote| Ok(remote.host()?.artifacts);
    HostInventory: |inner| Served::new().host(HostProviders { inventory: inner, ..host() }), |remote| Ok(remote.host()?.inventory);
    Plugs: |inner| Served::new().host(HostProviders { plugs: inner, ..host() }), |remote| Ok(remote.host()?.plugs);
    VolumeAccess: |inner| Served::new().host(HostProviders { access: [(SOME.cast(), inner)].into(), ..host() }), |remote| {
        let access = remote.host()?.access.remove(&SOME.cast());
        access.ok_or_else(|| crate::Error::internal("the access did not cross"))
    };
    VolumePool: |inner| Served::new().pool(SOME.cast(), inner), |remote| remote.pool(SOME.cast());
    NetProgram: |inner| Served::new().network(SOME.cast(), inner), |remote| remote.network(SOME.cast());
    MeterSink: |inner| Served::new().meter(inner), |remote| remote.meter();
}

/// A meter's rig over the wire.
#[derive(Debug)]
pub struct WiredMeter<R> {
    inner: R,
    current: Current<dyn MeterSink>,
}

impl<R: meter::Rig> WiredMeter<R> {
    /// Puts a unix socket before the meters of `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, current: Current::default() }
    }

    async fn over(&self, meter: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>> {
        self.current.keep(&meter);
        Wire.wrap(meter, false).await
    }
}

#[async_trait]
impl<R: meter::Rig> meter::Rig for WiredMeter<R> {
    async fn fresh(&self) -> Result<Arc<dyn MeterSink>> {
        self.over(self.inner.fresh().await?).await
    }
    async fn reopen(&self, old: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>> {
        drop(old);
        self.over(self.inner.reopen(self.current.take().await?).await?).await
    }
}

/// The id under which the one provider is served.
const SOME: Id<()> = Id::from_uuid(Uuid::from_u128(0x51));
