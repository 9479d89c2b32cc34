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

/// Measures one durable commit of eight records, 64 of them waiting together, a read, and a scan of a thousand entries.
pub fn state(criterion: &mut Criterion, rig: &impl StateRig) {
    let Ok(runtime) = Runtime::new() else { return };
    let store = rig.open();
    let lead = runtime.block_on(store.lead(Uuid::now_v7(), Duration::from_secs(3600), Epoch(0)));
    let Ok(Some(lead)) = lead else { return };
    let mut next = 0_u64;
    let mut key = move || {
        next += 1;
        Bytes::from(format!("r/bench/{next:016}"))
    };
    let mut writes = move || -> (Vec<Check>, Vec<Write>) {
        let keys: Vec<_> = (0..8).map(|_| key()).collect();
        let checks = keys.iter().cloned().map(Check::Absent).collect();
        (checks, keys.into_iter().map(|k| Write::Put(k, Bytes::from(vec![7; 400]))).collect())
    };
    let mut group = criterion.benchmark_group("state");
    group.throughput(Throughput::Elements(1));
    group.bench_function("commit.one", |b| {
        b.iter(|| {
            let (checks, writes) = writes();
            runtime.block_on(store.commit(&lead, checks, writes))
        });
    });
    group.throughput(Throughput::Elements(64));
    group.bench_function("commit.64", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let all: Vec<_> = (0..64)
                    .map(|_| {
                        let (store, lead, (checks, writes)) = (Arc::clone(&store), lead.clone(), writes());
                        tokio::spawn(async move { store.commit(&lead, checks, writes).await })
                    })
                    .collect();
                for one in all {
                    let _ = one.await;
                }
            });
        });
    });
    group.throughput(Throughput::Elements(1000));
    group.bench_function("scan.1000", |b| b.iter(|| runtime.block_on(store.scan(b"r/bench/", None, 1000))));
    group.finish();
}
