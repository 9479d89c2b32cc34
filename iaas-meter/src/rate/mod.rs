//! From integers to money. Pure: usage and prices in, lines out; no clock, no I/O, no float.
//!
//! A line's cost is computed from the exact usage, never from the rounded quantity beside it. Rounding happens in one
//! place, `decimal::Decimal::of_ratio`, once per printed number: an amount that is a finite decimal of at most 28
//! digits is exact; any other (a third of an hour) is rounded half to even at 9 digits after the point. The total is the
//! exact sum of the lines as printed.

pub mod decimal;
mod unit;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::model::Price;
use iaas_core::model::PriceBookSpec;
use iaas_core::spi::meter::BillLine;

use self::decimal::Decimal;
use crate::aggregate::Used;
use crate::price;

/// Rates `used`, in its order, by `prices`. A meter without a price makes no line.
///
/// # Errors
/// [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid) for a wrong currency, and for a price per time on a counter
/// that does not count time.
pub fn rate(used: &[Used], prices: &PriceBookSpec) -> Result<Vec<BillLine>> {
    price::check(prices)?;
    let priced = used.iter().filter_map(|u| Some((u, prices.prices.get(&u.meter)?)));
    priced.map(|(used, price)| line(used, price)).collect()
}

/// The exact sum of the lines' costs.
///
/// # Errors
/// [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid) if a cost is no decimal number.
pub fn total(lines: &[BillLine]) -> Result<String> {
    let mut sum = Decimal::ZERO;
    for line in lines {
        let bad = || Error::invalid("a line's cost is not a decimal number").about(line.resource.clone());
        sum = sum.plus(&Decimal::parse(&line.cost).ok_or_else(bad)?);
    }
    Ok(sum.to_string())
}

fn line(used: &Used, price: &Price) -> Result<BillLine> {
    let unit = unit::of(used, price.unit)?;
    // `DecimalText` holds nothing but decimal numbers.
    let amount = Decimal::parse(price.amount.as_str())
        .ok_or_else(|| Error::internal("a price is not a decimal number").about(used.resource.clone()))?;
    Ok(BillLine {
        resource: used.resource.clone(),
        meter: used.meter.clone(),
        quantity: Decimal::of_ratio(used.raw, unit.size, &Decimal::one()).to_string(),
        unit: unit.name,
        unit_price: price.amount.to_string(),
        cost: Decimal::of_ratio(used.raw, unit.size, &amount).to_string(),
    })
}

#[cfg(test)]
mod tests;
