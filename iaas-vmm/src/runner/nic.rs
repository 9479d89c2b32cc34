//! What a NIC has moved, counted between the guest and its port.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;

/// Frames and bytes of a NIC as its guest counts them: from the Ethernet header to the end of the payload.
#[derive(Debug, Default)]
pub struct NicCounters {
    /// Frames that the guest sent.
    pub tx_packets: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Frames that the guest was given.
    pub rx_packets: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Frames from the port that no NIC can take: segments that were never agreed on, or broken headers.
    pub refused: AtomicU64,
}

impl NicCounters {
    /// Counts a frame of `len` bytes that the guest sent.
    pub fn sent(&self, len: usize) {
        count(&self.tx_packets, &self.tx_bytes, len);
    }

    /// Counts a frame of `len` bytes that the guest was given.
    pub fn received(&self, len: usize) {
        count(&self.rx_packets, &self.rx_bytes, len);
    }
}

/// A port that counts what goes through it.
#[derive(Debug)]
pub struct Counted {
    port: Box<dyn FramePort>,
    counters: Arc<NicCounters>,
}

impl Counted {
    /// Counts what goes through `port`.
    pub fn new(port: Box<dyn FramePort>) -> Self {
        Self { port, counters: Arc::default() }
    }

    /// The counts.
    pub fn counters(&self) -> Arc<NicCounters> {
        self.counters.clone()
    }
}

impl FramePort for Counted {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        self.port.offloads(want)
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let count = self.port.recv(into, lens)?;
        for len in lens.iter().take(count) {
            self.counters.received(usize::try_from(*len).unwrap_or(0).saturating_sub(VNET_HEADER));
        }
        Ok(count)
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        let taken = self.port.send(frames)?;
        for frame in frames.iter().take(taken) {
            self.counters.sent(frame.len().saturating_sub(VNET_HEADER));
        }
        Ok(taken)
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.port.event_fd()
    }
}

fn count(packets: &AtomicU64, bytes: &AtomicU64, len: usize) {
    packets.fetch_add(1, Ordering::Relaxed);
    bytes.fetch_add(u64::try_from(len).unwrap_or(0), Ordering::Relaxed);
}
