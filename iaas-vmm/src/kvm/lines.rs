//! The wires of one PCI device: an eventfd per message-signalled interrupt, and one that its doorbells ring.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use iaas_core::Result;

use super::Bell;
use super::Machine;
use crate::pci::MsiMessage;
use crate::pci::Wiring;

/// The wires of a device on KVM.
#[derive(Debug)]
pub(crate) struct Lines {
    machine: Arc<Machine>,
    vectors: Vec<(u32, Bell)>,
    doorbell: Bell,
    /// Offsets of the doorbells from the start of the device's window.
    offsets: Vec<u64>,
    rung_at: Mutex<Option<u64>>,
}

impl Lines {
    /// Wires for `vectors` interrupts, and doorbells at `offsets` that all ring `doorbell`.
    pub(crate) fn new(
        machine: &Arc<Machine>,
        vectors: usize,
        doorbell: Bell,
        offsets: Vec<u64>,
    ) -> Result<Self> {
        let vectors = (0..vectors).map(|_| {
            let bell = Bell::new()?;
            Ok((machine.connect_message(&bell)?, bell))
        });
        let vectors = vectors.collect::<Result<_>>()?;
        Ok(Self { machine: machine.clone(), vectors, doorbell, offsets, rung_at: Mutex::new(None) })
    }
}

impl Wiring for Lines {
    fn route(&self, vector: usize, message: MsiMessage) -> Result<()> {
        let Some((gsi, _)) = self.vectors.get(vector) else { return Ok(()) };
        self.machine.route(*gsi, message)
    }

    fn raise(&self, vector: usize) -> io::Result<()> {
        self.vectors.get(vector).map_or(Ok(()), |(_, bell)| bell.ring())
    }

    fn place_doorbells(&self, window: Option<u64>) {
        let mut at = self.rung_at.lock().unwrap_or_else(PoisonError::into_inner);
        if *at == window {
            return;
        }
        let old = std::mem::replace(&mut *at, window);
        for offset in &self.offsets {
            if let Some(old) = old {
                // Fails for one that could not be placed there.
                let _ = self.machine.disconnect_doorbell(&self.doorbell, old.saturating_add(*offset));
            }
        }
        for offset in &self.offsets {
            let placed =
                window.map(|new| self.machine.connect_doorbell(&self.doorbell, new.saturating_add(*offset)));
            if let Some(Err(error)) = placed {
                tracing::debug!(%error, "a doorbell lies where another is");
            }
        }
    }

    fn wake(&self) {
        if let Err(error) = self.doorbell.ring() {
            tracing::warn!(%error, "a device's doorbell could not be rung");
        }
    }
}
