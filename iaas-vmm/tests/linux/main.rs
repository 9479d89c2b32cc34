//! An unmodified distribution kernel on our own machines. It needs a real KVM, and the guest's files.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(feature = "kvm")]

#[path = "../hypervisor/disk.rs"]
mod disk;

mod boot;
mod devices;
mod kill;
mod memory;
mod pause;
mod processors;
mod reboot;
mod rig;
