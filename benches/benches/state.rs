//! The state stores' benchmarks on the embedded store. `IAAS_BENCH_DIR` names a folder on the disk to measure.

use std::path::PathBuf;
use std::sync::Arc;

use criterion::Criterion;
use iaas_benches::StateRig;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::RedbStore;
use tempfile::TempDir;

/// One store in a folder of its own.
#[derive(Debug)]
struct Reference(TempDir);

impl StateRig for Reference {
    fn open(&self) -> Arc<dyn StateStore> {
        Arc::new(RedbStore::open(self.0.path().join("cloud.redb")).expect("a store in a new folder"))
    }
}

fn main() {
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::state(&mut criterion, &Reference(parent));
    criterion.final_summary();
}
