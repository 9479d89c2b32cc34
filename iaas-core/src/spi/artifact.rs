//! Kernels, initrds and firmware, brought to a host by digest.

use async_trait::async_trait;

use super::ByteStream;
use super::Converge;
use super::Ctx;
use super::contract::kind;
use crate::Digest;
use crate::Id;
use crate::Result;

kind!(
    /// A blob on one host. Its spec is its digest.
    Artifact, "artifact", holds_data: false, Digest => ArtifactObserved
);

/// A blob as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ArtifactObserved {
    /// Bytes that have arrived; the blob is usable when the phase is settled.
    pub size: u64,
}

/// Keeps blobs on one host.
///
/// # Contract
/// The clauses of [`Provider`](super::Provider) and of [`Converge<Artifact>`], and:
/// 1. `upload-verified`: an artifact is settled only when the bytes uploaded have the digest of its spec; other bytes are
///    refused with `Invalid` when the upload is closed, and nothing is kept of them.
/// 2. `upload-resumes`: an upload that broke off can be started again from its beginning.
///
/// Prove yours with `testing::conformance::artifacts` (feature `conformance`).
#[async_trait]
pub trait Artifacts: Converge<Artifact> {
    /// Opens a stream to write the blob of `id` to; `close` checks the digest.
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>>;
}
