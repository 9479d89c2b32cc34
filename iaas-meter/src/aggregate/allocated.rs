//! What was allocated: one step function per object and meter.

use iaas_core::spi::meter::UsageKey;
use jiff::Timestamp;

use super::Period;
use crate::usage_log::Place;

/// The changes of one allocation.
#[derive(Debug, Default)]
pub(super) struct Steps(Vec<Step>);

/// From `at` on, `quantity`. Fields in the order of the sort.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Step {
    order: u64,
    at: Timestamp,
    key: UsageKey,
    quantity: u64,
    place: Place,
}

/// A quantity that was allocated for a part of the period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The event that began it.
    pub key: UsageKey,
    /// Where the log has that event.
    pub place: Place,
    /// How much.
    pub quantity: u64,
    /// Since when, at the earliest the begin of the period.
    pub from: Timestamp,
    /// Until before when, at the latest the end of the period.
    pub to: Timestamp,
}

impl Steps {
    pub(super) fn add(&mut self, order: u64, at: Timestamp, key: UsageKey, quantity: u64, place: Place) {
        self.0.push(Step { order, at, key, quantity, place });
    }

    /// The parts of `period` in which something was allocated.
    pub(super) fn held(&self, period: Period) -> Vec<Held> {
        let mut steps: Vec<&Step> = self.0.iter().collect();
        steps.sort();
        let mut starts: Vec<Timestamp> = steps.iter().map(|s| s.at).collect();
        // A moment before that of its predecessor counts as the predecessor's.
        let mut latest = Timestamp::MIN;
        for start in &mut starts {
            latest = latest.max(*start);
            *start = latest;
        }
        let ends = starts.iter().skip(1).copied().chain([Timestamp::MAX]);
        let parts = steps.iter().zip(&starts).zip(ends);
        let clipped = parts.map(|((step, start), end)| Held {
            key: step.key.clone(),
            place: step.place,
            quantity: step.quantity,
            from: (*start).max(period.from()),
            to: end.min(period.to()),
        });
        clipped.filter(|h| h.quantity != 0 && h.from < h.to).collect()
    }
}

impl Held {
    /// Quantity × nanoseconds; `None` if it exceeds 128 bits.
    pub fn raw(&self) -> Option<u128> {
        // `from` is before `to`, so the difference is positive.
        let span = u128::try_from(self.to.as_nanosecond() - self.from.as_nanosecond()).unwrap_or(0);
        span.checked_mul(self.quantity.into())
    }
}
