//! The providers, by site, and the context of calls to them.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::draft::SiteFacts;
use crate::Digest;
use crate::Epoch;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::id::Cloud;
use crate::id::Fabric;
use crate::id::Pool;
use crate::model::Host;
use crate::model::Operation;
use crate::spi::Call;
use crate::spi::Cancel;
use crate::spi::Ctx;
use crate::spi::Feed;
use crate::spi::Provider;
use crate::spi::artifact::Artifact;
use crate::spi::block::VolumePool;
use crate::spi::host::HostProviders;
use crate::spi::network::NetProgram;

/// Where the bytes of kernels and initrds come from.
#[async_trait]
pub trait Blobs: Debug + Send + Sync + 'static {
    /// The bytes of `digest`, in pieces.
    ///
    /// # Errors
    /// `NotFound` if there is no such blob.
    async fn open(&self, digest: Digest) -> Result<Feed<Bytes>>;

    /// Keeps `bytes` under their digest.
    ///
    /// # Errors
    /// `Unavailable` if there is no room.
    async fn put(&self, bytes: Bytes) -> Result<Digest>;

    /// Forgets what is not in `wanted` and was last put longer than `unused` ago, by the blobs' own clock: what was just put
    /// is about to be named.
    ///
    /// # Errors
    /// `Unavailable` if something could not be removed; call again.
    async fn retain(&self, wanted: &BTreeSet<Digest>, unused: Duration) -> Result<()>;
}

/// The providers that a cloud acts through.
#[derive(Clone, Debug, Default)]
pub struct Sites {
    /// By host.
    pub hosts: BTreeMap<Id<Host>, HostProviders>,
    /// By pool.
    pub pools: BTreeMap<Id<Pool>, Arc<dyn VolumePool>>,
    /// By fabric.
    pub fabrics: BTreeMap<Id<Fabric>, Arc<dyn NetProgram>>,
    /// The preferred order of pools.
    pub pool_order: Vec<Id<Pool>>,
}

impl Sites {
    /// The providers of a host.
    ///
    /// # Errors
    /// `Unavailable` if this cloud was opened without them.
    pub fn host(&self, id: Id<Host>) -> Result<&HostProviders> {
        self.hosts.get(&id).ok_or_else(|| {
            Error::unavailable("the host's providers are not part of this cloud")
                .about(id_object(id))
                .remedy("open the cloud with the host, or delete what runs on it")
                .outcome_is(crate::Outcome::NotDone)
        })
    }

    /// The provider of a pool.
    ///
    /// # Errors
    /// As [`Self::host`].
    pub fn pool(&self, id: Id<Pool>) -> Result<&Arc<dyn VolumePool>> {
        self.pools.get(&id).ok_or_else(|| {
            Error::unavailable("the pool's provider is not part of this cloud")
                .about(id.object())
                .remedy("open the cloud with the pool")
                .outcome_is(crate::Outcome::NotDone)
        })
    }

    /// Every provider once.
    pub fn providers(&self) -> Vec<&dyn Provider> {
        let mut all: Vec<&dyn Provider> = Vec::new();
        for host in self.hosts.values() {
            all.push(&*host.inventory);
            all.push(&*host.hypervisor);
            all.push(&*host.artifacts);
            all.push(&*host.plugs);
            for access in host.access.values() {
                all.push(&**access);
            }
        }
        for pool in self.pools.values() {
            all.push(&**pool);
        }
        for fabric in self.fabrics.values() {
            all.push(&**fabric);
        }
        all
    }

    /// What decisions need to know of the sites.
    pub fn facts(&self, installs: BTreeMap<Id<Host>, Uuid>) -> SiteFacts {
        let reach = self.hosts.iter().map(|(id, h)| (*id, h.access.keys().copied().collect())).collect();
        SiteFacts { pools: self.pool_order.clone(), reach, installs }
    }
}

fn id_object(id: Id<Host>) -> crate::ObjectRef {
    id.object()
}

/// Makes the contexts of provider calls.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The cloud.
    pub cloud: Id<Cloud>,
    /// The incarnation of its store.
    pub incarnation: Uuid,
    /// The leader's fencing number.
    pub epoch: Epoch,
}

impl Caller {
    /// A call on behalf of `op`, in the trace that has the operation's id: the same after a restart.
    pub fn ctx(&self, op: Id<Operation>) -> Ctx {
        let call = Call {
            cloud: self.cloud,
            incarnation: self.incarnation,
            epoch: self.epoch,
            op,
            trace: (!op.uuid().is_nil()).then(|| traceparent(op)),
            budget: BUDGET,
        };
        Ctx { call, cancel: Cancel::new() }
    }

    /// A call of the engine's own.
    pub fn own(&self) -> Ctx {
        self.ctx(Id::from_uuid(Uuid::nil()))
    }
}

/// The operation as a `traceparent` (W3C Trace Context §3.2); the span's id is the random half of the operation's.
fn traceparent(op: Id<Operation>) -> String {
    let (trace, span) = (op.uuid().simple(), op.uuid().as_u64_pair().1);
    format!("00-{trace}-{span:016x}-01")
}

/// The id of a digest's artifact: the same on every host.
pub fn artifact_id(digest: Digest) -> Id<Artifact> {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.0[..16]);
    // RFC 9562 §5.8: a UUIDv8 has bits of our own choice.
    Id::from_uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// How long a provider may take to accept a wish.
const BUDGET: Duration = Duration::from_secs(60);
