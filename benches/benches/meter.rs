//! The meter's benchmarks on the reference. `IAAS_BENCH_DIR` names a folder on the disk to measure.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use criterion::Criterion;
use iaas_benches::MeterRig;
use iaas_core::spi::meter::MeterSink;
use iaas_meter::Meter;
use tempfile::TempDir;

/// Each meter in a folder of its own, gone when the rig is.
#[derive(Debug)]
struct Reference {
    parent: TempDir,
    made: AtomicU32,
}

impl MeterRig for Reference {
    fn fresh(&self) -> Arc<dyn MeterSink> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let folder = self.parent.path().join(format!("meter-{number}"));
        Arc::new(Meter::open(folder).expect("a meter in a new folder"))
    }
}

fn main() {
    // The system's temporary folder is often memory, where an fsync costs nothing; the build's seldom is.
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::meter(&mut criterion, &Reference { parent, made: AtomicU32::new(0) });
    criterion.final_summary();
}
