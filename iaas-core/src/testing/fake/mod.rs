//! An in-memory fake for each trait of [`spi`](crate::spi), on one shared [`World`].
//!
//! The fakes are honest: they keep every clause of the contracts, fence old leaders, bill to the digit, and forward and
//! drop frames by the program. They have no memory of their own; everything stands in the world, so that opening a fake
//! again is a restart of its process:
//!
//! ```
//! use std::sync::Arc;
//! use iaas_core::testing::fake::{self, Fault, World};
//! use iaas_core::{Id, SystemClock};
//!
//! let world = World::new(Arc::new(SystemClock::new()));
//! let site = fake::Site::new(&world);
//! let host = site.host();
//! world.fail_next(Fault::ReplyLost); // the next effect happens, but its caller is not told
//! let again = site.reopen(host.id);  // a restart: the same VMs, volumes and ports
//! assert!(world.things().is_empty());
//! # let _ = again;
//! ```
//!
//! [`World::effects`] is every effect in order, [`World::things`] everything that exists.

mod artifacts;
mod base;
mod block_device;
mod console;
mod digits;
mod frame_port;
mod hypervisor;
mod inventory;
mod meter;
mod network;
mod opener;
mod placement;
mod pool;
mod program;
mod security;
mod site;
#[cfg(test)]
mod tests;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Id;
use crate::id::Fabric;
use crate::id::Pool;
use crate::model::Host;
use crate::spi::block::VolumeAccess;
use crate::spi::host::HostProviders;

pub use artifacts::FakeArtifacts;
pub use block_device::FakeDevice;
pub use hypervisor::FakeHypervisor;
pub use inventory::FakeInventory;
pub use inventory::FakePower;
pub use meter::FakeMeter;
pub use network::FakeNetwork;
pub use network::FakePlugs;
pub use opener::FakeOpener;
pub use placement::FakePlacement;
pub use pool::FakeAccess;
pub use pool::FakePool;
pub use security::FakeAuditSink;
pub use security::FakeAuthorizer;
pub use security::FakeKeys;
pub use site::FakeKind;
pub use site::FakeSite;
pub use site::Look;
pub use site::Place;
pub use world::Effect;
pub use world::Fault;
pub use world::Landed;
pub use world::Thing;
pub use world::World;

/// One pool, one fabric, and hosts that reach both.
#[derive(Clone, Debug)]
pub struct Site {
    /// The world that it is in.
    pub world: World,
    /// The pool.
    pub pool: Id<Pool>,
    /// The fabric.
    pub fabric: Id<Fabric>,
}

impl Site {
    /// A new site in `world`.
    pub fn new(world: &World) -> Self {
        let id = || world.clock().uuid();
        Self { world: world.clone(), pool: Id::from_uuid(id()), fabric: Id::from_uuid(id()) }
    }

    /// A new host.
    pub fn host(&self) -> HostProviders {
        self.reopen(Id::from_uuid(self.world.clock().uuid()))
    }

    /// The providers of `id`, as after a restart.
    pub fn reopen(&self, id: Id<Host>) -> HostProviders {
        host(&self.world, id, &[self.pool], self.fabric)
    }

    /// The pool, as after a restart.
    pub fn volumes(&self) -> Arc<FakePool> {
        Arc::new(FakePool::open(&self.world, self.pool))
    }

    /// The network, as after a restart.
    pub fn network(&self) -> Arc<FakeNetwork> {
        Arc::new(FakeNetwork::open(&self.world, self.fabric))
    }
}

/// The fake providers of one host, which reaches `pools` and is on `fabric`.
pub fn host(world: &World, id: Id<Host>, pools: &[Id<Pool>], fabric: Id<Fabric>) -> HostProviders {
    let access = |pool: &Id<Pool>| {
        let access: Arc<dyn VolumeAccess> = Arc::new(FakeAccess::open(world, id, *pool));
        (*pool, access)
    };
    HostProviders {
        id,
        inventory: Arc::new(FakeInventory::open(world, id)),
        hypervisor: Arc::new(FakeHypervisor::open(world, id)),
        artifacts: Arc::new(FakeArtifacts::open(world, id)),
        access: pools.iter().map(access).collect::<BTreeMap<_, _>>(),
        plugs: Arc::new(FakePlugs::open(world, id, fabric)),
        fabric,
        power: Some(Arc::new(FakePower::open(world, id))),
    }
}
