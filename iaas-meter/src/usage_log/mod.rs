//! The usage log: append-only, hash-chained, durable before it answers.
//!
//! * One thread writes. Appends that wait together share one fsync.
//! * An event whose key the log has is dropped, also after a reopen.
//! * A tail that a crash tore off is set aside at open and reported; damage anywhere else is an error that names segment
//!   and offset, and nothing is skipped.
//! * Whoever holds [`Head`] of a moment can tell later that nothing before it was changed or cut off. Without one, a cut
//!   at the end cannot be seen.
//!
//! The bytes are described in `format.rs`.

mod dedup;
mod format;
mod read;
mod recover;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::thread::JoinHandle;

use iaas_core::Digest;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::Project;
use iaas_core::spi::meter::UsageEvent;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use self::write::Disk;
use self::write::Job;
use self::write::Writer;

/// An open usage log. Dropping it ends its thread and unlocks the folder.
#[derive(Debug)]
pub(crate) struct UsageLog {
    folder: PathBuf,
    opening: Opening,
    index: Arc<RwLock<Index>>,
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

/// How a log was found when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// What it held, whole and verified.
    pub head: Head,
    /// In how many segments.
    pub segments: u32,
    /// What a crash had torn off, if anything.
    pub torn: Option<Torn>,
}

/// The end of a log that was being written when the process or the machine died. Unless the disk lost what it had
/// called durable, none of its events had been answered with `Ok`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    /// In which segment.
    pub segment: u32,
    /// At which byte it began.
    pub offset: u64,
    /// How many bytes it had.
    pub bytes: u64,
    /// Where they are now; `None` if the log was only verified.
    pub kept: Option<PathBuf>,
}

/// The state of a log in two values: equal heads, equal logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The number of records.
    pub records: u64,
    /// The hash chain after the last of them.
    pub chain: Digest,
}

/// Where a log stopped making sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// In which segment.
    pub segment: u32,
    /// At which byte the damaged part begins: a header, a block or a record.
    pub offset: u64,
    /// What is wrong.
    pub why: String,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// In which segment.
    pub segment: u32,
    /// At which byte.
    pub offset: u32,
    /// The bytes of its CBOR.
    pub(crate) length: u32,
}

/// How a log is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// A segment that has reached this many bytes is followed by the next one. From 4 KiB to 1 GiB.
    pub segment_bytes: u32,
}

/// What readers see: only what is durable.
#[derive(Debug)]
struct Index {
    head: Head,
    projects: HashMap<Id<Project>, Vec<Place>>,
}

impl UsageLog {
    /// Opens the log in `folder`, or makes it. Blocks while it reads the whole log.
    pub(crate) fn open(folder: &Path, options: Options) -> Result<Self> {
        Self::open_on(folder, options, Box::new(write::SystemDisk))
    }

    fn open_on(folder: &Path, options: Options, disk: Box<dyn Disk>) -> Result<Self> {
        if !(4 << 10..=1 << 30).contains(&options.segment_bytes) {
            return Err(Error::invalid(format!("a segment of {} bytes", options.segment_bytes))
                .remedy("choose 4 KiB to 1 GiB"));
        }
        let lock = recover::lock(folder)?;
        let found = recover::recover(folder)?;
        let index = Arc::new(RwLock::new(Index { head: found.opening.head, projects: found.projects }));
        let writer = Writer::new(folder, options, disk, lock, found.end, found.seen, Arc::clone(&index));
        // Deep enough that a busy cloud shares fsyncs, small enough that a slow disk is felt by who appends.
        let (jobs, queue) = mpsc::channel(1024);
        let thread = std::thread::Builder::new()
            .name("usage-log".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|e| Error::unavailable("no thread for the usage log").because(&e))?;
        let folder = folder.to_owned();
        Ok(Self { folder, opening: found.opening, index, jobs: Some(jobs), writer: Some(thread) })
    }

    /// Keeps `batch`, all of it or nothing; `Ok` means durable. Safe to cancel: the batch is then kept or not.
    pub(crate) async fn append(&self, batch: &[UsageEvent]) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let job = Job::new(batch, reply)?;
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send(job).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Calls `each` for every event of `project`, in the order of the log.
    pub(crate) async fn visit<T, F>(&self, project: Id<Project>, mut state: T, mut each: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&mut T, Place, UsageEvent) + Send + 'static,
    {
        let places = self.index().projects.get(&project).cloned().unwrap_or_default();
        let folder = self.folder.clone();
        let read = move || {
            read::visit(&folder, &places, |place, event| each(&mut state, place, event))?;
            Ok(state)
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(|e| Error::internal("reading the usage log ended early").because(&e))?
    }

    pub(crate) fn opening(&self) -> &Opening {
        &self.opening
    }

    pub(crate) fn head(&self) -> Head {
        self.index().head
    }

    fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UsageLog {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.writer.take() {
            // It ends when the queue is empty; if it panicked, there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// Reads the whole log in `folder`, without changing or locking it, and checks every byte.
///
/// # Errors
/// As [`Meter::open`](crate::Meter::open) for a folder that cannot be read, a foreign log or a newer format.
pub fn verify(folder: &Path) -> Result<Result<Opening, Damage>> {
    recover::verify(folder)
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "segment {} of the usage log is damaged at byte {}: {}",
            self.segment, self.offset, self.why
        )
    }
}

impl From<Damage> for Error {
    fn from(damage: Damage) -> Self {
        Error::unavailable(damage.to_string())
            .outcome_is(iaas_core::Outcome::NotDone)
            .remedy("restore this segment from a copy; nothing was skipped or changed")
    }
}

impl Default for Options {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20 }
    }
}

fn ended() -> Error {
    Error::unavailable("the usage log has stopped").remedy("open it again")
}

/// The file of a segment.
fn segment_path(folder: &Path, segment: u32) -> PathBuf {
    folder.join(format!("usage-{segment:010}.log"))
}

#[cfg(test)]
mod tests;
