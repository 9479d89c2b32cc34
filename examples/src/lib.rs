//! Programs that compose the SDK, and the smallest whole one:
//!
//! ```
#![doc = include_str!("../smallest.rs")]
//! ```
//!
//! It runs on the in-memory fakes, so that it runs anywhere; [`machine::open`] composes the same cloud from the reference
//! implementations of this machine, as `quickstart` uses it.

pub mod chaos;
pub mod gaps;
pub mod guest;
pub mod machine;
pub mod memory;
pub mod report;
pub mod supervise;
pub mod trials;
