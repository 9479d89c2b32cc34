//! The PC that a guest finds: where things are, and the state in which its processors start.

pub(crate) mod cpu;
mod cpuid;
pub(crate) mod layout;
pub(crate) mod registers;
