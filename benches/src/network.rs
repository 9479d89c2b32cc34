//! Frames through a packet engine.

use std::fmt::Debug;

use criterion::Criterion;
use criterion::Throughput;

/// Forwards frames between two ports of one subnet.
pub trait NetworkRig: Debug {
    /// Forwards a batch of frames of 64 bytes and says how many arrived.
    fn forward(&mut self) -> u64;
}

/// Measures frames of 64 bytes between two ports in memory.
pub fn network(criterion: &mut Criterion, rig: &mut impl NetworkRig) {
    let batch = rig.forward();
    let mut group = criterion.benchmark_group("net");
    group.throughput(Throughput::Elements(batch.max(1)));
    group.bench_function("mem.64b", |b| b.iter(|| rig.forward()));
    group.finish();
}
