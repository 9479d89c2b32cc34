//! MSI-X: a table of messages, each with a mask, and the interrupts that wait behind a mask.

use std::sync::Arc;

use iaas_core::Result;

use super::MsiMessage;
use super::Wiring;

/// The table of one function.
///
/// # Source
/// PCI Local Bus 3.0 §6.8.2.
#[derive(Debug)]
pub(super) struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
    wiring: Arc<dyn Wiring>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    pending: bool,
}

impl Msix {
    pub(super) fn new(count: usize, wiring: Arc<dyn Wiring>) -> Self {
        // Reset leaves every entry masked.
        let entry = Entry { message: MsiMessage::default(), masked: true, pending: false };
        Self { entries: vec![entry; count], enabled: false, masked: false, wiring }
    }

    pub(super) fn count(&self) -> usize {
        self.entries.len()
    }

    /// Takes the capability's control word.
    pub(super) fn control(&mut self, word: u16) -> Result<()> {
        self.enabled = word & ENABLE != 0;
        self.masked = word & MASK_ALL != 0;
        (0..self.entries.len()).try_for_each(|vector| self.settle(vector))
    }

    /// Interrupts, or notes it until the mask is lifted.
    pub(super) fn raise(&mut self, vector: u16) {
        let vector = usize::from(vector);
        let open = self.is_open(vector);
        let Some(entry) = self.entries.get_mut(vector) else { return };
        if !open {
            entry.pending |= self.enabled;
        } else if let Err(error) = self.wiring.raise(vector) {
            tracing::warn!(%error, "the guest could not be interrupted");
        }
    }

    pub(super) fn read_table(&self, at: usize, out: &mut [u8]) {
        for (n, byte) in out.iter_mut().enumerate() {
            *byte = self.byte(at + n);
        }
    }

    /// Takes a write of aligned 4 or 8 bytes, as the specification demands; others are ignored.
    pub(super) fn write_table(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        if !matches!(bytes.len(), 4 | 8) || !at.is_multiple_of(bytes.len()) {
            return Ok(());
        }
        let vector = at / ENTRY;
        let Some(entry) = self.entries.get_mut(vector) else { return Ok(()) };
        for (n, long) in bytes.chunks_exact(4).enumerate() {
            let Ok(value) = long.try_into().map(u32::from_le_bytes) else { continue };
            match at % ENTRY / 4 + n {
                0 => entry.message.address_low = value & !3,
                1 => entry.message.address_high = value,
                2 => entry.message.data = value,
                _ => entry.masked = value & 1 != 0,
            }
        }
        self.settle(vector)
    }

    pub(super) fn read_pending(&self, at: usize, out: &mut [u8]) {
        for (n, byte) in out.iter_mut().enumerate() {
            let bit = |bit: usize| self.entries.get((at + n) * 8 + bit).is_some_and(|entry| entry.pending);
            *byte = (0..8).fold(0, |byte, n| byte | u8::from(bit(n)) << n);
        }
    }

    fn is_open(&self, vector: usize) -> bool {
        self.enabled && !self.masked && self.entries.get(vector).is_some_and(|entry| !entry.masked)
    }

    /// Tells the machine of an entry that is open, and lets out what waited behind its mask.
    fn settle(&mut self, vector: usize) -> Result<()> {
        if !self.is_open(vector) {
            return Ok(());
        }
        let Some(entry) = self.entries.get_mut(vector) else { return Ok(()) };
        self.wiring.route(vector, entry.message)?;
        if std::mem::take(&mut entry.pending) {
            self.raise(u16::try_from(vector).unwrap_or(u16::MAX));
        }
        Ok(())
    }

    fn byte(&self, at: usize) -> u8 {
        let Some(entry) = self.entries.get(at / ENTRY) else { return 0 };
        let MsiMessage { address_low, address_high, data } = entry.message;
        let longs = [address_low, address_high, data, u32::from(entry.masked)];
        let long = longs.get(at % ENTRY / 4).copied().unwrap_or(0);
        long.to_le_bytes().get(at % 4).copied().unwrap_or(0)
    }
}

/// Bytes of an entry.
pub(super) const ENTRY: usize = 16;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
