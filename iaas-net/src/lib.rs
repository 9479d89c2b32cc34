//! The packet engine of the IaaS SDK.

mod folder;
pub mod pipeline;
pub mod port;
mod program;
mod provider;
mod service;
pub mod switch;
mod sys;
pub mod topology;
mod wire;

pub use pipeline::Pipeline;
pub use port::RingOpener;
pub use program::Program;
pub use provider::HostNetwork;
pub use provider::Settings;
pub use switch::role::SwitchRole;
pub use topology::ROUTER_MAC;
pub use topology::Topology;
