//! The folder of one role, and durable small files.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::Identity;
use super::counters::CountersPage;
use super::lock::LockState;
use super::lock::RoleLock;
use super::plain::open_plain;
use crate::Error;
use crate::ErrorKind;
use crate::Result;

/// The folder of one role; it outlives the role's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleFolder {
    path: PathBuf,
    socket: PathBuf,
}

impl RoleFolder {
    pub(super) fn new(path: PathBuf, socket: PathBuf) -> Self {
        Self { path, socket }
    }

    /// Where it is. A role may keep files of its own in it; they go when the role is forgotten.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket of the role.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The role's log: what it wrote to standard output and error.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// The last bytes of the log, at most `max`, as text; empty if there is none.
    pub fn log_tail(&self, max: u64) -> String {
        tail(&self.log(), max).unwrap_or_default()
    }

    /// The newest content of the role's counters page and its number; `None` if it wrote none.
    pub fn counters(&self) -> Result<Option<(u64, Bytes)>> {
        match CountersPage::open(&self.counters_path()) {
            Ok(page) => page.read(),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The passport; `None` if the folder is half-made.
    pub fn passport(&self) -> Result<Option<Bytes>> {
        Ok(read(&self.passport_path())?.map(Bytes::from))
    }

    /// Whether a process holds the role's lock.
    pub fn lock_state(&self) -> Result<LockState> {
        RoleLock::state(&self.lock_path())
    }

    pub(super) fn exists(&self) -> Result<bool> {
        self.path.try_exists().map_err(|e| cannot("looked at", &self.path, &e))
    }

    /// Makes the folder with its passport, durably.
    pub(super) fn make(&self, passport: &[u8]) -> Result<()> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        make_dirs(parent)?;
        make_dirs(self.socket.parent().unwrap_or(Path::new("/")))?;
        DirBuilder::new().mode(0o700).create(&self.path).map_err(|e| cannot("made", &self.path, &e))?;
        sync_dir(parent)?;
        write(&self.passport_path(), passport)
    }

    pub(super) fn set_passport(&self, passport: &[u8]) -> Result<()> {
        write(&self.passport_path(), passport)
    }

    pub(super) fn open_log(&self) -> Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.log())
            .map_err(|e| cannot("opened", &self.log(), &e))
    }

    /// Stores who the role is; durable when it returns.
    pub(super) fn store(&self, identity: Identity) -> Result<()> {
        let record = RoleRecord { version: 1, identity };
        write(&self.record_path(), &super::frame::encode(&record)?)
    }

    /// Who the role is; `None` if that was never stored.
    pub(super) fn identity(&self) -> Result<Option<Identity>> {
        let path = self.record_path();
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let record: RoleRecord = super::frame::decode(&bytes)
            .map_err(|e| e.detail(path.display().to_string()).outcome_is(crate::Outcome::Unknown))?;
        Ok(Some(record.identity))
    }

    /// Removes the socket and the folder; `Ok` if they are gone. The passport goes last, so that what a crash leaves still
    /// says whose it was.
    pub(super) fn remove(&self) -> Result<()> {
        gone(fs::remove_file(&self.socket), &self.socket)?;
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(cannot("read", &self.path, &e)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| cannot("read", &self.path, &e))?;
            if entry.file_name() == PASSPORT {
                continue;
            }
            let path = entry.path();
            let is_dir = entry.file_type().map_err(|e| cannot("read", &path, &e))?.is_dir();
            gone(if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }, &path)?;
        }
        gone(fs::remove_file(self.passport_path()), &self.path)?;
        gone(fs::remove_dir(&self.path), &self.path)?;
        sync_dir(self.path.parent().unwrap_or(Path::new("/")))
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }
    pub(super) fn counters_path(&self) -> PathBuf {
        self.path.join("counters")
    }
    fn passport_path(&self) -> PathBuf {
        self.path.join(PASSPORT)
    }
    fn record_path(&self) -> PathBuf {
        self.path.join("role.cbor")
    }
}

/// `role.cbor`.
#[derive(Debug, Serialize, Deserialize)]
struct RoleRecord {
    version: u16,
    identity: Identity,
}

/// The ids of the folders in `parent`; other names are not ours.
pub(super) fn ids_in(parent: &Path) -> Result<Vec<Uuid>> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(cannot("read", parent, &e)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| cannot("read", parent, &e))?;
        ids.extend(entry.file_name().to_str().and_then(|name| Uuid::try_parse(name).ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

/// Makes `path` and what is missing above it, with mode 0700.
pub(super) fn make_dirs(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| cannot("made", path, &e))
}

/// Replaces a small file so that after a crash or a power cut it holds the old or the new bytes. A failure leaves no draft.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let fresh = path.with_extension("new");
    write_file(&fresh, bytes)
        .and_then(|()| fs::rename(&fresh, path))
        .inspect_err(|_| drop(fs::remove_file(&fresh)))
        .map_err(|e| cannot("written", path, &e))?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A small file's bytes; `None` if it is missing.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match open_plain(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(cannot("opened", path, &e)),
    };
    let mut bytes = Vec::new();
    file.take(SMALL_MAX).read_to_end(&mut bytes).map_err(|e| cannot("read", path, &e))?;
    Ok(Some(bytes))
}

fn tail(path: &Path, max: u64) -> io::Result<String> {
    let mut file = open_plain(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(max)))?;
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| cannot("synced", path, &e))
}

fn gone(result: io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot("removed", path, &e)),
        _ => Ok(()),
    }
}

fn cannot(what: &str, path: &Path, e: &io::Error) -> Error {
    let error = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::unavailable("this host's disk is full").remedy("free space below the state folder")
        }
        _ => Error::unavailable(format!("a file of this host could not be {what}"))
            .remedy("check the disk and the rights to the state folder"),
    };
    error.detail(path.display().to_string()).because(e)
}

const PASSPORT: &str = "passport";
/// No small file of ours is larger.
const SMALL_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn made(dir: &Path) -> RoleFolder {
        let folder = RoleFolder::new(dir.join("roles/runner/x"), dir.join("run/x.sock"));
        folder.make(b"pass").unwrap();
        folder
    }

    #[test]
    fn removing_is_complete_idempotent_and_takes_what_the_role_left() {
        let dir = tempfile::tempdir().unwrap();
        let folder = made(dir.path());
        fs::write(folder.path().join("console"), "x").unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.socket(), "").unwrap();
        folder.remove().unwrap();
        assert!(!folder.exists().unwrap());
        assert!(!folder.socket().exists());
        folder.remove().unwrap();
    }

    #[test]
    fn a_record_that_cannot_be_read_is_an_error_and_not_an_absence() {
        let dir = tempfile::tempdir().unwrap();
        let folder = made(dir.path());
        assert_eq!(folder.identity().unwrap(), None);
        let identity = Identity { pid: 7, start: 8, boot: Uuid::nil() };
        folder.store(identity).unwrap();
        assert_eq!(folder.identity().unwrap(), Some(identity));
        fs::write(folder.record_path(), [0xff, 0x00]).unwrap();
        assert!(folder.identity().is_err());
    }

    #[test]
    fn a_pipe_or_a_link_in_the_place_of_a_file_neither_blocks_nor_leads_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let folder = made(dir.path());
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        for name in ["counters", "log", "lock"] {
            nix::unistd::mkfifo(&folder.path().join(name), mode).unwrap();
        }
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::remove_file(folder.passport_path()).unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), folder.passport_path()).unwrap();
        assert!(folder.counters().is_err());
        assert!(folder.lock_state().is_err());
        assert!(folder.passport().is_err());
        assert_eq!(folder.log_tail(100), "");
        folder.remove().unwrap();
        assert!(dir.path().join("secret").exists());
    }

    #[test]
    fn the_tail_of_a_log_is_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let folder = made(dir.path());
        assert_eq!(folder.log_tail(10), "");
        fs::write(folder.log(), "0123456789abc").unwrap();
        assert_eq!(folder.log_tail(4), "9abc");
    }
}
