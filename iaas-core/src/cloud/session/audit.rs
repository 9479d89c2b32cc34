//! The audit log, with proofs.

use bytes::Bytes;

use super::Session;
use crate::Result;
use crate::engine::audit::Leaf;
use crate::engine::audit::read;
use crate::security::actions;

/// The audit log of a cloud.
#[derive(Clone, Debug)]
pub struct Audit {
    session: Session,
}

impl Audit {
    pub(crate) fn new(session: &Session) -> Self {
        Self { session: session.clone() }
    }

    /// The log's leaves, in order, as they enter the tree. Everything committed before the call is in it.
    ///
    /// # Errors
    /// Those of the gate and of the store.
    pub async fn leaves(&self) -> Result<Vec<Bytes>> {
        let request = actions::ReadAudit { cloud: crate::Id::from_uuid(uuid::Uuid::nil()) };
        let _permit = self.session.cloud().gate().check(self.session.principal(), request).await?;
        let driver = self.session.cloud().engine().driver();
        driver.sequence().await?;
        Ok(driver.log.lock().await.leaves.clone())
    }

    /// The log's entries, in order.
    ///
    /// # Errors
    /// As [`leaves`](Self::leaves).
    pub async fn entries(&self) -> Result<Vec<Leaf>> {
        self.leaves().await?.iter().map(|bytes| read(bytes)).collect()
    }
}
