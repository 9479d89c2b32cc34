//! The common clauses, kept for you: a provider of your own is a [`Maker`] of a few methods, and [`Base`] makes it whole.
//!
//! [`Base`] fences old leaders, keeps tags and revisions, finishes or reports what a crash left half-made, lists in pages,
//! and lets one call at a time act on an object. What it must remember lies on a [`Shelf`]. You write how a thing is made,
//! unmade and looked at; each of these must be repeatable, because a crash may come at any point.
//!
//! | you write | and get |
//! |---|---|
//! | [`Maker`] | [`Provider`](super::Provider), [`Converge`] |
//! | [`VmMaker`] for `Vm` | [`Hypervisor`] |
//! | [`PoolMaker`] for `PoolVolume` | [`VolumePool`] |
//! | [`Maker`] for `Access` | [`VolumeAccess`] |
//! | [`SyncDisk`] | [`BlockDevice`](super::dataplane::BlockDevice), by [`AtOnce`] |
//!
//! `examples/bring_your_own.rs` has one of each.

mod disk;
mod fence;
mod provider;
mod shelf;

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

pub use disk::AtOnce;
pub use disk::SyncDisk;
pub use fence::stamp;
pub use provider::Base;
pub use shelf::FolderShelf;
pub use shelf::RamShelf;
pub use shelf::Shelf;

use super::ByteStream;
use super::Converge;
use super::Ctx;
use super::Kind;
use super::Phase;
use super::Reading;
use super::Site;
use super::block::Access;
use super::block::Fenced;
use super::block::PoolVolume;
use super::block::VolumeAccess;
use super::block::VolumeJob;
use super::block::VolumePool;
use super::block::VolumeSnapshot;
use super::hypervisor::Handover;
use super::hypervisor::Hypervisor;
use super::hypervisor::Vm;
use super::hypervisor::VmImage;
use crate::Id;
use crate::Result;
use crate::Term;

/// The wish that a maker works for.
type Spec<M> = <<M as Maker>::Kind as Kind>::Spec;

/// How things of one kind are made on one site.
///
/// [`Base`] calls one method at a time for each id, and those of different ids at once. A method should be short: start
/// what takes long, and let [`look`](Self::look) say [`Phase::Working`].
#[async_trait]
pub trait Maker: Debug + Send + Sync + 'static {
    /// What it makes.
    type Kind: Kind;

    /// Name and version, for [`Hello::product`](super::Hello::product).
    fn product(&self) -> String;

    /// Where it acts.
    fn site(&self) -> Site;

    /// What it can do beyond the required; the kind's module has the names in `cap`.
    fn caps(&self) -> &'static [&'static str] {
        &[]
    }

    /// Refuses a spec before anything is done: `Invalid` if it can never be met, or if `old` cannot become it.
    fn check(&self, old: Option<&Spec<Self>>, new: &Spec<Self>) -> Result<()>;

    /// Makes `id`, or brings it to `spec`; also called to repair, and after a crash in its midst.
    ///
    /// # Errors
    /// Mark one that had no effect as [`NotDone`](crate::Outcome::NotDone): then the wish is forgotten. After any other the
    /// thing counts as half-made until it is ensured again or removed.
    async fn make(&self, id: Id<Self::Kind>, spec: &Spec<Self>) -> Result<()>;

    /// Lets nothing be left of `id`; `Ok` also if nothing was there.
    async fn unmake(&self, id: Id<Self::Kind>) -> Result<()>;

    /// Looks at what was made: how far it is, what it is, and the last readings of lives that ended.
    async fn look(&self, id: Id<Self::Kind>, spec: &Spec<Self>) -> Result<Look<Self::Kind>>;

    /// A reading of `id`, if it is metered: cumulative, with a `seq` that grows also over a restart.
    async fn reading(&self, _id: Id<Self::Kind>, _spec: &Spec<Self>) -> Result<Option<Reading>> {
        Ok(None)
    }

    /// The passport in a spec, if the kind has one.
    fn passport(&self, _spec: &Spec<Self>) -> Option<Bytes> {
        None
    }

    /// What the shelf may keep of a spec. Take the secrets out here.
    fn kept(&self, spec: &Spec<Self>) -> Spec<Self> {
        spec.clone()
    }
}

/// What [`Maker::look`] saw.
#[derive(Clone, Debug)]
pub struct Look<K: Kind> {
    /// How far it is.
    pub phase: Phase,
    /// What it is.
    pub is: K::Observed,
    /// The last readings of lives that ended.
    pub final_usage: Vec<Reading>,
}

impl<K: Kind> Look<K> {
    /// A thing that is as its spec wants it.
    pub fn settled(is: K::Observed) -> Self {
        Self { phase: Phase::Settled, is, final_usage: Vec::new() }
    }
}

/// What a maker of VMs has beside [`Maker`].
#[async_trait]
pub trait VmMaker: Maker<Kind = Vm> {
    /// Opens the console of a VM that exists, as [`Hypervisor::console`].
    async fn console(&self, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>>;
}

#[async_trait]
impl<M: VmMaker> Hypervisor for Base<M> {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        None
    }

    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        None
    }

    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.own(cx, vm)?;
        self.maker().console(vm, from).await
    }
}

/// What a maker of volumes has beside [`Maker`].
#[async_trait]
pub trait PoolMaker: Maker<Kind = PoolVolume> {
    /// Keeps older writers out, as [`VolumePool::fence`].
    async fn fence(&self, volume: Id<PoolVolume>, below: Term) -> Result<Fenced>;
}

#[async_trait]
impl<M: PoolMaker> VolumePool for Base<M> {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        None
    }

    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        None
    }

    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let maker = Arc::clone(self.maker());
        self.act(cx, volume, move || async move { maker.fence(volume, below).await }).await
    }
}

impl<M: Maker<Kind = Access>> VolumeAccess for Base<M> {}
