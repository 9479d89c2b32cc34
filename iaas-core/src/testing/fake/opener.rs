//! Opens the targets of the fakes in this process.

use bytes::Bytes;
use uuid::Uuid;

use super::frame_port;
use super::pool;
use super::world::World;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOpener;
use crate::spi::dataplane::Env;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::Grant;
use crate::spi::dataplane::PortOpener;
use crate::spi::dataplane::opener::Key;
use crate::spi::target::Form;
use crate::spi::target::Mode;
use crate::spi::target::Target;

const SCHEME: (&str, u16) = ("fake", 1);

/// The opener of scheme `fake`, for volumes and ports of a [`World`].
#[derive(Clone, Debug)]
pub struct FakeOpener {
    world: World,
}

impl FakeOpener {
    /// Opens what stands in `world`.
    pub fn new(world: &World) -> Self {
        Self { world: world.clone() }
    }
}

/// The form of a target whose token is these ids.
pub(super) fn form(ids: &[Uuid]) -> Form {
    let token: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
    Form::Opener { scheme: SCHEME.0.to_owned(), version: SCHEME.1, token: Bytes::from(token) }
}

/// The ids in the token of a target.
fn ids<const N: usize>(target: &Target) -> Result<[Uuid; N]> {
    let bad =
        || Error::unsupported("no form of this target is a fake's").remedy("use the opener of its scheme");
    let ours = target.forms.iter().find_map(|f| match f {
        Form::Opener { scheme, version, token } if (scheme.as_str(), *version) == SCHEME => Some(token),
        _ => None,
    });
    let token = ours.ok_or_else(bad)?;
    let ids: Vec<Uuid> = token.chunks(16).filter_map(|c| Uuid::from_slice(c).ok()).collect();
    ids.try_into().map_err(|_| bad())
}

impl BlockOpener for FakeOpener {
    fn scheme(&self) -> (&'static str, u16) {
        SCHEME
    }

    fn prepare(&self, target: &Target) -> Result<Grant> {
        ids::<2>(target).map(|_| Grant::default())
    }

    fn open(&self, target: &Target, _: Grant, _: Option<Key>, _: &Env) -> Result<Box<dyn BlockDevice>> {
        let [pool, volume] = ids::<2>(target)?;
        let disk = pool::disk(&self.world, Id::from_uuid(pool), Id::from_uuid(volume))
            .ok_or_else(|| Error::not_found("the volume of this target is gone"))?;
        let device = disk.open(target.mode == Mode::Read)?;
        if target.mode == Mode::Write {
            device.claim(target.term)?;
        }
        Ok(Box::new(device))
    }
}

impl PortOpener for FakeOpener {
    fn scheme(&self) -> (&'static str, u16) {
        SCHEME
    }

    fn prepare(&self, target: &Target) -> Result<Grant> {
        ids::<1>(target).map(|_| Grant::default())
    }

    fn open(&self, target: &Target, _: Grant, _: &Env) -> Result<Vec<Box<dyn FramePort>>> {
        let [port] = ids::<1>(target)?;
        frame_port::open(&self.world, Id::from_uuid(port), target.term)
    }
}
