//! The keyed work queue: at most one look at an object at a time, none forgotten. Pure: time comes in.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use uuid::Uuid;

use crate::ObjectRef;

/// An errand of the engine itself, queued like an object.
pub fn errand(name: &str) -> ObjectRef {
    ObjectRef { kind: name.to_owned(), id: Uuid::nil() }
}

/// What to do with an object after a look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until it is woken.
    Rest,
    /// Look again after this time, or when it is woken.
    After(Duration),
}

/// Objects that want a look.
#[derive(Debug, Default)]
pub struct Queue {
    due: BTreeMap<ObjectRef, Duration>,
    running: BTreeSet<ObjectRef>,
}

impl Queue {
    /// Wants a look at `object` at `at` at the latest. While one is under way, another follows it.
    pub fn want(&mut self, object: ObjectRef, at: Duration) {
        self.due.entry(object).and_modify(|due| *due = (*due).min(at)).or_insert(at);
    }

    /// Takes an object that is due at `now` and not under way.
    pub fn take(&mut self, now: Duration) -> Option<ObjectRef> {
        let ready = |(object, due): &(&ObjectRef, &Duration)| **due <= now && !self.running.contains(*object);
        // The one that has waited longest, so that no object starves.
        let object = self.due.iter().filter(ready).min_by_key(|(_, due)| **due)?.0.clone();
        self.due.remove(&object);
        self.running.insert(object.clone());
        Some(object)
    }

    /// The look at `object` is over.
    pub fn done(&mut self, object: &ObjectRef, next: Next, now: Duration) {
        self.running.remove(object);
        if let Next::After(span) = next {
            self.want(object.clone(), now + span);
        }
    }

    /// When the next object that is not under way is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.due.iter().filter(|(object, _)| !self.running.contains(*object)).map(|(_, due)| *due).min()
    }

    /// How many looks are under way.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether nothing is under way or due by `now`.
    pub fn is_idle(&self, now: Duration) -> bool {
        self.running.is_empty() && self.next_due().is_none_or(|due| due > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn an_object_is_looked_at_once_at_a_time_and_again_if_woken_meanwhile() {
        let mut queue = Queue::default();
        let a = errand("a");
        queue.want(a.clone(), Duration::ZERO);
        assert_eq!(queue.take(S), Some(a.clone()));
        queue.want(a.clone(), S);
        assert_eq!(queue.take(S), None);
        queue.done(&a, Next::Rest, S);
        assert_eq!(queue.take(S), Some(a.clone()));
        queue.done(&a, Next::Rest, S);
        assert!(queue.is_idle(S));
    }

    #[test]
    fn a_wake_up_comes_before_a_later_appointment() {
        let mut queue = Queue::default();
        let a = errand("a");
        queue.want(a.clone(), 60 * S);
        assert_eq!(queue.take(S), None);
        queue.want(a.clone(), S);
        assert_eq!(queue.take(S), Some(a));
    }

    #[test]
    fn who_has_waited_longest_comes_first() {
        let mut queue = Queue::default();
        queue.want(errand("a"), 2 * S);
        queue.want(errand("b"), S);
        assert_eq!(queue.take(3 * S), Some(errand("b")));
        assert_eq!(queue.next_due(), Some(2 * S));
    }
}
