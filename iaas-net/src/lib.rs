//! The packet engine of the IaaS SDK.

pub mod pipeline;
pub mod port;
mod program;
mod service;
mod sys;
pub mod topology;
mod wire;

pub use pipeline::Pipeline;
pub use port::RingOpener;
pub use program::Program;
pub use topology::ROUTER_MAC;
pub use topology::Topology;
