//! The fake pool of volumes, and access to them on a host.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::block_device::Disk;
use super::hypervisor::MAX_PASSPORT;
use super::opener;
use super::site::FakeKind;
use super::site::FakeSite;
use super::site::Look;
use super::site::Place;
use super::site::Stand;
use super::world::Landed;
use super::world::World;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::Term;
use crate::id::Pool;
use crate::model::Host;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Site;
use crate::spi::block::Access;
use crate::spi::block::AccessObserved;
use crate::spi::block::AccessSpec;
use crate::spi::block::Fenced;
use crate::spi::block::Health;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeObserved;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumeJob;
use crate::spi::block::VolumePool;
use crate::spi::block::VolumeSnapshot;
use crate::spi::block::cap;
use crate::spi::target::Target;

const NAME: &str = "pool";

/// Volumes that exist only in a [`World`].
pub type FakePool = FakeSite<PoolVolume>;
/// Access of one host to a [`FakePool`].
pub type FakeAccess = FakeSite<Access>;

impl FakeSite<PoolVolume> {
    /// Opens `pool`.
    pub fn open(world: &World, pool: Id<Pool>) -> Self {
        Self::stand(world, Site::Pool(pool), NAME, None, &[cap::GROW])
    }

    /// The bytes that all volumes of the pool use.
    pub fn used(&self) -> u64 {
        let mut sum = 0;
        self.stand.find(|_, _, disk| {
            sum += disk.used();
            None::<()>
        });
        sum
    }
}

impl FakeKind for PoolVolume {
    type Body = Arc<Disk>;

    fn check(_: &Place, old: Option<&PoolVolumeSpec>, spec: &PoolVolumeSpec) -> Result<()> {
        if spec.size == 0 || !spec.size.is_multiple_of(4096) {
            return Err(Error::invalid(format!("a volume of {} bytes", spec.size))
                .remedy("use a multiple of 4096 bytes"));
        }
        if old.is_some_and(|old| spec.size < old.size) {
            return Err(Error::invalid("a volume cannot shrink").remedy("make a smaller one and copy"));
        }
        if spec.passport.len() > MAX_PASSPORT {
            return Err(Error::invalid("the passport is too large").remedy("use at most 16 KiB"));
        }
        if spec.from.is_some() {
            return Err(Error::unsupported("this pool makes no clones").remedy("ask its capabilities first"));
        }
        Ok(())
    }

    fn apply(_: &Place, _: Id<Self>, body: Option<Arc<Disk>>, spec: &PoolVolumeSpec) -> Arc<Disk> {
        let disk = body.unwrap_or_default();
        disk.grow(spec.size);
        disk
    }

    fn look(_: &Place, _: Id<Self>, _: &PoolVolumeSpec, disk: &mut Arc<Disk>) -> Look<Self> {
        Look::settled(PoolVolumeObserved {
            size: disk.size(),
            unique: disk.used(),
            writer: disk.writer(),
            health: Health::Good,
        })
    }

    fn gone(_: &Place, _: Id<Self>, disk: &mut Arc<Disk>) {
        disk.destroy();
    }

    fn passport(spec: &PoolVolumeSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }
}

#[async_trait]
impl VolumePool for FakeSite<PoolVolume> {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        None
    }

    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        None
    }

    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let _inside = self.base.enter(cx).await?;
        let disk = self.touch(volume, |_, _, disk| disk.clone()).ok_or_else(|| {
            Error::not_found("there is no volume with this id in the pool").about(volume.object())
        })?;
        let strike = self.place.world.strike(self.place.site, "fence", volume.object(), cx.call.epoch);
        if strike.landed != Landed::No {
            disk.fence(below);
        }
        self.place.world.finish(strike, Fenced::Done(below)).await
    }
}

/// The disk of a volume that stands in the world.
pub(super) fn disk(world: &World, pool: Id<Pool>, volume: Id<PoolVolume>) -> Option<Arc<Disk>> {
    world.standing::<Stand<PoolVolume>>(Site::Pool(pool), NAME)?.touch(volume, |_, disk| disk.clone())
}

impl FakeSite<Access> {
    /// Opens the access of `host` to `pool`.
    pub fn open(world: &World, host: Id<Host>, pool: Id<Pool>) -> Self {
        Self::stand(world, Site::Host(host), &format!("access to {pool}"), Some(Site::Pool(pool)), &[])
    }
}

impl FakeKind for Access {
    type Body = ();

    fn check(place: &Place, _: Option<&AccessSpec>, spec: &AccessSpec) -> Result<()> {
        if place.beside == Some(Site::Pool(spec.pool)) {
            return Ok(());
        }
        Err(Error::invalid(format!("the pool {} is not the one of this provider", spec.pool))
            .remedy("call the provider of that pool on this host"))
    }

    fn apply(_: &Place, _: Id<Self>, _: Option<()>, _: &AccessSpec) {}

    fn look(place: &Place, _: Id<Self>, spec: &AccessSpec, _: &mut ()) -> Look<Self> {
        let mut look: Look<Self> = Look::settled(AccessObserved { target: None });
        match disk(&place.world, spec.pool, spec.volume) {
            Some(_) => look.is.target = Some(target(spec)),
            None => {
                look.phase = Phase::Blocked(
                    Error::not_found("the volume is not in the pool").about(spec.volume.object()),
                );
            }
        }
        look
    }
}

fn target(spec: &AccessSpec) -> Target {
    Target {
        id: spec.volume.uuid(),
        term: spec.term,
        mode: spec.mode,
        forms: vec![opener::form(&[spec.pool.uuid(), spec.volume.uuid()])],
        key: None,
    }
}

impl VolumeAccess for FakeSite<Access> {}
