//! Volumes as sparse raw files: the simplest pool that keeps every promise.
//!
//! A pool is one folder: `pool.meta`, and for each volume `<id>.raw` (its bytes) and `<id>.meta` ([its record](sidecar)).
//!
//! # One writer
//! A process that writes holds the lock [`sidecar::WRITER`] of the record's open file, and the kernel gives it back when
//! the process dies. To take over, [`claim`] stores the higher term and waits for that lock. The older writer hears of it
//! by inotify, lets its operations end, refuses all that follow and gives the lock up; so two never write. Each of its
//! flushes also reads the record after the sync, and fails if the term is no longer its own.
//!
//! # What it does not do
//! Snapshots, clones, encryption and limits: its capabilities say so, and a spec that asks for them is refused.

pub(crate) mod access;
pub(crate) mod claim;
pub(crate) mod device;
pub(crate) mod opener;
pub(crate) mod pool;
pub(crate) mod psync;
pub(crate) mod queue;
pub(crate) mod sidecar;
pub(crate) mod site;
pub(crate) mod small;
pub(crate) mod token;
pub(crate) mod uring;

use std::io;

use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Outcome;

/// The error of a file operation on the pool; nothing is half-done that the next call does not repair.
pub(crate) fn trouble(what: &str, error: &io::Error) -> Error {
    let (kind, text, remedy) = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (ErrorKind::NoCapacity, "the pool's disk is full", "free space on it, or use another pool")
        }
        io::ErrorKind::FileTooLarge => (
            ErrorKind::Invalid,
            "the volume is larger than the pool's file system allows",
            "make it smaller, or use another pool",
        ),
        io::ErrorKind::PermissionDenied => (
            ErrorKind::Unavailable,
            "the pool's files may not be read and written by us",
            "give this user the rights to the pool's folder",
        ),
        io::ErrorKind::ReadOnlyFilesystem => {
            (ErrorKind::Unavailable, "the pool's disk is read-only", "mount it writable")
        }
        _ => (ErrorKind::Unavailable, "the pool's files cannot be used", "check the disk and the log"),
    };
    Error::new(kind, text).remedy(remedy).outcome_is(Outcome::Unknown).detail(what).because(error)
}
