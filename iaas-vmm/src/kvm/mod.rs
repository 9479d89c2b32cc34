//! The only use of KVM's calls: one machine, its processors, its interrupt lines, and the self-test of this machine's KVM.
//!
//! Above this module nobody sees a KVM structure except those of a processor's state, and nobody makes a call by number.
//! What the kernel holds on to (guest memory, eventfds) is kept alive here for as long as it may use it.

mod bell;
mod lines;
mod machine;
mod selftest;
mod vcpu;

pub(crate) use bell::Bell;
pub(crate) use lines::Lines;
pub(crate) use machine::Machine;
pub(crate) use selftest::Ended;
pub(crate) use selftest::run_test_guest;
pub(crate) use vcpu::Exit;
pub(crate) use vcpu::Kick;
pub(crate) use vcpu::ThreadClock;
pub(crate) use vcpu::Vcpu;
pub(crate) use vcpu::kick_signal;
