//! The changes of late, for watches: a bounded ring in memory.
//!
//! A watch that fell behind the ring, or that asks for what was before this process, is told `Compacted` and ends.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use crate::Result;
use crate::Rev;
use crate::spi::Pull;
use crate::spi::state_store::Change;

/// What changed of late.
#[derive(Debug)]
pub(super) struct History {
    ring: Arc<Mutex<Ring>>,
    wake: watch::Sender<()>,
}

/// Changes in the order of revisions. Each has a number that only grows: `first` is that of the oldest one kept.
#[derive(Debug)]
struct Ring {
    changes: VecDeque<Change>,
    bytes: usize,
    first: u64,
    /// Every change after this revision is in `changes`.
    floor: Rev,
}

impl History {
    /// Starts with no memory of what was up to `floor`.
    pub(super) fn from(floor: Rev) -> Self {
        let ring = Ring { changes: VecDeque::new(), bytes: 0, first: 0, floor };
        Self { ring: Arc::new(Mutex::new(ring)), wake: watch::Sender::new(()) }
    }

    /// Adds the changes of a commit whose revision is above all before.
    pub(super) fn append(&self, changes: impl IntoIterator<Item = Change>) {
        let mut ring = lock(&self.ring);
        for change in changes {
            ring.push(change);
        }
        drop(ring);
        self.wake.send_replace(());
    }

    /// Forgets everything up to `floor`: something was written that is not known in detail.
    pub(super) fn forget(&self, floor: Rev) {
        let mut ring = lock(&self.ring);
        ring.first = ring.first.saturating_add(ring.changes.len() as u64);
        ring.changes.clear();
        ring.bytes = 0;
        ring.floor = floor;
        drop(ring);
        self.wake.send_replace(());
    }

    /// The changes after `after` of keys that begin with `prefix`.
    pub(super) fn watch(&self, prefix: &[u8], after: Rev) -> Watch {
        Watch {
            ring: self.ring.clone(),
            wake: self.wake.subscribe(),
            prefix: Bytes::copy_from_slice(prefix),
            after,
            next: None,
            ended: false,
        }
    }
}

impl Ring {
    fn push(&mut self, change: Change) {
        self.bytes += size(&change);
        self.changes.push_back(change);
        while self.changes.len() > MAX_CHANGES || self.bytes > MAX_HISTORY {
            let Some(oldest) = self.changes.pop_front() else { return };
            self.bytes -= size(&oldest);
            self.first += 1;
            self.floor = rev(&oldest);
        }
    }

    fn at(&self, number: u64) -> Option<&Change> {
        let place = number.checked_sub(self.first)?;
        self.changes.get(usize::try_from(place).ok()?)
    }

    /// The number of the first change after `after`.
    fn start(&self, after: Rev) -> u64 {
        self.first + self.changes.partition_point(|c| rev(c) <= after) as u64
    }
}

/// A watch's place in the history.
#[derive(Debug)]
pub(super) struct Watch {
    ring: Arc<Mutex<Ring>>,
    wake: watch::Receiver<()>,
    prefix: Bytes,
    after: Rev,
    next: Option<u64>,
    ended: bool,
}

impl Watch {
    /// The next change that is there already.
    fn ready(&mut self) -> Option<Change> {
        let ring = lock(&self.ring);
        let lost = match self.next {
            None => self.after < ring.floor,
            Some(next) => next < ring.first,
        };
        if lost {
            self.ended = true;
            return Some(Change::Compacted(Rev(ring.floor.0.saturating_add(1))));
        }
        let mut next = self.next.unwrap_or_else(|| ring.start(self.after));
        let mut found = None;
        while found.is_none()
            && let Some(change) = ring.at(next)
        {
            next += 1;
            found =
                (rev(change) > self.after && key(change).starts_with(&self.prefix)).then(|| change.clone());
        }
        self.next = Some(next);
        found
    }
}

#[async_trait]
impl Pull<Change> for Watch {
    async fn next(&mut self) -> Option<Result<Change>> {
        loop {
            if self.ended {
                return None;
            }
            self.wake.mark_unchanged();
            if let Some(change) = self.ready() {
                return Some(Ok(change));
            }
            // The only other holder is the store: when it is gone nothing will change any more.
            self.wake.changed().await.ok()?;
        }
    }
}

fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rev(change: &Change) -> Rev {
    match change {
        Change::Put(entry) => entry.rev,
        Change::Deleted { rev, .. } | Change::Compacted(rev) => *rev,
    }
}

fn key(change: &Change) -> &[u8] {
    match change {
        Change::Put(entry) => &entry.key,
        Change::Deleted { key, .. } => key,
        Change::Compacted(_) => &[],
    }
}

fn size(change: &Change) -> usize {
    match change {
        Change::Put(entry) => entry.key.len() + entry.value.len(),
        Change::Deleted { key, .. } => key.len(),
        Change::Compacted(_) => 0,
    }
}

/// The most changes kept.
const MAX_CHANGES: usize = 16 * 1024;
/// The most bytes of keys and values kept.
const MAX_HISTORY: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spi::state_store::Entry;

    fn put(key: &str, rev: u64) -> Change {
        Change::Put(Entry { key: Bytes::copy_from_slice(key.as_bytes()), value: Bytes::new(), rev: Rev(rev) })
    }

    #[tokio::test]
    async fn a_watch_that_fell_behind_is_told_so_once_and_ends() {
        let history = History::from(Rev(3));
        let mut slow = history.watch(b"", Rev(3));
        history.append([put("a", 4)]);
        assert_eq!(slow.next().await, Some(Ok(put("a", 4))));
        let many = MAX_CHANGES as u64 + 5;
        history.append((5..5 + many).map(|rev| put("b", rev)));
        // Revisions 4 to 9 were pushed out.
        assert_eq!(slow.next().await, Some(Ok(Change::Compacted(Rev(10)))));
        assert_eq!(slow.next().await, None);
        let mut fresh = history.watch(b"", Rev(9));
        assert_eq!(fresh.next().await, Some(Ok(put("b", 10))));
    }

    #[tokio::test]
    async fn a_watch_of_the_future_waits_for_it() {
        let history = History::from(Rev(0));
        let mut watch = history.watch(b"", Rev(2));
        history.append([put("a", 1)]);
        history.append([put("a", 2)]);
        history.append([put("a", 3)]);
        assert_eq!(watch.next().await, Some(Ok(put("a", 3))));
        drop(history);
        assert_eq!(watch.next().await, None);
    }

    #[tokio::test]
    async fn the_ring_is_bounded_in_bytes_too() {
        let history = History::from(Rev(0));
        let value = Bytes::from(vec![0; 1 << 20]);
        for rev in 1..=20 {
            let key = Bytes::from_static(b"k");
            history.append([Change::Put(Entry { key, value: value.clone(), rev: Rev(rev) })]);
        }
        // 16 MiB hold 15 entries of 1 MiB and a byte.
        assert_eq!(history.watch(b"", Rev(0)).next().await, Some(Ok(Change::Compacted(Rev(6)))));
    }
}
