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
    /// Those of `due` that are not under way, by when.
    order: BTreeSet<(Duration, ObjectRef)>,
    /// How many of `due` wait for their look.
    restless: usize,
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
        let old = self.due.get(&object).copied();
        let due =
            old.map_or(new, |old| Due { at: old.at.min(new.at), restless: old.restless || new.restless });
        self.restless += usize::from(due.restless);
        self.restless -= usize::from(old.is_some_and(|old| old.restless));
        if !self.running.contains(&object) {
            if let Some(old) = old {
                self.order.remove(&(old.at, object.clone()));
            }
            self.order.insert((due.at, object.clone()));
        }
        self.due.insert(object, due);
    }

    /// Takes an object that is due at `now` and not under way.
    pub fn take(&mut self, now: Duration) -> Option<ObjectRef> {
        // The one that has waited longest, so that no object starves.
        let (at, _) = self.order.first()?;
        if *at > now {
            return None;
        }
        let (_, object) = self.order.pop_first()?;
        if self.due.remove(&object).is_some_and(|due| due.restless) {
            self.restless -= 1;
        }
        self.running.insert(object.clone());
        Some(object)
    }

    /// The look at `object` is over.
    pub fn done(&mut self, object: &ObjectRef, next: Next, now: Duration) {
        self.running.remove(object);
        if let Some(due) = self.due.get(object) {
            self.order.insert((due.at, object.clone()));
        }
        match next {
            Next::Rest => {}
            Next::After(span) => self.put(object.clone(), Due { at: now + span, restless: true }),
            Next::Check(span) => self.put(object.clone(), Due { at: now + span, restless: false }),
        }
    }

    /// When the next object that is not under way is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.order.first().map(|(at, _)| *at)
    }

    /// How many looks are under way.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether nothing is under way, and no object waits for a look.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.restless == 0
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

    /// The same, decided by looking at everything.
    #[derive(Default)]
    struct Slow {
        due: BTreeMap<ObjectRef, (Duration, bool)>,
        running: BTreeSet<ObjectRef>,
    }

    impl Slow {
        fn put(&mut self, object: ObjectRef, at: Duration, restless: bool) {
            let due = self.due.entry(object).or_insert((at, restless));
            *due = (due.0.min(at), due.1 || restless);
        }

        fn next(&self) -> Option<(Duration, ObjectRef)> {
            let waiting = self.due.iter().filter(|(object, _)| !self.running.contains(*object));
            waiting.map(|(object, due)| (due.0, object.clone())).min()
        }
    }

    proptest::proptest! {
        #[test]
        fn the_index_says_what_a_look_at_everything_says(steps in proptest::collection::vec((0u8..5, 0u8..6, 0u32..9), 1..200)) {
            let (mut queue, mut slow) = (Queue::default(), Slow::default());
            for (step, object, time) in steps {
                let (object, time) = (errand(&object.to_string()), time * S);
                match step {
                    0 | 1 => {
                        queue.want(object.clone(), time);
                        slow.put(object, time, true);
                    }
                    2 => {
                        let taken = slow.next().filter(|(at, _)| *at <= time).map(|(_, object)| object);
                        proptest::prop_assert_eq!(queue.take(time), taken.clone());
                        if let Some(object) = taken {
                            slow.due.remove(&object);
                            slow.running.insert(object);
                        }
                    }
                    _ => if slow.running.remove(&object) {
                        let next = if step == 3 { Next::Check(time) } else { Next::After(time) };
                        queue.done(&object, next, S);
                        slow.put(object, S + time, step == 4);
                    },
                }
                proptest::prop_assert_eq!(queue.next_due(), slow.next().map(|(at, _)| at));
                let idle = slow.running.is_empty() && !slow.due.values().any(|due| due.1);
                proptest::prop_assert_eq!(queue.is_idle(), idle);
            }
        }
    }
}
