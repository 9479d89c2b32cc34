//! Benchmarks that run on fakes, references and your own types: one function per area, which takes criterion and a rig.
//!
//! A rig makes a fresh implementation. The programs under `benches/` run each area on the reference.

mod block;
mod meter;
mod network;
mod state;

pub use block::BlockRig;
pub use block::block;
pub use meter::MeterRig;
pub use meter::meter;
pub use network::NetworkRig;
pub use network::network;
pub use state::StateRig;
pub use state::state;
