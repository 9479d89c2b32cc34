//! One look at one object: state in, effects on the way to what it wants, observation out. No other input.

mod attachment;
mod fabric;
mod instance;
mod vm_spec;
mod volume;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use uuid::Uuid;

use super::commit::Committer;
use super::commit::SELF;
use super::queue::Next;
use super::sites::Blobs;
use super::sites::Caller;
use super::sites::Sites;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::engine::draft::Draft;
use crate::engine::state::Stored;
use crate::id::Fabric;
use crate::model::*;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Seen;
use crate::spi::target::Target;

/// What reconcilers work with.
#[derive(Clone, Debug)]
pub struct Work {
    /// Reads and commits.
    pub committer: Arc<Committer>,
    /// The providers.
    pub sites: Arc<Sites>,
    /// Makes contexts.
    pub caller: Caller,
    /// Kernels and initrds.
    pub blobs: Arc<dyn Blobs>,
    /// How to open what is attached, as far as it is known: rebuilt by looking, never stored.
    pub targets: Arc<Mutex<BTreeMap<Uuid, Target>>>,
    /// When an object was last asked to come, and with which revision.
    pub asked: Arc<Mutex<BTreeMap<Uuid, (Rev, Duration)>>>,
}

impl Work {
    /// Looks at `object` once.
    ///
    /// # Errors
    /// Those of providers and of commits: the caller retries later, for ever.
    pub async fn look(&self, object: &ObjectRef) -> Result<Next> {
        if let Some(id) = object.typed::<Instance>() {
            return instance::look(self, id).await;
        }
        if let Some(id) = object.typed::<Volume>() {
            return volume::look(self, id).await;
        }
        if let Some(id) = object.typed::<Attachment>() {
            return attachment::look(self, id).await;
        }
        if let Some(id) = object.typed::<Fabric>() {
            return fabric::look(self, id).await;
        }
        Ok(Next::Rest)
    }

    fn target(&self, attachment: Id<Attachment>) -> Option<Target> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner).get(&attachment.uuid()).cloned()
    }

    fn remember(&self, attachment: Id<Attachment>, target: Target) {
        let old = self
            .targets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(attachment.uuid(), target.clone());
        if old != Some(target) {
            let instance = self.committer.read(|s| s.get(attachment).map(|a| a.spec.instance));
            instance.into_iter().for_each(|id| self.committer.wake(id.object()));
        }
    }

    /// Whether `object` is to be ensured at `effect`, after what was seen of it; if so, that is noted.
    ///
    /// What is stuck is repaired now and then, not at each look: providers wake us for what we do ourselves.
    fn must_ensure<K: Kind>(&self, object: Uuid, effect: Rev, seen: Option<&Seen<K>>) -> bool {
        let now = self.committer.clock().monotonic();
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let must = match seen.filter(|seen| seen.applied >= effect).map(|seen| &seen.phase) {
            None => true,
            Some(Phase::Settled | Phase::Working { .. } | Phase::Leaving) => false,
            Some(Phase::Blocked(_) | Phase::Broken(_)) => asked
                .get(&object)
                .is_none_or(|(rev, at)| *rev != effect || now.saturating_sub(*at) >= REPAIR_AGAIN),
        };
        if must {
            asked.insert(object, (effect, now));
        }
        must
    }

    /// Whether `object`, which was seen, is to be told to go; if so, that is noted.
    ///
    /// Also what is leaving is told now and then: a removal that was cut off stands still until it is asked for again.
    fn must_remove<K: Kind>(&self, object: Uuid, seen: &Seen<K>) -> bool {
        let now = self.committer.clock().monotonic();
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let told = asked.get(&object).filter(|(rev, _)| *rev == GOING);
        let again = if seen.phase == Phase::Leaving { RESYNC } else { REPAIR_AGAIN };
        let must = told.is_none_or(|(_, at)| now.saturating_sub(*at) >= again);
        if must {
            asked.insert(object, (GOING, now));
        }
        must
    }

    /// How long what was sent at `rev` counts as fresh; `None` if it is to be sent, which is noted.
    fn sent_lately(&self, object: Uuid, rev: Rev) -> Option<Duration> {
        let now = self.committer.clock().monotonic();
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = asked.get(&object).filter(|(sent, _)| *sent == rev);
        let left = sent.and_then(|(_, at)| (*at + RESYNC).checked_sub(now)).filter(|left| !left.is_zero());
        if left.is_none() {
            asked.insert(object, (rev, now));
        }
        left
    }

    /// Nothing is to be remembered of an object that is gone.
    fn forget_asking(&self, object: Uuid) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&object);
    }

    fn forget(&self, attachment: Id<Attachment>) {
        self.forget_asking(attachment.uuid());
        self.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(&attachment.uuid());
    }

    /// Notes that a look at `object` failed, or works again.
    ///
    /// # Errors
    /// Those of the commit.
    pub async fn note_trouble(&self, object: &ObjectRef, trouble: Option<Trouble>) -> Result<()> {
        if let Some(id) = object.typed::<Instance>() {
            return self.trouble(id, trouble).await;
        }
        if let Some(id) = object.typed::<Volume>() {
            return self.trouble(id, trouble).await;
        }
        if let Some(id) = object.typed::<Attachment>() {
            return self.trouble(id, trouble).await;
        }
        Ok(())
    }

    async fn trouble<R: Stored>(&self, id: Id<R>, trouble: Option<Trouble>) -> Result<()> {
        let same = self.committer.read(|s| s.get(id).is_none_or(|r| r.meta.trouble == trouble));
        if same {
            return Ok(());
        }
        let set = |draft: &mut Draft<'_>| match draft.find(id) {
            Some(mut record) => {
                record.meta.trouble = trouble;
                draft.keep(record)
            }
            None => Ok(()),
        };
        self.committer.commit_quietly(SELF, set).await.map(|_| ())
    }
}

/// When to look again at what is on its way.
fn pace(phase: &Phase) -> Next {
    match phase {
        Phase::Settled => Next::Check(RESYNC),
        Phase::Working { poll_in, .. } => Next::After((*poll_in).clamp(SOON, RESYNC)),
        Phase::Blocked(_) | Phase::Leaving => Next::After(4 * SOON),
        Phase::Broken(_) => Next::Check(RESYNC),
    }
}

/// Whether asking again cannot help: the wish itself is wrong.
fn hopeless(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported)
}

/// Whether `phase` differs in more than progress.
fn same_phase(a: &Phase, b: &Phase) -> bool {
    match (a, b) {
        (Phase::Blocked(a), Phase::Blocked(b)) | (Phase::Broken(a), Phase::Broken(b)) => a == b,
        _ => std::mem::discriminant(a) == std::mem::discriminant(b),
    }
}

/// How long what is settled rests before it is looked at again unasked.
const RESYNC: Duration = Duration::from_secs(10);
/// Stands for the wish that an object be gone.
const GOING: Rev = Rev(u64::MAX);
/// The shortest time between two repairs of the same object.
const REPAIR_AGAIN: Duration = Duration::from_secs(1);
/// The shortest time between two looks at the same object.
const SOON: Duration = Duration::from_millis(25);
