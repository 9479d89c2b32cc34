//! Metering of an embeddable cloud: an append-only usage log, and exact bills that can be made again from it.
//!
//! ```
//! use iaas_core::{Clock, Id, ManualClock};
//! use iaas_core::model::{Price, PriceBook, PriceBookSpec, Project, Unit};
//! use iaas_core::spi::meter::{MeterSink, Usage, UsageEvent, UsageKey};
//! use iaas_meter::Meter;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> iaas_core::Result<()> {
//! # let folder = tempfile::tempdir().expect("a temporary folder");
//! let clock = ManualClock::at("2030-01-01T00:00:00Z".parse().expect("a time"));
//! let meter = Meter::open(folder.path().join("usage"))?;
//! let (project, instance) = (Id::<Project>::from_uuid(clock.uuid()), Id::<iaas_core::model::Instance>::from_uuid(clock.uuid()));
//!
//! let started = clock.now();
//! meter.append(&[UsageEvent {
//!     project,
//!     key: UsageKey::Commit { incarnation: clock.uuid(), rev: iaas_core::Rev(1), index: 0 },
//!     what: Usage::Allocated { of: instance.object(), meter: "vcpu".into(), quantity: 2, order: 1, at: started },
//! }]).await?; // durable
//!
//! clock.advance(std::time::Duration::from_secs(5400));
//! let price = Price { amount: "0.04".parse()?, unit: Unit::Hour };
//! let prices = PriceBookSpec { currency: "EUR".into(), from: started, prices: [("vcpu".into(), price)].into() };
//! let bill = meter.bill(project, started, clock.now(), Id::<PriceBook>::from_uuid(clock.uuid()), &prices).await?;
//! // 2 vCPU × 1.5 h = 3 vCPU-hours; 3 × 0.04 = 0.12
//! assert_eq!((bill.lines[0].quantity.as_str(), bill.lines[0].unit.as_str()), ("3", "vCPU-hours"));
//! assert_eq!(bill.total, "0.12");
//! # Ok(())
//! # }
//! ```
//!
//! # Core concepts
//! * [`Meter`]: the [`MeterSink`](iaas_core::spi::meter::MeterSink) of this crate. `append` answers after one fsync that
//!   all waiting appends share; a bill reads its project's events.
//! * [`usage_log`]: the log. Nothing is changed in it, and nothing is skipped when it is damaged.
//! * [`aggregate`]: events to integers. [`price`]: which book holds when. [`rate`](mod@rate): integers to money. All three are pure.
//!
//! # What it does not do
//! Invoices, taxes, tiers, commitments, budgets and exports. Usage that has no price makes no line;
//! [`Meter::used`] lists it.
#![forbid(unsafe_code)]

pub mod aggregate;
mod meter;
pub mod price;
pub mod rate;
pub mod usage_log;

pub use aggregate::Period;
pub use meter::Explanation;
pub use meter::Meter;
pub use price::Schedule;
pub use usage_log::verify;
