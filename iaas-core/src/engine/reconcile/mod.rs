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
use super::queue::Next;
use super::sites::Blobs;
use super::sites::Caller;
use super::sites::Sites;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::engine::draft::Draft;
use crate::engine::state::Stored;
use crate::id::Fabric;
use crate::model::*;
use crate::spi::Phase;
use crate::spi::target::Target;

/// The name under which the engine changes what it observed.
pub const SELF: &str = "engine";

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

    fn forget(&self, attachment: Id<Attachment>) {
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
        self.committer.commit(SELF, set).await.map(|_| ())
    }
}

/// When to look again at what is on its way.
fn pace(phase: &Phase) -> Next {
    match phase {
        Phase::Settled => Next::After(RESYNC),
        Phase::Working { poll_in, .. } => Next::After((*poll_in).clamp(SOON, RESYNC)),
        Phase::Blocked(_) | Phase::Leaving => Next::After(4 * SOON),
        Phase::Broken(_) => Next::After(RESYNC),
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
/// The shortest time between two looks at the same object.
const SOON: Duration = Duration::from_millis(25);
