//! The packet engine of the IaaS SDK.

pub mod pipeline;
mod program;
mod service;
pub mod topology;
mod wire;

pub use pipeline::Pipeline;
pub use program::Program;
pub use topology::ROUTER_MAC;
pub use topology::Topology;
