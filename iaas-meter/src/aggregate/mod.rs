//! From events to integers: how much of each meter each object used in a period. Pure: no clock, no I/O, no float.
//!
//! The result depends on the set of events alone, not on the order in which they arrive nor on how often.
//!
//! * **Allocated**: the events of one (object, meter) are sorted by `order`, then time, then key, and are steps of one
//!   function: each holds from its moment until that of the next. A moment before that of its predecessor (a host whose
//!   clock is behind) counts as the predecessor's, so no time is billed twice. Only what lies in `[from, to)` counts; the
//!   last step holds until `to`. The result is quantity × nanoseconds.
//! * **Counted**: a life's total at a moment is the greatest that was read until then, zero before the first reading. A
//!   period's use is the total at `to` minus the total at `from`, summed over lives. So the use between two readings
//!   belongs to the period in which the later one was taken, and adjoining periods add up without gap or overlap.

mod allocated;
mod counted;

use std::collections::BTreeMap;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::model::Project;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use jiff::Timestamp;

pub use self::allocated::Held;
pub use self::counted::Counted;
pub use self::counted::Mark;

use self::allocated::Steps;
use self::counted::Lives;
use crate::usage_log::Place;

/// A period: from its first moment until before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    from: Timestamp,
    to: Timestamp,
}

/// How much of one meter one object used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Used {
    /// What used it.
    pub resource: ObjectRef,
    /// By which meter.
    pub meter: String,
    /// What the number counts.
    pub measure: Measure,
    /// The number, exact.
    pub raw: u128,
}

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Things over time, in thing-nanoseconds: what was allocated, and counters whose name ends in `-ns`.
    OverTime,
    /// Things: every other counter.
    Plain,
}

/// One reason for a [`Used`]; the raw numbers of all of them add up to its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Something was allocated for a while.
    Held(Held),
    /// A counter grew.
    Counted(Counted),
}

/// Gathers the events of one project in one period. Memory: one entry per change of an allocation and per life.
#[derive(Debug)]
pub struct Ledger {
    project: Id<Project>,
    period: Period,
    allocated: BTreeMap<(ObjectRef, String), Steps>,
    counted: BTreeMap<(ObjectRef, String), Lives>,
}

impl Period {
    /// From `from` until before `to`; may be empty.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid) if it ends before it begins.
    pub fn new(from: Timestamp, to: Timestamp) -> Result<Self> {
        if to < from {
            return Err(Error::invalid(format!("a period from {from} to {to}")).remedy("swap the two"));
        }
        Ok(Self { from, to })
    }

    /// Its first moment.
    pub fn from(self) -> Timestamp {
        self.from
    }

    /// The first moment after it.
    pub fn to(self) -> Timestamp {
        self.to
    }
}

impl Ledger {
    /// An empty one.
    pub fn new(project: Id<Project>, period: Period) -> Self {
        Self { project, period, allocated: BTreeMap::new(), counted: BTreeMap::new() }
    }

    /// Takes an event; one of another project changes nothing. `place` says where the log has it.
    pub fn add(&mut self, place: Place, event: UsageEvent) {
        if event.project != self.project {
            return;
        }
        match event.what {
            Usage::Allocated { of, meter, quantity, order, at } => {
                self.allocated.entry((of, meter)).or_default().add(order, at, event.key, quantity, place);
            }
            Usage::Counted(reading) => {
                for (meter, total) in reading.totals {
                    let lives = self.counted.entry((reading.of.clone(), meter)).or_default();
                    let mark = Mark { total, at: reading.at.wall, place };
                    lives.add(self.period, (reading.term, reading.life), mark);
                }
            }
        }
    }

    /// What was used, ordered by resource and meter; what is zero is left out.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](iaas_core::ErrorKind::Unsupported) if a number exceeds 128 bits.
    pub fn used(&self) -> Result<Vec<Used>> {
        let used = self.evidence().map(|(resource, meter, measure, reasons)| {
            let raw = sum(reasons.iter()).ok_or_else(|| too_much(resource, meter))?;
            Ok(Used { resource: resource.clone(), meter: meter.to_owned(), measure, raw })
        });
        let mut used =
            used.filter(|u| u.as_ref().map_or(true, |u| u.raw != 0)).collect::<Result<Vec<_>>>()?;
        used.sort();
        Ok(used)
    }

    /// Why `resource` used what it used of `meter`: reasons by measure, in the order of time.
    pub fn why(&self, resource: &ObjectRef, meter: &str) -> Vec<(Measure, Vec<Evidence>)> {
        let ours = self.evidence().filter(|(r, m, ..)| *r == resource && *m == meter);
        ours.map(|(_, _, measure, reasons)| (measure, reasons)).collect()
    }

    fn evidence(&self) -> impl Iterator<Item = (&ObjectRef, &str, Measure, Vec<Evidence>)> {
        let held = self.allocated.iter().map(|((of, meter), steps)| {
            let reasons = steps.held(self.period).into_iter().map(Evidence::Held).collect();
            (of, meter.as_str(), Measure::OverTime, reasons)
        });
        let counted = self.counted.iter().map(|((of, meter), lives)| {
            let reasons = lives.counted().map(Evidence::Counted).collect();
            (of, meter.as_str(), Measure::of_counter(meter), reasons)
        });
        held.chain(counted)
    }
}

impl Measure {
    fn of_counter(meter: &str) -> Self {
        if meter.ends_with("-ns") { Self::OverTime } else { Self::Plain }
    }
}

impl Evidence {
    /// Its part of the whole; `None` if it exceeds 128 bits.
    pub fn raw(&self) -> Option<u128> {
        match self {
            Self::Held(held) => held.raw(),
            Self::Counted(counted) => Some(counted.raw()),
        }
    }
}

fn sum<'a>(mut reasons: impl Iterator<Item = &'a Evidence>) -> Option<u128> {
    reasons.try_fold(0u128, |sum, reason| sum.checked_add(reason.raw()?))
}

fn too_much(resource: &ObjectRef, meter: &str) -> Error {
    Error::unsupported(format!("the use of `{meter}` exceeds 128 bits"))
        .about(resource.clone())
        .remedy("bill shorter periods, or see which producer counts wrongly")
}

#[cfg(test)]
mod tests;
