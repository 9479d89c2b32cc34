//! Locks that the kernel gives back when their holder dies, whatever killed it.
//!
//! Two kinds: a whole-file lock that proves that a role lives ([`RoleLock`]), and byte-range locks of one open file
//! description, which give one lock per id or per epoch without a file for each.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::FcntlArg;
use nix::libc;

use super::plain::open_plain;
use crate::Error;
use crate::Result;

/// Proves that its holder lives: taken at the start of a role, given back by the kernel at its end.
#[derive(Debug)]
pub struct RoleLock {
    _lives: RangeLock,
    detached: Option<RangeLock>,
}

/// What the lock of a role says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// No process is left that is this role.
    Free,
    /// A process lives that still dies with the control process that started it.
    Held,
    /// A process lives on its own.
    Detached,
}

impl RoleLock {
    /// Takes the lock at `path`, making the file; `None` if another process holds it.
    pub fn try_take(path: &Path) -> Result<Option<Self>> {
        Ok(RangeLock::try_take(path, LIVES)?.map(|lock| Self { _lives: lock, detached: None }))
    }

    /// Lets others see that its holder lives on its own now.
    pub(super) fn detach(&mut self, path: &Path) -> Result<()> {
        self.detached = RangeLock::try_take(path, DETACHED)?;
        match self.detached {
            Some(_) => Ok(()),
            None => Err(Error::internal("another process holds half of a role's lock")),
        }
    }

    /// Whether somebody holds the lock at `path`; never in the way of one who takes it. A missing file is held by nobody,
    /// and is not made.
    pub fn state(path: &Path) -> Result<LockState> {
        let file = match open_plain(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(LockState::Free),
            Err(e) => return Err(cannot_lock(path, &e)),
        };
        let is_held = |range: Range| {
            let mut found = range.flock()?;
            nix::fcntl::fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found))
                .map_err(|e| cannot_lock(path, &e.into()))?;
            // fcntl(2): the type becomes F_UNLCK when nothing is in the way, else the lock that is.
            Ok(i32::from(found.l_type) != libc::F_UNLCK)
        };
        Ok(match (is_held(DETACHED)?, is_held(LIVES)?) {
            (true, _) => LockState::Detached,
            (false, true) => LockState::Held,
            (false, false) => LockState::Free,
        })
    }
}

/// A lock on some bytes of a file, which need not exist; given back on drop.
#[derive(Debug)]
pub(super) struct RangeLock {
    _file: File,
}

/// Which bytes, and whether others may hold them too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) start: u64,
    /// At least 1.
    pub(super) len: u64,
    pub(super) exclusive: bool,
}

impl RangeLock {
    /// Takes the lock if nobody is in the way. Each lock has an open file description of its own, so two of one process
    /// exclude each other like those of two processes.
    pub(super) fn try_take(path: &Path, range: Range) -> Result<Option<Self>> {
        let file = open(path)?;
        let want = range.flock()?;
        match nix::fcntl::fcntl(&file, FcntlArg::F_OFD_SETLK(&want)) {
            Ok(_) => Ok(Some(Self { _file: file })),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(e) => Err(cannot_lock(path, &e.into())),
        }
    }
}

impl Range {
    fn flock(self) -> Result<libc::flock> {
        let kind = if self.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        let (Ok(start), Ok(len)) = (i64::try_from(self.start), i64::try_from(self.len)) else {
            return Err(Error::invalid("a lock beyond the end of the largest file"));
        };
        Ok(libc::flock {
            l_type: i16::try_from(kind).unwrap_or_default(),
            l_whence: 0, // SEEK_SET
            l_start: start,
            l_len: len,
            l_pid: 0, // fcntl(2): must be 0 for locks of an open file description
        })
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| cannot_lock(path, &e))
}

fn cannot_lock(path: &Path, e: &std::io::Error) -> Error {
    Error::unavailable("a lock file of this host could not be used")
        .detail(path.display().to_string())
        .because(e)
        .outcome_is(crate::Outcome::NotDone)
}

/// What a role locks as long as it lives.
const LIVES: Range = Range { start: 0, len: 1, exclusive: true };
/// What it locks from when it is on its own.
const DETACHED: Range = Range { start: 1, len: 1, exclusive: true };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_lock_is_held_until_its_holder_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let state = || RoleLock::state(&path).unwrap();
        assert_eq!(state(), LockState::Free);
        assert!(!path.exists());
        let mut held = RoleLock::try_take(&path).unwrap().unwrap();
        assert_eq!(state(), LockState::Held);
        assert!(RoleLock::try_take(&path).unwrap().is_none());
        held.detach(&path).unwrap();
        assert_eq!(state(), LockState::Detached);
        drop(held);
        assert_eq!(state(), LockState::Free);
    }

    #[test]
    fn ranges_exclude_only_where_they_overlap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ranges");
        let take =
            |start, len, exclusive| RangeLock::try_take(&path, Range { start, len, exclusive }).unwrap();
        let five = take(5, 1, false).unwrap();
        let _five_again = take(5, 1, false).unwrap();
        assert!(take(0, 6, true).is_none());
        let _below = take(0, 5, true).unwrap();
        let _above = take(6, 100, true).unwrap();
        drop(five);
        assert!(take(5, 1, true).is_none(), "the second holder is still there");
    }
}
