//! Which session may call a provider, and whose calls are still running.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::sync::watch;

use super::Part;
use crate::Id;
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

    /// Lets a call of `session` in; `None` if a newer session has claimed.
    pub(super) fn enter(&self, part: Part, cloud: Id<Cloud>, session: u64) -> Option<Inside> {
        let mut doors = self.doors();
        let door = doors.entry((part, cloud)).or_default();
        if session < door.claimed_by {
            return None;
        }
        *door.inside.entry(session).or_default() += 1;
        Some(Inside { gates: self.clone(), door: (part, cloud), session })
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

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::future::poll_fn;
    use std::pin::Pin;
    use std::task::Poll;

    use uuid::Uuid;

    use super::*;

    async fn is_ready(future: &mut Pin<Box<impl Future>>) -> bool {
        poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
    }

    #[tokio::test]
    async fn a_claim_waits_for_older_sessions_of_its_own_cloud_and_shuts_them_out() {
        let (gates, part) = (Gates::new(), Part::Plugs);
        let [ours, theirs] = [1, 2].map(|n| Id::from_uuid(Uuid::from_u128(n)));
        let (old, other) = (gates.enter(part, ours, 1).unwrap(), gates.enter(part, theirs, 1).unwrap());
        let new = gates.enter(part, ours, 2).unwrap();
        let mut claim = Box::pin(gates.claim(&new));
        assert!(!is_ready(&mut claim).await);
        assert!(gates.enter(part, ours, 1).is_none());
        drop(old);
        assert!(is_ready(&mut claim).await);
        assert!(gates.enter(part, theirs, 1).is_some());
        assert!(gates.enter(Part::Power, ours, 1).is_some());
        drop(other);
    }
}
