//! Composing a cloud from its parts.

use std::sync::Arc;
use std::time::Duration;

use super::Cloud;
use super::MemoryBlobs;
use crate::Clock;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::SystemClock;
use crate::engine::Engine;
use crate::engine::placement::FirstFit;
use crate::engine::run::EngineParts;
use crate::engine::sites::Blobs;
use crate::engine::sites::Sites;
use crate::id;
use crate::id::Fabric;
use crate::id::Pool;
use crate::spi::audit::AuditSink;
use crate::spi::authorizer::Authorizer;
use crate::spi::block::VolumePool;
use crate::spi::host::HostProviders;
use crate::spi::meter::MeterSink;
use crate::spi::network::NetProgram;
use crate::spi::placement::Placement;
use crate::spi::state_store::StateStore;

/// The parts of a cloud. A store, an authorizer and a meter are required; the rest has a default or may be left out.
#[derive(Debug)]
#[must_use = "a builder does nothing until it is opened"]
pub struct CloudBuilder {
    id: Option<Id<id::Cloud>>,
    store: Option<Arc<dyn StateStore>>,
    sites: Sites,
    authorizer: Option<Arc<dyn Authorizer>>,
    meter: Option<Arc<dyn MeterSink>>,
    audit: Option<Arc<dyn AuditSink>>,
    placement: Arc<dyn Placement>,
    clock: Arc<dyn Clock>,
    blobs: Arc<dyn Blobs>,
    operator: String,
    lease: Duration,
}

impl Default for CloudBuilder {
    fn default() -> Self {
        Self {
            id: None,
            store: None,
            sites: Sites::default(),
            authorizer: None,
            meter: None,
            audit: None,
            placement: Arc::new(FirstFit),
            clock: Arc::new(SystemClock::new()),
            blobs: Arc::new(MemoryBlobs::default()),
            operator: "operator".to_owned(),
            lease: Duration::from_secs(15),
        }
    }
}

impl CloudBuilder {
    /// The cloud's id, for providers that are told it before the store is open; drawn at the first opening by default.
    pub fn id(mut self, id: Id<id::Cloud>) -> Self {
        self.id = Some(id);
        self
    }

    /// Where state is kept.
    pub fn store(mut self, store: Arc<dyn StateStore>) -> Self {
        self.store = Some(store);
        self
    }

    /// Adds a pool of volumes; the first one added is preferred.
    pub fn pool(mut self, id: Id<Pool>, pool: Arc<dyn VolumePool>) -> Self {
        self.sites.pools.insert(id, pool);
        self.sites.pool_order.push(id);
        self
    }

    /// Adds a network fabric.
    pub fn fabric(mut self, id: Id<Fabric>, program: Arc<dyn NetProgram>) -> Self {
        self.sites.fabrics.insert(id, program);
        self
    }

    /// Adds a host. A host without a record gets one, in the zone `local`.
    pub fn host(mut self, host: HostProviders) -> Self {
        self.sites.hosts.insert(host.id, host);
        self
    }

    /// Who decides who may do what.
    pub fn authorizer(mut self, authorizer: Arc<dyn Authorizer>) -> Self {
        self.authorizer = Some(authorizer);
        self
    }

    /// Where usage goes and bills come from.
    pub fn meter(mut self, meter: Arc<dyn MeterSink>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// Where the audit log is copied to; the store keeps it in any case.
    pub fn audit(mut self, sink: Arc<dyn AuditSink>) -> Self {
        self.audit = Some(sink);
        self
    }

    /// Where instances go; [`FirstFit`] by default.
    pub fn placement(mut self, placement: Arc<dyn Placement>) -> Self {
        self.placement = placement;
        self
    }

    /// Time and ids; the system's by default.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Where kernels and initrds are kept; in memory by default.
    pub fn blobs(mut self, blobs: Arc<dyn Blobs>) -> Self {
        self.blobs = blobs;
        self
    }

    /// The principal that may do everything from the first opening on; `operator` by default.
    pub fn operator(mut self, name: &str) -> Self {
        self.operator = name.to_owned();
        self
    }

    /// How long another control plane has to wait after this one died; 15 s by default.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Takes the lead of the cloud in the store, adopts what runs, and starts to converge.
    ///
    /// Spawns tasks on the current tokio runtime.
    ///
    /// # Errors
    /// - [`Invalid`](crate::ErrorKind::Invalid): a required part is missing.
    /// - [`Conflict`](crate::ErrorKind::Conflict): another control plane leads, or a site knows a newer state.
    /// - Those of the store and of the providers.
    pub async fn open(self) -> Result<Cloud> {
        let missing =
            |part: &str| Error::invalid(format!("a cloud needs {part}")).remedy("give it to the builder");
        let authorizer = self.authorizer.ok_or_else(|| missing("an authorizer"))?;
        let engine = Engine::open(EngineParts {
            id: self.id,
            store: self.store.ok_or_else(|| missing("a state store"))?,
            clock: self.clock,
            placement: self.placement,
            sites: self.sites,
            authorizer,
            meter: self.meter.ok_or_else(|| missing("a meter"))?,
            audit: self.audit,
            blobs: self.blobs,
            operator: self.operator,
            lease: self.lease,
        })
        .await?;
        Ok(Cloud::new(engine))
    }
}
