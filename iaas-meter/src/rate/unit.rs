//! The units of a bill: how many raw ones make one, and its name.

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::model::Unit;

use crate::aggregate::Measure;
use crate::aggregate::Used;

/// A unit of a bill.
#[derive(Debug)]
pub(super) struct BillUnit {
    /// How many raw ones make one.
    pub(super) size: u128,
    pub(super) name: String,
}

/// The unit of `used` when it is priced per `unit`.
pub(super) fn of(used: &Used, unit: Unit) -> Result<BillUnit> {
    let thing = thing(&used.meter);
    let gib = if thing == "byte" { "GiB".to_owned() } else { format!("2^30 {thing}") };
    let (size, name) = match (used.measure, unit) {
        (Measure::OverTime, Unit::One) => (SECOND, format!("{thing}-seconds")),
        (Measure::OverTime, Unit::Hour) => (SECOND * HOUR, format!("{thing}-hours")),
        (Measure::OverTime, Unit::Gib) => (SECOND * GIB, format!("{gib}-seconds")),
        (Measure::OverTime, Unit::GibHour) => (SECOND * HOUR * GIB, format!("{gib}-hours")),
        (Measure::Plain, Unit::One) if thing == "byte" => (1, "bytes".to_owned()),
        (Measure::Plain, Unit::One) => (1, thing.to_owned()),
        (Measure::Plain, Unit::Gib) => (GIB, gib),
        (Measure::Plain, Unit::Hour | Unit::GibHour) => {
            return Err(Error::invalid(format!(
                "`{}` is priced per hour but does not count time",
                used.meter
            ))
            .about(used.resource.clone())
            .remedy("price it per one or per GiB"));
        }
    };
    Ok(BillUnit { size, name })
}

/// The thing that a meter counts.
fn thing(meter: &str) -> &str {
    match meter.strip_suffix("-ns").unwrap_or(meter) {
        "vcpu" => "vCPU",
        bytes if bytes.ends_with("byte") || bytes.ends_with("bytes") => "byte",
        other => other,
    }
}

/// Nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;
/// Seconds of an hour.
const HOUR: u128 = 3600;
/// Bytes of a GiB.
const GIB: u128 = 1 << 30;
