//! Benchmarks that run on fakes, references and your own types: one function per area, which takes criterion and a rig.
//!
//! A rig makes a fresh implementation. The programs under `benches/` run each area on the reference.

mod meter;

pub use meter::MeterRig;
pub use meter::meter;
