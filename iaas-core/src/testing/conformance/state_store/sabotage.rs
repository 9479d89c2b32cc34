//! Stores that break one clause each.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::MemoryRig;
use super::Rig;
use crate::Epoch;
use crate::Error;
use crate::ErrorKind;
use crate::Result;
use crate::Rev;
use crate::spi::Feed;
use crate::spi::Pull;
use crate::spi::state_store::Change;
use crate::spi::state_store::Check;
use crate::spi::state_store::Entry;
use crate::spi::state_store::Lead;
use crate::spi::state_store::MAX_CHECKS;
use crate::spi::state_store::MAX_WRITES;
use crate::spi::state_store::StateStore;
use crate::spi::state_store::Write;
use crate::testing::conformance::Saboteur;

/// One saboteur or more for each clause.
pub fn saboteurs() -> Vec<Saboteur<dyn Rig>> {
    macro_rules! list {
        ($($clause:literal, $does:literal => $fault:ident;)+) => {
            vec![$(Saboteur { clause: $clause, does: $does, rig: || Box::new(BadRig::with(Fault::$fault)) }),+]
        };
    }
    list! {
        "commit-atomic", "writes the first entry of a refused commit" => Torn;
        "commit-durable", "forgets the last commit in a restart" => Forgets;
        "rev-grows", "counts revisions anew after a restart" => RevRestarts;
        "check-absent", "does not look whether a key is absent" => SkipsAbsent;
        "check-at", "does not look at revisions" => SkipsAt;
        "limits", "splits a commit that is too large" => Splits;
        "no-key-twice", "takes the last of two writes of a key" => LastWins;
        "scan-ordered", "scans backwards" => Backwards;
        "scan-ordered", "begins a scan with the key it should be after" => Repeats;
        "scan-rev", "says an older revision than it read" => OldRev;
        "epoch-grows", "counts epochs anew after a restart" => EpochRestarts;
        "epoch-grows", "does not heed the floor" => NoFloor;
        "stale-lead-fenced", "lets any leader of the past write" => AnyLead;
        "one-lead", "gives the lead to whoever asks last" => LastAsks;
        "resign-frees", "keeps a lead that was given back, once" => KeepsLead;
        "watch-complete", "reports only the first change of a commit" => FirstOnly;
        "watch-complete", "reports a change twice" => Twice;
        "watch-prefix", "reports all keys" => AllKeys;
        "get-latest", "reads what was before the last commit" => Stale;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Torn,
    Forgets,
    RevRestarts,
    SkipsAbsent,
    SkipsAt,
    Splits,
    LastWins,
    Backwards,
    Repeats,
    OldRev,
    EpochRestarts,
    NoFloor,
    AnyLead,
    LastAsks,
    KeepsLead,
    FirstOnly,
    Twice,
    AllKeys,
    Stale,
}

struct BadRig {
    clean: MemoryRig,
    fault: Fault,
    state: Arc<Mutex<Bad>>,
}

impl BadRig {
    fn with(fault: Fault) -> Self {
        Self { clean: MemoryRig::default(), fault, state: Arc::default() }
    }

    fn spoil(&self, clean: Arc<dyn StateStore>) -> Arc<dyn StateStore> {
        Arc::new(BadStore {
            clean,
            fault: self.fault,
            state: self.state.clone(),
            resigned: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl Rig for BadRig {
    async fn fresh(&self) -> Result<Arc<dyn StateStore>> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Bad::default();
        Ok(self.spoil(self.clean.fresh().await?))
    }

    async fn reopen(&self, old: Arc<dyn StateStore>) -> Result<Arc<dyn StateStore>> {
        let clean = self.clean.reopen(old).await?;
        self.state.lock().unwrap_or_else(PoisonError::into_inner).restart();
        Ok(self.spoil(clean))
    }
}

/// What the saboteur remembers beside the clean store.
#[derive(Debug, Default)]
struct Bad {
    newest: Option<Lead>,
    last_rev: Rev,
    /// Entries that the last commit replaced.
    replaced: BTreeMap<Bytes, Option<Entry>>,
    hidden: BTreeSet<Bytes>,
    rev_base: u64,
    epoch_base: u64,
}

impl Bad {
    fn restart(&mut self) {
        self.hidden = self.replaced.keys().cloned().collect();
        self.rev_base = self.last_rev.0;
        self.epoch_base = self.newest.as_ref().map_or(0, |lead| lead.epoch.0);
    }
}

#[derive(Debug)]
struct BadStore {
    clean: Arc<dyn StateStore>,
    fault: Fault,
    state: Arc<Mutex<Bad>>,
    resigned: AtomicBool,
}

impl BadStore {
    fn state(&self) -> MutexGuard<'_, Bad> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// The clean store's lead for what a caller holds.
    fn inward(&self, lead: &Lead) -> Lead {
        let state = self.state();
        match self.fault {
            Fault::AnyLead => state.newest.clone().unwrap_or_else(|| lead.clone()),
            Fault::EpochRestarts => Lead { epoch: Epoch(lead.epoch.0 + state.epoch_base), ..lead.clone() },
            _ => lead.clone(),
        }
    }

    fn outward(&self, lead: Lead) -> Lead {
        let mut state = self.state();
        state.newest = Some(lead.clone());
        match self.fault {
            Fault::EpochRestarts => Lead { epoch: Epoch(lead.epoch.0 - state.epoch_base), ..lead },
            _ => lead,
        }
    }

    async fn remember(&self, writes: &[Write]) -> Result<()> {
        let mut replaced = BTreeMap::new();
        for write in writes {
            replaced.insert(write.key().clone(), self.clean.get(write.key()).await?);
        }
        self.state().replaced = replaced;
        Ok(())
    }

    /// Changes what a commit asks for; one that is too large is left for the clean store to refuse.
    fn bend(&self, checks: &mut Vec<Check>, writes: &mut Vec<Write>) {
        if checks.len() > MAX_CHECKS {
            return;
        }
        match self.fault {
            Fault::SkipsAbsent => checks.retain(|check| !matches!(check, Check::Absent(_))),
            Fault::SkipsAt => checks.retain(|check| !matches!(check, Check::At(..))),
            Fault::LastWins => {
                let last: BTreeMap<_, _> = writes.drain(..).map(|w| (w.key().clone(), w)).collect();
                writes.extend(last.into_values());
            }
            _ => {}
        }
    }
}

#[async_trait]
impl StateStore for BadStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>> {
        if self.is(Fault::Stale)
            && let Some(before) = self.state().replaced.get(key)
        {
            return Ok(before.clone());
        }
        self.clean.get(key).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)> {
        let (mut found, mut rev) = self.clean.scan(prefix, after, limit).await?;
        match self.fault {
            Fault::Forgets => found.retain(|entry| !self.state().hidden.contains(&entry.key)),
            Fault::Backwards => found.reverse(),
            Fault::Repeats => {
                if let Some(after) = after {
                    found.splice(0..0, self.clean.get(after).await?);
                }
            }
            Fault::OldRev => rev = Rev(rev.0.saturating_sub(1)),
            _ => {}
        }
        Ok((found, rev))
    }

    async fn commit(&self, lead: &Lead, mut checks: Vec<Check>, mut writes: Vec<Write>) -> Result<Rev> {
        let lead = self.inward(lead);
        self.bend(&mut checks, &mut writes);
        if self.is(Fault::Splits) && writes.len() > MAX_WRITES {
            let rest = writes.split_off(MAX_WRITES);
            self.clean.commit(&lead, vec![], rest).await?;
        }
        self.remember(&writes).await?;
        let first = writes.first().cloned();
        match self.clean.commit(&lead, checks, writes).await {
            Ok(rev) => {
                let mut state = self.state();
                state.last_rev = rev;
                Ok(if self.is(Fault::RevRestarts) { Rev(rev.0 - state.rev_base) } else { rev })
            }
            Err(error) if self.is(Fault::Torn) && error.kind() == ErrorKind::Conflict => {
                self.clean.commit(&lead, vec![], first.into_iter().collect()).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>> {
        let prefix = if self.is(Fault::AllKeys) { b"" } else { prefix };
        let clean = self.clean.watch(prefix, after).await?;
        Ok(Box::new(BadWatch { clean, fault: self.fault, last: None, again: None }))
    }

    async fn lead(&self, me: Uuid, ttl: Duration, floor: Epoch) -> Result<Option<Lead>> {
        if self.is(Fault::KeepsLead) && self.resigned.swap(false, SeqCst) {
            return Ok(None);
        }
        let floor = if self.is(Fault::NoFloor) { Epoch(0) } else { floor };
        let newest = self.state().newest.clone();
        if self.is(Fault::LastAsks)
            && let Some(held) = newest
        {
            self.clean.resign(held).await?;
        }
        Ok(self.clean.lead(me, ttl, floor).await?.map(|lead| self.outward(lead)))
    }

    async fn renew(&self, lead: &Lead) -> Result<()> {
        // The saboteur of commits leaves renewals alone.
        let lead = if self.is(Fault::AnyLead) { lead.clone() } else { self.inward(lead) };
        self.clean.renew(&lead).await
    }

    async fn resign(&self, lead: Lead) -> Result<()> {
        self.resigned.store(true, SeqCst);
        let lead = if self.is(Fault::AnyLead) { lead } else { self.inward(&lead) };
        self.clean.resign(lead).await
    }
}

struct BadWatch {
    clean: Feed<Change>,
    fault: Fault,
    last: Option<Rev>,
    again: Option<Change>,
}

#[async_trait]
impl Pull<Change> for BadWatch {
    async fn next(&mut self) -> Option<Result<Change>> {
        if let Some(again) = self.again.take() {
            return Some(Ok(again));
        }
        loop {
            let change = match self.clean.next().await? {
                Ok(change) => change,
                Err(error) => return Some(Err::<Change, Error>(error)),
            };
            let rev = super::of(&change).0;
            let seen = self.last.replace(rev) == Some(rev);
            if self.fault == Fault::FirstOnly && seen {
                continue;
            }
            if self.fault == Fault::Twice && seen {
                self.again = Some(change.clone());
            }
            return Some(Ok(change));
        }
    }
}
