//! Which keys the log has.
//!
//! Exact, never by fingerprint: a false positive would lose usage. Readings of one life are numbered, so they cost one
//! range per gap and not one entry per reading; commits cost one range per run of indexes, about 50 bytes each.

use std::collections::BTreeMap;
use std::collections::HashMap;

use iaas_core::ObjectRef;
use iaas_core::spi::meter::UsageKey;
use uuid::Uuid;

/// The set of keys.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// By (object, term, life): the numbers of readings.
    lives: HashMap<(ObjectRef, u64, u64), Ranges<u64>>,
    /// By incarnation: (revision, index) in one number.
    commits: HashMap<Uuid, Ranges<u128>>,
}

impl Seen {
    /// Adds `key`; `false` if it was there.
    pub(crate) fn insert(&mut self, key: &UsageKey) -> bool {
        match key {
            UsageKey::Reading { of, term, life, seq } => {
                self.lives.entry((of.clone(), *term, *life)).or_default().insert(*seq)
            }
            UsageKey::Commit { incarnation, rev, index } => {
                let number = u128::from(rev.0) << 32 | u128::from(*index);
                self.commits.entry(*incarnation).or_default().insert(number)
            }
        }
    }

    /// Takes `key` out again; only for keys that [`insert`](Self::insert) has just added.
    pub(crate) fn remove(&mut self, key: &UsageKey) {
        match key {
            UsageKey::Reading { of, term, life, seq } => {
                if let Some(ranges) = self.lives.get_mut(&(of.clone(), *term, *life)) {
                    ranges.remove(*seq);
                }
            }
            UsageKey::Commit { incarnation, rev, index } => {
                if let Some(ranges) = self.commits.get_mut(incarnation) {
                    ranges.remove(u128::from(rev.0) << 32 | u128::from(*index));
                }
            }
        }
    }
}

/// A number that has neighbours.
trait Step: Copy + Ord {
    fn before(self) -> Option<Self>;
    fn after(self) -> Option<Self>;
}

macro_rules! step {
    ($($number:ty),+) => {$(
        impl Step for $number {
            fn before(self) -> Option<Self> {
                self.checked_sub(1)
            }
            fn after(self) -> Option<Self> {
                self.checked_add(1)
            }
        }
    )+};
}

step!(u64, u128);

/// A set of numbers as disjoint ranges that do not touch: first to last, both included.
#[derive(Debug)]
struct Ranges<T>(BTreeMap<T, T>);

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Step> Ranges<T> {
    fn insert(&mut self, n: T) -> bool {
        let left = self.0.range(..=n).next_back().map(|(first, last)| (*first, *last));
        if left.is_some_and(|(_, last)| n <= last) {
            return false;
        }
        let first = match left {
            Some((first, last)) if last.after() == Some(n) => first,
            _ => n,
        };
        let last = n.after().and_then(|right| self.0.remove(&right)).unwrap_or(n);
        self.0.insert(first, last);
        true
    }

    fn remove(&mut self, n: T) {
        let Some((first, last)) = self.0.range(..=n).next_back().map(|(first, last)| (*first, *last)) else {
            return;
        };
        if last < n {
            return;
        }
        self.0.remove(&first);
        if let Some(end) = n.before().filter(|end| *end >= first) {
            self.0.insert(first, end);
        }
        if let Some(start) = n.after().filter(|start| *start <= last) {
            self.0.insert(start, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_are_a_set(steps in proptest::collection::vec((any::<bool>(), 0u64..40), 0..200)) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (add, n) in steps {
                if add {
                    prop_assert_eq!(ranges.insert(n), model.insert(n));
                } else {
                    ranges.remove(n);
                    model.remove(&n);
                }
                let all: Vec<u64> = ranges.0.iter().flat_map(|(first, last)| *first..=*last).collect();
                prop_assert_eq!(all, model.iter().copied().collect::<Vec<_>>());
                // Touching ranges are one: that is what bounds the memory.
                prop_assert!(ranges.0.iter().zip(ranges.0.iter().skip(1)).all(|(a, b)| a.1 + 1 < *b.0));
            }
        }
    }

    #[test]
    fn a_life_with_every_reading_costs_one_range_at_both_ends_of_the_numbers() {
        let mut ranges = Ranges::default();
        for n in [u64::MAX, u64::MAX - 1, 0, 1, 2] {
            assert!(ranges.insert(n));
            assert!(!ranges.insert(n));
        }
        assert_eq!(ranges.0.len(), 2);
    }
}
