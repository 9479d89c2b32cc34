//! Ports: how frames come to the switch and go from it.

pub mod memory;
pub mod opener;
pub mod ring;
pub(crate) mod socket;

pub use memory::MemoryPort;
pub use opener::RingOpener;
pub use ring::RingPort;
