//! The fake store of kernels and initrds on a host.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::site::FakeKind;
use super::site::FakeSite;
use super::site::Look;
use super::site::Place;
use super::site::Stand;
use super::world::Landed;
use super::world::World;
use crate::Digest;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::model::Host;
use crate::spi::ByteStream;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Site;
use crate::spi::artifact::Artifact;
use crate::spi::artifact::ArtifactObserved;
use crate::spi::artifact::Artifacts;

const NAME: &str = "artifacts";
/// The largest blob, in bytes, so that a peer cannot fill the memory.
const MAX_BLOB: usize = 1 << 30;

/// Blobs that exist only in a [`World`].
pub type FakeArtifacts = FakeSite<Artifact>;

impl FakeSite<Artifact> {
    /// Opens the blobs of `host`.
    pub fn open(world: &World, host: Id<Host>) -> Self {
        Self::stand(world, Site::Host(host), NAME, None, &[])
    }

    /// The bytes of a blob that has arrived.
    pub fn blob(&self, id: Id<Artifact>) -> Option<Bytes> {
        self.touch(id, |_, _, body| body.blob.clone()).flatten()
    }
}

/// A blob in the world.
#[derive(Debug)]
pub struct Blob {
    digest: Digest,
    blob: Option<Bytes>,
}

impl FakeKind for Artifact {
    type Body = Blob;

    fn check(_: &Place, _: Option<&Digest>, _: &Digest) -> Result<()> {
        Ok(())
    }

    fn apply(_: &Place, _: Id<Self>, body: Option<Blob>, digest: &Digest) -> Blob {
        body.filter(|b| b.digest == *digest).unwrap_or(Blob { digest: *digest, blob: None })
    }

    fn look(_: &Place, _: Id<Self>, _: &Digest, body: &mut Blob) -> Look<Self> {
        let size = body.blob.as_ref().map_or(0, |b| b.len() as u64);
        let mut look: Look<Self> = Look::settled(ArtifactObserved { size });
        if body.blob.is_none() {
            look.phase = Phase::Working { done: 0, total: None, poll_in: Duration::from_millis(100) };
        }
        look
    }
}

/// Refuses if no blob with `digest` is on the host of `place`.
pub(super) fn need(place: &Place, digest: Digest) -> Result<()> {
    let stand = place.world.standing::<Stand<Artifact>>(place.site, NAME);
    let found = stand.and_then(|s| s.find(|_, _, b| (b.digest == digest && b.blob.is_some()).then_some(())));
    found.ok_or_else(|| {
        Error::not_found(format!("the artifact {digest} is not on this host"))
            .remedy("ensure it with `Artifacts`, and upload it, before the VM")
    })
}

#[async_trait]
impl Artifacts for FakeSite<Artifact> {
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>> {
        let seen = self.observe(cx, id).await?;
        seen.ok_or_else(|| {
            Error::not_found("there is no artifact with this id").remedy("ensure it first").about(id.object())
        })?;
        let site = Arc::new(self.again());
        Ok(Box::new(Upload { site, cx: cx.clone(), id, bytes: Vec::new(), closed: false }))
    }
}

impl FakeSite<Artifact> {
    fn again(&self) -> Self {
        Self { base: self.base.clone(), place: self.place.clone(), stand: self.stand.clone() }
    }

    /// Keeps the bytes of an upload, if they are the right ones.
    async fn land(&self, cx: &Ctx, id: Id<Artifact>, bytes: Bytes) -> Result<()> {
        let _inside = self.base.enter(cx).await?;
        let digest = self.touch(id, |_, digest, _| *digest);
        let digest = digest.ok_or_else(|| Error::not_found("the artifact was removed during its upload"))?;
        if Digest::of(&bytes) != digest {
            return Err(Error::invalid(format!("the uploaded bytes do not have the digest {digest}"))
                .remedy("upload the right file")
                .about(id.object()));
        }
        let strike = self.place.world.strike(self.place.site, "upload", id.object(), cx.call.epoch);
        if strike.landed == Landed::Whole {
            self.touch(id, |_, _, body| body.blob = Some(bytes));
        }
        self.base.wake(id.object());
        self.place.world.finish(strike, ()).await
    }
}

struct Upload {
    site: Arc<FakeSite<Artifact>>,
    cx: Ctx,
    id: Id<Artifact>,
    bytes: Vec<u8>,
    closed: bool,
}

#[async_trait]
impl ByteStream for Upload {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        Ok(None)
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if self.closed {
            return Err(Error::conflict("the upload is closed"));
        }
        if self.bytes.len() + bytes.len() > MAX_BLOB {
            return Err(Error::invalid("the artifact is larger than 1 GiB"));
        }
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.bytes).into();
        self.site.land(&self.cx, self.id, bytes).await
    }
}
