//! A network port, opened in the process that uses it: batches of frames, each behind a virtio-net header.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use super::IoBuffers;

/// The bytes of the header before each frame.
///
/// # Source
/// virtio 1.2 §5.1.6, `struct virtio_net_hdr_v1`.
pub const VNET_HEADER: usize = 12;

/// What the other side may leave to us, as virtio-net feature bits say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums may be left to be filled in.
    pub checksum: bool,
    /// TCP over IPv4 segments larger than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 segments larger than the MTU.
    pub tso6: bool,
    /// UDP datagrams larger than the MTU.
    pub uso: bool,
}

/// One queue pair of a port.
///
/// # Contract
/// Frames keep their order. A frame that does not fit into its buffers is dropped and counted. Neither call blocks.
pub trait FramePort: Debug + Send {
    /// Agrees on offloads: answers those of `want` that the port can take. Before the first frame.
    fn offloads(&mut self, want: Offloads) -> Offloads;

    /// Fills up to `into.len()` buffers with a frame each and their lengths (header included) into `lens`.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize>;

    /// Sends the frames in order and says how many were taken.
    ///
    /// # Errors
    /// `WouldBlock` if none was taken.
    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize>;

    /// Readable when there may be something to receive, or room to send after `WouldBlock`.
    fn event_fd(&self) -> BorrowedFd<'_>;
}
