//! How fast usage becomes durable, and how fast it becomes a bill.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use criterion::Criterion;
use criterion::Throughput;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Rev;
use iaas_core::model::Price;
use iaas_core::model::PriceBookSpec;
use iaas_core::model::Project;
use iaas_core::model::Unit;
use iaas_core::spi::meter::MeterSink;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use iaas_core::spi::meter::UsageKey;
use jiff::Timestamp;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Makes meters to measure.
pub trait MeterRig: Debug {
    /// An empty one, on the disk whose speed counts. It lives as long as the rig.
    fn fresh(&self) -> Arc<dyn MeterSink>;
}

/// Measures a meter.
///
/// * `meter.ingest.durable`: single events per second from 256 callers at a time, each of which waits for `Ok`.
/// * `meter.ingest.durable.alone`: the same from one caller: what an fsync costs.
/// * `meter.bill`: events per second from a log of 10 000 events of one project to its bill.
///
/// # Panics
/// If the meter fails.
pub fn meter(criterion: &mut Criterion, rig: &impl MeterRig) {
    let runtime = Runtime::new().expect("a runtime");
    for (name, callers) in [("meter.ingest.durable", 256), ("meter.ingest.durable.alone", 1)] {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).throughput(Throughput::Elements(1));
        let sink = rig.fresh();
        let mut next = 0;
        group.bench_function("ours", |bencher| {
            bencher.iter_custom(|events| {
                let first = next;
                next += events;
                runtime.block_on(ingest(&sink, first, events, callers))
            });
        });
        group.finish();
    }
    let sink = rig.fresh();
    runtime.block_on(async {
        let events: Vec<_> = (0..BILLED).map(event).collect();
        for batch in events.chunks(1000) {
            sink.append(batch).await.expect("the meter takes events");
        }
    });
    let mut group = criterion.benchmark_group("meter.bill");
    group.sample_size(10).throughput(Throughput::Elements(BILLED));
    group.bench_function("ours", |bencher| bencher.iter(|| runtime.block_on(bill(&sink))));
    group.finish();
}

/// Appends the events from number `first` on, one per call, `callers` calls at a time. Returns how long it took until
/// the last was durable.
async fn ingest(sink: &Arc<dyn MeterSink>, first: u64, events: u64, callers: u64) -> Duration {
    let mut tasks = JoinSet::new();
    let begun = Instant::now();
    for caller in 0..callers {
        let sink = Arc::clone(sink);
        tasks.spawn(async move {
            for number in (caller..events).step_by(usize::try_from(callers).unwrap_or(1)) {
                sink.append(&[event(first + number)]).await.expect("the meter takes an event");
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a caller ends");
    }
    begun.elapsed()
}

async fn bill(sink: &Arc<dyn MeterSink>) {
    let price = Price { amount: "0.04".parse().expect("a price"), unit: Unit::Hour };
    let prices = [("vcpu".to_owned(), price)].into();
    let prices = PriceBookSpec { currency: "EUR".to_owned(), from: Timestamp::UNIX_EPOCH, prices };
    let to = Timestamp::from_second(1 << 30).expect("a time");
    let bill = sink.bill(project(), Timestamp::UNIX_EPOCH, to, Id::from_uuid(Uuid::nil()), &prices).await;
    assert_eq!(bill.expect("a bill").lines.len(), 100);
}

fn project() -> Id<Project> {
    Id::from_uuid(Uuid::from_u128(1))
}

/// The number is the event's identity. A hundred instances change in turns.
fn event(number: u64) -> UsageEvent {
    let of = ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(u128::from(number % 100)) };
    let second = i64::try_from(number % (1 << 29)).unwrap_or(0);
    UsageEvent {
        project: project(),
        key: UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(number), index: 0 },
        what: Usage::Allocated {
            of,
            meter: "vcpu".to_owned(),
            quantity: 1 + number % 8,
            order: number,
            at: Timestamp::from_second(second).expect("a time"),
        },
    }
}

/// The events of the bill that is measured.
const BILLED: u64 = 10_000;
