//! Who may, and the proof of it.

pub mod audit;
pub mod rbac;
