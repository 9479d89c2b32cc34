//! A store that lives as long as its handles: for tests and for clouds that nobody needs to keep.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::all_hold;
use super::closed;
use super::history::History;
use super::lead::Leads;
use crate::Clock;
use crate::Epoch;
use crate::Error;
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

/// A [`StateStore`] in memory. No call blocks; nothing survives the last handle.
#[derive(Debug)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    history: History,
    session: u64,
    clock: Arc<dyn Clock>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Bytes, (Bytes, Rev)>,
    rev: Rev,
    leads: Leads,
    session: u64,
}

impl MemoryStore {
    /// An empty store on the system's clock.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock::new()))
    }

    /// An empty store whose leads last by `clock`.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { state: Arc::default(), history: History::from(Rev(0)), session: 0, clock }
    }

    /// The same state as a process that starts again would find it: what was committed is there, the history of
    /// changes is not, nobody has the lead, and this older handle is closed.
    #[must_use]
    pub fn reopen(&self) -> Self {
        let mut state = self.lock();
        state.session += 1;
        state.leads = Leads::after(state.leads.newest());
        self.history.forget(state.rev);
        Self {
            state: self.state.clone(),
            history: History::from(state.rev),
            session: state.session,
            clock: self.clock.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.session == self.session { Ok(state) } else { Err(closed()) }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn rev_of(&self, key: &[u8]) -> Option<Rev> {
        self.entries.get(key).map(|(_, rev)| *rev)
    }

    fn apply(&mut self, writes: Vec<Write>) -> Vec<Change> {
        let rev = self.rev;
        let mut changes = Vec::with_capacity(writes.len());
        for write in writes {
            match write {
                Write::Put(key, value) => {
                    self.entries.insert(key.clone(), (value.clone(), rev));
                    changes.push(Change::Put(Entry { key, value, rev }));
                }
                Write::Delete(key) => {
                    if self.entries.remove(&key).is_some() {
                        changes.push(Change::Deleted { key, rev });
                    }
                }
            }
        }
        changes
    }
}

#[async_trait]
impl StateStore for MemoryStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>> {
        let state = self.open()?;
        Ok(state.entries.get_key_value(key).map(|(key, (value, rev))| entry(key, value, *rev)))
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)> {
        let state = self.open()?;
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let found = state
            .entries
            .range::<[u8], _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, (value, rev))| entry(key, value, *rev))
            .collect();
        Ok((found, state.rev))
    }

    async fn commit(&self, lead: &Lead, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        check_limits(&checks, &writes)?;
        let mut state = self.open()?;
        state.leads.check(lead)?;
        all_hold(&checks, |key| Ok(state.rev_of(key)))?;
        state.rev = next(state.rev)?;
        let changes = state.apply(writes);
        // Under the lock, so that the history has the order of the commits.
        self.history.append(changes);
        Ok(state.rev)
    }

    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>> {
        let _open = self.open()?;
        Ok(Box::new(self.history.watch(prefix, after)))
    }

    async fn lead(&self, me: Uuid, ttl: Duration, floor: Epoch) -> Result<Option<Lead>> {
        self.open()?.leads.take(me, ttl, floor, self.clock.monotonic())
    }

    async fn renew(&self, lead: &Lead) -> Result<()> {
        self.open()?.leads.renew(lead, self.clock.monotonic())
    }

    async fn resign(&self, lead: Lead) -> Result<()> {
        self.open()?.leads.resign(&lead);
        Ok(())
    }
}

/// The revision after `rev`.
pub(super) fn next(rev: Rev) -> Result<Rev> {
    rev.0.checked_add(1).map(Rev).ok_or_else(|| Error::internal("no revision is left"))
}

fn entry(key: &Bytes, value: &Bytes, rev: Rev) -> Entry {
    Entry { key: key.clone(), value: value.clone(), rev }
}
