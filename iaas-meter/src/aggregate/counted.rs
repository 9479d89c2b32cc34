//! What was counted: totals that grow within a life and begin at zero in the next.

use std::collections::BTreeMap;

use iaas_core::Term;
use jiff::Timestamp;

use super::Period;
use crate::usage_log::Place;

/// The lives of one counter: the greatest totals until the period's two borders.
#[derive(Debug, Default)]
pub(super) struct Lives(BTreeMap<(Term, u64), Span>);

#[derive(Debug, Default)]
struct Span {
    opening: Option<Mark>,
    closing: Option<Mark>,
}

/// A total that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The total.
    pub total: u128,
    /// When it was read.
    pub at: Timestamp,
    /// Where the log has the reading.
    pub place: Place,
}

/// How much a counter grew in one life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// In which placement.
    pub term: Term,
    /// In which life of it.
    pub life: u64,
    /// The greatest total until the period's begin; `None`: it had not been read, so it counts as zero.
    pub opening: Option<Mark>,
    /// The greatest total until the period's end.
    pub closing: Mark,
}

impl Lives {
    pub(super) fn add(&mut self, period: Period, life: (Term, u64), mark: Mark) {
        let span = self.0.entry(life).or_default();
        if mark.at <= period.from() {
            raise(&mut span.opening, mark);
        }
        if mark.at <= period.to() {
            raise(&mut span.closing, mark);
        }
    }

    pub(super) fn counted(&self) -> impl Iterator<Item = Counted> {
        let read = self.0.iter().filter_map(|(life, span)| Some((*life, span.opening, span.closing?)));
        let counted = read.map(|((term, life), opening, closing)| Counted { term, life, opening, closing });
        counted.filter(|c| c.raw() != 0)
    }
}

impl Counted {
    /// How much it grew.
    pub fn raw(&self) -> u128 {
        // Every reading of the opening is one of the closing too, so this never goes below zero.
        self.closing.total.saturating_sub(self.opening.map_or(0, |m| m.total))
    }
}

/// Keeps the greater total; of equal ones the first that was read.
fn raise(best: &mut Option<Mark>, mark: Mark) {
    let rank = |m: &Mark| (m.total, std::cmp::Reverse(m.at), std::cmp::Reverse(m.place));
    if best.is_none_or(|b| rank(&b) < rank(&mark)) {
        *best = Some(mark);
    }
}
