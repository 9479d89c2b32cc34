//! Frames through a packet engine.

use std::fmt::Debug;

use criterion::Criterion;
use criterion::Throughput;

/// Forwards frames between two ports of one subnet.
pub trait NetworkRig: Debug {
    /// Forwards a batch of frames of 64 bytes and says how many arrived.
    fn forward(&mut self) -> u64;
}

/// Measures `net.mem.64b`: frames of 64 bytes per second between two ports in memory.
///
/// # Panics
/// If no frame arrives.
pub fn network(criterion: &mut Criterion, rig: &mut impl NetworkRig) {
    let batch = rig.forward();
    assert!(batch > 0, "frames arrive");
    let mut group = criterion.benchmark_group("net.mem.64b");
    group.throughput(Throughput::Elements(batch));
    group.bench_function("ours", |b| b.iter(|| rig.forward()));
    group.finish();
}
