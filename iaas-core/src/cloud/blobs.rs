//! Where the bytes of kernels and initrds are kept until hosts have them: in a folder or in memory, by digest.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use async_trait::async_trait;
use bytes::Bytes;

use crate::Digest;
use crate::Error;
use crate::Result;
use crate::engine::sites::Blobs;
use crate::spi::Feed;
use crate::spi::Pull;

/// Blobs in memory: gone with the process.
#[derive(Debug, Default)]
pub struct MemoryBlobs(Mutex<BTreeMap<Digest, Bytes>>);

#[async_trait]
impl Blobs for MemoryBlobs {
    async fn open(&self, digest: Digest) -> Result<Feed<Bytes>> {
        let blobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = blobs.get(&digest).cloned().ok_or_else(|| absent(digest))?;
        Ok(Box::new(Pieces { rest: bytes }))
    }

    async fn put(&self, bytes: Bytes) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, bytes);
        Ok(digest)
    }
}

/// Blobs as files of a folder of their own, named by digest.
#[derive(Debug)]
pub struct FolderBlobs {
    folder: PathBuf,
}

impl FolderBlobs {
    /// Opens the folder, or makes it (mode 0700).
    ///
    /// # Errors
    /// `Unavailable` names the folder.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|e| broken(&folder, &e))?;
        Ok(Self { folder })
    }
}

#[async_trait]
impl Blobs for FolderBlobs {
    async fn open(&self, digest: Digest) -> Result<Feed<Bytes>> {
        let path = self.folder.join(digest.to_string());
        let bytes = blocking(move || match std::fs::read(&path) {
            Ok(bytes) => Ok(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(absent(digest)),
            Err(e) => Err(broken(&path, &e)),
        })
        .await?;
        Ok(Box::new(Pieces { rest: Bytes::from(bytes) }))
    }

    async fn put(&self, bytes: Bytes) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        let folder = self.folder.clone();
        blocking(move || keep(&folder, digest, &bytes).map_err(|e| broken(&folder, &e))).await?;
        Ok(digest)
    }
}

/// Written beside, made durable, then renamed: a blob is whole or absent.
fn keep(folder: &Path, digest: Digest, bytes: &[u8]) -> std::io::Result<()> {
    let path = folder.join(digest.to_string());
    if path.exists() {
        return Ok(());
    }
    let draft = folder.join(format!(".{digest}.{}", std::process::id()));
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&draft, &path)?;
    std::fs::File::open(folder)?.sync_all()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("a task of the blobs failed").because(&e))?
}

#[derive(Debug)]
struct Pieces {
    rest: Bytes,
}

#[async_trait]
impl Pull<Bytes> for Pieces {
    async fn next(&mut self) -> Option<Result<Bytes>> {
        if self.rest.is_empty() {
            return None;
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        Some(Ok(piece))
    }
}

fn absent(digest: Digest) -> Error {
    Error::not_found(format!("there is no blob {digest}")).remedy("import the image again")
}

fn broken(path: &Path, error: &std::io::Error) -> Error {
    Error::unavailable("a kernel or initrd could not be read or kept")
        .detail(path.display().to_string())
        .because(error)
        .remedy("check the folder's permissions and free space")
}

/// Bytes per piece.
const PIECE: usize = 1 << 20;
