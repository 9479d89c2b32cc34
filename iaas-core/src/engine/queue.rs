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
    /// Something is left to do: look again after this time, or when it is woken.
    After(Duration),
    /// It is as it shall be: look again after this time all the same, because wake-ups may be lost.
    Check(Duration),
}

/// Objects that want a look.
#[derive(Debug, Default)]
pub struct Queue {
    due: BTreeMap<ObjectRef, Due>,
    running: BTreeSet<ObjectRef>,
}

/// When an object is looked at, and whether it waits for that.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Duration,
    restless: bool,
}

impl Queue {
    /// Wants a look at `object` at `at` at the latest. While one is under way, another follows it.
    pub fn want(&mut self, object: ObjectRef, at: Duration) {
        self.put(object, Due { at, restless: true });
    }

    fn put(&mut self, object: ObjectRef, new: Due) {
        let due = self.due.entry(object).or_insert(new);
        *due = Due { at: due.at.min(new.at), restless: due.restless || new.restless };
    }

    /// Takes an object that is due at `now` and not under way.
    pub fn take(&mut self, now: Duration) -> Option<ObjectRef> {
        let ready = |(object, due): &(&ObjectRef, &Due)| due.at <= now && !self.running.contains(*object);
        // The one that has waited longest, so that no object starves.
        let object = self.due.iter().filter(ready).min_by_key(|(_, due)| due.at)?.0.clone();
        self.due.remove(&object);
        self.running.insert(object.clone());
        Some(object)
    }

    /// The look at `object` is over.
    pub fn done(&mut self, object: &ObjectRef, next: Next, now: Duration) {
        self.running.remove(object);
        match next {
            Next::Rest => {}
            Next::After(span) => self.put(object.clone(), Due { at: now + span, restless: true }),
            Next::Check(span) => self.put(object.clone(), Due { at: now + span, restless: false }),
        }
    }

    /// When the next object that is not under way is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.due.iter().filter(|(object, _)| !self.running.contains(*object)).map(|(_, due)| due.at).min()
    }

    /// How many looks are under way.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether nothing is under way, and no object waits for a look.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && !self.due.values().any(|due| due.restless)
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
        assert!(queue.is_idle());
    }

    #[test]
    fn what_will_be_retried_is_not_at_rest_and_what_is_only_checked_is() {
        let mut queue = Queue::default();
        let a = errand("a");
        queue.want(a.clone(), S);
        assert!(!queue.is_idle());
        assert_eq!(queue.take(S), Some(a.clone()));
        queue.done(&a, Next::After(60 * S), S);
        assert!(!queue.is_idle(), "a retry is still to come");
        assert_eq!(queue.take(61 * S), Some(a.clone()));
        queue.done(&a, Next::Check(60 * S), 61 * S);
        assert!(queue.is_idle());
        assert_eq!(queue.next_due(), Some(121 * S));
        queue.want(a, 62 * S);
        assert!(!queue.is_idle(), "it was woken");
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
