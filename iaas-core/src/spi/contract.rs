//! The contract that all providers share: who calls, what is owned, what was seen, and the four verbs.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use uuid::Uuid;

use super::Feed;
use crate::Entity;
use crate::Epoch;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::id::Cloud;
use crate::id::Fabric;
use crate::id::Pool;
use crate::model::Host;
use crate::model::Operation;

/// Everything that may cross a process border.
pub trait Value: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static {}
impl<T: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static> Value for T {}

/// The part of a call's context that crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The cloud that calls.
    pub cloud: Id<Cloud>,
    /// The incarnation of its store; a restored or copied store gets a new one.
    pub incarnation: Uuid,
    /// The fencing number of the calling leader.
    pub epoch: Epoch,
    /// The operation on whose behalf it calls.
    pub op: Id<Operation>,
    /// The trace that spans belong to, if any.
    #[serde(default)]
    pub trace: Option<String>,
    /// The time that remains; a duration, because an instant does not cross.
    pub budget: Duration,
}

/// The context of a provider call.
#[derive(Clone, Debug)]
pub struct Ctx {
    /// What crosses.
    pub call: Call,
    /// A polite request to stop; local, it crosses as a frame of its own.
    pub cancel: Cancel,
}

/// A request to stop that can be asked for and waited for.
#[derive(Clone, Debug)]
pub struct Cancel(watch::Sender<bool>);

impl Cancel {
    /// A request that nobody has made yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Asks to stop.
    pub fn cancel(&self) {
        self.0.send_replace(true);
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when somebody asks.
    pub async fn cancelled(&self) {
        let mut asked = self.0.subscribe();
        // `self` holds the sender, so this ends only by the request.
        let _ = asked.wait_for(|asked| *asked).await;
    }
}

impl Default for Cancel {
    fn default() -> Self {
        Self::new()
    }
}

/// What a provider writes on each thing that it makes, so that identity survives loss of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// The owning cloud.
    pub cloud: Id<Cloud>,
    /// The incarnation of the store that asked for it.
    pub incarnation: Uuid,
    /// The revision that was applied last.
    pub rev: Rev,
}

/// A moment on a host's clocks, taken at the effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The host's wall clock.
    pub wall: Timestamp,
    /// The host's boot; `mono_ns` compares only within one.
    pub boot_id: Uuid,
    /// Nanoseconds on the host's monotonic clock.
    pub mono_ns: u64,
}

/// Where a provider acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Site {
    /// One host.
    Host(Id<Host>),
    /// One pool of storage.
    Pool(Id<Pool>),
    /// One network fabric.
    Fabric(Id<Fabric>),
}

/// The public key of a host to which secrets are sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealKey(pub Bytes);

/// A secret that only the host named by `to` can open.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Whose private key opens it.
    pub to: SealKey,
    /// What it is bound to.
    pub aad: Bytes,
    /// The cipher text.
    pub body: Bytes,
}

impl Debug for Sealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sealed({} bytes)", self.body.len())
    }
}

/// A provider's answer to "who are you".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Name and version of the implementation.
    pub product: String,
    /// The oldest and the newest protocol that it speaks.
    pub protocol: (u16, u16),
    /// Where it acts.
    pub site: Site,
    /// The installation: changes when the site's disk is made anew, so that an absence there proves nothing.
    pub install: Uuid,
    /// The newest incarnation, epoch and revision that this site has seen from the asking cloud.
    pub newest: Option<(Uuid, Epoch, Rev)>,
    /// The key for secrets, if this site opens them.
    #[serde(default)]
    pub seal_to: Option<SealKey>,
    /// The [`Entity::NAME`]s of the kinds that it converges.
    pub kinds: BTreeSet<String>,
    /// What it can do beyond the required; each trait names its capabilities.
    #[serde(default)]
    pub caps: BTreeSet<String>,
}

/// How far an object is on its way to its spec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It is as the applied spec wants it.
    Settled,
    /// It is under way.
    Working {
        /// Units done.
        done: u64,
        /// Units in all, if known.
        total: Option<u64>,
        /// When to look again.
        poll_in: Duration,
    },
    /// It waits for something outside; retried without being asked.
    Blocked(Error),
    /// It cannot be reached from here; a newer spec or `remove` is needed.
    Broken(Error),
    /// It is being removed. If that was cut off by a crash, `remove` goes on with it.
    Leaving,
}

/// Cumulative counters of one object; never deltas, so a lost or doubled reading costs nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// What was measured.
    pub of: ObjectRef,
    /// The placement that it belongs to.
    pub term: Term,
    /// Counts lives within a term: totals start at zero in each.
    pub life: u64,
    /// Grows with each reading of a life.
    pub seq: u64,
    /// No reading of this life follows.
    pub fin: bool,
    /// When.
    pub at: Stamp,
    /// Meter name to total, for example `vcpu-ns`, `memory-byte-ns`, `tx-bytes`.
    pub totals: BTreeMap<String, u128>,
}

/// A kind of object that providers make.
pub trait Kind: Entity + Sized + Debug + Send + Sync {
    /// Whether removing it loses data of a tenant; a sweep never removes such a thing.
    const HOLDS_DATA: bool;
    /// What is wanted: complete, resolved, and never stored.
    type Spec: Value;
    /// What is seen.
    type Observed: Value;
}

/// An object as it was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Seen<K: Kind> {
    /// The revision of the spec that was accepted last.
    pub applied: Rev,
    /// How far it is.
    pub phase: Phase,
    /// When it was looked at.
    pub at: Stamp,
    /// What it is.
    pub is: K::Observed,
    /// The last readings of lives that ended and of this object when it is leaving.
    #[serde(default)]
    pub final_usage: Vec<Reading>,
}

/// An object found on a site, also a half-made one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Found<K: Kind> {
    /// Its id.
    pub id: Id<K>,
    /// Whose it is.
    pub tag: Tag,
    /// What an adopting control plane needs to know: at most 16 KiB, no secrets.
    #[serde(default)]
    pub passport: Option<Bytes>,
    /// What it is, or why that could not be read.
    pub seen: Result<Seen<K>>,
}

/// What every provider answers, whatever it makes.
///
/// # Contract
/// Callable from many threads and tasks; a caller that drops a future loses only the answer.
/// 1. `hello-reads`: [`hello`](Self::hello) changes nothing and never raises the epoch.
/// 2. `claim-raises`: after [`claim`](Self::claim) with epoch *e* every changing call with an older epoch fails with
///    [`ErrorKind::Fenced`](crate::ErrorKind::Fenced) and has no effect, also after a restart of the provider.
/// 3. `claim-drains`: `claim` returns only after every call with an older epoch has ended.
/// 4. `usage-cumulative`: totals of one `(of, term, life)` never shrink, `seq` grows, also over a restart.
///
/// Prove yours with `testing::conformance::provider` (feature `conformance`).
#[async_trait]
pub trait Provider: Debug + Send + Sync + 'static {
    /// Says who this is and the newest epoch that it has seen.
    async fn hello(&self) -> Result<Hello>;

    /// Raises the site's epoch to `cx.call.epoch`, durably, and waits for older calls to end.
    async fn claim(&self, cx: &Ctx) -> Result<Hello>;

    /// Wakes the caller when something may have changed. Lossy: it only says where to look.
    async fn changes(&self, cx: &Ctx) -> Result<Feed<ObjectRef>>;

    /// Up to `limit` readings of objects after `after`, in the order of [`ObjectRef`].
    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>>;
}

/// The four verbs by which objects of kind `K` come, change and go.
///
/// # Contract
/// One call is in flight per id; calls of different ids may run at once.
/// 1. `ensure-idempotent`: `ensure` twice with the same id, revision and spec gives one object; the second repairs.
/// 2. `ensure-older-conflicts`: a revision below the applied one fails with `Conflict` and changes nothing.
/// 3. `ensure-after-crash`: after an error or a crash at any point, `ensure` or `remove` leaves nothing behind that the
///    spec does not want.
/// 4. `remove-absent-ok`: `remove` of an absent id is `Ok`.
/// 5. `remove-newer-refused`: `remove` refuses with `Conflict` if the tag's revision is above `upto` or its incarnation is
///    another.
/// 6. `remove-complete`: after `remove`, `observe` comes to answer `None`, and only when nothing is left, also nothing
///    half-made.
/// 7. `observe-survives-reopen`: what was accepted is seen after a restart of the provider, with the same revision.
/// 8. `inventory-complete`: `inventory` lists each object of this cloud on the site once, in order of id, pages of at most
///    `limit`.
/// 9. `inventory-ours-only`: things of other clouds, or without a tag, are never listed.
/// 10. `fenced-no-effect`: `ensure` and `remove` with an old epoch fail with `Fenced` and change nothing. `observe` and
///     `inventory` neither raise nor check the epoch.
/// 11. `concurrent-ensure-one`: racing `ensure`s of one id make one object.
/// 12. `outcome-honest`: an error with [`Outcome::NotDone`](crate::Outcome::NotDone) had no effect.
/// 13. `bad-spec-invalid`: a spec that can never be met fails with `Invalid` and leaves nothing.
///
/// Prove yours with `testing::conformance::converge` (feature `conformance`).
#[async_trait]
pub trait Converge<K: Kind>: Provider {
    /// Creates `id`, or brings it to `spec`. Returns when the wish is accepted; [`Seen::phase`] says how far it is.
    async fn ensure(&self, cx: &Ctx, id: Id<K>, rev: Rev, spec: &K::Spec) -> Result<Seen<K>>;

    /// Accepts that `id` shall go, if its revision is at most `upto`.
    async fn remove(&self, cx: &Ctx, id: Id<K>, upto: Rev) -> Result<()>;

    /// Looks at `id`. `None`: nothing is left of it.
    async fn observe(&self, cx: &Ctx, id: Id<K>) -> Result<Option<Seen<K>>>;

    /// Up to `limit` objects of this cloud after `after`, in order of id.
    async fn inventory(&self, cx: &Ctx, after: Option<Id<K>>, limit: usize) -> Result<Vec<Found<K>>>;
}

/// Declares a kind of provider object.
macro_rules! kind {
    ($(#[$doc:meta])* $name:ident, $noun:literal, holds_data: $data:literal, $spec:ty => $seen:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {}
        impl $crate::Entity for $name {
            const NAME: &'static str = $noun;
        }
        impl $crate::spi::Kind for $name {
            const HOLDS_DATA: bool = $data;
            type Spec = $spec;
            type Observed = $seen;
        }
    };
}
pub(crate) use kind;
