//! This machine, read from `/proc` and `/sys`. What is not there is missing from the answer, never zero.
//!
//! Parsers take the folders' roots, so they are tested on trees that are not this machine.

mod facts;

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::id::Cloud;
use iaas_core::model::Host;
use iaas_core::process::HostFence;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Hello;
use iaas_core::spi::Provider;
use iaas_core::spi::Pull;
use iaas_core::spi::Reading;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::host::HostFacts;
use iaas_core::spi::host::HostInventory;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::files;

/// The [`HostInventory`] of the machine that it runs on.
#[derive(Clone, Debug)]
pub struct MachineInventory {
    state: PathBuf,
    cloud: Id<Cloud>,
    host: Id<Host>,
    install: Uuid,
    virtualization: Arc<OnceCell<String>>,
}

impl MachineInventory {
    /// Opens the inventory of this machine. `cloud` is the one whose newest epoch `hello` tells; calls of others are served
    /// too.
    ///
    /// # Errors
    /// `Unavailable`: the state folder cannot be used.
    pub fn open(state: &Path, cloud: Id<Cloud>, host: Id<Host>) -> Result<Self> {
        let install = files::install(state)?;
        Ok(Self { state: state.to_owned(), cloud, host, install, virtualization: Arc::default() })
    }

    fn fence(&self, cloud: Id<Cloud>) -> Result<HostFence> {
        HostFence::open(&self.state, cloud, Site::Host(self.host))
    }

    fn hello_to(&self, cloud: Id<Cloud>) -> Result<Hello> {
        Ok(Hello {
            product: concat!("iaas-vmm inventory ", env!("CARGO_PKG_VERSION")).to_owned(),
            protocol: (1, 1),
            site: Site::Host(self.host),
            install: self.install,
            newest: self.fence(cloud)?.newest()?,
            seal_to: None,
            kinds: Default::default(),
            caps: Default::default(),
        })
    }

    /// How VMs run here; the self-test of KVM is done once.
    async fn virtualization(&self) -> String {
        let found = self.virtualization.get_or_init(|| async {
            let test = tokio::task::spawn_blocking(|| {
                let capability = crate::probe();
                match capability.remedy() {
                    Some(remedy) => format!("{capability}; {remedy}"),
                    None => capability.to_string(),
                }
            });
            test.await.unwrap_or_else(|_| "the self-test of KVM failed".to_owned())
        });
        found.await.clone()
    }
}

#[async_trait]
impl Provider for MachineInventory {
    async fn hello(&self) -> Result<Hello> {
        self.hello_to(self.cloud)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.fence(cx.call.cloud)?.claim(&cx.call).await?;
        self.hello_to(cx.call.cloud)
    }

    async fn changes(&self, _cx: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(Box::new(Silent))
    }

    async fn usage(&self, _cx: &Ctx, _after: Option<ObjectRef>, _limit: usize) -> Result<Vec<Reading>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl HostInventory for MachineInventory {
    async fn facts(&self, _cx: &Ctx) -> Result<HostFacts> {
        let read = tokio::task::spawn_blocking(|| facts::read(Path::new("/proc"), Path::new("/sys")));
        let mut facts =
            read.await.map_err(|e| Error::internal("reading the machine ended abruptly").because(&e))?;
        facts.virtualization = Some(self.virtualization().await);
        Ok(facts)
    }

    async fn lease(&self, cx: &Ctx, _ttl: Duration) -> Result<Stamp> {
        // No VM of this host depends on it yet; who asks learns the host's time, and that it may still act here.
        let fence = self.fence(cx.call.cloud)?;
        let _effect = fence.enter(&cx.call).await?;
        Ok(files::stamp())
    }
}

/// Machines change without telling; who wants to know looks again.
#[derive(Debug)]
struct Silent;

#[async_trait]
impl Pull<ObjectRef> for Silent {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        std::future::pending().await
    }
}
