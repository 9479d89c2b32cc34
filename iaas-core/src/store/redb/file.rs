//! The file: a page of our own that says what it is, then the database.
//!
//! The page comes first so that a newer format, a foreign file or damage is told before the database reads a byte. The
//! whole file is made beside its place and then linked there, so it is never seen half-made.

use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use redb::Database;
use redb::ReadTransaction;
use redb::ReadableDatabase;
use redb::StorageBackend;
use redb::TableDefinition;
use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use super::Counters;
use super::closed;
use crate::Epoch;
use crate::Error;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::spi::state_store::Entry;

/// Key to revision (8 bytes, big endian) and value.
pub(super) const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
/// Names to numbers: `rev`, `epoch`.
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// What the store knows beside its entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    /// The last commit.
    pub(super) rev: Rev,
    /// The last lead.
    pub(super) epoch: Epoch,
}

/// The locked file. Clones share the lock; it ends with the last.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    file: Arc<File>,
    path: PathBuf,
    id: Uuid,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Counts {
    commits: AtomicU64,
    batches: AtomicU64,
    syncs: AtomicU64,
    written: AtomicU64,
    synced: AtomicU64,
    sync_failed: AtomicBool,
    /// The length that the file may not exceed: a full disk for tests.
    room: AtomicU64,
}

impl Disk {
    /// Opens the file at `path`, or makes it, and locks it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = match open_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                make(path)?;
                open_file(path)
            }
            other => other,
        };
        let file = file.map_err(|e| trouble(path, &e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(path)),
            Err(TryLockError::Error(e)) => return Err(trouble(path, &e)),
        }
        forget_drafts(path).map_err(|e| trouble(path, &e))?;
        let id = read_header(&file, path)?;
        let disk = Self::over(file, path, id);
        // The database would take an empty rest for a new one.
        match disk.len() {
            Ok(0) => Err(damaged(path)),
            Ok(_) => Ok(disk),
            Err(e) => Err(trouble(path, &e)),
        }
    }

    fn over(file: File, path: &Path, id: Uuid) -> Self {
        let counts = Counts {
            commits: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            written: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            sync_failed: AtomicBool::new(false),
            room: AtomicU64::new(u64::MAX),
        };
        Self { file: Arc::new(file), path: path.to_owned(), id, counts: Arc::new(counts) }
    }

    pub(super) fn id(&self) -> Uuid {
        self.id
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            commits: self.counts.commits.load(Relaxed),
            batches: self.counts.batches.load(Relaxed),
            syncs: self.counts.syncs.load(Relaxed),
            synced_bytes: self.counts.synced.load(Relaxed),
        }
    }

    /// Counts a durable write of `commits` commits.
    pub(super) fn count_batch(&self, commits: u64) {
        self.counts.commits.fetch_add(commits, Relaxed);
        self.counts.batches.fetch_add(1, Relaxed);
    }

    /// Whether a sync has failed. The kernel then forgets which bytes are not on the disk: nobody can trust the file
    /// until it was opened anew.
    pub(super) fn sync_failed(&self) -> bool {
        self.counts.sync_failed.load(Relaxed)
    }

    #[cfg(test)]
    pub(super) fn set_room(&self, bytes: u64) {
        self.counts.room.store(bytes, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn break_sync(&self) {
        self.counts.sync_failed.store(true, Relaxed);
    }

    fn check_room(&self, end: u64) -> io::Result<()> {
        if end > self.counts.room.load(Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// Opens the database in the file.
    fn database(&self) -> Result<Database> {
        let open = || Database::builder().set_cache_size(CACHE).create_with_backend(self.clone());
        // The database may panic on bytes that it did not write.
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(Ok(database)) => Ok(database),
            Ok(Err(redb::DatabaseError::Storage(redb::StorageError::Io(e)))) => Err(trouble(&self.path, &e)),
            Ok(Err(redb::DatabaseError::UpgradeRequired(found))) => Err(Error::unsupported(format!(
                "the database of {} has the older format {found}",
                name(&self.path)
            ))
            .remedy("open it once with the version of this program that made it, or restore a backup")),
            Ok(Err(e)) => Err(damaged(&self.path).because(&e)),
            Err(_) => Err(damaged(&self.path)),
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().saturating_sub(HEADER))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, shifted(offset)?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let end = shifted(len)?;
        self.check_room(end)?;
        self.file.set_len(end)
    }

    fn sync_data(&self) -> io::Result<()> {
        let written = self.counts.written.swap(0, Relaxed);
        self.counts.syncs.fetch_add(1, Relaxed);
        if self.sync_failed() {
            return Err(io::Error::other("an earlier sync failed"));
        }
        self.file.sync_data().inspect_err(|_| self.counts.sync_failed.store(true, Relaxed))?;
        self.counts.synced.fetch_add(written, Relaxed);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = shifted(offset)?;
        let len = data.len() as u64;
        self.check_room(at.saturating_add(len))?;
        self.file.write_all_at(data, at)?;
        self.counts.written.fetch_add(len, Relaxed);
        Ok(())
    }
}

/// The database while it is open.
#[derive(Debug)]
pub(super) struct Open {
    disk: Disk,
    database: RwLock<Option<Database>>,
}

impl Open {
    pub(super) fn new(disk: Disk) -> Result<Self> {
        let database = disk.database()?;
        Ok(Self { disk, database: RwLock::new(Some(database)) })
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Runs `read` on the last durable state.
    pub(super) fn read<T>(&self, read: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.with(|database| read(&database.begin_read().map_err(failed)?))
    }

    pub(super) fn with<T>(&self, run: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        run(database.as_ref().ok_or_else(closed)?)
    }

    /// Opens the database anew after it failed, on the same locked file.
    pub(super) fn reopen(&self) -> Result<()> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        drop(database.take());
        *database = Some(self.disk.database()?);
        Ok(())
    }

    pub(super) fn close(&self) {
        drop(self.database.write().unwrap_or_else(PoisonError::into_inner).take());
        // Readers may hold clones of the file for a moment longer; the next opener shall not see its lock.
        let _ = self.disk.file.unlock();
    }
}

/// Reads what the store knows beside its entries.
pub(super) fn state(txn: &ReadTransaction) -> Result<State> {
    let meta = txn.open_table(META).map_err(failed)?;
    let number = |name: &str| Ok(meta.get(name).map_err(failed)?.map_or(0, |v| v.value()));
    Ok(State { rev: Rev(number("rev")?), epoch: Epoch(number("epoch")?) })
}

/// The stored form of an entry's value.
pub(super) fn stored(rev: Rev, value: &[u8]) -> Vec<u8> {
    [&rev.0.to_be_bytes(), value].concat()
}

/// The revision in a stored value.
pub(super) fn rev_of(stored: &[u8]) -> Result<Rev> {
    let (rev, _) = stored.split_first_chunk().ok_or_else(short)?;
    Ok(Rev(u64::from_be_bytes(*rev)))
}

/// The entry of a stored value.
pub(super) fn entry(key: &[u8], stored: &[u8]) -> Result<Entry> {
    let (rev, value) = stored.split_first_chunk().ok_or_else(short)?;
    Ok(Entry {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
        rev: Rev(u64::from_be_bytes(*rev)),
    })
}

/// The error of a database call that failed before anything was committed.
pub(super) fn failed(error: impl Into<redb::Error>) -> Error {
    let error = error.into();
    let full = matches!(&error, redb::Error::Io(e) if is_full(e));
    let text =
        if full { "the disk of the state store is full" } else { "the state store cannot use its file" };
    let remedy = if full { "free space on it; nothing was changed" } else { "check the disk and the log" };
    Error::unavailable(text).remedy(remedy).outcome_is(Outcome::NotDone).because(&error)
}

fn short() -> Error {
    Error::internal("an entry of the state store is damaged").remedy("restore a backup")
}

fn shifted(offset: u64) -> io::Result<u64> {
    offset.checked_add(HEADER).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(file)
}

/// Makes an empty store at `path`; one that somebody else made meanwhile is left alone.
fn make(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| trouble(folder, &e))?;
    let draft = folder.join(format!("{}{}{DRAFT_END}", draft_start(path), Uuid::new_v4()));
    let result = fill(&draft).and_then(|()| place(&draft, path, folder).map_err(|e| trouble(path, &e)));
    let _ = std::fs::remove_file(&draft);
    result
}

/// Writes an empty store to `draft`, durably.
fn fill(draft: &Path) -> Result<()> {
    let io = |e: &io::Error| trouble(draft, e);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(draft).map_err(|e| io(&e))?;
    let id = Uuid::new_v4();
    file.write_all_at(&header(id), 0).map_err(|e| io(&e))?;
    let disk = Disk::over(file, draft, id);
    let database = disk.database()?;
    let txn = database.begin_write().map_err(failed)?;
    txn.open_table(ENTRIES).map_err(failed)?;
    txn.open_table(META).map_err(failed)?;
    txn.commit().map_err(failed)?;
    drop(database);
    disk.file.sync_all().map_err(|e| io(&e))
}

fn place(draft: &Path, path: &Path, folder: &Path) -> io::Result<()> {
    match std::fs::hard_link(draft, path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        // Whoever was faster has taken the draft away.
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.exists() => {}
        other => other?,
    }
    File::open(folder)?.sync_all()
}

/// Removes what others left that died while they made the store at `path`, which is there now and locked.
fn forget_drafts(path: &Path) -> io::Result<()> {
    let start = draft_start(path);
    for entry in std::fs::read_dir(folder_of(path))? {
        let entry = entry?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|n| n.strip_prefix(&start)?.strip_suffix(DRAFT_END));
        if id.is_some_and(|id| Uuid::try_parse(id).is_ok()) {
            match std::fs::remove_file(entry.path()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// How the name of a draft of the store at `path` begins; an id and [`DRAFT_END`] follow.
fn draft_start(path: &Path) -> String {
    format!(".{}.", name(path))
}

const DRAFT_END: &str = ".new";

/// The first page: magic, format, identity, checksum; the rest is zero.
fn header(id: Uuid) -> Vec<u8> {
    let mut page = Vec::from(MAGIC);
    page.extend(FORMAT.to_le_bytes());
    page.extend(KIND);
    page.extend(id.as_bytes());
    page.extend(&Sha256::digest(&page)[..8]);
    page.resize(HEADER_LEN, 0);
    page
}

/// Checks the first page and returns the identity in it.
fn read_header(file: &File, path: &Path) -> Result<Uuid> {
    let mut page = [0; 40];
    match file.read_exact_at(&mut page, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(foreign(path)),
        other => other.map_err(|e| trouble(path, &e))?,
    }
    let Some((magic, rest)) = page.split_first_chunk::<8>() else { return Err(foreign(path)) };
    let Some((format, rest)) = rest.split_first_chunk() else { return Err(foreign(path)) };
    let Some((kind, rest)) = rest.split_first_chunk() else { return Err(foreign(path)) };
    let Some((id, sum)) = rest.split_first_chunk() else { return Err(foreign(path)) };
    if magic != MAGIC {
        return Err(foreign(path));
    }
    let format = u32::from_le_bytes(*format);
    if format > FORMAT {
        return Err(Error::unsupported(format!("the state store {} has format {format}", name(path)))
            .remedy(format!("use a newer version of this program; this one reads up to format {FORMAT}")));
    }
    if kind != KIND {
        return Err(foreign(path));
    }
    if sum != &Sha256::digest(&page[..32])[..8] {
        return Err(damaged(path));
    }
    Ok(Uuid::from_bytes(*id))
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn foreign(path: &Path) -> Error {
    Error::invalid(format!("{} is not the state store of a cloud", name(path)))
        .remedy("name another file, or move this one away")
        .detail(path.display().to_string())
}

fn damaged(path: &Path) -> Error {
    Error::invalid(format!("the state store {} is damaged", name(path)))
        .remedy("restore a backup of it")
        .detail(path.display().to_string())
}

fn in_use(path: &Path) -> Error {
    Error::conflict(format!("the state store {} is in use by another process", name(path)))
        .remedy("stop the other program that runs this cloud, or give this one a folder of its own")
        .detail(path.display().to_string())
}

fn trouble(path: &Path, error: &io::Error) -> Error {
    let name = name(path);
    let wrong = match error.kind() {
        io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => return foreign(path).because(error),
        io::ErrorKind::PermissionDenied => {
            Error::unavailable(format!("{name} may not be read and written by us"))
                .remedy("give this user read and write rights to the file and its folder")
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            Error::unavailable(format!("{name} is on a read-only disk")).remedy("mount the disk writable")
        }
        io::ErrorKind::UnexpectedEof => return damaged(path).because(error),
        _ if is_full(error) => {
            Error::unavailable(format!("the disk of {name} is full")).remedy("free space on it")
        }
        _ => Error::unavailable(format!("{name} cannot be used")).remedy("check the disk and the log"),
    };
    wrong.outcome_is(Outcome::NotDone).detail(path.display().to_string()).because(error)
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

const MAGIC: &[u8; 8] = b"IAASDATA";
/// Says that it holds a cloud's state.
const KIND: &[u8; 4] = b"stat";
const FORMAT: u32 = 1;
const HEADER_LEN: usize = 4096;
const HEADER: u64 = HEADER_LEN as u64;
/// Bytes of the database that are kept in memory.
const CACHE: usize = 64 << 20;
