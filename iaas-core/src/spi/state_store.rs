//! The one thing that high availability depends on: an ordered key-value store with atomic, fenced commits.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::Feed;
use crate::Epoch;
use crate::Error;
use crate::Result;
use crate::Rev;

/// The most checks of one commit.
pub const MAX_CHECKS: usize = 128;
/// The most writes of one commit.
pub const MAX_WRITES: usize = 128;
/// The most bytes of keys and values of one commit.
pub const MAX_BYTES: usize = 1 << 20;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// The commit that wrote it last.
    pub rev: Rev,
}

/// The right to commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lead {
    /// Who.
    pub me: Uuid,
    /// Grows with each grant.
    pub epoch: Epoch,
    /// How long it lasts unless renewed.
    pub ttl: Duration,
}

/// What must hold for a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// No entry has the key.
    Absent(Bytes),
    /// The entry was last written by that commit.
    At(Bytes, Rev),
}

/// What a commit writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Write {
    /// Sets the value.
    Put(Bytes, Bytes),
    /// Removes the entry, if any.
    Delete(Bytes),
}

impl Write {
    /// The key that it writes.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// A change that a watch reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// An entry was written.
    Put(Entry),
    /// An entry was removed.
    Deleted {
        /// Its key.
        key: Bytes,
        /// By which commit.
        rev: Rev,
    },
    /// Changes before this revision are no longer known: scan, then watch from there.
    Compacted(Rev),
}

/// Keeps the cloud's state.
///
/// # Contract
/// 1. `commit-atomic`: all checks hold and all writes happen, or none of it.
/// 2. `commit-durable`: after `Ok` the writes survive a crash.
/// 3. `rev-grows`: each commit has a higher revision than all before, also after a reopen.
/// 4. `check-absent` and 5. `check-at`: a check that does not hold fails with `Conflict`.
/// 6. `limits`: more than [`MAX_CHECKS`], [`MAX_WRITES`] or [`MAX_BYTES`] fails with `Invalid`.
/// 7. `no-key-twice`: a commit that writes one key twice fails with `Invalid`.
/// 8. `scan-ordered`: entries in byte order of keys, only of the prefix, after `after`, at most `limit`.
/// 9. `scan-rev`: the revision of a scan is that of the state it read.
/// 10. `epoch-grows`: each lead has a higher epoch than all before and than `floor`, also after a reopen.
/// 11. `stale-lead-fenced`: a commit by an older lead fails with `Fenced` and writes nothing.
/// 12. `one-lead`: while a lead lasts, another asker gets `None`.
/// 13. `resign-frees`: after `resign` another gets the lead at once.
/// 14. `watch-complete`: a watch from revision *r* reports each change after *r* once, in order, or `Compacted`.
/// 15. `watch-prefix`: and only keys of its prefix.
/// 16. `get-latest`: a read after a commit sees it.
#[async_trait]
pub trait StateStore: Debug + Send + Sync + 'static {
    /// The entry of `key`.
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>>;

    /// Up to `limit` entries whose key begins with `prefix` and is above `after`, and the revision that was read.
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)>;

    /// Writes, if every check holds.
    async fn commit(&self, lead: &Lead, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev>;

    /// Changes after `after` of keys that begin with `prefix`.
    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>>;

    /// Takes the lead for `ttl` with an epoch above `floor`; `None` while another has it.
    async fn lead(&self, me: Uuid, ttl: Duration, floor: Epoch) -> Result<Option<Lead>>;

    /// Prolongs the lead by its `ttl`.
    async fn renew(&self, lead: &Lead) -> Result<()>;

    /// Gives the lead back.
    async fn resign(&self, lead: Lead) -> Result<()>;
}

/// Refuses what every store refuses: too many checks or writes, too many bytes, a key twice.
///
/// # Errors
/// `Invalid`, with what to do.
pub fn check_limits(checks: &[Check], writes: &[Write]) -> Result<()> {
    let bytes: usize = writes
        .iter()
        .map(|w| match w {
            Write::Put(k, v) => k.len() + v.len(),
            Write::Delete(k) => k.len(),
        })
        .sum();
    if checks.len() > MAX_CHECKS || writes.len() > MAX_WRITES || bytes > MAX_BYTES {
        return Err(Error::invalid(format!(
            "a commit of {} checks, {} writes and {bytes} bytes is too large",
            checks.len(),
            writes.len()
        ))
        .remedy("split it: at most 128 checks, 128 writes and 1 MiB"));
    }
    let mut keys: Vec<_> = writes.iter().map(Write::key).collect();
    keys.sort_unstable();
    if keys.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("a commit writes one key twice").remedy("write each key once"));
    }
    Ok(())
}
