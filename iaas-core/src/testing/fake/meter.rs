//! The fake meter: keeps events in the world and rates them the slow way.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use jiff::Timestamp;

use super::digits::Digits;
use super::world::Standing;
use super::world::Thing;
use super::world::World;
use super::world::lock;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::id::Fabric;
use crate::model::PriceBook;
use crate::model::PriceBookSpec;
use crate::model::Project;
use crate::model::Unit;
use crate::spi::Site;
use crate::spi::meter::Bill;
use crate::spi::meter::BillLine;
use crate::spi::meter::MeterSink;
use crate::spi::meter::Usage;
use crate::spi::meter::UsageEvent;
use crate::spi::meter::UsageKey;

/// Nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;
/// Seconds of an hour.
const HOUR: u128 = 3600;
/// Bytes of a GiB.
const GIB: u128 = 1 << 30;

/// A usage log in a [`World`], rated digit by digit.
#[derive(Debug)]
pub struct FakeMeter {
    world: World,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Log(Mutex<BTreeMap<UsageKey, UsageEvent>>);

impl FakeMeter {
    /// Opens the log of `world`.
    pub fn open(world: &World) -> Self {
        let nowhere = Site::Fabric(Id::<Fabric>::from_uuid(uuid::Uuid::nil()));
        Self { world: world.clone(), log: world.stand(nowhere, "meter", Log::default) }
    }

    /// The events, in order of their keys.
    pub fn events(&self) -> Vec<UsageEvent> {
        lock(&self.log.0).values().cloned().collect()
    }
}

#[async_trait]
impl MeterSink for FakeMeter {
    async fn append(&self, batch: &[UsageEvent]) -> Result<()> {
        self.world.alive().await;
        let mut log = lock(&self.log.0);
        for event in batch {
            log.entry(event.key.clone()).or_insert_with(|| event.clone());
        }
        Ok(())
    }

    async fn bill(
        &self,
        project: Id<Project>,
        from: Timestamp,
        to: Timestamp,
        book: Id<PriceBook>,
        prices: &PriceBookSpec,
    ) -> Result<Bill> {
        self.world.alive().await;
        if to < from {
            return Err(Error::invalid(format!("a period from {from} to {to}")).remedy("swap the two"));
        }
        let log = lock(&self.log.0);
        let ours: Vec<&UsageEvent> = log.values().filter(|e| e.project == project).collect();
        let mut used = allocated(&ours, from, to)?;
        used.extend(counted(&ours, from, to)?);
        used.sort();
        let lines = used.iter().filter_map(|u| u.rate(prices).transpose()).collect::<Result<Vec<_>>>()?;
        let total = lines.iter().fold(Digits::zero(), |sum, l| sum.plus(&Digits::parse(&l.cost)));
        Ok(Bill {
            project,
            from,
            to,
            currency: prices.currency.clone(),
            price_book: book,
            lines,
            total: total.to_string(),
        })
    }
}

/// What one object used of one meter.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Used {
    resource: ObjectRef,
    meter: String,
    /// Whether the number is thing-nanoseconds.
    over_time: bool,
    raw: u128,
}

impl Used {
    fn rate(&self, prices: &PriceBookSpec) -> Result<Option<BillLine>> {
        let Some(price) = prices.prices.get(&self.meter).filter(|_| self.raw != 0) else { return Ok(None) };
        let (size, unit) = self.unit(price.unit)?;
        let raw = Digits::parse(&self.raw.to_string());
        Ok(Some(BillLine {
            resource: self.resource.clone(),
            meter: self.meter.clone(),
            quantity: raw.over(size).to_string(),
            unit,
            unit_price: price.amount.to_string(),
            cost: raw.times(&Digits::parse(price.amount.as_str())).over(size).to_string(),
        }))
    }

    fn unit(&self, unit: Unit) -> Result<(u128, String)> {
        let thing = match self.meter.strip_suffix("-ns").unwrap_or(&self.meter) {
            "vcpu" => "vCPU",
            bytes if bytes.ends_with("byte") || bytes.ends_with("bytes") => "byte",
            other => other,
        };
        let gib = if thing == "byte" { "GiB".to_owned() } else { format!("2^30 {thing}") };
        Ok(match (self.over_time, unit) {
            (true, Unit::One) => (SECOND, format!("{thing}-seconds")),
            (true, Unit::Hour) => (SECOND * HOUR, format!("{thing}-hours")),
            (true, Unit::Gib) => (SECOND * GIB, format!("{gib}-seconds")),
            (true, Unit::GibHour) => (SECOND * HOUR * GIB, format!("{gib}-hours")),
            (false, Unit::One) => (1, if thing == "byte" { "bytes".to_owned() } else { thing.to_owned() }),
            (false, Unit::Gib) => (GIB, gib),
            (false, Unit::Hour | Unit::GibHour) => {
                return Err(Error::invalid(format!("`{}` does not count time", self.meter))
                    .remedy("price it per one or per GiB"));
            }
        })
    }
}

/// An object and a meter.
type Series = (ObjectRef, String);
/// A change of an allocation: order, time, key and quantity.
type Step = (u64, Timestamp, UsageKey, u64);
/// The greatest totals until both ends of the period, by term and life.
type Lives = BTreeMap<(u64, u64), (u128, u128)>;

/// Steps in the order of (order, time, key): each holds from its moment until that of the next.
fn allocated(events: &[&UsageEvent], from: Timestamp, to: Timestamp) -> Result<Vec<Used>> {
    let mut steps: BTreeMap<Series, Vec<Step>> = BTreeMap::new();
    for event in events {
        if let Usage::Allocated { of, meter, quantity, order, at } = &event.what {
            let step = (*order, *at, event.key.clone(), *quantity);
            steps.entry((of.clone(), meter.clone())).or_default().push(step);
        }
    }
    let mut used = Vec::new();
    for ((resource, meter), mut steps) in steps {
        steps.sort();
        let mut since = Timestamp::MIN;
        let mut holds = 0u64;
        let mut raw = 0u128;
        for (_, at, _, quantity) in steps {
            let until = at.max(since);
            raw = grow(raw, holds, since, until, from, to)?;
            (since, holds) = (until, quantity);
        }
        raw = grow(raw, holds, since, Timestamp::MAX, from, to)?;
        used.push(Used { resource, meter, over_time: true, raw });
    }
    Ok(used)
}

/// `raw` plus what was held of the period.
fn grow(
    raw: u128,
    holds: u64,
    since: Timestamp,
    until: Timestamp,
    from: Timestamp,
    to: Timestamp,
) -> Result<u128> {
    let span = until.min(to).as_nanosecond() - since.max(from).as_nanosecond();
    let more = u128::try_from(span).unwrap_or(0).checked_mul(holds.into());
    more.and_then(|more| raw.checked_add(more)).ok_or_else(too_much)
}

/// The greatest total until `to` minus the greatest until `from`, summed over lives.
fn counted(events: &[&UsageEvent], from: Timestamp, to: Timestamp) -> Result<Vec<Used>> {
    let mut lives: BTreeMap<Series, Lives> = BTreeMap::new();
    for event in events {
        let Usage::Counted(reading) = &event.what else { continue };
        for (meter, total) in &reading.totals {
            let life = lives.entry((reading.of.clone(), meter.clone())).or_default();
            let (opening, closing) = life.entry((reading.term.0, reading.life)).or_default();
            if reading.at.wall <= from {
                *opening = (*opening).max(*total);
            }
            if reading.at.wall <= to {
                *closing = (*closing).max(*total);
            }
        }
    }
    let sum = |((resource, meter), lives): (Series, Lives)| {
        let over_time = meter.ends_with("-ns");
        let raw = lives.values().try_fold(0u128, |sum, (opening, closing)| {
            sum.checked_add(closing.saturating_sub(*opening)).ok_or_else(too_much)
        })?;
        Ok(Used { resource, meter, over_time, raw })
    };
    lives.into_iter().map(sum).collect()
}

fn too_much() -> Error {
    Error::unsupported("a use exceeds 128 bits").remedy("bill shorter periods")
}

impl Standing for Log {
    fn things(&self) -> Vec<Thing> {
        Vec::new()
    }
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
