//! The contracts as code: one suite per trait, one check per clause, and for each clause a saboteur that breaks it.
//!
//! A suite runs on a *rig*, which you write for your implementation: it makes a fresh one, restarts it on what it left
//! behind, and says what exists. [`run`] gives a [`Report`]; [`Report::assert_clean`] is your whole test:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use iaas_core::testing::conformance::state_store;
//! state_store::run(&state_store::MemoryRig::default()).await.assert_clean();
//! # }
//! ```
//!
//! # Proving yours
//! | trait | suite | rig |
//! |---|---|---|
//! | `Hypervisor` | [`hypervisor`] | [`hypervisor::HypervisorRig`] |
//! | `Artifacts` | [`artifacts`] | [`artifacts::ArtifactsRig`] |
//! | `VolumePool`, down to the bytes | [`volume_pool`] | [`volume_pool::PoolRig`] |
//! | `VolumeAccess` | [`volume_access`] | [`volume_access::AccessRig`] |
//! | `NetProgram`, down to the packets | [`net_program`] | [`net_program::NetRig`] |
//! | `Plugs` | [`plugs`] | [`plugs::PlugsRig`] |
//! | `HostInventory` | [`inventory`] | [`inventory::InventoryRig`] |
//! | `StateStore` | [`state_store`] | [`state_store::Rig`] |
//! | `MeterSink` | [`meter`] | [`meter::Rig`] |
//! | `Authorizer` | [`authorizer`] | [`authorizer::Rig`] |
//! | `AuditSink`, `KeyManager`, `Placement` | [`small`] | [`small::AuditRig`], [`small::KeysRig`], [`small::PlacementRig`] |
//!
//! The smallest whole example, a placement of your own:
//! ```
//! # use std::sync::Arc;
//! # use iaas_core::spi::placement::{Fleet, PlaceRequest, Placed, Placement};
//! # use iaas_core::testing::{conformance::small, fake::FakePlacement};
//! #[derive(Debug)]
//! struct Mine;
//! impl Placement for Mine {
//!     fn rank(&self, want: &PlaceRequest, fleet: &Fleet, seed: u64) -> Placed {
//!         FakePlacement.rank(want, fleet, seed) // your idea goes here
//!     }
//! }
//! impl small::PlacementRig for Mine {
//!     fn placement(&self) -> Arc<dyn Placement> { Arc::new(Mine) }
//! }
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! small::run_placement(&Mine).await.assert_clean();
//! # }
//! ```
//! A provider's rig also restarts it and breaks it; [`fakes`] has one of each to copy. The same rig runs over a socket:
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use iaas_core::testing::conformance::{fakes::FakeInventoryRig, inventory, rig::Wrapped, wire::Wire};
//! inventory::run(&FakeInventoryRig::default()).await.assert_clean();
//! inventory::run(&Wrapped::new(FakeInventoryRig::default(), Wire)).await.assert_clean();
//! # }
//! ```
//!
//! # Proving the suites
//! A [`Saboteur`] is a rig around a clean implementation that breaks just one clause; [`Matrix`] proves that the check of
//! that clause notices.

pub mod artifacts;
pub mod authorizer;
mod calls;
pub mod converge;
pub mod fakes;
pub mod hypervisor;
pub mod inventory;
pub mod meter;
pub mod net_program;
pub mod own;
mod packet;
pub mod plugs;
pub mod provider;
pub mod rig;
pub mod sabotage;
pub mod small;
pub mod state_store;
pub mod volume_access;
pub mod volume_pool;
pub mod wire;

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

/// How a check ended: what was wrong, in words.
pub type Verdict = Result<(), String>;

/// A check under way.
pub type Running<'a> = Pin<Box<dyn Future<Output = Verdict> + Send + 'a>>;

/// A future that borrows nothing.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// One clause of a contract as code, for rigs of type `R`.
pub struct Check<R: ?Sized + 'static> {
    /// The clause's name in the trait's `# Contract`.
    pub clause: &'static str,
    /// Runs it on a fresh implementation.
    pub run: for<'a> fn(&'a R) -> Running<'a>,
}

impl<R: ?Sized> fmt::Debug for Check<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Check({})", self.clause)
    }
}

/// How each check of a suite ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The suite's name.
    pub suite: &'static str,
    /// Clause and verdict, in the order of the contract.
    pub results: Vec<(&'static str, Verdict)>,
}

impl Report {
    /// The clauses that are broken, each once.
    pub fn broken(&self) -> Vec<&'static str> {
        let mut broken: Vec<_> = self.results.iter().filter(|(_, v)| v.is_err()).map(|(c, _)| *c).collect();
        broken.dedup();
        broken
    }

    /// Panics with every broken clause, if there is one.
    ///
    /// # Panics
    /// If a clause is broken, or if nothing was checked.
    pub fn assert_clean(&self) {
        assert!(!self.results.is_empty(), "{}: nothing was checked", self.suite);
        assert!(self.broken().is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    /// What failed; with `{:#}` a table of every check.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} of {} checks failed", self.suite, self.failures().count(), self.results.len())?;
        if f.alternate() {
            let all = self.results.iter().map(|(clause, ended)| (clause, ended.as_ref().err()));
            return all.into_iter().try_for_each(|(clause, why)| {
                write!(f, "\n  {clause:<24} {}", why.map_or("ok", String::as_str))
            });
        }
        self.failures().try_for_each(|(clause, why)| write!(f, "\n  {clause}: {why}"))
    }
}

impl Report {
    fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.results.iter().filter_map(|(clause, verdict)| Some((*clause, verdict.as_ref().err()?.as_str())))
    }
}

/// Runs every check on `rig`. A check that panics or does not end is a broken clause.
pub async fn run<R: ?Sized>(suite: &'static str, checks: &[Check<R>], rig: &R) -> Report {
    let mut results = Vec::with_capacity(checks.len());
    for check in checks {
        let began = std::time::Instant::now();
        let running = unpanicked((check.run)(rig));
        let verdict = match tokio::time::timeout(LONGEST, running).await {
            Ok(verdict) => verdict,
            Err(_) => Err(format!("did not end within {} s", LONGEST.as_secs())),
        };
        tracing::info!(suite, clause = check.clause, kept = verdict.is_ok(), took = ?began.elapsed(), "checked");
        results.push((check.clause, verdict));
    }
    Report { suite, results }
}

/// A clean implementation with one clause broken.
pub struct Saboteur<R: ?Sized + 'static> {
    /// The clause that it breaks.
    pub clause: &'static str,
    /// What it does, in a few words.
    pub does: &'static str,
    /// Makes the rig.
    pub rig: fn() -> Box<R>,
}

impl<R: ?Sized> fmt::Debug for Saboteur<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Saboteur({}: {})", self.clause, self.does)
    }
}

/// Which clauses caught which saboteur.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The clean implementation's report.
    pub clean: Report,
    /// Saboteurs: the clause each breaks, what it does, and its report.
    pub rows: Vec<(&'static str, &'static str, Report)>,
}

impl Matrix {
    /// Runs the suite on the clean rig and on every saboteur.
    pub async fn of<R: ?Sized>(
        suite: &'static str,
        checks: &[Check<R>],
        clean: &R,
        saboteurs: &[Saboteur<R>],
    ) -> Self {
        let clean = run(suite, checks, clean).await;
        let mut rows = Vec::with_capacity(saboteurs.len());
        for saboteur in saboteurs {
            let rig = (saboteur.rig)();
            rows.push((saboteur.clause, saboteur.does, run(suite, checks, &*rig).await));
        }
        Self { clean, rows }
    }

    /// Panics unless the clean rig passes, every clause has a saboteur, and each is caught by its own clause.
    ///
    /// # Panics
    /// With the matrix, if not.
    pub fn assert_caught(&self) {
        self.clean.assert_clean();
        for (clause, verdict) in &self.clean.results {
            assert!(verdict.is_err() || self.has(clause), "{clause} has no saboteur\n{self}");
        }
        for (clause, does, report) in &self.rows {
            assert!(report.broken().contains(clause), "nobody noticed: {clause}, {does}\n{self}");
        }
    }

    fn has(&self, clause: &str) -> bool {
        self.rows.iter().any(|(broken, ..)| *broken == clause)
    }
}

impl fmt::Display for Matrix {
    /// One line per saboteur: the clause, what it does, and the clauses that caught it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suite = self.clean.suite;
        writeln!(f, "{suite}: {:<24} {:<52} caught by", "clause", "saboteur")?;
        for (clause, does, report) in &self.rows {
            writeln!(f, "{suite}: {clause:<24} {does:<52} {}", report.broken().join(" "))?;
        }
        writeln!(f, "{suite}: {:<24} {:<52} {}", "-", "clean", self.clean.broken().join(" "))
    }
}

/// Turns a panic of `running` into a verdict.
async fn unpanicked(mut running: Running<'_>) -> Verdict {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(cx))) {
        Ok(poll) => poll,
        Err(panic) => Poll::Ready(Err(format!("panicked: {}", said(&*panic)))),
    })
    .await
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("with a value that is no text")
}

/// Fails the check with a message, unless the condition holds.
macro_rules! demand {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use demand;

/// Lists checks: `checks![dyn Rig: "clause" => function, …]`, each an `async fn(&dyn Rig) -> Verdict`.
macro_rules! checks {
    ($rig:ty: $($clause:literal => $check:path),+ $(,)?) => {
        &[$($crate::testing::conformance::Check::<$rig> {
            clause: $clause,
            run: |rig| Box::pin($check(rig)),
        }),+]
    };
}
pub(crate) use checks;

/// Names what was being done when an error came that should not have come.
pub(crate) fn should<T>(what: &str, result: crate::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{what}: {:?}, {e:#}", e.kind()))
}

/// Fails unless `result` is an error of `kind`.
pub(crate) fn should_fail<T: fmt::Debug>(
    what: &str,
    kind: crate::ErrorKind,
    result: crate::Result<T>,
) -> Verdict {
    match result {
        Err(e) if e.kind() == kind => Ok(()),
        Err(e) => Err(format!("{what}: {:?} instead of {kind:?}, {e:#}", e.kind())),
        Ok(value) => Err(format!("{what}: succeeded with {value:?} instead of failing with {kind:?}")),
    }
}

/// A check that takes longer hangs; it is far above what any takes on a slow machine.
const LONGEST: Duration = Duration::from_secs(120);
