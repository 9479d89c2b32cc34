//! The embedded durable store: one file, one process, many small commits in one durable write.
//!
//! [`file`] knows the file: its header, its lock, its errors. [`writer`] is the thread that owns all changes. Reads go
//! to the last durable state without waiting for it.

mod file;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use uuid::Uuid;

use self::file::Disk;
use self::file::ENTRIES;
use self::file::Open;
use self::file::failed;
use self::writer::Ask;
use self::writer::Writer;
use super::closed;
use super::history::History;
use crate::Clock;
use crate::Epoch;
use crate::Error;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::SystemClock;
use crate::spi::Feed;
use crate::spi::state_store::Change;
use crate::spi::state_store::Check;
use crate::spi::state_store::Entry;
use crate::spi::state_store::Lead;
use crate::spi::state_store::StateStore;
use crate::spi::state_store::Write;
use crate::spi::state_store::check_limits;

/// A [`StateStore`] in one file, for one process at a time.
///
/// Commits that wait at the same time share one durable write: each is checked and applied in order, and all are
/// answered after it. The history of changes is in memory; a watch from before this process is told `Compacted`.
/// Dropping the store ends its thread and frees the file; that may wait for one write.
#[derive(Debug)]
pub struct RedbStore {
    open: Arc<Open>,
    history: Arc<History>,
    asks: Option<mpsc::Sender<Ask>>,
    writer: Option<JoinHandle<()>>,
}

/// What a store has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commits that succeeded.
    pub commits: u64,
    /// Durable writes; many commits share one.
    pub batches: u64,
    /// Calls of `fdatasync`.
    pub syncs: u64,
    /// Bytes that were written and then synced.
    pub synced_bytes: u64,
}

impl RedbStore {
    /// Opens the store at `path`, or makes it, in a folder that is made if it is not there.
    ///
    /// Blocks while it reads the file; after a crash it checks the whole of it. The file is 0600, a new folder 0700.
    ///
    /// # Errors
    /// - `Conflict`: another process, or another handle in this one, has it open.
    /// - `Invalid`: the file is something else, or it is damaged.
    /// - `Unsupported`: a newer version of this program made it.
    /// - `Unavailable`: it cannot be read or written, or the disk is full; nothing was changed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::with_clock(path, Arc::new(SystemClock::new()))
    }

    /// As [`open`](Self::open); leads last by `clock`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_clock(path: impl AsRef<Path>, clock: Arc<dyn Clock>) -> Result<Self> {
        Self::start(Disk::open(path.as_ref())?, clock)
    }

    fn start(disk: Disk, clock: Arc<dyn Clock>) -> Result<Self> {
        let open = Arc::new(Open::new(disk)?);
        let state = open.read(file::state)?;
        let history = Arc::new(History::from(state.rev));
        let (asks, queue) = mpsc::channel(QUEUE);
        let writer = Writer::new(open.clone(), history.clone(), clock, state);
        let thread = std::thread::Builder::new()
            .name("state-store".into())
            .spawn(move || writer.run(queue))
            .map_err(|e| Error::unavailable("the state store's thread does not start").because(&e))?;
        Ok(Self { open, history, asks: Some(asks), writer: Some(thread) })
    }

    /// The identity of this store, drawn when it was made; a copy of the file has the same.
    pub fn id(&self) -> Uuid {
        self.open.disk().id()
    }

    /// What was done since it was opened.
    pub fn counters(&self) -> Counters {
        self.open.disk().counters()
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<Result<T>>) -> Ask) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let asks = self.asks.as_ref().ok_or_else(closed)?;
        asks.send(make(reply)).await.map_err(|_| closed())?;
        let lost = || Error::unavailable("the state store stopped").outcome_is(Outcome::Unknown);
        answer.await.map_err(|_| lost().remedy("open it again; the commit may have happened"))?
    }

    /// Runs `read` on a thread where blocking is fine.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&redb::ReadTransaction) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let open = self.open.clone();
        let done = tokio::task::spawn_blocking(move || open.read(read)).await;
        done.map_err(|e| Error::internal("a read of the state store failed").because(&e))?
    }
}

#[async_trait]
impl StateStore for RedbStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>> {
        let key = Bytes::copy_from_slice(key);
        self.read(move |txn| {
            let table = txn.open_table(ENTRIES).map_err(failed)?;
            let found = table.get(&*key).map_err(failed)?;
            found.map(|value| file::entry(&key, value.value())).transpose()
        })
        .await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)> {
        let prefix = prefix.to_vec();
        let after = after.map(<[u8]>::to_vec);
        self.read(move |txn| {
            let found = scan(txn, &prefix, after.as_deref(), limit)?;
            Ok((found, file::state(txn)?.rev))
        })
        .await
    }

    async fn commit(&self, lead: &Lead, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        check_limits(&checks, &writes)?;
        let lead = lead.clone();
        self.ask(|reply| Ask::Commit { lead, checks, writes, reply }).await
    }

    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>> {
        Ok(Box::new(self.history.watch(prefix, after)))
    }

    async fn lead(&self, me: Uuid, ttl: Duration, floor: Epoch) -> Result<Option<Lead>> {
        self.ask(|reply| Ask::Lead { me, ttl, floor, reply }).await
    }

    async fn renew(&self, lead: &Lead) -> Result<()> {
        let lead = lead.clone();
        self.ask(|reply| Ask::Renew { lead, reply }).await
    }

    async fn resign(&self, lead: Lead) -> Result<()> {
        self.ask(|reply| Ask::Resign { lead, reply }).await
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        // Without a sender the thread answers what is queued and ends; then nobody writes and the file can be freed.
        drop(self.asks.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        self.open.close();
    }
}

fn scan(
    txn: &redb::ReadTransaction,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<Vec<Entry>> {
    use std::ops::Bound;
    let table = txn.open_table(ENTRIES).map_err(failed)?;
    let from = match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    };
    let mut found = Vec::new();
    for item in table.range::<&[u8]>((from, Bound::Unbounded)).map_err(failed)? {
        if found.len() >= limit {
            break;
        }
        let (key, value) = item.map_err(failed)?;
        if !key.value().starts_with(prefix) {
            break;
        }
        found.push(file::entry(key.value(), value.value())?);
    }
    Ok(found)
}

/// Requests that wait for the thread; more wait in their callers.
const QUEUE: usize = 1024;

#[cfg(test)]
mod tests;
