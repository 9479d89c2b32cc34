//! Bills told as stories on their own clock, every amount derived in the open; and the law that the log's order,
//! repetition and reopening change nothing.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a panic")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use iaas_core::Clock;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ManualClock;
use iaas_core::ObjectRef;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::model::Instance;
use iaas_core::model::Port;
use iaas_core::model::Price;
use iaas_core::model::PriceBook;
use iaas_core::model::PriceBookSpec;
use iaas_core::model::Project;
use iaas_core::model::Unit;
use iaas_core::model::Volume;
use iaas_core::spi::Reading;
use iaas_core::spi::Stamp;
use iaas_core::spi::meter::Bill;
use iaas_core::spi::meter::MeterSink;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use iaas_core::spi::meter::UsageKey;
use iaas_core::testing::fake::FakeMeter;
use iaas_core::testing::fake::World;
use iaas_meter::Meter;
use iaas_meter::Period;
use iaas_meter::Schedule;
use iaas_meter::aggregate::Evidence;
use iaas_meter::usage_log::Options;
use jiff::Timestamp;
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

const GIB: u64 = 1 << 30;

/// A cloud as far as its meter sees it.
struct Story {
    clock: Arc<ManualClock>,
    folder: TempDir,
    meter: Meter,
    project: Id<Project>,
    rev: u64,
}

impl Story {
    fn begin() -> Self {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let folder = tempfile::tempdir().unwrap();
        let meter = Meter::open(folder.path()).unwrap();
        let project = Id::from_uuid(clock.uuid());
        Self { clock, folder, meter, project, rev: 0 }
    }

    /// From now on, `of` has `quantity` of `meter`.
    async fn allocate(&mut self, of: &ObjectRef, meter: &str, quantity: u64, order: u64) {
        self.rev += 1;
        let key = UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(self.rev), index: 0 };
        let (of, meter) = (of.clone(), meter.to_owned());
        let what = Usage::Allocated { of, meter, quantity, order, at: self.clock.now() };
        self.meter.append(&[UsageEvent { project: self.project, key, what }]).await.unwrap();
    }

    /// A port's counters are read.
    async fn read(&self, of: &ObjectRef, life: u64, seq: u64, totals: [(&str, u128); 2]) {
        let at = Stamp { wall: self.clock.now(), boot_id: Uuid::nil(), mono_ns: 0 };
        let totals = totals.map(|(meter, total)| (meter.to_owned(), total)).into();
        let reading = Reading { of: of.clone(), term: Term(1), life, seq, fin: false, at, totals };
        let key = UsageKey::Reading { of: of.clone(), term: 1, life, seq };
        let event = UsageEvent { project: self.project, key, what: Usage::Counted(reading) };
        self.meter.append(&[event]).await.unwrap();
    }

    fn pass(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    async fn bill(&self, from: i64, to: i64) -> Bill {
        self.meter.bill(self.project, at(from), at(to), book(), &prices("EUR", 0)).await.unwrap()
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn book() -> Id<PriceBook> {
    Id::from_uuid(Uuid::from_u128(77))
}

fn prices(currency: &str, from: i64) -> PriceBookSpec {
    let price = |amount: &str, unit| Price { amount: amount.parse().unwrap(), unit };
    let prices = [
        ("vcpu", price("0.04", Unit::Hour)),
        ("memory-bytes", price("0.005", Unit::GibHour)),
        ("volume-bytes", price("0.0001", Unit::GibHour)),
        ("tx-bytes", price("0.09", Unit::Gib)),
        ("rx-bytes", price("0", Unit::Gib)),
    ];
    let prices = prices.map(|(meter, price)| (meter.to_owned(), price)).into();
    PriceBookSpec { currency: currency.to_owned(), from: at(from), prices }
}

/// (meter, quantity, unit, unit price, cost) of each line.
fn lines(bill: &Bill) -> Vec<[&str; 5]> {
    bill.lines.iter().map(|l| [&*l.meter, &*l.quantity, &*l.unit, &*l.unit_price, &*l.cost]).collect()
}

#[tokio::test]
async fn a_day_of_a_small_cloud_costs_what_the_price_list_says() {
    let mut story = Story::begin();
    let vm = Id::<Instance>::from_uuid(story.clock.uuid()).object();
    let disk = Id::<Volume>::from_uuid(story.clock.uuid()).object();
    let port = Id::<Port>::from_uuid(story.clock.uuid()).object();
    story.allocate(&disk, "volume-bytes", 10 * GIB, 0).await;
    story.pass(3600);
    story.allocate(&vm, "vcpu", 2, 1).await;
    story.allocate(&vm, "memory-bytes", 4 * GIB, 1).await;
    story.pass(1800);
    story.read(&port, 0, 1, [("tx-bytes", u128::from(GIB)), ("rx-bytes", 5)]).await;
    story.pass(1800);
    // Stopped for two hours: the disk stays.
    story.allocate(&vm, "vcpu", 0, 1).await;
    story.allocate(&vm, "memory-bytes", 0, 1).await;
    // The runner died and counts from zero again in its next life.
    story.read(&port, 1, 1, [("tx-bytes", u128::from(GIB / 2)), ("rx-bytes", 0)]).await;
    story.pass(7200);
    story.allocate(&vm, "vcpu", 4, 2).await;
    story.pass(1800);
    story.allocate(&vm, "vcpu", 0, 2).await;

    let bill = story.bill(0, 86_400).await;
    let expected = [
        // 4 GiB × 1 h = 4 GiB-hours × 0.005
        ["memory-bytes", "4", "GiB-hours", "0.005", "0.02"],
        // 2 vCPU × 1 h + 4 vCPU × 0.5 h = 4 vCPU-hours × 0.04
        ["vcpu", "4", "vCPU-hours", "0.04", "0.16"],
        // 10 GiB × 24 h (still there) = 240 GiB-hours × 0.0001
        ["volume-bytes", "240", "GiB-hours", "0.0001", "0.024"],
        // 5 bytes = 5 / 2^30 GiB, 30 digits: rounded at nine. They cost nothing, and are on the bill.
        ["rx-bytes", "0.000000005", "GiB", "0", "0"],
        // 1 GiB + 0.5 GiB × 0.09
        ["tx-bytes", "1.5", "GiB", "0.09", "0.135"],
    ];
    let by_resource = |wanted: &ObjectRef| bill.lines.iter().filter(|l| l.resource == *wanted).count();
    assert_eq!((by_resource(&vm), by_resource(&disk), by_resource(&port)), (2, 1, 2));
    let (mut ours, mut theirs) = (lines(&bill), expected.to_vec());
    ours.sort_unstable();
    theirs.sort_unstable();
    assert_eq!(ours, theirs);
    assert!(bill.lines.is_sorted_by_key(|l| (l.resource.clone(), l.meter.clone())));
    // 0.02 + 0.16 + 0.024 + 0 + 0.135
    assert_eq!(bill.total, "0.339");
}

#[tokio::test]
async fn hours_of_a_day_add_up_to_the_day() {
    let mut story = Story::begin();
    let vm = Id::<Instance>::from_uuid(story.clock.uuid()).object();
    story.pass(1234);
    story.allocate(&vm, "vcpu", 3, 1).await;
    story.pass(50_000);
    story.allocate(&vm, "vcpu", 1, 2).await;
    let mut sum = 0;
    for hour in 0..24 {
        let period = Period::new(at(hour * 3600), at((hour + 1) * 3600)).unwrap();
        sum += story.meter.used(story.project, period).await.unwrap().iter().map(|u| u.raw).sum::<u128>();
    }
    // 3 × 50 000 s + 1 × (86 400 - 51 234) s
    assert_eq!(sum, (150_000 + 35_166) * 1_000_000_000);
}

#[tokio::test]
async fn a_new_price_book_splits_the_bill_where_it_begins_and_never_reaches_back() {
    let mut story = Story::begin();
    let vm = Id::<Instance>::from_uuid(story.clock.uuid()).object();
    story.allocate(&vm, "vcpu", 1, 1).await;
    let mut dearer = prices("EUR", 7200);
    dearer.prices.get_mut("vcpu").unwrap().amount = "0.05".parse().unwrap();
    let mut schedule = Schedule::default();
    schedule.insert(book(), prices("EUR", 0)).unwrap();
    schedule.insert(Id::from_uuid(Uuid::from_u128(78)), dearer.clone()).unwrap();
    let period = Period::new(at(0), at(10_800)).unwrap();
    let bills = story.meter.bills(story.project, period, &schedule).await.unwrap();
    let totals: Vec<_> = bills.iter().map(|b| (b.from.as_second(), b.to.as_second(), &*b.total)).collect();
    // 2 h × 0.04, then 1 h × 0.05
    assert_eq!(totals, [(0, 7200, "0.08"), (7200, 10_800, "0.05")]);
    // By the new book alone the first two hours have no price, and are not billed at a later one.
    let refused = story.meter.bill(story.project, at(0), at(10_800), book(), &dearer).await.unwrap_err();
    assert_eq!((refused.kind(), refused.object()), (ErrorKind::Invalid, Some(&vm)));
    story.meter.bill(story.project, at(7200), at(10_800), book(), &dearer).await.unwrap();
    // A period within the second book has one bill, by that book.
    let later = Period::new(at(8000), at(11_600)).unwrap();
    let bills_later = story.meter.bills(story.project, later, &schedule).await.unwrap();
    let [bill] = &*bills_later else { panic!("{bills_later:?}") };
    assert_eq!((bill.price_book.uuid().as_u128(), &*bill.total), (78, "0.05"));
    // A book that begins after the period changes nothing in it.
    schedule.insert(Id::from_uuid(Uuid::from_u128(79)), prices("EUR", 99_999)).unwrap();
    assert_eq!(story.meter.bills(story.project, period, &schedule).await.unwrap(), bills);
    assert_eq!(schedule.insert(book(), prices("EUR", 0)).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(schedule.insert(book(), prices("USD", 5)).unwrap_err().kind(), ErrorKind::Invalid);
    let none = Schedule::default();
    let error = story.meter.bills(story.project, period, &none).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn each_line_can_be_traced_to_the_events_that_made_it() {
    let mut story = Story::begin();
    let vm = Id::<Instance>::from_uuid(story.clock.uuid()).object();
    let port = Id::<Port>::from_uuid(story.clock.uuid()).object();
    story.allocate(&vm, "vcpu", 2, 1).await;
    story.pass(100);
    story.read(&port, 0, 1, [("tx-bytes", 30), ("rx-bytes", 0)]).await;
    story.allocate(&vm, "vcpu", 5, 2).await;
    story.pass(100);
    story.read(&port, 0, 2, [("tx-bytes", 90), ("rx-bytes", 0)]).await;
    let period = Period::new(at(50), at(250)).unwrap();
    let why = story.meter.explain(story.project, period, &vm, "vcpu").await.unwrap();
    let held: Vec<_> = why[0]
        .evidence
        .iter()
        .map(|e| match e {
            Evidence::Held(h) => (h.key.clone(), h.quantity, h.from, h.to),
            Evidence::Counted(_) => panic!("{e:?}"),
        })
        .collect();
    let key = |rev| UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(rev), index: 0 };
    assert_eq!(held, [(key(1), 2, at(50), at(100)), (key(2), 5, at(100), at(250))]);
    let why = story.meter.explain(story.project, period, &port, "tx-bytes").await.unwrap();
    let [Evidence::Counted(counted)] = &*why[0].evidence else { panic!("{why:?}") };
    // The first reading at 100 is within the period, so all 90 bytes are.
    assert_eq!((counted.opening, counted.closing.total, counted.closing.at), (None, 90, at(200)));
    for (resource, meter, from, to) in [(&vm, "tx-bytes", 0, 250), (&port, "tx-bytes", 0, 50)] {
        let period = Period::new(at(from), at(to)).unwrap();
        let nothing = story.meter.explain(story.project, period, resource, meter).await.unwrap_err();
        assert_eq!(nothing.kind(), ErrorKind::NotFound);
    }
}

#[tokio::test]
async fn a_reopened_log_gives_the_same_bill_byte_for_byte() {
    let mut story = Story::begin();
    let vm = Id::<Instance>::from_uuid(story.clock.uuid()).object();
    story.allocate(&vm, "vcpu", 3, 1).await;
    story.pass(1);
    let before = format!("{:?}", story.bill(0, 7).await);
    let Story { folder, meter, project, .. } = story;
    drop(meter);
    let meter = Meter::open(folder.path()).unwrap();
    let after = meter.bill(project, at(0), at(7), book(), &prices("EUR", 0)).await.unwrap();
    assert_eq!(format!("{after:?}"), before);
    let backwards = meter.bill(project, at(7), at(0), book(), &prices("EUR", 0)).await.unwrap_err();
    assert_eq!(backwards.kind(), ErrorKind::Invalid);
}

fn event() -> impl Strategy<Value = UsageEvent> {
    let of = |n: u128| ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(n) };
    let allocated = (0u64..9, 0u32..2, 0u128..3, 0u64..5, 0u64..3, 0i64..5000, 1u128..3);
    let allocated = allocated.prop_map(move |(rev, index, n, quantity, order, second, project)| UsageEvent {
        project: Id::from_uuid(Uuid::from_u128(project)),
        key: UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(rev), index },
        what: Usage::Allocated { of: of(n), meter: "vcpu".to_owned(), quantity, order, at: at(second) },
    });
    let counted = (0u128..3, 0u64..2, 0u64..2, 0u64..6, 0i64..5000, 0u128..1 << 40);
    let counted = counted.prop_map(move |(n, term, life, seq, second, total)| {
        let at = Stamp { wall: at(second), boot_id: Uuid::nil(), mono_ns: 0 };
        let totals = BTreeMap::from([("tx-bytes".to_owned(), total)]);
        UsageEvent {
            project: Id::from_uuid(Uuid::from_u128(1)),
            key: UsageKey::Reading { of: of(n), term, life, seq },
            what: Usage::Counted(Reading { of: of(n), term: Term(term), life, seq, fin: false, at, totals }),
        }
    });
    prop_oneof![allocated, counted]
}

/// Events with a key each, and the same ones shuffled, some twice.
fn arrivals() -> impl Strategy<Value = (Vec<UsageEvent>, Vec<UsageEvent>)> {
    proptest::collection::vec(event(), 0..25).prop_flat_map(|mut events| {
        events.sort_by(|a, b| a.key.cmp(&b.key));
        events.dedup_by(|a, b| a.key == b.key);
        let twice: Vec<_> = events.iter().chain(&events).cloned().collect();
        (Just(events), Just(twice).prop_shuffle())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_order_repetition_or_reopening_gives_the_bill_of_the_fake(
        (events, arrivals) in arrivals(), cut in 1usize..7, from in 0i64..4000, span in 0i64..4000,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (plain, mixed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |folder: &TempDir| Meter::open_with(folder.path(), Options { segment_bytes: 4096 }).unwrap();
        let meter = open(&plain);
        runtime.block_on(meter.append(&events)).unwrap();
        let mut other = open(&mixed);
        for (n, batch) in arrivals.chunks(cut).enumerate() {
            runtime.block_on(other.append(batch)).unwrap();
            if n % 4 == 3 {
                drop(other);
                other = open(&mixed);
            }
        }
        prop_assert_eq!(other.head().records, events.len() as u64);
        // Written by others, and rated digit by digit on paper.
        let fake = FakeMeter::open(&World::new(Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH))));
        runtime.block_on(fake.append(&arrivals)).unwrap();
        for project in 1..3 {
            let bill = |meter: &dyn MeterSink| {
                let project = Id::from_uuid(Uuid::from_u128(project));
                runtime.block_on(meter.bill(project, at(from), at(from + span), book(), &prices("EUR", 0))).unwrap()
            };
            prop_assert_eq!(bill(&meter), bill(&other));
            prop_assert_eq!(bill(&meter), bill(&fake));
        }
    }
}
