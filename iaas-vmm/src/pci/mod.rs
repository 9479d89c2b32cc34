//! The PCI bus of a machine: configuration space by ports and by memory, windows, and the virtio transport.
//!
//! Bus 0 alone, one function per device, no bridges. Interrupts are messages (MSI-X); there is no pin.

mod config;
mod msix;
mod root;
mod status;
mod virtio;

use std::fmt::Debug;
use std::io;

use iaas_core::Result;

pub(crate) use root::Root;
pub(crate) use root::SLOTS;
pub(crate) use virtio::NOTIFY;
pub(crate) use virtio::NOTIFY_STRIDE;
pub(crate) use virtio::VirtioPci;

/// What a message-signalled interrupt writes, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MsiMessage {
    pub(crate) address_low: u32,
    pub(crate) address_high: u32,
    pub(crate) data: u32,
}

/// The wires from a device to the machine around it.
pub(crate) trait Wiring: Debug + Send + Sync {
    /// From now on, interrupt `vector` sends `message`.
    fn route(&self, vector: usize, message: MsiMessage) -> Result<()>;

    /// Interrupts.
    fn raise(&self, vector: usize) -> io::Result<()>;

    /// The device's window is now at `window`, or nowhere. Doorbells that cannot be placed there cost time alone: the
    /// guest's write then reaches the device by itself.
    fn place_doorbells(&self, window: Option<u64>);

    /// Gives the device a turn soon.
    fn wake(&self);
}

#[cfg(test)]
mod tests;
