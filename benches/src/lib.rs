//! Benchmarks that run on fakes, references and your own types: one function per area, which takes criterion and a rig.
//!
//! A rig makes a fresh implementation. The programs under `benches/` run each area on the reference; `tests/fakes.rs` runs
//! each on the fakes, and is the shortest example of a rig.
//!
//! A criterion group is a figure, its functions `ours` and `peer` are the two sides. What criterion cannot measure, because
//! two sides must take turns or because it is no time, is printed as `HARNESS <name> ours=<x> peer=<y|->`. `cargo xtask
//! bench` reads both and prints one line per figure.

mod block;
mod control;
mod front_end;
mod meter;
mod network;
mod service;
mod state;
mod volume;

pub use block::BlockRig;
pub use block::block;
pub use block::fill;
pub use control::ControlRig;
pub use control::Written;
pub use control::control;
pub use meter::MeterRig;
pub use meter::meter;
pub use network::NetworkRig;
pub use network::network;
pub use service::Service;
pub use state::StateRig;
pub use state::state;
pub use volume::VolumeParts;

/// Whether `cargo bench` runs this program. Without it a harness only shows that it works.
fn measures() -> bool {
    std::env::args().any(|arg| arg == "--bench")
}
