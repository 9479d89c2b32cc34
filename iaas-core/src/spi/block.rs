//! Block storage: volumes in a pool, and access to them on a host.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::Converge;
use super::Ctx;
use super::contract::kind;
use super::key::WrappedKey;
use super::target::Mode;
use super::target::Target;
use crate::Id;
use crate::Result;
use crate::Term;
use crate::id::Pool;

kind!(
    /// A volume as a pool keeps it. It shares its UUID with the volume of the model.
    PoolVolume, "pool-volume", holds_data: true, PoolVolumeSpec => PoolVolumeObserved
);
kind!(
    /// A snapshot of a volume.
    VolumeSnapshot, "volume-snapshot", holds_data: true, VolumeSnapshotSpec => VolumeSnapshotObserved
);
kind!(
    /// A long job on a volume: import, export, copy, backup, scrub.
    VolumeJob, "volume-job", holds_data: false, VolumeJobSpec => VolumeJobObserved
);
kind!(
    /// The right of one host to open a volume. It shares its UUID with the attachment.
    Access, "access", holds_data: false, AccessSpec => AccessObserved
);

/// A volume to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolVolumeSpec {
    /// Bytes, a multiple of 4096. It may grow, never shrink.
    pub size: u64,
    /// What it starts from; zeroes if `None`.
    pub from: Option<Source>,
    /// Its limits.
    pub qos: Qos,
    /// Its data key, wrapped.
    pub key: Option<WrappedKey>,
    /// What an adopting control plane needs: at most 16 KiB, no secrets.
    pub passport: Bytes,
}

/// What a volume starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A snapshot of the same pool.
    Snapshot(Id<VolumeSnapshot>),
    /// Another volume of the same pool.
    Volume(Id<PoolVolume>),
}

/// Limits of a volume; `None` for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qos {
    /// Operations a second.
    pub iops: Option<u64>,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
}

/// A volume as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolVolumeObserved {
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes that only this volume uses.
    pub unique: u64,
    /// The newest writer that claimed it.
    pub writer: Term,
    /// Whether its data is whole.
    pub health: Health,
}

/// Whether data is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// As far as is known.
    Good,
    /// Some of it is damaged; `bytes` are lost.
    Damaged {
        /// How many bytes.
        bytes: u64,
    },
}

/// A snapshot to keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSnapshotSpec {
    /// Of which volume.
    pub volume: Id<PoolVolume>,
    /// The writer's receipt, when the volume is attached.
    pub receipt: Option<FreezeReceipt>,
}

/// A snapshot as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeSnapshotObserved {
    /// The volume has a writer: let it freeze with this ticket.
    AskWriter(FreezeTicket),
    /// It is taken.
    Ready {
        /// Bytes that only this snapshot uses.
        unique: u64,
    },
}

/// A pool's request to a writer to freeze.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeTicket(pub Bytes);
/// A writer's answer to a ticket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeReceipt(pub Bytes);

/// A job to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeJobSpec {
    /// On which volume.
    pub volume: Id<PoolVolume>,
    /// Which job, by the pool's name for it.
    pub job: String,
    /// Its arguments.
    pub arguments: Bytes,
}

/// A job as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeJobObserved {
    /// Its result, when it is done.
    pub result: Option<Bytes>,
}

/// A volume to make reachable on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessSpec {
    /// In which pool.
    pub pool: Id<Pool>,
    /// Which volume.
    pub volume: Id<PoolVolume>,
    /// The writer's number.
    pub term: Term,
    /// What may be done with it.
    pub mode: Mode,
}

/// Access as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessObserved {
    /// How to open it, once that is possible.
    pub target: Option<Target>,
}

/// Whether older writers are kept out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fenced {
    /// This pool cannot know.
    Impossible,
    /// Older writers of this kernel are refused; another host's are not known of.
    SameKernel,
    /// No writer below this term can write any more: a proof.
    Done(Term),
}

/// The capabilities of a [`VolumePool`].
pub mod cap {
    /// A volume can be made from a snapshot or another volume.
    pub const CLONE: &str = "clone";
    /// A volume can grow.
    pub const GROW: &str = "grow";
}

/// Keeps volumes: one provider per pool.
///
/// # Contract
/// The clauses of [`Provider`](super::Provider) and of [`Converge<PoolVolume>`], and:
/// 1. `new-reads-zero`: a new volume without a source reads as zeroes over its whole size.
/// 2. `flushed-survives`: what was written and flushed is read after a reopen and after a kill of the writer.
/// 3. `grow-keeps`: growing keeps the data; the new bytes read as zero. Shrinking is `Invalid`.
/// 4. `stale-writer-fenced`: once a writer with a higher term has claimed the volume, an older one's next flush fails, and
///    no write of it is acknowledged as durable.
/// 5. `fence-honest`: [`fence`](Self::fence) answers `Done` only if no older writer can write.
/// 6. `kinds-agree`: `snapshots` and `jobs` are `Some` just if `Hello::kinds` names their kind; a volume with a source
///    fails with `Unsupported` where `caps` lacks [`cap::CLONE`].
/// 7. `remove-frees`: after removal the space is free again.
///
/// Prove yours with `testing::conformance::volume_pool` (feature `conformance`).
#[async_trait]
pub trait VolumePool: Converge<PoolVolume> {
    /// Snapshots, if this pool has them.
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>>;

    /// Jobs, if this pool has them.
    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>>;

    /// Keeps out every writer of `volume` whose term is below `below`.
    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced>;
}

/// Makes volumes of one pool reachable on one host.
///
/// # Contract
/// The clauses of [`Provider`](super::Provider) and of [`Converge<Access>`], and:
/// 1. `target-when-settled`: settled access has a target whose id, term and mode are those of its spec.
/// 2. `absent-volume-blocked`: access to a volume that is not there is `Blocked` or fails with `NotFound`; no volume is made.
///
/// Prove yours with `testing::conformance::volume_access` (feature `conformance`).
pub trait VolumeAccess: Converge<Access> {}

/// How long a provider may take between two looks at a job.
pub const POLL: Duration = Duration::from_millis(200);

/// The namespace of the ids that are derived, not drawn.
pub const DERIVED: Uuid = Uuid::from_u128(0x5d1b_7a3e_2c40_4d0c_9d55_6a2f_0e1c_77b1);
