//! What a provider remembers over a restart: small values by key, in memory or in a folder.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use crate::Error;
use crate::Result;

/// Small values by key. Keys are of the characters `a-z`, `0-9` and `-`.
///
/// # Contract
/// A `put` is whole or not at all, and durable when it returns: as durable as the things that it speaks of.
pub trait Shelf: Debug + Send + Sync + 'static {
    /// Keeps `value`, or forgets the key.
    fn put(&self, key: &str, value: Option<&[u8]>) -> Result<()>;

    /// Everything that is kept.
    fn all(&self) -> Result<BTreeMap<String, Vec<u8>>>;
}

/// A shelf in memory, for things that are themselves in memory.
#[derive(Debug, Default)]
pub struct RamShelf(Mutex<BTreeMap<String, Vec<u8>>>);

impl Shelf for RamShelf {
    fn put(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Some(value) => kept.insert(key.to_owned(), value.to_vec()),
            None => kept.remove(key),
        };
        Ok(())
    }

    fn all(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// A shelf of one file per key in a folder of its own, replaced by renaming and synchronized.
#[derive(Debug)]
pub struct FolderShelf(PathBuf);

impl FolderShelf {
    /// Opens the folder, or makes it.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|e| failed(&folder, &e))?;
        Ok(Self(folder))
    }

    fn replace(&self, key: &str, value: &[u8]) -> io::Result<()> {
        // The point keeps it apart from every key.
        let new = self.0.join(format!(".{key}"));
        let mut file = File::create(&new)?;
        file.write_all(value)?;
        file.sync_all()?;
        fs::rename(&new, self.0.join(key))
    }
}

impl Shelf for FolderShelf {
    fn put(&self, key: &str, value: Option<&[u8]>) -> Result<()> {
        let path = self.0.join(key);
        let done = match value {
            Some(value) => self.replace(key, value),
            None => fs::remove_file(&path).or_else(|e| match e.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            }),
        };
        done.and_then(|()| File::open(&self.0)?.sync_all()).map_err(|e| failed(&path, &e))
    }

    fn all(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&self.0).map_err(|e| failed(&self.0, &e))? {
            let entry = entry.map_err(|e| failed(&self.0, &e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') {
                all.insert(name, fs::read(entry.path()).map_err(|e| failed(&entry.path(), &e))?);
            }
        }
        Ok(all)
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::internal("the provider's own notes cannot be kept or read")
        .because(error)
        .detail(path.display().to_string())
        .remedy("look at the disk of the host")
}
