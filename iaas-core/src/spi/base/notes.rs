//! What a provider remembers over a restart: small values by key, one file each, in a folder that only one may have open.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::TryLockError;
use std::io;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::Error;
use crate::Outcome;
use crate::Result;

/// An open folder of notes. Keys are of the characters `a-z`, `0-9` and `-`.
///
/// A `put` is whole or not at all, and durable when it returns.
#[derive(Debug)]
pub(super) struct Notes {
    folder: PathBuf,
    _lock: File,
}

impl Notes {
    /// Opens the folder, or makes it. Waits a little for whoever has it open, as for a process that is about to end.
    pub(super) async fn open(folder: PathBuf) -> Result<Arc<Self>> {
        make_folder(&folder).map_err(|e| failed(&folder, &e))?;
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true).mode(0o600).open(folder.join(".lock"));
        let lock = lock.map_err(|e| failed(&folder, &e))?;
        let until = Instant::now() + PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Arc::new(Self { folder, _lock: lock })),
                Err(TryLockError::WouldBlock) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::conflict("this provider is open already")
                        .detail(folder.display().to_string())
                        .remedy("end the other one, or use another folder")
                        .outcome_is(Outcome::NotDone));
                }
                Err(TryLockError::Error(e)) => return Err(failed(&folder, &e)),
            }
        }
    }

    /// Keeps `value`, or forgets the key.
    pub(super) fn put(&self, key: &str, value: Option<&impl Serialize>) -> Result<()> {
        let path = self.folder.join(key);
        let done = match value {
            Some(value) => {
                let mut bytes = Vec::new();
                ciborium::into_writer(value, &mut bytes)
                    .map_err(|e| Error::internal("a note of the provider cannot be written").because(&e))?;
                self.replace(key, &bytes)
            }
            None => fs::remove_file(&path).or_else(if_gone),
        };
        done.and_then(|()| File::open(&self.folder)?.sync_all()).map_err(|e| failed(&path, &e))
    }

    /// What is kept under `key`.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let path = self.folder.join(key);
        let bytes = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| failed(&path, &e))?,
        };
        ciborium::from_reader(&*bytes).map(Some).map_err(|e| {
            Error::internal("a note of the provider cannot be read")
                .because(&e)
                .detail(path.display().to_string())
        })
    }

    /// Everything whose key begins so.
    pub(super) fn all<T: DeserializeOwned>(&self, begin: &str) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(|e| failed(&self.folder, &e))? {
            let name = entry.map_err(|e| failed(&self.folder, &e))?.file_name();
            if let Some(name) = name.to_str().filter(|name| name.starts_with(begin)) {
                all.extend(self.get(name)?);
            }
        }
        Ok(all)
    }

    fn replace(&self, key: &str, value: &[u8]) -> io::Result<()> {
        // The point keeps it apart from every key.
        let new = self.folder.join(format!(".{key}"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(value)?;
        file.sync_all()?;
        fs::rename(&new, self.folder.join(key))
    }
}

/// Makes a folder for this user only, with what is missing above it.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Takes an error that says that a thing is not there for its removal.
pub(super) fn if_gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::internal("the provider's own notes cannot be kept or read")
        .because(error)
        .detail(path.display().to_string())
        .remedy("look at the disk of the host")
}

/// How long an opening waits for another holder: far above what a process takes to end.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);
