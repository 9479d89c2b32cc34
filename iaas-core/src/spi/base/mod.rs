//! The contracts, kept for you: a hypervisor or a storage of your own is a few plain methods.
//!
//! | you write | and get | which is |
//! |---|---|---|
//! | [`Machines`]: check, start, stop, kill, look | [`hypervisor()`] | a [`Hypervisor`](super::hypervisor::Hypervisor) |
//! | [`Disks`]: check, make, remove, open, and a [`Disk`] | [`storage()`] | a pool, access to it and an opener |
//!
//! What the contracts ask of every provider is done here: old leaders are refused, things carry tags and revisions, the same
//! wish twice makes one thing, one call at a time acts on a thing, what a crash left half-made is finished or removed, and
//! everything is remembered in the folder that you give. Your methods may block; they are not called on the threads of the
//! runtime, and a panic in one is an error of that call only.
//!
//! An [`Authorizer`](super::authorizer::Authorizer) has two methods and needs no help: keep a
//! [`Rbac`](crate::security::rbac::Rbac) inside for the roles, and add your rule to its decisions.
//!
//! `testing::conformance::own` (feature `conformance`) proves what you wrote with the suites of the contracts.
//! `examples/bring_your_own.rs` has one of each.

mod disks;
mod fence;
mod machines;
mod maker;
mod notes;
mod provider;

pub use disks::Disk;
pub use disks::Disks;
pub use disks::Storage;
pub use disks::storage;
pub use machines::Machines;
pub use machines::Power;
pub use machines::hypervisor;

pub(crate) use fence::Leaders;
pub(crate) use provider::changes;
