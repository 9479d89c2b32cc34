//! The control plane's benchmark: the whole of it, on fakes that answer at once and the embedded durable store.
//! `IAAS_BENCH_DIR` names a folder on the disk to measure.

use std::path::PathBuf;
use std::sync::Arc;

use criterion::Criterion;
use iaas_benches::ControlRig;
use iaas_benches::Written;
use iaas_core::Cloud;
use iaas_core::SystemClock;
use iaas_core::cloud::CloudBuilder;
use iaas_core::security::rbac::Rbac;
use iaas_core::store::RedbStore;
use iaas_core::testing::fake;

/// One store for the whole run.
#[derive(Debug)]
struct Reference(Arc<RedbStore>);

impl ControlRig for Reference {
    fn cloud(&self) -> CloudBuilder {
        let world = fake::World::new(Arc::new(SystemClock::new()));
        let site = fake::Site::new(&world);
        Cloud::builder()
            .store(self.0.clone())
            .pool(site.pool, site.volumes())
            .fabric(site.fabric, site.network())
            .host(site.host())
            .authorizer(Arc::new(Rbac::new()))
            .meter(Arc::new(fake::FakeMeter::open(&world)))
    }

    fn written(&self) -> Option<Written> {
        let counters = self.0.counters();
        Some(Written { commits: counters.commits, synced_bytes: counters.synced_bytes })
    }
}

fn main() {
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let store = RedbStore::open(parent.path().join("cloud.redb")).expect("a store in a new folder");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::control(&mut criterion, &Reference(Arc::new(store)));
    criterion.final_summary();
}
