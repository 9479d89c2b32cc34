//! The thread that owns all changes: it takes what waits, applies it in order in one transaction, and answers after the
//! disk has it.

use std::sync::Arc;
use std::time::Duration;

use redb::ReadableTable;
use redb::Table;
use redb::WriteTransaction;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::file;
use super::file::ENTRIES;
use super::file::META;
use super::file::Open;
use super::file::State;
use super::file::failed;
use crate::Clock;
use crate::Epoch;
use crate::Error;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::spi::state_store::Change;
use crate::spi::state_store::Check;
use crate::spi::state_store::Entry;
use crate::spi::state_store::Lead;
use crate::spi::state_store::Write;
use crate::store::all_hold;
use crate::store::history::History;
use crate::store::lead::Leads;
use crate::store::memory::next;

type Reply<T> = oneshot::Sender<Result<T>>;

/// A request to the thread. A caller that went away loses only the answer.
#[derive(Debug)]
pub(super) enum Ask {
    Commit { lead: Lead, checks: Vec<Check>, writes: Vec<Write>, reply: Reply<Rev> },
    Lead { me: Uuid, ttl: Duration, floor: Epoch, reply: Reply<Option<Lead>> },
    Renew { lead: Lead, reply: Reply<()> },
    Resign { lead: Lead, reply: Reply<()> },
}

/// An answer that waits for the disk.
enum Answer {
    Commit(Reply<Rev>, Result<Rev>),
    Lead(Reply<Option<Lead>>, Result<Option<Lead>>),
    Unit(Reply<()>, Result<()>),
}

/// What a batch does to what is in memory, once the disk has it.
struct Draft {
    rev: Rev,
    leads: Leads,
    changes: Vec<Change>,
    answers: Vec<Answer>,
    commits: u64,
}

/// The state of the thread.
pub(super) struct Writer {
    open: Arc<Open>,
    history: Arc<History>,
    clock: Arc<dyn Clock>,
    rev: Rev,
    leads: Leads,
    broken: bool,
}

impl Writer {
    pub(super) fn new(open: Arc<Open>, history: Arc<History>, clock: Arc<dyn Clock>, state: State) -> Self {
        Self { open, history, clock, rev: state.rev, leads: Leads::after(state.epoch), broken: false }
    }

    /// Serves `queue` until all senders are gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Ask>) {
        while let Some(first) = queue.blocking_recv() {
            let mut bytes = first.bytes();
            let mut batch = vec![first];
            while batch.len() < MAX_BATCH && bytes < MAX_BATCH_BYTES {
                let Ok(ask) = queue.try_recv() else { break };
                bytes += ask.bytes();
                batch.push(ask);
            }
            self.serve(batch);
        }
    }

    fn serve(&mut self, batch: Vec<Ask>) {
        if let Err(error) = self.mend() {
            batch.into_iter().for_each(|ask| ask.refuse(&error));
            return;
        }
        let mut draft = Draft::new(self.rev, self.leads.clone());
        match self.attempt(batch, &mut draft) {
            Ok(()) => self.accept(draft),
            Err(error) => self.reject(draft, &error),
        }
    }

    /// Applies the batch to `draft` and makes it durable; asks that were not reached are refused.
    fn attempt(&self, batch: Vec<Ask>, draft: &mut Draft) -> Result<()> {
        let epoch = self.leads.newest();
        let now = self.clock.monotonic();
        let mut batch = batch.into_iter();
        let done = self.open.with(|database| {
            let txn = database.begin_write().map_err(failed)?;
            draft.apply(&txn, &mut batch, now)?;
            if draft.commits == 0 && draft.leads.newest() == epoch {
                return txn.abort().map_err(failed);
            }
            draft.store_numbers(&txn)?;
            txn.commit().map_err(failed)?;
            self.open.disk().count_batch(draft.commits);
            Ok(())
        });
        if let Err(error) = &done {
            batch.for_each(|ask| ask.refuse(error));
        }
        done
    }

    fn accept(&mut self, draft: Draft) {
        self.rev = draft.rev;
        self.leads = draft.leads;
        self.history.append(draft.changes);
        draft.answers.into_iter().for_each(Answer::send);
    }

    /// Finds out what became of a batch that failed, and tells all who wait.
    fn reject(&mut self, draft: Draft, error: &Error) {
        self.broken = true;
        let mended = self.mend();
        let landed = mended.is_err() || self.open.disk().sync_failed();
        let outcome = if landed { Outcome::Unknown } else { Outcome::NotDone };
        let error = error.clone().outcome_is(outcome);
        tracing::error!(?error, path = %self.open.disk().path().display(), "the state store failed");
        draft.answers.into_iter().for_each(|answer| answer.fail(&error));
    }

    /// Opens the database anew if the last batch failed.
    ///
    /// # Errors
    /// `Unavailable`, if that does not work; nothing was done.
    fn mend(&mut self) -> Result<()> {
        if self.open.disk().sync_failed() {
            return Err(Error::unavailable("a sync of the state store failed")
                .remedy("check the disk, then open the store anew")
                .outcome_is(Outcome::NotDone));
        }
        if !self.broken {
            return Ok(());
        }
        self.open.reopen()?;
        let state = self.open.read(file::state)?;
        if state.rev != self.rev {
            self.history.forget(state.rev);
            self.rev = state.rev;
        }
        if state.epoch != self.leads.newest() {
            self.leads = Leads::after(state.epoch);
        }
        self.broken = false;
        Ok(())
    }
}

impl Draft {
    fn new(rev: Rev, leads: Leads) -> Self {
        Self { rev, leads, changes: Vec::new(), answers: Vec::new(), commits: 0 }
    }

    /// Applies each ask in order. An error is one of the disk: then nothing of the batch happens.
    fn apply(
        &mut self,
        txn: &WriteTransaction,
        batch: &mut impl Iterator<Item = Ask>,
        now: Duration,
    ) -> Result<()> {
        let mut table = txn.open_table(ENTRIES).map_err(failed)?;
        for ask in batch {
            match ask {
                Ask::Commit { lead, checks, writes, reply } => {
                    let done = self.commit(&mut table, &lead, &checks, writes);
                    let (answer, fatal) = match done {
                        Ok(answer) => (answer, None),
                        Err(error) => (Err(error.clone()), Some(error)),
                    };
                    self.answers.push(Answer::Commit(reply, answer));
                    if let Some(error) = fatal {
                        return Err(error);
                    }
                }
                Ask::Lead { me, ttl, floor, reply } => {
                    let answer = self.leads.take(me, ttl, floor, now);
                    self.answers.push(Answer::Lead(reply, answer));
                }
                Ask::Renew { lead, reply } => {
                    let answer = self.leads.renew(&lead, now);
                    self.answers.push(Answer::Unit(reply, answer));
                }
                Ask::Resign { lead, reply } => {
                    self.leads.resign(&lead);
                    self.answers.push(Answer::Unit(reply, Ok(())));
                }
            }
        }
        Ok(())
    }

    /// The outer error is one of the disk, the inner one the refusal of this commit alone.
    fn commit(
        &mut self,
        table: &mut Table<'_, &'static [u8], &'static [u8]>,
        lead: &Lead,
        checks: &[Check],
        writes: Vec<Write>,
    ) -> Result<Result<Rev>> {
        let mut broken = None;
        let allowed = self.leads.check(lead).and_then(|()| {
            all_hold(checks, |key| stored_rev(table, key).inspect_err(|e| broken = Some(e.clone())))
        });
        if let Some(error) = broken {
            return Err(error);
        }
        let rev = match allowed.and_then(|()| next(self.rev)) {
            Ok(rev) => rev,
            Err(refusal) => return Ok(Err(refusal)),
        };
        for write in writes {
            self.changes.extend(put(table, write, rev)?);
        }
        self.rev = rev;
        self.commits += 1;
        Ok(Ok(rev))
    }

    fn store_numbers(&self, txn: &WriteTransaction) -> Result<()> {
        let mut meta = txn.open_table(META).map_err(failed)?;
        meta.insert("rev", self.rev.0).map_err(failed)?;
        meta.insert("epoch", self.leads.newest().0).map_err(failed)?;
        Ok(())
    }
}

impl Ask {
    /// About how much memory its writes take.
    fn bytes(&self) -> usize {
        let Self::Commit { writes, .. } = self else { return 0 };
        let size = |write: &Write| match write {
            Write::Put(key, value) => key.len() + value.len(),
            Write::Delete(key) => key.len(),
        };
        writes.iter().map(size).sum()
    }

    fn refuse(self, error: &Error) {
        match self {
            Self::Commit { reply, .. } => drop(reply.send(Err(error.clone()))),
            Self::Lead { reply, .. } => drop(reply.send(Err(error.clone()))),
            Self::Renew { reply, .. } | Self::Resign { reply, .. } => drop(reply.send(Err(error.clone()))),
        }
    }
}

impl Answer {
    /// Answers; a caller that went away is no matter.
    fn send(self) {
        match self {
            Self::Commit(reply, answer) => drop(reply.send(answer)),
            Self::Lead(reply, answer) => drop(reply.send(answer)),
            Self::Unit(reply, answer) => drop(reply.send(answer)),
        }
    }

    /// Answers that the batch failed. Refusals rest on earlier commits of the same batch, so they fail with it.
    fn fail(self, error: &Error) {
        match self {
            Self::Commit(reply, _) => drop(reply.send(Err(error.clone()))),
            Self::Lead(reply, _) => drop(reply.send(Err(error.clone()))),
            Self::Unit(reply, _) => drop(reply.send(Err(error.clone()))),
        }
    }
}

fn stored_rev(table: &Table<'_, &'static [u8], &'static [u8]>, key: &[u8]) -> Result<Option<Rev>> {
    table.get(key).map_err(failed)?.map(|stored| file::rev_of(stored.value())).transpose()
}

fn put(
    table: &mut Table<'_, &'static [u8], &'static [u8]>,
    write: Write,
    rev: Rev,
) -> Result<Option<Change>> {
    match write {
        Write::Put(key, value) => {
            table.insert(&*key, &*file::stored(rev, &value)).map_err(failed)?;
            Ok(Some(Change::Put(Entry { key, value, rev })))
        }
        Write::Delete(key) => {
            let there = table.remove(&*key).map_err(failed)?.is_some();
            Ok(there.then_some(Change::Deleted { key, rev }))
        }
    }
}

/// The most asks of one durable write.
const MAX_BATCH: usize = 256;
/// The bytes after which a batch takes no more asks.
const MAX_BATCH_BYTES: usize = 8 << 20;
