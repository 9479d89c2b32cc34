//! Where usage goes: an append-only sink that counts each event once.

use std::fmt::Debug;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::Reading;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::PriceBook;
use crate::model::Project;

/// One entry of the usage log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageEvent {
    /// Who pays.
    pub project: Id<Project>,
    /// Its identity: an event with a key that the sink has is dropped.
    pub key: UsageKey,
    /// What happened.
    pub what: Usage,
}

/// The identity of an event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UsageKey {
    /// A counter's reading.
    Reading {
        /// Of what.
        of: ObjectRef,
        /// Its placement.
        term: u64,
        /// Its life.
        life: u64,
        /// Its number.
        seq: u64,
    },
    /// The n-th outbox entry of a commit.
    Commit {
        /// The store's incarnation.
        incarnation: Uuid,
        /// The commit.
        rev: Rev,
        /// Its place in it.
        index: u32,
    },
}

/// What happened to something that is billed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Usage {
    /// From `at` on, `of` has `quantity` of `meter` allocated. Zero ends it.
    Allocated {
        /// What.
        of: ObjectRef,
        /// For example `vcpu`, `memory-bytes`, `volume-bytes`.
        meter: String,
        /// How much, in the meter's unit.
        quantity: u64,
        /// Orders events of one object where clocks do not: the boot or placement.
        order: u64,
        /// Since when, by the clock of the place where it took effect.
        at: Timestamp,
    },
    /// A cumulative counter.
    Counted(Reading),
}

/// A bill of one project for a period, exact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bill {
    /// Whose.
    pub project: Id<Project>,
    /// Its first moment.
    pub from: Timestamp,
    /// The first moment after it.
    pub to: Timestamp,
    /// ISO 4217 code.
    pub currency: String,
    /// The price book that it was rated by.
    pub price_book: Id<PriceBook>,
    /// Its lines, ordered by resource and meter.
    pub lines: Vec<BillLine>,
    /// The sum of the lines' costs, as an exact decimal.
    pub total: String,
}

/// A line of a bill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BillLine {
    /// What was used.
    pub resource: ObjectRef,
    /// By which meter.
    pub meter: String,
    /// How much, as an exact decimal.
    pub quantity: String,
    /// In which unit.
    pub unit: String,
    /// The price of a unit, as an exact decimal.
    pub unit_price: String,
    /// Quantity times price, as an exact decimal.
    pub cost: String,
}

/// Takes usage and turns it into bills.
///
/// # Contract
/// 1. `append-durable`: after `Ok` the events survive a crash.
/// 2. `append-once`: an event whose key is known changes nothing, also after a reopen.
/// 3. `order-free`: the bill does not depend on the order in which events arrive.
/// 4. `replay-same`: rating the log twice gives the same bill, byte for byte.
/// 5. `project-apart`: a project's bill has only its own lines.
/// 6. `period-clipped`: only what was used in the period is billed; what was counted between two readings was used when
///    the later one was taken. A period that ends before it begins is `Invalid`.
/// 7. `bill-exact`: a cost is the exact usage times the price, wherever that is a decimal number of at most 28 digits;
///    else it is rounded half to even at nine. The total is the exact sum of the costs.
///
/// Prove yours with `testing::conformance::meter`.
#[async_trait]
pub trait MeterSink: Debug + Send + Sync + 'static {
    /// Keeps `batch`; `Ok` means durable.
    async fn append(&self, batch: &[UsageEvent]) -> Result<()>;

    /// The bill of `project` from `from` until before `to`, by `prices`. What is still allocated counts until `to`.
    async fn bill(
        &self,
        project: Id<Project>,
        from: Timestamp,
        to: Timestamp,
        book: Id<PriceBook>,
        prices: &crate::model::PriceBookSpec,
    ) -> Result<Bill>;
}
