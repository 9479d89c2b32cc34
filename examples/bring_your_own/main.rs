//! Parts of your own: an authorizer, a hypervisor and a storage, each proven by the public suite of its contract.
//!
//! They are written from the documentation of `iaas_core::spi` alone; `iaas_core::spi::base` keeps the common clauses.

mod allow_list;
mod ram;
mod rigs;
mod supervisor;

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iaas_core::testing::conformance::Report;
use iaas_core::testing::conformance::authorizer;
use iaas_core::testing::conformance::hypervisor;
use iaas_core::testing::conformance::volume_access;
use iaas_core::testing::conformance::volume_pool;

#[tokio::main]
async fn main() {
    show(&authorizer::run(&allow_list::AllowList::default()).await);
    show(&volume_pool::run(&rigs::Pools::default()).await);
    show(&volume_access::run(&rigs::Accesses::default()).await);
    let report = hypervisor::run(&rigs::Supervisors::default()).await;
    rigs::clear();
    show(&report);
    println!("OK");
}

/// Prints a report, and ends the program if a clause is broken.
fn show(report: &Report) {
    println!("{report}");
    report.assert_clean();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
