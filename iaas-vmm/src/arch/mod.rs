//! What depends on the processor's architecture. One so far.

pub(crate) mod x86_64;

pub(crate) use x86_64::cpu::Entry;
pub(crate) use x86_64::cpu::set_up;
pub(crate) use x86_64::layout;
