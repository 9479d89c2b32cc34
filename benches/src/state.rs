//! Commits, reads and scans of a state store.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::Criterion;
use criterion::Throughput;
use iaas_core::Epoch;
use iaas_core::spi::state_store::Check;
use iaas_core::spi::state_store::StateStore;
use iaas_core::spi::state_store::Write;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Opens an empty store.
pub trait StateRig: Debug {
    /// A new, empty store.
    fn open(&self) -> Arc<dyn StateStore>;
}

/// Measures a store whose entries have 400 bytes.
///
/// * `state.commit.one`: commits per second of eight records each, one after the other.
/// * `state.commit.64`: the same when 64 callers wait at a time.
/// * `state.scan.1000`: entries per second of scans of a thousand.
///
/// # Panics
/// If the store fails.
pub fn state(criterion: &mut Criterion, rig: &impl StateRig) {
    let runtime = Runtime::new().expect("a runtime");
    let store = rig.open();
    let lead = runtime.block_on(store.lead(Uuid::now_v7(), Duration::from_secs(3600), Epoch(0)));
    let lead = lead.expect("a store").expect("nobody else leads");
    let mut next = 0_u64;
    let mut writes = move || -> (Vec<Check>, Vec<Write>) {
        let keys: Vec<_> = (next..next + 8).map(|n| Bytes::from(format!("r/bench/{n:016}"))).collect();
        next += 8;
        let checks = keys.iter().cloned().map(Check::Absent).collect();
        (checks, keys.into_iter().map(|k| Write::Put(k, Bytes::from(vec![7; 400]))).collect())
    };
    figure(criterion, "state.commit.one", 1, || {
        let (checks, writes) = writes();
        runtime.block_on(store.commit(&lead, checks, writes)).expect("a commit");
    });
    figure(criterion, "state.commit.64", 64, || {
        runtime.block_on(async {
            let all: Vec<_> = (0..64)
                .map(|_| {
                    let (store, lead, (checks, writes)) = (Arc::clone(&store), lead.clone(), writes());
                    tokio::spawn(async move { store.commit(&lead, checks, writes).await })
                })
                .collect();
            for one in all {
                one.await.expect("a caller ends").expect("a commit");
            }
        });
    });
    // However few commits were measured, there is something to scan.
    for _ in 0..125 {
        let (checks, writes) = writes();
        runtime.block_on(store.commit(&lead, checks, writes)).expect("a commit");
    }
    figure(criterion, "state.scan.1000", 1000, || {
        let found = runtime.block_on(store.scan(b"r/bench/", None, 1000)).expect("a scan");
        assert_eq!(found.0.len(), 1000);
    });
}

/// A rate: `each` does `amount` at a time.
fn figure(criterion: &mut Criterion, name: &str, amount: u64, mut each: impl FnMut()) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(amount));
    group.bench_function("ours", |b| b.iter(&mut each));
    group.finish();
}
