//! The volumes' benchmarks on raw files. `IAAS_BENCH_DIR` names a folder on the disk to measure.

use std::path::PathBuf;

use criterion::Criterion;
use iaas_benches::BlockRig;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_store::bench_volume;
use tempfile::TempDir;

/// One volume in a folder of its own.
#[derive(Debug)]
struct Reference(TempDir);

impl BlockRig for Reference {
    fn open(&self) -> Box<dyn BlockDevice> {
        bench_volume(self.0.path(), 1 << 30).expect("a volume in a new folder")
    }
}

fn main() {
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::block(&mut criterion, &Reference(parent));
    criterion.final_summary();
}
