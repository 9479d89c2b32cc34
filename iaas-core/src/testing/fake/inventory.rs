//! The fake machine of a host, and the fake of its power button.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;

use super::base::Base;
use super::base::Fence;
use super::base::provider_by_base;
use super::world::Landed;
use super::world::Standing;
use super::world::Thing;
use super::world::World;
use super::world::lock;
use crate::Id;
use crate::Result;
use crate::model::Host;
use crate::spi::Ctx;
use crate::spi::Site;
use crate::spi::Stamp;
use crate::spi::host::CpuFacts;
use crate::spi::host::HostFacts;
use crate::spi::host::HostInventory;
use crate::spi::host::Power;

/// A machine that exists only in a [`World`].
#[derive(Debug)]
pub struct FakeInventory {
    base: Base,
    stand: Arc<Machine>,
}

#[derive(Debug)]
struct Machine {
    fence: Arc<Fence>,
    facts: Mutex<HostFacts>,
}

impl FakeInventory {
    /// Opens the machine of `host`: 64 hardware threads and 256 GiB at first.
    pub fn open(world: &World, host: Id<Host>) -> Self {
        let site = Site::Host(host);
        let make = || Machine { fence: Arc::new(Fence::new(world)), facts: Mutex::new(facts()) };
        let stand = world.stand(site, "inventory", make);
        Self { base: Base::new(world, site, "inventory", stand.fence.clone()), stand }
    }

    /// Changes what the machine is made of.
    pub fn set(&self, facts: HostFacts) {
        *lock(&self.stand.facts) = facts;
    }
}

fn facts() -> HostFacts {
    HostFacts {
        hostname: Some("fake".into()),
        cpu: Some(CpuFacts { threads: 64, cores: Some(32), ..CpuFacts::default() }),
        memory: Some(256 << 30),
        memory_available: Some(256 << 30),
        virtualization: Some("fake: VMs exist only in memory".into()),
        ..HostFacts::default()
    }
}

provider_by_base!(FakeInventory);

#[async_trait]
impl HostInventory for FakeInventory {
    async fn facts(&self, _: &Ctx) -> Result<HostFacts> {
        self.base.world.alive().await;
        Ok(lock(&self.stand.facts).clone())
    }

    async fn lease(&self, cx: &Ctx, _: Duration) -> Result<Stamp> {
        let _inside = self.base.enter(cx).await?;
        Ok(self.base.world.stamp())
    }
}

impl Standing for Machine {
    fn things(&self) -> Vec<Thing> {
        Vec::new()
    }
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// The power of the hosts of a [`World`]: on until it is turned off.
#[derive(Debug)]
pub struct FakePower {
    base: Base,
    stand: Arc<Switches>,
}

#[derive(Debug)]
struct Switches {
    fence: Arc<Fence>,
    off: Mutex<BTreeMap<Id<Host>, bool>>,
}

impl FakePower {
    /// Opens the controller of `host`.
    pub fn open(world: &World, host: Id<Host>) -> Self {
        let site = Site::Host(host);
        let make = || Switches { fence: Arc::new(Fence::new(world)), off: Mutex::default() };
        let stand = world.stand(site, "power", make);
        Self { base: Base::new(world, site, "power", stand.fence.clone()), stand }
    }
}

provider_by_base!(FakePower);

#[async_trait]
impl Power for FakePower {
    async fn is_on(&self, _: &Ctx, host: Id<Host>) -> Result<bool> {
        self.base.world.alive().await;
        Ok(!lock(&self.stand.off).get(&host).copied().unwrap_or(false))
    }

    async fn set(&self, cx: &Ctx, host: Id<Host>, on: bool) -> Result<()> {
        let _inside = self.base.enter(cx).await?;
        let strike = self.base.world.strike(self.base.site, "power", host.object(), cx.call.epoch);
        if strike.landed == Landed::Whole {
            lock(&self.stand.off).insert(host, !on);
        }
        self.base.world.finish(strike, ()).await
    }
}

impl Standing for Switches {
    fn things(&self) -> Vec<Thing> {
        Vec::new()
    }
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
