//! Where the audit log is copied to.

use std::fmt::Debug;

use async_trait::async_trait;
use bytes::Bytes;

use crate::Result;

/// Follows the audit log, off the path of effects.
///
/// # Contract
/// 1. `append-idempotent`: leaves that were taken before change nothing.
/// 2. `append-gapless`: a batch that begins after the end of what was taken is refused with `Conflict`.
///
/// Prove yours with `testing::conformance::small` (feature `conformance`).
#[async_trait]
pub trait AuditSink: Debug + Send + Sync + 'static {
    /// Takes `leaves`, the first of which has index `first`, and the checkpoint that covers them.
    async fn append(&self, first: u64, leaves: &[Bytes], checkpoint: &str) -> Result<()>;
}
