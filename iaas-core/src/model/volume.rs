//! Volumes: disks that outlive the instances that use them.

use serde::Deserialize;
use serde::Serialize;

use super::record::Charge;
use super::record::resource;
use crate::ByteSize;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::id::Pool;
use crate::spi::Phase;
use crate::spi::block::PoolVolumeObserved;
use crate::spi::key::WrappedKey;

resource!(
    /// A disk of a tenant.
    Volume, "volume", VolumeSpec, VolumeBind, VolumeStatus
);

/// A volume's wish: whole MiB, from 1 MiB to 64 TiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawVolume", into = "RawVolume")]
pub struct VolumeSpec {
    size: ByteSize,
}

#[derive(Serialize, Deserialize)]
struct RawVolume {
    size: ByteSize,
}

impl VolumeSpec {
    /// Checks a size.
    ///
    /// # Errors
    /// `Invalid` if it is out of range.
    pub fn new(size: ByteSize) -> Result<Self> {
        if !size.0.is_multiple_of(1 << 20) || !(1..=64 << 20).contains(&(size.0 >> 20)) {
            return Err(Error::invalid(format!("{size} is not the size of a volume"))
                .remedy("use whole MiB, 1 MiB to 64 TiB"));
        }
        Ok(Self { size })
    }

    /// Its size.
    pub fn size(&self) -> ByteSize {
        self.size
    }
}

impl TryFrom<RawVolume> for VolumeSpec {
    type Error = Error;
    fn try_from(raw: RawVolume) -> Result<Self> {
        Self::new(raw.size)
    }
}
impl From<VolumeSpec> for RawVolume {
    fn from(spec: VolumeSpec) -> Self {
        Self { size: spec.size }
    }
}

/// What was decided for a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBind {
    /// The pool.
    pub pool: Option<Id<Pool>>,
    /// The newest writer's number.
    pub writer: Term,
    /// Its data key.
    #[serde(default)]
    pub key: Option<WrappedKey>,
    /// What it counts for.
    pub charge: Charge,
}

/// A volume as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What the pool says.
    pub seen: Option<(Rev, Phase, PoolVolumeObserved)>,
}
