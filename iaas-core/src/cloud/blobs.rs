//! Where the bytes of kernels and initrds are kept until hosts have them: in a folder or in memory, by digest.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use crate::Digest;
use crate::Error;
use crate::Result;
use crate::engine::sites::Blobs;
use crate::spi::Feed;
use crate::spi::Pull;

/// Blobs in memory: gone with the process.
#[derive(Debug, Default)]
pub struct MemoryBlobs(Mutex<BTreeMap<Digest, (Bytes, Instant)>>);

#[async_trait]
impl Blobs for MemoryBlobs {
    async fn open(&self, digest: Digest) -> Result<Feed<Bytes>> {
        let blobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, _) = blobs.get(&digest).cloned().ok_or_else(|| absent(digest))?;
        Ok(Box::new(Pieces { rest: bytes }))
    }

    async fn put(&self, bytes: Bytes) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, (bytes, Instant::now()));
        Ok(digest)
    }

    async fn retain(&self, wanted: &BTreeSet<Digest>, unused: Duration) -> Result<()> {
        let mut blobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.retain(|digest, (_, put)| wanted.contains(digest) || put.elapsed() <= unused);
        Ok(())
    }
}

/// Blobs as files of a folder of their own, named by digest.
#[derive(Debug)]
pub struct FolderBlobs {
    folder: PathBuf,
}

impl FolderBlobs {
    /// Opens the folder, or makes it (mode 0700). Drafts of writers that died go.
    ///
    /// # Errors
    /// `Unavailable` names the folder.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .and_then(|()| forget_drafts(&folder))
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

    async fn retain(&self, wanted: &BTreeSet<Digest>, unused: Duration) -> Result<()> {
        let (folder, wanted) = (self.folder.clone(), wanted.clone());
        blocking(move || drop_unused(&folder, &wanted, unused).map_err(|e| broken(&folder, &e))).await
    }
}

/// Written beside, made durable, then renamed: a blob is whole or absent.
fn keep(folder: &Path, digest: Digest, bytes: &[u8]) -> std::io::Result<()> {
    let path = folder.join(digest.to_string());
    match File::options().write(true).open(&path) {
        // It is wanted again: its age counts from now.
        Ok(file) => return file.set_modified(SystemTime::now()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let draft = folder.join(format!("{DRAFT}{digest}.{}", Uuid::new_v4().simple()));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
    // Whoever holds the lock is alive.
    file.lock()?;
    let kept =
        file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&draft, &path));
    if kept.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    kept.and_then(|()| File::open(folder)?.sync_all())
}

fn forget_drafts(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(DRAFT) {
            let dead = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
            if dead {
                gone(std::fs::remove_file(entry.path()))?;
            }
        }
    }
    Ok(())
}

fn drop_unused(folder: &Path, wanted: &BTreeSet<Digest>, unused: Duration) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let digest = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
        if digest.is_some_and(|digest| !wanted.contains(&digest)) {
            // A moment in the future has no age.
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if age > unused {
                gone(std::fs::remove_file(entry.path()))?;
            }
        }
    }
    Ok(())
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
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

/// Before the name of a blob that is being written.
const DRAFT: &str = ".";
/// Bytes per piece.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn the_draft_of_a_dead_writer_goes_and_that_of_a_living_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = FolderBlobs::open(dir.path()).unwrap();
        let digest = blobs.put(Bytes::from_static(b"kernel")).await.unwrap();
        std::fs::write(dir.path().join(format!(".{digest}.dead")), "ker").unwrap();
        let living = format!(".{digest}.living");
        let draft = File::create(dir.path().join(&living)).unwrap();
        draft.lock().unwrap();
        FolderBlobs::open(dir.path()).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [living, digest.to_string()]);
    }

    #[tokio::test]
    async fn what_nobody_names_goes_when_it_is_old_and_a_new_put_makes_it_young() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, memory) = (FolderBlobs::open(dir.path()).unwrap(), MemoryBlobs::default());
        for blobs in [&folder as &dyn Blobs, &memory] {
            let wanted = blobs.put(Bytes::from_static(b"wanted")).await.unwrap();
            let other = blobs.put(Bytes::from_static(b"other")).await.unwrap();
            let named = BTreeSet::from([wanted]);
            blobs.retain(&named, Duration::from_secs(3600)).await.unwrap();
            assert!(blobs.open(other).await.is_ok(), "it is young");
            blobs.retain(&named, Duration::ZERO).await.unwrap();
            assert!(blobs.open(other).await.is_err() && blobs.open(wanted).await.is_ok());
        }
        let old = folder.put(Bytes::from_static(b"old")).await.unwrap();
        let file = File::options().write(true).open(dir.path().join(old.to_string())).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
        folder.put(Bytes::from_static(b"old")).await.unwrap();
        folder.retain(&BTreeSet::new(), Duration::from_secs(3600)).await.unwrap();
        assert!(folder.open(old).await.is_ok(), "it was put again");
        file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
        folder.retain(&BTreeSet::new(), Duration::from_secs(3600)).await.unwrap();
        assert!(!names(dir.path()).contains(&old.to_string()));
    }
}
