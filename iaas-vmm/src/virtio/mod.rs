//! Virtio devices, written once over `virtio-queue`, and the transports that bring them to a guest.
//!
//! A device never trusts its driver: a malformed chain fails that device, never the process.

pub mod block;
pub mod chain;
pub mod device;
pub mod net;
pub mod rng;
pub mod vhost_user;
