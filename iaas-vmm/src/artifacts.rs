//! Kernels and initrds of one host, in a folder by digest.
//!
//! `<state>/artifacts/<uuid>/` is one artifact: `tag.cbor`, and `blob` once its bytes have arrived and been checked. Bytes
//! on their way are in `upload-…`. What has a `blob` had the right digest when it was synced.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Digest;
use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::id::Cloud;
use iaas_core::model::Host;
use iaas_core::process::HostFence;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Provider;
use iaas_core::spi::Pull;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Tag;
use iaas_core::spi::artifact::Artifact;
use iaas_core::spi::artifact::ArtifactObserved;
use iaas_core::spi::artifact::Artifacts;
use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use crate::files;

/// The artifacts in a state folder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ArtifactFolder {
    root: PathBuf,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Label {
    version: u16,
    tag: Tag,
    digest: Digest,
}

impl ArtifactFolder {
    /// The artifacts of the host with that state folder.
    pub fn at(state: &Path) -> Self {
        Self { root: state.join("artifacts") }
    }

    /// Opens the blob with `digest` for reading.
    ///
    /// # Errors
    /// `NotFound`: it is not on this host.
    pub fn open(&self, digest: Digest) -> Result<File> {
        for id in self.ids()? {
            if self.label(id)?.is_some_and(|label| label.digest == digest)
                && let Ok(file) = File::open(self.blob(id))
            {
                return Ok(file);
            }
        }
        Err(Error::not_found(format!("the artifact {digest} is not on this host"))
            .remedy("ensure it with `Artifacts`, and upload it, before the VM"))
    }

    fn folder(&self, id: Uuid) -> PathBuf {
        self.root.join(id.to_string())
    }

    fn blob(&self, id: Uuid) -> PathBuf {
        self.folder(id).join("blob")
    }

    fn label_path(&self, id: Uuid) -> PathBuf {
        self.folder(id).join("tag.cbor")
    }

    fn label(&self, id: Uuid) -> Result<Option<Label>> {
        files::load(&self.label_path(id))
    }

    fn ids(&self) -> Result<Vec<Uuid>> {
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(files::cannot("read", &self.root, &e)),
        };
        let mut ids: Vec<Uuid> =
            entries.filter_map(|entry| Uuid::try_parse(entry.ok()?.file_name().to_str()?).ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn seen(&self, id: Uuid, label: &Label) -> Seen<Artifact> {
        let size = std::fs::metadata(self.blob(id)).map(|data| data.len());
        let phase = match size {
            Ok(_) => Phase::Settled,
            Err(_) => Phase::Working { done: 0, total: None, poll_in: LOOK },
        };
        let is = ArtifactObserved { size: size.unwrap_or(0) };
        Seen { applied: label.tag.rev, phase, at: files::stamp(), is, final_usage: Vec::new() }
    }

    /// Writes the label; another digest drops the blob first.
    fn put(&self, id: Uuid, label: &Label) -> Result<()> {
        if self.label(id)?.is_some_and(|old| old.digest != label.digest) {
            files::gone(std::fs::remove_file(self.blob(id)), &self.blob(id))?;
        }
        files::make_folder(&self.folder(id))?;
        files::sync_folder(&self.root)?;
        files::store(&self.label_path(id), label)
    }

    /// Removes what a crash left: uploads of `cloud`, which nobody goes on with, and folders without a label.
    fn clean(&self, cloud: Id<Cloud>) -> Result<()> {
        for id in self.ids()? {
            let folder = self.folder(id);
            let whole = match self.label(id) {
                Ok(Some(label)) if label.tag.cloud != cloud => continue,
                Ok(label) => label.is_some(),
                // Seen by `inventory`, and no reason not to lead.
                Err(_) => continue,
            };
            let entries = std::fs::read_dir(&folder).map_err(|e| files::cannot("read", &folder, &e))?;
            let stale = |name: &str| name.starts_with(UPLOAD) || (!whole && name == "tag.new");
            for entry in entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(stale)) {
                files::gone(std::fs::remove_file(entry.path()), &entry.path())?;
            }
            if !whole {
                // Only an empty one goes.
                let _ = std::fs::remove_dir(&folder);
            }
        }
        Ok(())
    }

    /// The label goes last, so that what a crash leaves still says whose it was.
    fn delete(&self, id: Uuid) -> Result<()> {
        let folder = self.folder(id);
        let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(()) };
        for entry in entries.flatten().filter(|entry| entry.path() != self.label_path(id)) {
            files::gone(std::fs::remove_file(entry.path()), &entry.path())?;
        }
        files::gone(std::fs::remove_file(self.label_path(id)), &folder)?;
        files::gone(std::fs::remove_dir(&folder), &folder)?;
        files::sync_folder(&self.root)
    }
}

/// The [`Artifacts`] of one host, in its state folder.
#[derive(Clone, Debug)]
pub struct HostArtifacts {
    host: Id<Host>,
    install: Uuid,
    state: PathBuf,
    cloud: Id<Cloud>,
    folder: ArtifactFolder,
}

impl HostArtifacts {
    /// Opens the artifacts of a host. `cloud` is the one whose newest epoch `hello` tells; calls of others are served too.
    ///
    /// # Errors
    /// `Unavailable`: the state folder cannot be used.
    pub fn open(state: &Path, cloud: Id<Cloud>, host: Id<Host>) -> Result<Self> {
        let folder = ArtifactFolder::at(state);
        files::make_folder(&folder.root)?;
        Ok(Self { host, install: files::install(state)?, state: state.to_owned(), cloud, folder })
    }

    fn fence(&self, cloud: Id<Cloud>) -> Result<HostFence> {
        HostFence::open(&self.state, cloud, Site::Host(self.host))
    }

    fn hello_to(&self, cloud: Id<Cloud>) -> Result<Hello> {
        Ok(Hello {
            product: concat!("iaas-vmm artifacts ", env!("CARGO_PKG_VERSION")).to_owned(),
            protocol: (1, 1),
            site: Site::Host(self.host),
            install: self.install,
            newest: self.fence(cloud)?.newest()?,
            seal_to: None,
            kinds: [Artifact::NAME.to_owned()].into(),
            caps: Default::default(),
        })
    }

    fn owned(&self, call: &Call, id: Id<Artifact>) -> Result<Option<Label>> {
        let label = self.folder.label(id.uuid())?;
        if label.is_some_and(|label| label.tag.cloud != call.cloud) {
            return Err(Error::conflict("this id is taken by something that is not ours").about(id.object()));
        }
        Ok(label)
    }
}

impl HostArtifacts {
    fn may_remove(&self, call: &Call, id: Id<Artifact>, upto: Rev) -> Result<()> {
        let label = self.owned(call, id)?;
        if label.is_some_and(|l| l.tag.incarnation != call.incarnation || l.tag.rev > upto) {
            return Err(Error::conflict("the artifact was changed by somebody who knows more")
                .remedy("look at it again")
                .about(id.object()));
        }
        Ok(())
    }
}

#[async_trait]
impl Provider for HostArtifacts {
    async fn hello(&self) -> Result<Hello> {
        self.hello_to(self.cloud)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.fence(cx.call.cloud)?.claim(&cx.call).await?;
        self.folder.clean(cx.call.cloud)?;
        self.hello_to(cx.call.cloud)
    }

    async fn changes(&self, _cx: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(Box::new(Silent))
    }

    async fn usage(&self, _cx: &Ctx, _after: Option<ObjectRef>, _limit: usize) -> Result<Vec<Reading>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Converge<Artifact> for HostArtifacts {
    #[tracing::instrument(name = "artifact.ensure", skip_all, fields(op = %cx.call.op, artifact = %id))]
    async fn ensure(&self, cx: &Ctx, id: Id<Artifact>, rev: Rev, spec: &Digest) -> Result<Seen<Artifact>> {
        let fence = self.fence(cx.call.cloud)?;
        let _effect = fence.enter(&cx.call).await?;
        let old = self.owned(&cx.call, id)?;
        let newer = |label: &Label| label.tag.incarnation == cx.call.incarnation && rev < label.tag.rev;
        if let Some(old) = old.filter(newer) {
            let text = format!("revision {rev} is older than {}, which was accepted", old.tag.rev);
            return Err(Error::conflict(text).about(id.object()));
        }
        let tag = Tag { cloud: cx.call.cloud, incarnation: cx.call.incarnation, rev };
        let label = Label { version: 1, tag, digest: *spec };
        self.folder.put(id.uuid(), &label)?;
        Ok(self.folder.seen(id.uuid(), &label))
    }

    #[tracing::instrument(name = "artifact.remove", skip_all, fields(op = %cx.call.op, artifact = %id))]
    async fn remove(&self, cx: &Ctx, id: Id<Artifact>, upto: Rev) -> Result<()> {
        // Before the fence too: a copy of the store is told about the tag, not about its epoch.
        self.may_remove(&cx.call, id, upto)?;
        let fence = self.fence(cx.call.cloud)?;
        let _effect = fence.enter(&cx.call).await?;
        self.may_remove(&cx.call, id, upto)?;
        self.folder.delete(id.uuid())
    }

    async fn observe(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Option<Seen<Artifact>>> {
        let label = self.folder.label(id.uuid())?.filter(|label| label.tag.cloud == cx.call.cloud);
        Ok(label.map(|label| self.folder.seen(id.uuid(), &label)))
    }

    async fn inventory(
        &self,
        cx: &Ctx,
        after: Option<Id<Artifact>>,
        limit: usize,
    ) -> Result<Vec<Found<Artifact>>> {
        let mut found = Vec::new();
        for id in self.folder.ids()?.into_iter().map(Id::<Artifact>::from_uuid) {
            if found.len() >= limit || after.is_some_and(|after| id <= after) {
                continue;
            }
            let Some(label) = self.folder.label(id.uuid())? else { continue };
            if label.tag.cloud == cx.call.cloud {
                let seen = Ok(self.folder.seen(id.uuid(), &label));
                found.push(Found { id, tag: label.tag, passport: None, seen });
            }
        }
        Ok(found)
    }
}

#[async_trait]
impl Artifacts for HostArtifacts {
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>> {
        let label = self.owned(&cx.call, id)?.ok_or_else(|| {
            Error::not_found("there is no artifact with this id").remedy("ensure it first").about(id.object())
        })?;
        // A name of its own for each upload: one that broke off cannot mix with the next.
        let path = self.folder.folder(id.uuid()).join(format!("{UPLOAD}{}", Uuid::new_v4().simple()));
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| files::cannot("made", &path, &e))?;
        let call = cx.call.clone();
        let part = Part { file, path, hash: Sha256::new(), size: 0 };
        Ok(Box::new(Upload { artifacts: self.clone(), call, id, label, part: Some(part) }))
    }
}

/// Bytes on their way. Dropped before it is closed, nothing is kept of it.
struct Upload {
    artifacts: HostArtifacts,
    call: Call,
    id: Id<Artifact>,
    label: Label,
    part: Option<Part>,
}

struct Part {
    file: File,
    path: PathBuf,
    hash: Sha256,
    size: u64,
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[async_trait]
impl ByteStream for Upload {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        Ok(None)
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let part = self.part.as_mut().ok_or_else(|| Error::conflict("the upload is closed"))?;
        part.size += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if part.size > BLOB_MAX {
            return Err(Error::invalid("the artifact is larger than 4 GiB").about(self.id.object()));
        }
        part.hash.update(&bytes);
        part.file.write_all(&bytes).map_err(|e| files::cannot("written", &part.path, &e))
    }

    async fn close(&mut self) -> Result<()> {
        let Some(part) = self.part.take() else { return Ok(()) };
        let fence = self.artifacts.fence(self.call.cloud)?;
        let _effect = fence.enter(&self.call).await?;
        let digest = Digest(part.hash.clone().finalize().into());
        if digest != self.label.digest {
            let text = format!("the uploaded bytes do not have the digest {}", self.label.digest);
            return Err(Error::invalid(text).remedy("upload the right file").about(self.id.object()));
        }
        let (id, folder) = (self.id.uuid(), &self.artifacts.folder);
        if folder.label(id)?.map(|label| label.digest) != Some(digest) {
            return Err(Error::conflict("the artifact was changed during its upload").about(self.id.object()));
        }
        part.file.sync_all().map_err(|e| files::cannot("synced", &part.path, &e))?;
        std::fs::rename(&part.path, folder.blob(id)).map_err(|e| files::cannot("kept", &part.path, &e))?;
        files::sync_folder(&folder.folder(id))
    }
}

/// Artifacts change only by calls of whoever would listen.
#[derive(Debug)]
struct Silent;

#[async_trait]
impl Pull<ObjectRef> for Silent {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        std::future::pending().await
    }
}

/// Before the name of an upload.
const UPLOAD: &str = "upload-";
/// The largest blob, so that a peer cannot fill the disk by one upload.
const BLOB_MAX: u64 = 4 << 30;
/// When to look again for bytes that have not arrived.
const LOOK: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use iaas_core::Epoch;
    use iaas_core::spi::Cancel;

    use super::*;

    const CLOUD: Id<Cloud> = Id::from_uuid(Uuid::from_u128(1));

    fn cx(epoch: u64) -> Ctx {
        let call = Call {
            cloud: CLOUD,
            incarnation: Uuid::from_u128(2),
            epoch: Epoch(epoch),
            op: Id::from_uuid(Uuid::nil()),
            trace: None,
            budget: Duration::from_secs(60),
        };
        Ctx { call, cancel: Cancel::new() }
    }

    #[tokio::test]
    async fn what_a_killed_upload_or_ensure_left_goes_with_the_next_claim() {
        let dir = tempfile::tempdir().unwrap();
        let open = || HostArtifacts::open(dir.path(), CLOUD, Id::from_uuid(Uuid::from_u128(3))).unwrap();
        let (id, artifacts) = (Id::<Artifact>::from_uuid(Uuid::from_u128(4)), open());
        artifacts.claim(&cx(1)).await.unwrap();
        artifacts.ensure(&cx(1), id, Rev(1), &Digest::of(b"kernel")).await.unwrap();
        let mut upload = artifacts.upload(&cx(1), id).await.unwrap();
        upload.write(Bytes::from_static(b"ker")).await.unwrap();
        std::mem::forget(upload);
        let half = artifacts.folder.folder(Uuid::from_u128(5));
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join("tag.new"), b"torn").unwrap();

        let artifacts = open();
        artifacts.claim(&cx(2)).await.unwrap();
        assert!(!half.exists());
        let names = std::fs::read_dir(artifacts.folder.folder(id.uuid())).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["tag.cbor"]);
        let mut upload = artifacts.upload(&cx(2), id).await.unwrap();
        upload.write(Bytes::from_static(b"kernel")).await.unwrap();
        upload.close().await.unwrap();
        assert_eq!(artifacts.observe(&cx(2), id).await.unwrap().unwrap().phase, Phase::Settled);
    }
}
