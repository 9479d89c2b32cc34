//! Devices of the PC itself: the serial port and the power switch.

pub(crate) mod power;
pub(crate) mod serial;
