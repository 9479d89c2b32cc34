//! Which session may call a provider, and whose calls are still running.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::sync::watch;

use super::Part;
use crate::Error;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::id::Cloud;

/// The gates of all providers of a server.
#[derive(Clone, Debug)]
pub(super) struct Gates(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    doors: Mutex<BTreeMap<(Part, Id<Cloud>), Door>>,
    left: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Door {
    /// The newest session that has claimed.
    claimed_by: u64,
    /// Calls that run, by session.
    inside: BTreeMap<u64, usize>,
}

/// A call that runs; it leaves when this is dropped.
#[derive(Debug)]
pub(super) struct Inside {
    gates: Gates,
    door: (Part, Id<Cloud>),
    session: u64,
}

impl Gates {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared { doors: Mutex::default(), left: watch::Sender::new(()) }))
    }

    /// Lets a call of `session` in, unless a newer session has claimed.
    pub(super) fn enter(&self, part: Part, cloud: Id<Cloud>, session: u64) -> Result<Inside> {
        let mut doors = self.doors();
        let door = doors.entry((part, cloud)).or_default();
        if session < door.claimed_by {
            return Err(Error::unavailable("a newer session has claimed this provider")
                .outcome_is(Outcome::NotDone)
                .remedy("connect again"));
        }
        *door.inside.entry(session).or_default() += 1;
        Ok(Inside { gates: self.clone(), door: (part, cloud), session })
    }

    /// Shuts older sessions out and waits until their calls have ended.
    pub(super) async fn claim(&self, inside: &Inside) {
        let mut left = self.0.left.subscribe();
        if let Some(door) = self.doors().get_mut(&inside.door) {
            door.claimed_by = door.claimed_by.max(inside.session);
        }
        let older = |gates: &Self| {
            gates.doors().get(&inside.door).is_some_and(|d| d.inside.keys().any(|s| *s < inside.session))
        };
        while older(self) {
            // `self` holds the sender, so this ends only when a call has left.
            let _ = left.changed().await;
        }
    }

    fn doors(&self) -> MutexGuard<'_, BTreeMap<(Part, Id<Cloud>), Door>> {
        self.0.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(door) = self.gates.doors().get_mut(&self.door)
            && let Some(count) = door.inside.get_mut(&self.session)
        {
            *count -= 1;
            if *count == 0 {
                door.inside.remove(&self.session);
            }
        }
        self.gates.0.left.send_replace(());
    }
}
