//! The one writer: draws a change up over the state, commits it, and takes it into memory.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tracing::Instrument;

use super::codec;
use super::draft::Basis;
use super::draft::Draft;
use super::draft::Plan;
use super::draft::SiteFacts;
use super::state::State;
use super::state::attached_object;
use crate::Clock;
use crate::Entity;
use crate::Error;
use crate::ErrorKind;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::id::Fabric;
use crate::model::*;
use crate::spi::placement::Placement;
use crate::spi::state_store::Check;
use crate::spi::state_store::Lead;
use crate::spi::state_store::StateStore;
use crate::spi::state_store::Write;

/// The name under which the engine changes what it observed.
pub const SELF: &str = "engine";

/// Commits changes one after another and keeps the state in memory.
///
/// Cheap to share. Readers never wait for a commit; a commit waits for the one before it.
#[derive(Debug)]
pub struct Committer {
    store: Arc<dyn StateStore>,
    clock: Arc<dyn Clock>,
    placement: Arc<dyn Placement>,
    sites: SiteFacts,
    state: Arc<RwLock<State>>,
    lead: Lead,
    one_at_a_time: Arc<Mutex<()>>,
    woken: AtomicU64,
    changed: watch::Sender<Rev>,
    halted: watch::Sender<Option<Error>>,
    wake: mpsc::UnboundedSender<ObjectRef>,
    fabrics: Vec<crate::Id<Fabric>>,
}

/// What a committer is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) store: Arc<dyn StateStore>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) placement: Arc<dyn Placement>,
    pub(super) sites: SiteFacts,
    pub(super) state: Arc<RwLock<State>>,
    pub(super) lead: Lead,
    pub(super) wake: mpsc::UnboundedSender<ObjectRef>,
    pub(super) fabrics: Vec<crate::Id<Fabric>>,
}

/// Who looks at what a commit changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wakes {
    Concerned,
    Nobody,
}

/// A change that is durable.
#[derive(Clone, Debug)]
pub struct Committed<T> {
    /// What the drawing returned.
    pub out: T,
    /// What it did.
    pub plan: Plan,
    /// Its revision.
    pub rev: Rev,
}

impl Committer {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { store, clock, placement, sites, state, lead, wake, fabrics } = parts;
        let rev = state.read().unwrap_or_else(PoisonError::into_inner).rev;
        Self {
            store,
            clock,
            placement,
            sites,
            state,
            lead,
            one_at_a_time: Arc::default(),
            woken: AtomicU64::new(0),
            changed: watch::Sender::new(rev),
            halted: watch::Sender::new(None),
            wake,
            fabrics,
        }
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn StateStore> {
        &self.store
    }

    /// The right by which it commits.
    pub fn lead(&self) -> &Lead {
        &self.lead
    }

    /// Says each new revision.
    pub fn changes(&self) -> watch::Receiver<Rev> {
        self.changed.subscribe()
    }

    /// Says when nothing can be committed any more, and why.
    pub fn halts(&self) -> watch::Receiver<Option<Error>> {
        self.halted.subscribe()
    }

    /// Stops committing: another leader exists, or what is in memory may not be what is stored.
    pub fn halt(&self, why: Error) {
        if self.stop(why.clone()) {
            tracing::error!(error = %why, "the control plane stops");
        }
    }

    /// Stops committing, as was asked for; whether this was the first to say so.
    pub fn stop(&self, why: Error) -> bool {
        self.halted.send_if_modified(|halted| {
            let first = halted.is_none();
            if first {
                *halted = Some(why);
            }
            first
        })
    }

    /// How many wake-ups were sent so far: what the driver has still to take is not at rest.
    pub fn woken(&self) -> u64 {
        self.woken.load(Ordering::Acquire)
    }

    /// Asks for a look at `object`.
    pub fn wake(&self, object: ObjectRef) {
        self.woken.fetch_add(1, Ordering::AcqRel);
        // The receiver is gone only while the cloud is being dropped.
        let _ = self.wake.send(object);
    }

    /// Reads the state. Keep it short: commits wait.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Draws a change up without committing it.
    ///
    /// # Errors
    /// Those of `draw`.
    pub fn plan<T>(&self, by: &str, draw: impl FnOnce(&mut Draft<'_>) -> Result<T>) -> Result<(T, Plan)> {
        self.read(|state| {
            let mut draft = Draft::new(self.basis(state), by);
            let out = draw(&mut draft)?;
            Ok((out, draft.finish().2))
        })
    }

    /// Draws a change up and commits it. Without any write nothing is committed.
    ///
    /// A caller that drops the future loses only the answer: what was handed to the store is taken into memory.
    ///
    /// # Errors
    /// Those of `draw`, and of [`StateStore::commit`].
    pub async fn commit<T>(
        self: &Arc<Self>,
        by: &str,
        draw: impl FnOnce(&mut Draft<'_>) -> Result<T>,
    ) -> Result<Committed<T>> {
        self.commit_and(by, Wakes::Concerned, draw).await
    }

    /// As [`commit`](Self::commit), for a change that nobody has to act upon.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn commit_quietly<T>(
        self: &Arc<Self>,
        by: &str,
        draw: impl FnOnce(&mut Draft<'_>) -> Result<T>,
    ) -> Result<Committed<T>> {
        self.commit_and(by, Wakes::Nobody, draw).await
    }

    async fn commit_and<T>(
        self: &Arc<Self>,
        by: &str,
        wakes: Wakes,
        draw: impl FnOnce(&mut Draft<'_>) -> Result<T>,
    ) -> Result<Committed<T>> {
        let turn = self.turn().await?;
        let (out, checks, writes, plan, before) = self.read(|state| {
            let mut draft = Draft::new(self.basis(state), by);
            let out = draw(&mut draft)?;
            let (checks, writes, plan) = draft.finish();
            let before = self.concerned(state, &writes);
            Ok::<_, Error>((out, checks, writes, plan, before))
        })?;
        if writes.is_empty() {
            return Ok(Committed { out, plan, rev: self.read(|s| s.rev) });
        }
        let this = Arc::clone(self);
        let rev = self
            .to_the_end(turn, async move {
                let rev = this.write(checks, writes.clone()).await?;
                // What cannot be read back was written by a defect of ours: memory is not what is stored.
                let after = this.apply(&writes, rev).inspect_err(|error| this.halt(error.clone()))?;
                this.changed.send_replace(rev);
                if wakes == Wakes::Concerned {
                    before.union(&after).for_each(|object| this.wake(object.clone()));
                }
                Ok(rev)
            })
            .await?;
        Ok(Committed { out, plan, rev })
    }

    /// Commits entries that are no records.
    ///
    /// # Errors
    /// Those of [`StateStore::commit`].
    pub async fn commit_raw(self: &Arc<Self>, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        let turn = self.turn().await?;
        let this = Arc::clone(self);
        self.to_the_end(turn, async move { this.write(checks, writes).await }).await
    }

    async fn turn(&self) -> Result<OwnedMutexGuard<()>> {
        let turn = Arc::clone(&self.one_at_a_time).lock_owned().await;
        match self.halted.borrow().clone() {
            Some(why) => Err(why.outcome_is(Outcome::NotDone)),
            None => Ok(turn),
        }
    }

    async fn write(&self, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        self.store.commit(&self.lead, checks, writes).await.inspect_err(|error| {
            if error.kind() == ErrorKind::Fenced || error.outcome() == Outcome::Unknown {
                self.halt(error.clone());
            }
        })
    }

    /// Runs `work` to its end even if the caller goes away: else the store would have what memory has not.
    async fn to_the_end(
        &self,
        turn: OwnedMutexGuard<()>,
        work: impl Future<Output = Result<Rev>> + Send + 'static,
    ) -> Result<Rev> {
        let task = async move {
            let _turn = turn;
            work.await
        };
        match tokio::spawn(task.in_current_span()).await {
            Ok(done) => done,
            Err(error) => {
                let error = Error::internal("a commit did not come to its end").because(&error);
                self.halt(error.clone());
                Err(error)
            }
        }
    }

    fn basis<'s>(&'s self, state: &'s State) -> Basis<'s> {
        Basis { state, clock: &*self.clock, placement: &*self.placement, sites: &self.sites }
    }

    fn apply(&self, writes: &[Write], rev: Rev) -> Result<BTreeSet<ObjectRef>> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for write in writes {
            let Some((noun, id)) = codec::parse_record_key(write.key()) else { continue };
            match write {
                Write::Put(_, value) => state.load(noun, id, value, rev)?,
                Write::Delete(_) => state.forget(noun, id, rev),
            }
        }
        state.rev = state.rev.max(rev);
        Ok(self.concerned(&state, writes))
    }

    /// The objects whose reconciliation a commit may change.
    fn concerned(&self, state: &State, writes: &[Write]) -> BTreeSet<ObjectRef> {
        let mut all = BTreeSet::new();
        for write in writes {
            match codec::parse_record_key(write.key()) {
                Some((noun, id)) => self.concern(state, &ObjectRef { kind: noun.to_owned(), id }, &mut all),
                None => all.extend(errand(write.key())),
            }
        }
        all
    }

    fn concern(&self, state: &State, object: &ObjectRef, all: &mut BTreeSet<ObjectRef>) {
        if let Some(id) = object.typed::<Instance>() {
            all.extend(state.attachments_of(id).iter().map(|a| a.meta.id.object()));
        }
        if let Some(attachment) = object.typed::<Attachment>().and_then(|id| state.get(id)) {
            all.insert(attachment.spec.instance.object());
            all.insert(attached_object(&attachment.spec.what));
        }
        all.extend(state.attachment_to(object).map(|a| a.meta.id.object()));
        // An operation may ask for what is so already: then nothing but the operation is written.
        if let Some(operation) = object.typed::<Operation>().and_then(|id| state.get(id))
            && operation.status.state == OperationState::Open
        {
            all.insert(operation.spec.target.clone());
        }
        if [Role::NAME, Binding::NAME].contains(&object.kind.as_str()) {
            all.insert(super::queue::errand("policies"));
        }
        if object.kind == Image::NAME {
            all.insert(super::queue::errand("artifacts"));
        }
        if [Network::NAME, Subnet::NAME, Port::NAME, SecurityGroup::NAME].contains(&object.kind.as_str()) {
            all.extend(self.fabrics.iter().map(|f| f.object()));
        }
        all.insert(object.clone());
    }
}

/// The errand that a write which is no record makes.
fn errand(key: &Bytes) -> Option<ObjectRef> {
    if key.starts_with(codec::OUTBOX.as_bytes()) {
        return Some(super::queue::errand("outbox"));
    }
    key.starts_with(codec::LEAVES.as_bytes()).then(|| super::queue::errand("audit"))
}
