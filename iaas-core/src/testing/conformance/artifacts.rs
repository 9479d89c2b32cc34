//! The contract of [`Artifacts`].

use async_trait::async_trait;
use bytes::Bytes;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::fresh;
use super::calls::id;
use super::calls::ours;
use super::calls::until;
use super::converge;
use super::demand;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use super::should_fail;
use crate::Digest;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::Rev;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::artifact::Artifact;
use crate::spi::artifact::Artifacts;

/// A store of blobs under test. [`blob`] is what [`ConvergeRig::spec`] names and [`ConvergeRig::drive`] uploads.
#[async_trait]
pub trait ArtifactsRig: ConvergeRig<Artifact> + Rig<Provider = dyn Artifacts> {}

#[async_trait]
impl<R: ArtifactsRig, W: Wrap<dyn Artifacts>> ArtifactsRig for Wrapped<R, W> {}

/// The bytes of the blob with that number.
pub fn blob(number: u32) -> Bytes {
    Bytes::from(format!("blob number {number}\n").repeat(1000))
}

/// Uploads a blob, if it is not there.
///
/// # Errors
/// As the upload's.
pub async fn upload(artifacts: &dyn Artifacts, cx: &Ctx, id: Id<Artifact>, bytes: &[u8]) -> Result<()> {
    let mut stream = artifacts.upload(cx, id).await?;
    for part in bytes.chunks(4096) {
        stream.write(Bytes::copy_from_slice(part)).await?;
    }
    stream.close().await
}

/// The checks, in the order of the contracts. Every digest is a good spec, so `bad-spec-invalid` says nothing.
pub fn suite() -> Vec<Check<dyn ArtifactsRig>> {
    let mut all = converge::checks::<Artifact, dyn ArtifactsRig>();
    all.retain(|check| check.clause != "bad-spec-invalid");
    all.extend([
        Check::<dyn ArtifactsRig> { clause: "upload-verified", run: |rig| Box::pin(upload_verified(rig)) },
        Check { clause: "upload-resumes", run: |rig| Box::pin(upload_resumes(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl ArtifactsRig) -> Report {
    super::run::<dyn ArtifactsRig>("artifacts", &suite(), rig).await
}

type Rigged<'a> = &'a dyn ArtifactsRig;

async fn upload_verified(rig: Rigged<'_>) -> Verdict {
    let artifacts = fresh(rig).await?;
    let id = id();
    should("ensure", artifacts.ensure(&ours(1), id, Rev(1), &Digest::of(&blob(1))).await)?;
    let wrong = upload(&*artifacts, &ours(1), id, &blob(2)).await;
    should_fail("an upload of other bytes", ErrorKind::Invalid, wrong)?;
    let seen = until(rig, &*artifacts, &ours(1), id, "stay", |_| true).await?;
    demand!(seen.phase != Phase::Settled, "it has settled on other bytes than its digest names");
    should("the right upload", upload(&*artifacts, &ours(1), id, &blob(1)).await)?;
    let settled = |seen: &crate::spi::Seen<Artifact>| seen.phase == Phase::Settled;
    let seen = until(rig, &*artifacts, &ours(1), id, "settle", settled).await?;
    let size = blob(1).len() as u64;
    demand!(seen.is.size == size, "{size} bytes were uploaded, it says {}", seen.is.size);
    Ok(())
}

async fn upload_resumes(rig: Rigged<'_>) -> Verdict {
    let artifacts = fresh(rig).await?;
    let id = id();
    should("ensure", artifacts.ensure(&ours(1), id, Rev(1), &Digest::of(&blob(1))).await)?;
    let mut broken = should("an upload", artifacts.upload(&ours(1), id).await)?;
    should("a part", broken.write(blob(1).slice(..5000)).await)?;
    drop(broken);
    should("the upload from its beginning", upload(&*artifacts, &ours(1), id, &blob(1)).await)?;
    until(rig, &*artifacts, &ours(1), id, "settle", |seen| seen.phase == Phase::Settled).await?;
    Ok(())
}
