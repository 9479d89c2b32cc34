//! Stories with their numbers derived in the open, and the laws: order and repetition do not matter, periods add up.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::spi::Reading;
use iaas_core::spi::Stamp;
use iaas_core::spi::meter::UsageKey;
use num_bigint::BigInt;
use num_rational::BigRational;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

const SECOND: u128 = 1_000_000_000;

fn project(n: u128) -> Id<Project> {
    Id::from_uuid(Uuid::from_u128(n))
}

fn instance(n: u128) -> ObjectRef {
    ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(n) }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn period(from: i64, to: i64) -> Period {
    Period::new(at(from), at(to)).unwrap()
}

/// `rev` is the event's identity.
fn allocated(rev: u64, of: u128, quantity: u64, order: u64, second: i64) -> UsageEvent {
    let key = UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(rev), index: 0 };
    let meter = "vcpu".to_owned();
    let what = Usage::Allocated { of: instance(of), meter, quantity, order, at: at(second) };
    UsageEvent { project: project(1), key, what }
}

fn counted(of: u128, (term, life, seq): (u64, u64, u64), second: i64, total: u128) -> UsageEvent {
    let key = UsageKey::Reading { of: instance(of), term, life, seq };
    let at = Stamp { wall: at(second), boot_id: Uuid::nil(), mono_ns: 0 };
    let totals = BTreeMap::from([("tx-bytes".to_owned(), total)]);
    let what =
        Usage::Counted(Reading { of: instance(of), term: Term(term), life, seq, fin: false, at, totals });
    UsageEvent { project: project(1), key, what }
}

fn used(events: &[UsageEvent], period: Period) -> Vec<Used> {
    let mut ledger = Ledger::new(project(1), period);
    for (n, event) in events.iter().enumerate() {
        let place = Place { segment: 1, offset: u32::try_from(n).unwrap(), length: 0 };
        ledger.add(place, event.clone());
    }
    ledger.used().unwrap()
}

fn raw(events: &[UsageEvent], period: Period) -> u128 {
    used(events, period).iter().map(|u| u.raw).sum()
}

#[test]
fn a_vm_stopped_for_half_the_hour_counts_half() {
    let events = [allocated(1, 1, 2, 1, 0), allocated(2, 1, 0, 1, 1800)];
    // 2 vCPU × 1800 s = 3600 vCPU-seconds
    assert_eq!(raw(&events, period(0, 3600)), 3600 * SECOND);
}

#[test]
fn only_the_period_counts_and_what_still_runs_counts_until_its_end() {
    let events = [allocated(1, 1, 2, 1, 100), allocated(2, 1, 5, 2, 200)];
    // [150, 200): 2 × 50 s = 100; [200, 300): 5 × 100 s = 500
    assert_eq!(raw(&events, period(150, 300)), 600 * SECOND);
    // Before it began there is nothing, and no line.
    assert_eq!(used(&events, period(0, 100)), []);
    assert_eq!(used(&events, period(250, 250)), []);
}

#[test]
fn order_wins_over_clocks_and_no_second_counts_twice() {
    // Host A: from 100. Then placed on host B, whose clock is 40 s behind: from "60". Stopped there at "90".
    let events = [allocated(1, 1, 2, 1, 100), allocated(2, 1, 2, 2, 60), allocated(3, 1, 0, 2, 90)];
    // B's moments count as 100, so nothing is left of either: never the same seconds twice.
    assert_eq!(raw(&events, period(0, 1000)), 0);
    // Stopped at "160": [100, 160) on B, 2 × 60 s = 120.
    let events = [allocated(1, 1, 2, 1, 100), allocated(2, 1, 2, 2, 60), allocated(3, 1, 0, 2, 160)];
    assert_eq!(raw(&events, period(0, 1000)), 120 * SECOND);
    // A stop of an earlier boot that arrives after the next start does not end it.
    let events = [allocated(1, 1, 1, 1, 0), allocated(3, 1, 1, 2, 50), allocated(2, 1, 0, 1, 40)];
    // [0, 40) and [50, 100): 90
    assert_eq!(raw(&events, period(0, 100)), 90 * SECOND);
}

#[test]
fn the_last_of_two_changes_in_one_moment_holds() {
    let events = [allocated(7, 1, 4, 1, 0), allocated(8, 1, 3, 1, 0)];
    assert_eq!(raw(&events, period(0, 10)), 30 * SECOND);
}

#[test]
fn a_counter_is_the_greatest_total_of_each_life_added_up() {
    // Life 0 was read as 700, life 1 (after a crash, from zero) as 50; another placement as 9.
    let events = [
        counted(1, (1, 0, 1), 10, 500),
        counted(1, (1, 0, 2), 20, 700),
        counted(1, (1, 1, 1), 30, 50),
        counted(1, (2, 0, 1), 40, 9),
    ];
    assert_eq!(raw(&events, period(0, 100)), 759);
}

#[test]
fn bytes_belong_to_the_period_in_which_they_were_read() {
    let events =
        [counted(1, (1, 0, 1), 10, 100), counted(1, (1, 0, 2), 20, 250), counted(1, (1, 0, 3), 30, 600)];
    // Until 20 inclusive: 250. From there to 30: 600 - 250.
    assert_eq!(raw(&events, period(0, 20)), 250);
    assert_eq!(raw(&events, period(20, 30)), 350);
    // No reading in between: they come with the next one.
    assert_eq!(raw(&events, period(21, 29)), 0);
}

#[test]
fn another_project_has_no_part_in_it() {
    let mut foreign = allocated(1, 1, 2, 1, 0);
    foreign.project = project(2);
    assert_eq!(used(&[foreign], period(0, 10)), []);
}

#[test]
fn more_than_128_bits_is_an_error_that_names_the_object() {
    let mut ledger = Ledger::new(project(1), period(0, 100));
    let place = Place { segment: 1, offset: 0, length: 0 };
    ledger.add(place, counted(4, (1, 0, 1), 10, u128::MAX));
    ledger.add(place, counted(4, (1, 1, 1), 10, 1));
    let error = ledger.used().unwrap_err();
    assert_eq!(error.object(), Some(&instance(4)));
}

fn events() -> impl Strategy<Value = Vec<UsageEvent>> {
    let allocation = (0u128..3, 0u64..4, 0u64..4, 0i64..60);
    let allocations = proptest::collection::vec(allocation, 0..12).prop_map(|all| {
        let made =
            (1..).zip(all).map(|(rev, (of, quantity, order, s))| allocated(rev, of, quantity, order, s));
        made.collect::<Vec<_>>()
    });
    // Totals of a life grow with its readings, and so does time.
    let life = (0u128..2, 0u64..3, 0u64..3, proptest::collection::vec((0i64..20, 0u128..1000), 0..6));
    let lives = proptest::collection::vec(life, 0..5).prop_map(|lives| {
        let mut distinct = BTreeSet::new();
        let mut all = Vec::new();
        for (of, term, life, steps) in lives {
            if !distinct.insert((of, term, life)) {
                continue;
            }
            let (mut now, mut total) = (0, 0);
            for (seq, (wait, more)) in (1..).zip(steps) {
                (now, total) = (now + wait, total + more);
                all.push(counted(of, (term, life, seq), now, total));
            }
        }
        all
    });
    (allocations, lives).prop_map(|(mut a, b)| {
        a.extend(b);
        a
    })
}

/// What the front page says, second by second and reading by reading, in rationals.
fn model(events: &[UsageEvent], period: Period) -> BTreeMap<(ObjectRef, String), BigRational> {
    let mut sums = BTreeMap::new();
    let whole = |n: i128| BigRational::from(BigInt::from(n));
    let names: BTreeSet<ObjectRef> = events.iter().map(|e| of(e).clone()).collect();
    for name in names {
        let mut steps: Vec<(u64, i64, &UsageKey, u64)> = Vec::new();
        let mut lives: BTreeMap<(u64, u64), Vec<(i64, u128)>> = BTreeMap::new();
        for event in events.iter().filter(|e| *of(e) == name) {
            match &event.what {
                Usage::Allocated { quantity, order, at, .. } => {
                    steps.push((*order, at.as_second(), &event.key, *quantity));
                }
                Usage::Counted(r) => {
                    let readings = lives.entry((r.term.0, r.life)).or_default();
                    readings.push((r.at.wall.as_second(), r.totals["tx-bytes"]));
                }
            }
        }
        steps.sort();
        let mut sum = whole(0);
        for second in period.from().as_second()..period.to().as_second() {
            // A step is in force if some step at or before it in the order began by now; the last such one holds.
            let holds = steps
                .iter()
                .enumerate()
                .rev()
                .find(|(n, _)| steps[..=*n].iter().all(|(_, begun, ..)| *begun <= second));
            sum += whole(holds.map_or(0, |(_, step)| i128::from(step.3)) * 1_000_000_000);
        }
        sums.insert((name.clone(), "vcpu".to_owned()), sum);
        let until = |border: Timestamp| {
            let total = |readings: &Vec<(i64, u128)>| {
                readings.iter().filter(|(s, _)| *s <= border.as_second()).map(|(_, t)| *t).max().unwrap_or(0)
            };
            whole(i128::try_from(lives.values().map(total).sum::<u128>()).unwrap())
        };
        sums.insert((name, "tx-bytes".to_owned()), until(period.to()) - until(period.from()));
    }
    sums.retain(|_, sum| *sum != whole(0));
    sums
}

fn of(event: &UsageEvent) -> &ObjectRef {
    match &event.what {
        Usage::Allocated { of, .. } => of,
        Usage::Counted(reading) => &reading.of,
    }
}

fn borders() -> impl Strategy<Value = (i64, i64, i64)> {
    (0i64..40, 0i64..30, 0i64..30).prop_map(|(a, b, c)| (a, a + b, a + b + c))
}

proptest! {
    #[test]
    fn neither_order_nor_repetition_matters(
        (events, mixed) in events().prop_flat_map(|e| {
            let twice: Vec<_> = e.iter().chain(&e).cloned().collect();
            (Just(e), Just(twice).prop_shuffle())
        }),
        (from, _, to) in borders(),
    ) {
        prop_assert_eq!(used(&events, period(from, to)), used(&mixed, period(from, to)));
    }

    #[test]
    fn adjoining_periods_add_up(events in events(), (a, b, c) in borders()) {
        prop_assert_eq!(raw(&events, period(a, b)) + raw(&events, period(b, c)), raw(&events, period(a, c)));
    }

    #[test]
    fn the_integers_equal_those_of_a_slow_rational_model(events in events(), (from, _, to) in borders()) {
        let used = used(&events, period(from, to));
        let ours: BTreeMap<_, _> =
            used.into_iter().map(|u| ((u.resource, u.meter), BigRational::from(BigInt::from(u.raw)))).collect();
        prop_assert_eq!(ours, model(&events, period(from, to)));
    }

    #[test]
    fn the_reasons_add_up_to_the_usage(events in events(), (from, _, to) in borders()) {
        let mut ledger = Ledger::new(project(1), period(from, to));
        for event in &events {
            ledger.add(Place { segment: 1, offset: 0, length: 0 }, event.clone());
        }
        for used in ledger.used().unwrap() {
            let why = ledger.why(&used.resource, &used.meter);
            let sum: u128 = why.iter().flat_map(|(_, e)| e).map(|e| e.raw().unwrap()).sum();
            prop_assert_eq!(sum, used.raw);
        }
    }
}
