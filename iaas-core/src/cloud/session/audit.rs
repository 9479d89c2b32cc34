//! The audit log, with proofs.

use bytes::Bytes;

use super::Session;
use crate::Error;
use crate::Result;
use crate::engine::audit::Leaf;
use crate::engine::audit::origin;
use crate::engine::audit::read;
use crate::security::actions;
use crate::security::audit::Checkpoint;
use crate::security::audit::InclusionProof;

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

    /// Proves that the leaf at `index` is in the log: the leaf, the proof, and the checkpoint whose root it leads to.
    ///
    /// # Errors
    /// Those of the gate and of the store; `Invalid` if the log is shorter.
    pub async fn prove(&self, index: u64) -> Result<(Bytes, InclusionProof, Checkpoint)> {
        let leaves = self.leaves().await?;
        let driver = self.session.cloud().engine().driver();
        let log = driver.log.lock().await;
        let proof = log.tree.inclusion(index, log.tree.size())?;
        let leaf = usize::try_from(index).ok().and_then(|i| leaves.get(i)).cloned();
        let leaf = leaf.ok_or_else(|| Error::invalid(format!("the audit log has no leaf {index}")))?;
        Ok((leaf, proof, log.tree.checkpoint(&origin(self.session.cloud().id()))?))
    }

    /// The log's entries, in order.
    ///
    /// # Errors
    /// As [`leaves`](Self::leaves).
    pub async fn entries(&self) -> Result<Vec<Leaf>> {
        self.leaves().await?.iter().map(|bytes| read(bytes)).collect()
    }
}
