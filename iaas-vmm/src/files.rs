//! Small durable files in CBOR, and moments on this host's clocks.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::spi::Stamp;
use jiff::Timestamp;
use nix::time::ClockId;
use nix::time::clock_gettime;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// Replaces the file at `path`; after a crash or a power cut it holds the old value or the new one. A failure leaves no draft.
pub(crate) fn store(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes = encode(value)?;
    let fresh = path.with_extension("new");
    write_file(&fresh, &bytes)
        .and_then(|()| fs::rename(&fresh, path))
        .inspect_err(|_| drop(fs::remove_file(&fresh)))
        .map_err(|e| cannot("written", path, &e))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// Reads the file at `path`; `None` if there is none.
///
/// # Errors
/// `Unavailable`, outcome unknown: it cannot be read, which is no absence.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(cannot("opened", path, &e)),
    };
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes).map_err(|e| cannot("read", path, &e))?;
    decode(&bytes).map(Some).map_err(|e| {
        Error::unavailable("a file of a VM on this host is damaged")
            .detail(path.display().to_string())
            .because(&e)
    })
}

/// A value as CBOR.
pub(crate) fn encode(value: &impl Serialize) -> Result<Bytes> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(|e| {
        Error::internal("a value could not be encoded").because(&e).outcome_is(Outcome::NotDone)
    })?;
    Ok(bytes.into())
}

/// A value from CBOR.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    ciborium::from_reader(bytes).map_err(|e| Error::invalid("a value could not be read").because(&e))
}

/// Makes a folder for this user only, with what is missing above it.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| cannot("made", path, &e))
}

/// Makes what happened to the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| cannot("synced", path, &e))
}

/// `Ok` if the thing at `path` is gone now.
pub(crate) fn gone(result: io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot("removed", path, &e)),
        _ => Ok(()),
    }
}

/// An error about a file, which only the operator sees the name of.
pub(crate) fn cannot(what: &str, path: &Path, e: &io::Error) -> Error {
    let error = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::unavailable("this host's disk is full").remedy("free space below the state folder")
        }
        _ => Error::unavailable(format!("a file of this host could not be {what}"))
            .remedy("check the disk and the rights to the state folder"),
    };
    error.detail(path.display().to_string()).because(e)
}

/// The installation that `state` belongs to: made once, and lost with the folder.
pub(crate) fn install(state: &Path) -> Result<Uuid> {
    make_folder(state)?;
    let path = state.join("install.cbor");
    loop {
        if let Some(id) = load(&path)? {
            forget_drafts(state)?;
            return Ok(id);
        }
        let fresh = state.join(format!("{DRAFT}{}.new", Uuid::new_v4().simple()));
        write_file(&fresh, &encode(&Uuid::new_v4())?)
            .inspect_err(|_| drop(fs::remove_file(&fresh)))
            .map_err(|e| cannot("written", &fresh, &e))?;
        // Linked, not renamed: of two that make one at once, the first wins and the other reads it.
        let linked = fs::hard_link(&fresh, &path);
        gone(fs::remove_file(&fresh), &fresh)?;
        match linked {
            // The first has come, or has even taken our draft away: read what it made.
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {}
            Err(e) => return Err(cannot("made", &path, &e)),
            Ok(()) => sync_folder(state)?,
        }
    }
}

/// Removes what was left by others that died while they made the installation, which is there now.
fn forget_drafts(state: &Path) -> Result<()> {
    let entries = fs::read_dir(state).map_err(|e| cannot("read", state, &e))?;
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(DRAFT)) {
        gone(fs::remove_file(entry.path()), &entry.path())?;
    }
    Ok(())
}

/// This moment on this host's clocks.
pub(crate) fn stamp() -> Stamp {
    Stamp { wall: Timestamp::now(), boot_id: boot_id(), mono_ns: monotonic_ns() }
}

/// Nanoseconds on the host's monotonic clock.
fn monotonic_ns() -> u64 {
    // Cannot fail for this clock on Linux; a zero would only shorten a reading.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// The boot of this host.
pub(crate) fn boot_id() -> Uuid {
    static BOOT: OnceLock<Uuid> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Uuid::try_parse(text.trim()).unwrap_or(Uuid::nil())
    })
}

fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// No file of ours is larger.
const LARGEST: u64 = 4 << 20;
/// How the name of a draft of the installation begins.
const DRAFT: &str = "install-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_is_made_once_and_a_dead_makers_draft_goes() {
        let dir = tempfile::tempdir().unwrap();
        let draft = dir.path().join("install-0123.new");
        fs::write(&draft, b"torn").unwrap();
        let id = install(dir.path()).unwrap();
        assert_eq!(install(dir.path()).unwrap(), id);
        assert!(!draft.exists());
        let makers: Vec<_> = (0..8)
            .map(|_| {
                let path = dir.path().join("other");
                std::thread::spawn(move || install(&path).unwrap())
            })
            .collect();
        let ids: std::collections::BTreeSet<Uuid> = makers.into_iter().map(|m| m.join().unwrap()).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(fs::read_dir(dir.path().join("other")).unwrap().count(), 1);
    }
}
