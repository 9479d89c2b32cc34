//! A volume to measure, made and opened by the traits of the data plane.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iaas_core::Epoch;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Cloud;
use iaas_core::id::Pool;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::block::VolumeAccess;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use uuid::Uuid;

/// What a storage back-end is made of.
#[derive(Clone, Debug)]
pub struct VolumeParts {
    /// The cloud in which it was opened.
    pub cloud: Id<Cloud>,
    /// Which pool it is.
    pub id: Id<Pool>,
    /// Makes the volume.
    pub pool: Arc<dyn VolumePool>,
    /// Makes it reachable on this host.
    pub access: Arc<dyn VolumeAccess>,
    /// Opens it.
    pub opener: Arc<dyn BlockOpener>,
}

impl VolumeParts {
    /// Opens the one volume of this pool to write, and makes it first if it is not there. `size` is in bytes.
    ///
    /// # Errors
    /// Those of the parts.
    ///
    /// # Panics
    /// If a part settles without a target.
    pub async fn open(&self, size: u64) -> Result<Box<dyn BlockDevice>> {
        let target = self.target(size).await?;
        let grant = self.opener.prepare(&target)?;
        self.opener.open(&target, grant, None, &Env::default())
    }

    /// What the process that uses the volume is told; otherwise like [`open`](Self::open).
    ///
    /// # Errors
    /// Those of the parts.
    ///
    /// # Panics
    /// If a part settles without a target.
    pub async fn target(&self, size: u64) -> Result<Target> {
        let cx = self.cx();
        let volume = Id::from_uuid(Uuid::from_u128(4));
        let spec =
            PoolVolumeSpec { size, from: None, qos: Qos::default(), key: None, passport: Bytes::new() };
        let right = AccessSpec { pool: self.id, volume, term: Term(1), mode: Mode::Write };
        self.pool.claim(&cx).await?;
        self.access.claim(&cx).await?;
        self.pool.ensure(&cx, volume, Rev(1), &spec).await?;
        let seen = self.access.ensure(&cx, Id::from_uuid(Uuid::from_u128(5)), Rev(2), &right).await?;
        Ok(seen.is.target.expect("a settled access has a target"))
    }

    fn cx(&self) -> Ctx {
        let call = Call {
            cloud: self.cloud,
            incarnation: Uuid::from_u128(6),
            epoch: Epoch(1),
            op: Id::from_uuid(Uuid::nil()),
            trace: None,
            budget: Duration::from_secs(60),
        };
        Ctx { call, cancel: Cancel::new() }
    }
}
