//! The contract of [`MeterSink`], clause by clause.

mod sabotage;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use async_trait::async_trait;
use jiff::Timestamp;
use uuid::Uuid;

use super::Check;
use super::Report;
use super::Verdict;
use super::checks;
use super::demand;
use super::should;
use super::should_fail;
use crate::ErrorKind;
use crate::Id;
use crate::ManualClock;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::model::Price;
use crate::model::PriceBookSpec;
use crate::model::Project;
use crate::model::Unit;
use crate::spi::Reading;
use crate::spi::Stamp;
use crate::spi::meter::Bill;
use crate::spi::meter::MeterSink;
use crate::spi::meter::Usage;
use crate::spi::meter::UsageEvent;
use crate::spi::meter::UsageKey;
use crate::testing::fake::FakeMeter;
use crate::testing::fake::World;

pub use sabotage::saboteurs;

/// What the suite needs to know about your meter.
#[async_trait]
pub trait Rig: Send + Sync + 'static {
    /// A new, empty meter on a backing of its own.
    async fn fresh(&self) -> Result<Arc<dyn MeterSink>>;

    /// As after a restart of the process: `old`, the last handle of the newest fresh meter, goes, and the meter is
    /// opened again on what it left.
    async fn reopen(&self, old: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>>;
}

/// The checks, in the order of the contract.
pub fn suite() -> &'static [Check<dyn Rig>] {
    checks![dyn Rig:
        "append-durable" => append_durable,
        "append-once" => append_once,
        "order-free" => order_free,
        "replay-same" => replay_same,
        "project-apart" => project_apart,
        "period-clipped" => period_clipped,
        "bill-exact" => bill_exact,
    ]
}

/// Runs the suite.
pub async fn run(rig: &impl Rig) -> Report {
    super::run::<dyn Rig>("meter", suite(), rig).await
}

/// The rig of [`FakeMeter`].
#[derive(Debug, Default)]
pub struct FakeMeterRig {
    world: Mutex<Option<World>>,
}

#[async_trait]
impl Rig for FakeMeterRig {
    async fn fresh(&self) -> Result<Arc<dyn MeterSink>> {
        let world = World::new(Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH)));
        let meter = FakeMeter::open(&world);
        *self.world.lock().unwrap_or_else(PoisonError::into_inner) = Some(world);
        Ok(Arc::new(meter))
    }

    async fn reopen(&self, old: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>> {
        drop(old);
        let world = self.world.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match world {
            Some(world) => Ok(Arc::new(FakeMeter::open(&world))),
            None => self.fresh().await,
        }
    }
}

// ---- the checks -------------------------------------------------------------------------------------------------

async fn append_durable(rig: &dyn Rig) -> Verdict {
    let meter = should("fresh", rig.fresh().await)?;
    append(&*meter, &[allocated(1, 2, 1, 0), counted(1, 0, 1, 5, 700)]).await?;
    let before = costs(&bill(&*meter, A, 0, 10).await?);
    let meter = should("reopen", rig.reopen(meter).await)?;
    append(&*meter, &[allocated(2, 0, 1, 5)]).await?;
    let meter = should("reopen", rig.reopen(meter).await)?;
    let after = costs(&bill(&*meter, A, 0, 10).await?);
    // 700 bytes at 1; 2 vCPU × 10 s at 1, and × 5 s once they ended there.
    demand!(before == ["700", "20"], "two events cost {before:?}, not 700 and 20");
    demand!(after == ["700", "10"], "after two restarts they cost {after:?}, not 700 and 10");
    Ok(())
}

async fn append_once(rig: &dyn Rig) -> Verdict {
    let mut meter = should("fresh", rig.fresh().await)?;
    append(&*meter, &[allocated(1, 2, 1, 0), counted(1, 0, 1, 5, 700)]).await?;
    let once = bill(&*meter, A, 0, 10).await?;
    // The same keys, and a content that would change the bill if it were looked at.
    let again = [allocated(1, 9, 1, 1), counted(1, 0, 1, 5, 900)];
    for round in ["", " after a restart"] {
        append(&*meter, &again).await?;
        append(&*meter, &[again[0].clone(), again[0].clone()]).await?;
        let twice = bill(&*meter, A, 0, 10).await?;
        demand!(once == twice, "known keys changed the bill{round}: {:?}", costs(&twice));
        meter = should("reopen", rig.reopen(meter).await)?;
    }
    Ok(())
}

async fn order_free(rig: &dyn Rig) -> Verdict {
    // Placed at 0, moved at 4 to a host whose clock says 3, stopped there at 8; one life read three times, one once.
    let mut events = vec![
        allocated(1, 2, 1, 0),
        allocated(2, 1, 2, 3),
        allocated(3, 0, 2, 8),
        counted(1, 0, 1, 2, 100),
        counted(1, 0, 2, 6, 400),
        counted(1, 0, 3, 12, 900),
        counted(1, 1, 1, 7, 30),
    ];
    for round in 0..events.len() {
        for _ in 0..2 {
            let meter = should("fresh", rig.fresh().await)?;
            for event in &events {
                append(&*meter, std::slice::from_ref(event)).await?;
            }
            let costs = costs(&bill(&*meter, A, 3, 10).await?);
            // Bytes: (400 - 100) + 30. vCPU-seconds: 1 × (8 - 3).
            demand!(costs == ["330", "5"], "in order {round} it costs {costs:?}, not 330 and 5");
            events.reverse();
        }
        events.rotate_left(1);
    }
    Ok(())
}

async fn replay_same(rig: &dyn Rig) -> Verdict {
    let meter = should("fresh", rig.fresh().await)?;
    append(&*meter, &[allocated(1, 3, 1, 0), counted(1, 0, 1, 5, 7)]).await?;
    let first = format!("{:?}", bill(&*meter, A, 1, 8).await?);
    let second = format!("{:?}", bill(&*meter, A, 1, 8).await?);
    demand!(first == second, "the second bill is another one:\n{first}\n{second}");
    let meter = should("reopen", rig.reopen(meter).await)?;
    let third = format!("{:?}", bill(&*meter, A, 1, 8).await?);
    demand!(first == third, "after a restart it is another one:\n{first}\n{third}");
    Ok(())
}

async fn project_apart(rig: &dyn Rig) -> Verdict {
    let meter = should("fresh", rig.fresh().await)?;
    let theirs = UsageEvent { project: B, ..allocated(2, 5, 1, 0) };
    append(&*meter, &[allocated(1, 2, 1, 0), theirs]).await?;
    let (a, b) = (bill(&*meter, A, 0, 10).await?, bill(&*meter, B, 0, 10).await?);
    demand!(a.project == A && b.project == B, "bills of {} and {}", a.project, b.project);
    demand!(costs(&a) == ["20"] && costs(&b) == ["50"], "they cost {:?} and {:?}", costs(&a), costs(&b));
    let stranger = bill(&*meter, Id::from_uuid(Uuid::from_u128(99)), 0, 10).await?;
    demand!(stranger.lines.is_empty() && stranger.total == "0", "a stranger has a bill: {stranger:?}");
    Ok(())
}

async fn period_clipped(rig: &dyn Rig) -> Verdict {
    let meter = should("fresh", rig.fresh().await)?;
    append(&*meter, &[allocated(1, 2, 1, 10), allocated(2, 1, 1, 20)]).await?;
    append(&*meter, &[counted(1, 0, 1, 15, 100), counted(1, 0, 2, 25, 160)]).await?;
    // From, to, and the costs: bytes as they were read, then vCPU-seconds.
    let parts: [(i64, i64, &[&str]); 6] = [
        (0, 10, &[]),
        (0, 15, &["100", "10"]),
        (15, 20, &["10"]),
        // 1 vCPU goes on beyond the last event.
        (20, 100, &["60", "80"]),
        (50, 50, &[]),
        (0, 100, &["160", "100"]),
    ];
    for (from, to, expected) in parts {
        let costs = costs(&bill(&*meter, A, from, to).await?);
        demand!(costs == expected, "from {from} to {to} it costs {costs:?}, not {expected:?}");
    }
    let backwards = meter.bill(A, at(2), at(1), Id::from_uuid(BOOK), &prices()).await;
    should_fail("a period that ends before it begins", ErrorKind::Invalid, backwards)
}

async fn bill_exact(rig: &dyn Rig) -> Verdict {
    let meter = should("fresh", rig.fresh().await)?;
    append(&*meter, &[allocated(1, 1, 1, 0), counted(1, 0, 1, 1, 3)]).await?;
    let mut prices = prices();
    let price = |amount: &str, unit| amount.parse().map(|amount| Price { amount, unit });
    prices.prices.insert("vcpu".to_owned(), should("a price", price("3600", Unit::Hour))?);
    prices.prices.insert("tx-bytes".to_owned(), should("a price", price("0.000000000000000001", Unit::One))?);
    let bill = should("bill", meter.bill(A, at(0), at(1), Id::from_uuid(BOOK), &prices).await)?;
    let costs = costs(&bill);
    // 1/3600 vCPU-hour is no finite decimal, its cost is; 3 × 10^-18 is far below any coin.
    let expected = ["0.000000000000000003", "1"];
    demand!(costs == expected, "the costs are {costs:?}, not {expected:?}");
    demand!(bill.total == "1.000000000000000003", "the total is {}", bill.total);
    let lines: Vec<_> = bill.lines.iter().map(|l| (&*l.quantity, &*l.unit, &*l.unit_price)).collect();
    let expected = [("3", "bytes", "0.000000000000000001"), ("0.000277778", "vCPU-hours", "3600")];
    demand!(lines == expected, "the lines are {lines:?}, not {expected:?}");
    demand!(bill.currency == "EUR" && bill.price_book.uuid() == BOOK, "the bill is {bill:?}");
    Ok(())
}

// ---- what the checks are made of --------------------------------------------------------------------------------

/// `rev` is the event's identity; the object is always the same.
fn allocated(rev: u64, quantity: u64, order: u64, second: i64) -> UsageEvent {
    let key = UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(rev), index: 0 };
    let (of, meter) = (instance(), "vcpu".to_owned());
    UsageEvent { project: A, key, what: Usage::Allocated { of, meter, quantity, order, at: at(second) } }
}

fn counted(term: u64, life: u64, seq: u64, second: i64, total: u128) -> UsageEvent {
    let of = instance();
    let key = UsageKey::Reading { of: of.clone(), term, life, seq };
    let at = Stamp { wall: at(second), boot_id: Uuid::nil(), mono_ns: 0 };
    let totals = BTreeMap::from([("tx-bytes".to_owned(), total)]);
    let reading = Reading { of, term: Term(term), life, seq, fin: false, at, totals };
    UsageEvent { project: A, key, what: Usage::Counted(reading) }
}

fn instance() -> ObjectRef {
    ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(7) }
}

/// Some seconds after the epoch.
fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A vCPU-second and a byte cost 1 each.
fn prices() -> PriceBookSpec {
    let one = || "1".parse().map(|amount| Price { amount, unit: Unit::One });
    let prices = ["vcpu", "tx-bytes"].into_iter().filter_map(|meter| Some((meter.to_owned(), one().ok()?)));
    PriceBookSpec { currency: "EUR".to_owned(), from: Timestamp::UNIX_EPOCH, prices: prices.collect() }
}

async fn append(meter: &dyn MeterSink, events: &[UsageEvent]) -> Verdict {
    should("append", meter.append(events).await)
}

async fn bill(meter: &dyn MeterSink, project: Id<Project>, from: i64, to: i64) -> Result<Bill, String> {
    should("bill", meter.bill(project, at(from), at(to), Id::from_uuid(BOOK), &prices()).await)
}

fn costs(bill: &Bill) -> Vec<String> {
    bill.lines.iter().map(|l| l.cost.clone()).collect()
}

const A: Id<Project> = Id::from_uuid(Uuid::from_u128(1));
const B: Id<Project> = Id::from_uuid(Uuid::from_u128(2));
const BOOK: Uuid = Uuid::from_u128(3);
