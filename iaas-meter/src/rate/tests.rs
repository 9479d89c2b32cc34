//! Every expected number is derived by hand beside it.

use std::collections::BTreeMap;

use iaas_core::ObjectRef;
use iaas_core::model::Unit;
use jiff::Timestamp;
use num_bigint::BigInt;
use num_rational::BigRational;
use proptest::prelude::*;
use uuid::Uuid;

use super::decimal::EXACT_DIGITS;
use super::decimal::ROUNDED_SCALE;
use super::*;
use crate::aggregate::Measure;

fn used(meter: &str, measure: Measure, raw: u128) -> Used {
    let resource = ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(1) };
    Used { resource, meter: meter.to_owned(), measure, raw }
}

fn book(meter: &str, amount: &str, unit: Unit) -> PriceBookSpec {
    let price = Price { amount: amount.parse().unwrap(), unit };
    let prices = BTreeMap::from([(meter.to_owned(), price)]);
    PriceBookSpec { currency: "EUR".to_owned(), from: Timestamp::UNIX_EPOCH, prices }
}

fn rated(used: &Used, amount: &str, unit: Unit) -> (String, String, String) {
    let line = rate(std::slice::from_ref(used), &book(&used.meter, amount, unit)).unwrap().remove(0);
    (line.quantity, line.unit, line.cost)
}

fn texts(quantity: &str, unit: &str, cost: &str) -> (String, String, String) {
    (quantity.to_owned(), unit.to_owned(), cost.to_owned())
}

#[test]
fn each_unit_converts_and_is_named() {
    // 2 vCPU × 1800 s = 3600 vCPU-seconds = 1 vCPU-hour.
    let vcpu = used("vcpu", Measure::OverTime, 2 * 1800 * 1_000_000_000);
    assert_eq!(rated(&vcpu, "0.04", Unit::Hour), texts("1", "vCPU-hours", "0.04"));
    assert_eq!(rated(&vcpu, "0.00001", Unit::One), texts("3600", "vCPU-seconds", "0.036"));
    // 8 GiB × 7200 s = 16 GiB-hours, × 0.005 = 0.08.
    let memory = used("memory-bytes", Measure::OverTime, (8 << 30) * 7200 * 1_000_000_000);
    assert_eq!(rated(&memory, "0.005", Unit::GibHour), texts("16", "GiB-hours", "0.08"));
    // 1.5 GiB × 0.09 = 0.135.
    let sent = used("tx-bytes", Measure::Plain, 3 << 29);
    assert_eq!(rated(&sent, "0.09", Unit::Gib), texts("1.5", "GiB", "0.135"));
    assert_eq!(rated(&sent, "1", Unit::One), texts("1610612736", "bytes", "1610612736"));
    // A counter of nanoseconds is time: 1 500 000 000 vcpu-ns = 1.5 vCPU-seconds.
    let ran = used("vcpu-ns", Measure::OverTime, 1_500_000_000);
    assert_eq!(rated(&ran, "2", Unit::One), texts("1.5", "vCPU-seconds", "3"));
    let refused = rate(&[sent], &book("tx-bytes", "1", Unit::Hour)).unwrap_err();
    assert_eq!(refused.kind(), iaas_core::ErrorKind::Invalid);
}

#[test]
fn what_is_no_finite_decimal_is_rounded_half_to_even_and_the_cost_does_not_inherit_it() {
    // 1 vCPU × 1 s = 1/3600 h = 0.000277777…; 3600 × that = exactly 1, not 0.9999999992.
    let second = used("vcpu", Measure::OverTime, 1_000_000_000);
    assert_eq!(rated(&second, "3600", Unit::Hour), texts("0.000277778", "vCPU-hours", "1"));
    // 1 byte = 2^-30 GiB has 30 digits: rounded to 0.000000001 (0.93e-9). × 0.5 = 0.47e-9 rounds to 0.
    let byte = used("tx-bytes", Measure::Plain, 1);
    assert_eq!(rated(&byte, "0.5", Unit::Gib), texts("0.000000001", "GiB", "0"));
    // 2^-28 GiB = 0.0000000037252902984619140625 has 28 digits: exact.
    let four = used("tx-bytes", Measure::Plain, 4);
    assert_eq!(rated(&four, "1", Unit::Gib).2, "0.0000000037252902984619140625");
    // Halves: 1/2 and 3/2 of 10^-9, made infinite by more than 28 digits: 0.5e-9 is short enough to stay exact.
    assert_eq!(rated(&used("tx-bytes", Measure::Plain, 1), "0.0000000005", Unit::One).2, "0.0000000005");
}

#[test]
fn a_tie_goes_to_the_even_neighbour() {
    // 10^20 + 0.0000000005 and + 0.0000000015 have 31 digits, so they are rounded at the ninth: to …0 and to …2.
    let ratio = |raw: u128| Decimal::of_ratio(raw, 10u128.pow(10), &Decimal::one()).to_string();
    assert_eq!(ratio(10u128.pow(30) + 5), "100000000000000000000");
    assert_eq!(ratio(10u128.pow(30) + 15), "100000000000000000000.000000002");
}

#[test]
fn a_negative_price_is_a_credit_and_the_total_is_the_exact_sum() {
    let (spent, back) = (used("tx-bytes", Measure::Plain, 10), used("rx-bytes", Measure::Plain, 3));
    let mut prices = book("tx-bytes", "0.1", Unit::One);
    prices.prices.extend(book("rx-bytes", "-0.0000001", Unit::One).prices);
    let lines = rate(&[spent, back], &prices).unwrap();
    assert_eq!([&*lines[0].cost, &*lines[1].cost], ["1", "-0.0000003"]);
    assert_eq!(total(&lines).unwrap(), "0.9999997");
    assert_eq!(total(&[]).unwrap(), "0");
}

#[test]
fn a_meter_without_a_price_makes_no_line_and_a_wrong_currency_is_refused() {
    let unpriced = used("gpu", Measure::OverTime, 1);
    assert_eq!(rate(&[unpriced], &book("vcpu", "1", Unit::One)).unwrap(), []);
    let wrong = PriceBookSpec { currency: "euro".to_owned(), ..book("vcpu", "1", Unit::One) };
    assert_eq!(rate(&[], &wrong).unwrap_err().kind(), iaas_core::ErrorKind::Invalid);
}

fn ratio(numer: u128, denom: u128) -> BigRational {
    BigRational::new(BigInt::from(numer), BigInt::from(denom))
}

/// A decimal text as a rational, read digit by digit.
fn value(text: &str) -> BigRational {
    let (minus, text) = text.strip_prefix('-').map_or((false, text), |t| (true, t));
    let (mut value, mut place) = (ratio(0, 1), None);
    for c in text.chars() {
        if c == '.' {
            place = Some(ratio(1, 1));
            continue;
        }
        let digit = ratio(c.to_digit(10).unwrap().into(), 1);
        match &mut place {
            None => value = value * ratio(10, 1) + digit,
            Some(p) => {
                *p = p.clone() / ratio(10, 1);
                value += digit * p.clone();
            }
        }
    }
    if minus { -value } else { value }
}

/// The rule of the module's front page, tried out by long division: at most 28 digits in all, or else nine places.
fn model(exact: &BigRational) -> BigRational {
    let limit = BigInt::from(10).pow(EXACT_DIGITS);
    for scale in 0..=EXACT_DIGITS {
        let scaled = exact * BigRational::from(BigInt::from(10).pow(scale));
        if scaled.is_integer() && scaled.numer().magnitude() < limit.magnitude() {
            return exact.clone();
        }
    }
    let unit = BigRational::from(BigInt::from(10).pow(ROUNDED_SCALE));
    let scaled = exact * &unit;
    let (below, half) = (scaled.floor(), ratio(1, 2));
    let rest = &scaled - &below;
    let up = rest > half || (rest == half && below.to_integer() % 2 != BigInt::ZERO);
    (if up { below + ratio(1, 1) } else { below }) / unit
}

proptest! {
    #[test]
    fn costs_equal_those_of_a_slow_rational_model(
        raw in prop_oneof![any::<u128>(), 0u128..1 << 70, (0u128..1000).prop_map(|n| n * 3_600_000_000_000)],
        price in "-?[0-9]{1,10}(\\.[0-9]{1,18})?",
        unit in prop_oneof![Just(Unit::One), Just(Unit::Hour), Just(Unit::Gib), Just(Unit::GibHour)],
    ) {
        let size = match unit {
            Unit::One => ratio(1_000_000_000, 1),
            Unit::Hour => ratio(3600 * 1_000_000_000, 1),
            Unit::Gib => ratio((1 << 30) * 1_000_000_000, 1),
            Unit::GibHour => ratio(3600 * (1 << 30) * 1_000_000_000, 1),
        };
        let quantity = ratio(raw, 1) / size;
        let (shown, _, cost) = rated(&used("memory-bytes", Measure::OverTime, raw), &price, unit);
        prop_assert_eq!(value(&shown), model(&quantity));
        prop_assert_eq!(value(&cost), model(&(quantity * value(&price))));
        // One way to print a number: nothing to strip, no minus before zero.
        prop_assert!(!cost.contains('.') || !cost.ends_with('0'), "{}", cost);
        prop_assert!(cost != "-0" && !cost.ends_with('.'), "{}", cost);
    }

    #[test]
    fn a_decimal_reads_back_as_it_prints_and_sums_exactly(a in "-?[0-9]{1,20}(\\.[0-9]{1,20})?", b in "-?[0-9]{1,20}(\\.[0-9]{1,20})?") {
        let (x, y) = (Decimal::parse(&a).unwrap(), Decimal::parse(&b).unwrap());
        prop_assert_eq!(value(&x.to_string()), value(&a));
        prop_assert_eq!(Decimal::parse(&x.to_string()).unwrap(), x.clone());
        prop_assert_eq!(value(&x.plus(&y).to_string()), value(&a) + value(&b));
    }

    #[test]
    fn no_text_makes_the_reader_of_decimals_panic(text: String) {
        let _ = Decimal::parse(&text);
    }
}
