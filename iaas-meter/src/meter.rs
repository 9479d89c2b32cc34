//! The meter: a usage log and the bills made from it.

use std::path::Path;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::model::PriceBook;
use iaas_core::model::PriceBookSpec;
use iaas_core::model::Project;
use iaas_core::spi::meter::Bill;
use iaas_core::spi::meter::MeterSink;
use iaas_core::spi::meter::UsageEvent;
use jiff::Timestamp;

use crate::aggregate::Evidence;
use crate::aggregate::Ledger;
use crate::aggregate::Measure;
use crate::aggregate::Period;
use crate::aggregate::Used;
use crate::price::Part;
use crate::price::Schedule;
use crate::rate;
use crate::usage_log::Head;
use crate::usage_log::Opening;
use crate::usage_log::Options;
use crate::usage_log::UsageLog;

/// Keeps usage in a folder and makes bills of it.
///
/// The log is the only truth: every bill is computed from its records when it is asked for, so it is the same after a
/// reopen. Callable from many threads; needs a tokio runtime for reading. Dropping it waits for the write in hand and
/// unlocks the folder.
///
/// Memory: 12 bytes per event, and what it takes to know each key again (one range per life and gap of readings, about
/// 50 bytes per run of commits). A bill reads only its project's events.
#[derive(Debug)]
pub struct Meter {
    log: UsageLog,
}

/// Why a line is on a bill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What was used.
    pub resource: ObjectRef,
    /// By which meter.
    pub meter: String,
    /// What the numbers of the evidence count.
    pub measure: Measure,
    /// The events that made it; their raw numbers add up to the usage that was rated.
    pub evidence: Vec<Evidence>,
}

impl Meter {
    /// Opens the usage log in `folder`, or makes it there with mode 0700.
    ///
    /// Blocks while it reads and checks every byte. A tail that a crash tore off is set aside; see
    /// [`opening`](Self::opening).
    ///
    /// # Errors
    /// - [`ErrorKind::Conflict`](iaas_core::ErrorKind::Conflict): it is open elsewhere.
    /// - [`ErrorKind::Unavailable`](iaas_core::ErrorKind::Unavailable): it is damaged (the text names segment and byte;
    ///   [`verify`](crate::verify) gives them as values), or the folder cannot be used.
    /// - [`ErrorKind::Unsupported`](iaas_core::ErrorKind::Unsupported): a newer version wrote it.
    /// - [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid): the folder holds something else.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(folder, Options::default())
    }

    /// As [`open`](Self::open), with options.
    ///
    /// # Errors
    /// As [`open`](Self::open); `Invalid` for an option out of range.
    pub fn open_with(folder: impl AsRef<Path>, options: Options) -> Result<Self> {
        Ok(Self { log: UsageLog::open(folder.as_ref(), options)? })
    }

    /// How the log was found.
    pub fn opening(&self) -> &Opening {
        self.log.opening()
    }

    /// What the log holds now. Keep it elsewhere to prove later that nothing was changed or cut off.
    pub fn head(&self) -> Head {
        self.log.head()
    }

    /// What `project` used, priced or not, ordered by resource and meter.
    ///
    /// # Errors
    /// `Unavailable` if the log cannot be read.
    pub async fn used(&self, project: Id<Project>, period: Period) -> Result<Vec<Used>> {
        self.ledger(project, period).await?.used()
    }

    /// The bills of `project`: one per price book that is in force in the period.
    ///
    /// # Errors
    /// As [`MeterSink::bill`]; `NotFound` if the schedule is empty.
    pub async fn bills(&self, project: Id<Project>, period: Period, prices: &Schedule) -> Result<Vec<Bill>> {
        let mut bills = Vec::new();
        for Part { period, book, prices } in prices.parts(period)? {
            bills.push(self.bill(project, period.from(), period.to(), book, prices).await?);
        }
        Ok(bills)
    }

    /// Which events made the lines of `resource` and `meter` on the bill of `project`.
    ///
    /// # Errors
    /// `NotFound` if there was no such use; `Unavailable` if the log cannot be read.
    pub async fn explain(
        &self,
        project: Id<Project>,
        period: Period,
        resource: &ObjectRef,
        meter: &str,
    ) -> Result<Vec<Explanation>> {
        let ledger = self.ledger(project, period).await?;
        let why = ledger.why(resource, meter).into_iter().filter(|(_, evidence)| !evidence.is_empty());
        let explained: Vec<_> = why
            .map(|(measure, evidence)| Explanation {
                resource: resource.clone(),
                meter: meter.to_owned(),
                measure,
                evidence,
            })
            .collect();
        if explained.is_empty() {
            return Err(
                Error::not_found(format!("no use of `{meter}` in this period")).about(resource.clone())
            );
        }
        Ok(explained)
    }

    async fn ledger(&self, project: Id<Project>, period: Period) -> Result<Ledger> {
        let empty = Ledger::new(project, period);
        self.log.visit(project, empty, |ledger, place, event| ledger.add(place, event)).await
    }

    /// Refuses to bill at prices that did not hold yet.
    async fn check_in_force(
        &self,
        project: Id<Project>,
        period: Period,
        prices: &PriceBookSpec,
    ) -> Result<()> {
        if prices.from <= period.from() {
            return Ok(());
        }
        let early = Period::new(period.from(), prices.from.min(period.to()))?;
        let used = self.used(project, early).await?;
        match used.iter().find(|u| prices.prices.contains_key(&u.meter)) {
            None => Ok(()),
            Some(used) => Err(Error::invalid(format!(
                "the price book holds only from {}, but `{}` was used before",
                prices.from, used.meter
            ))
            .about(used.resource.clone())
            .remedy("bill the time before by the book of that time")),
        }
    }
}

#[async_trait]
impl MeterSink for Meter {
    async fn append(&self, batch: &[UsageEvent]) -> Result<()> {
        self.log.append(batch).await
    }

    /// Usage from before the price book held is refused with `Invalid`, never billed at a price of later.
    async fn bill(
        &self,
        project: Id<Project>,
        from: Timestamp,
        to: Timestamp,
        book: Id<PriceBook>,
        prices: &PriceBookSpec,
    ) -> Result<Bill> {
        let period = Period::new(from, to)?;
        self.check_in_force(project, period, prices).await?;
        let used = self.used(project, period).await?;
        let lines = rate::rate(&used, prices)?;
        let total = rate::total(&lines)?;
        Ok(Bill { project, from, to, currency: prices.currency.clone(), price_book: book, lines, total })
    }
}
