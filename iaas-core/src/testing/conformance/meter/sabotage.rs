//! Meters that break one clause each.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use jiff::Timestamp;
use uuid::Uuid;

use super::FakeMeterRig;
use super::Rig;
use crate::Id;
use crate::Result;
use crate::Rev;
use crate::model::PriceBook;
use crate::model::PriceBookSpec;
use crate::model::Project;
use crate::spi::meter::Bill;
use crate::spi::meter::MeterSink;
use crate::spi::meter::Usage;
use crate::spi::meter::UsageEvent;
use crate::spi::meter::UsageKey;
use crate::testing::conformance::Saboteur;

/// One saboteur or more for each clause.
pub fn saboteurs() -> Vec<Saboteur<dyn Rig>> {
    macro_rules! list {
        ($($clause:literal, $does:literal => $fault:ident;)+) => {
            vec![$(Saboteur { clause: $clause, does: $does, rig: || Box::new(BadRig::with(Fault::$fault)) }),+]
        };
    }
    list! {
        "append-durable", "forgets what came before a restart" => Forgets;
        "append-once", "counts an event again that comes again" => CountsAgain;
        "append-once", "knows keys only until a restart" => ForgetsKeys;
        "order-free", "takes allocations in the order of their arrival" => ByArrival;
        "order-free", "drops readings that arrive late" => DropsLate;
        "replay-same", "orders the lines of each second bill backwards" => Shuffles;
        "project-apart", "bills everything to whoever came first" => OnePayer;
        "period-clipped", "bills what was before the period" => FromTheStart;
        "period-clipped", "bills to the end of the minute" => WholeMinutes;
        "bill-exact", "rounds each cost to cents" => Cents;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Forgets,
    CountsAgain,
    ForgetsKeys,
    ByArrival,
    DropsLate,
    Shuffles,
    OnePayer,
    FromTheStart,
    WholeMinutes,
    Cents,
}

struct BadRig {
    clean: FakeMeterRig,
    fault: Fault,
}

impl BadRig {
    fn with(fault: Fault) -> Self {
        Self { clean: FakeMeterRig::default(), fault }
    }

    fn spoil(&self, clean: Arc<dyn MeterSink>, reopened: bool) -> Arc<dyn MeterSink> {
        Arc::new(BadMeter { clean, fault: self.fault, reopened, state: Mutex::default() })
    }
}

#[async_trait]
impl Rig for BadRig {
    async fn fresh(&self) -> Result<Arc<dyn MeterSink>> {
        Ok(self.spoil(self.clean.fresh().await?, false))
    }

    async fn reopen(&self, old: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>> {
        let clean = match self.fault {
            Fault::Forgets => self.clean.fresh().await?,
            _ => self.clean.reopen(old).await?,
        };
        Ok(self.spoil(clean, true))
    }
}

#[derive(Debug)]
struct BadMeter {
    clean: Arc<dyn MeterSink>,
    fault: Fault,
    reopened: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    arrived: u64,
    bills: u64,
    first: Option<Id<Project>>,
    keys: BTreeSet<UsageKey>,
    newest: u64,
}

impl BadMeter {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What reaches the clean meter of an event.
    fn bend(&self, event: &UsageEvent) -> Option<UsageEvent> {
        let (mut event, mut state) = (event.clone(), self.state());
        state.arrived += 1;
        let known = !state.keys.insert(event.key.clone());
        if self.is(Fault::CountsAgain) && known || self.is(Fault::ForgetsKeys) && self.reopened {
            let incarnation = Uuid::from_u128(u128::MAX);
            event.key = UsageKey::Commit { incarnation, rev: Rev(state.arrived), index: 0 };
        }
        if self.is(Fault::OnePayer) {
            event.project = *state.first.get_or_insert(event.project);
        }
        match &mut event.what {
            Usage::Allocated { order, .. } if self.is(Fault::ByArrival) => *order = state.arrived,
            Usage::Counted(reading) if self.is(Fault::DropsLate) => {
                if reading.seq < state.newest {
                    return None;
                }
                state.newest = reading.seq;
            }
            _ => {}
        }
        Some(event)
    }
}

#[async_trait]
impl MeterSink for BadMeter {
    async fn append(&self, batch: &[UsageEvent]) -> Result<()> {
        let bent: Vec<_> = batch.iter().filter_map(|event| self.bend(event)).collect();
        self.clean.append(&bent).await
    }

    async fn bill(
        &self,
        project: Id<Project>,
        from: Timestamp,
        to: Timestamp,
        book: Id<PriceBook>,
        prices: &PriceBookSpec,
    ) -> Result<Bill> {
        let minute = |t: Timestamp| Timestamp::from_second(t.as_second() / 60 * 60 + 60).unwrap_or(t);
        let begin = if self.is(Fault::FromTheStart) { Timestamp::UNIX_EPOCH.min(to) } else { from };
        let end = if self.is(Fault::WholeMinutes) && from <= to { minute(to) } else { to };
        let mut bill = self.clean.bill(project, begin, end, book, prices).await?;
        (bill.from, bill.to) = (from, to);
        self.state().bills += 1;
        if self.is(Fault::Shuffles) && self.state().bills.is_multiple_of(2) {
            bill.lines.reverse();
        }
        if self.is(Fault::Cents) {
            bill.lines.iter_mut().for_each(|line| line.cost = cents(&line.cost));
        }
        Ok(bill)
    }
}

/// The number without what comes after its second decimal.
fn cents(cost: &str) -> String {
    let Some((whole, fraction)) = cost.split_once('.') else { return cost.to_owned() };
    format!("{whole}.{}", fraction.chars().take(2).collect::<String>())
}
