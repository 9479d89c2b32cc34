//! What a processor finds at I/O ports and where there is no memory.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iaas_core::Result;

use crate::arch::layout;
use crate::device::power;
use crate::device::power::Power;
use crate::device::power::Wish;
use crate::device::serial::Serial;
use crate::kvm::Machine;
use crate::pci::Root;

/// The devices of the PC, found by address. Locks are taken one at a time.
#[derive(Debug)]
pub(super) struct Bus {
    machine: Arc<Machine>,
    serial: Mutex<Serial>,
    power: Mutex<Power>,
    pci: Root,
}

impl Bus {
    pub(super) fn new(machine: Arc<Machine>, serial: Serial, pci: Root) -> Self {
        Self { machine, serial: Mutex::new(serial), power: Mutex::default(), pci }
    }

    pub(super) fn port_out(&self, port: u16, bytes: &[u8]) -> Option<Wish> {
        if let Some(wish) = power::reset_wish(port, bytes) {
            return Some(wish);
        }
        match (port, bytes) {
            (SERIAL..=SERIAL_END, [value]) => {
                lock(&self.serial).write(serial_register(port), *value);
                None
            }
            (layout::PCI_ADDRESS..=PCI_END, _) => {
                self.pci.write_port(port, bytes);
                None
            }
            _ if Power::has(port) => {
                let mut power = lock(&self.power);
                let wish = power.write(port, bytes);
                // Under the lock, so that the last change decides.
                self.show(&power);
                wish
            }
            // Nobody there: the bytes are lost.
            _ => None,
        }
    }

    pub(super) fn port_in(&self, port: u16, bytes: &mut [u8]) {
        match port {
            SERIAL..=SERIAL_END => {
                bytes.fill(0xff);
                if let [value] = bytes {
                    *value = lock(&self.serial).read(serial_register(port));
                }
            }
            layout::PCI_ADDRESS..=PCI_END => self.pci.read_port(port, bytes),
            _ if Power::has(port) => lock(&self.power).read(port, bytes),
            _ => bytes.fill(0xff),
        }
    }

    pub(super) fn memory_out(&self, at: u64, bytes: &[u8]) {
        if (layout::ECAM..layout::ECAM + layout::ECAM_SIZE).contains(&at) {
            self.pci.write_ecam(at - layout::ECAM, bytes);
        } else if !self.pci.write(at, bytes) {
            tracing::trace!(at, "a write to nothing");
        }
    }

    pub(super) fn memory_in(&self, at: u64, bytes: &mut [u8]) {
        if (layout::ECAM..layout::ECAM + layout::ECAM_SIZE).contains(&at) {
            self.pci.read_ecam(at - layout::ECAM, bytes);
        } else if !self.pci.read(at, bytes) {
            bytes.fill(0xff);
        }
    }

    /// Presses the power button.
    pub(super) fn press(&self) -> Result<()> {
        let mut power = lock(&self.power);
        power.press();
        self.machine.set_pin(layout::SCI_PIN, power.interrupts())
    }

    /// Types on the serial port.
    pub(super) fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).type_in(bytes)
    }

    fn show(&self, power: &Power) {
        if let Err(error) = self.machine.set_pin(layout::SCI_PIN, power.interrupts()) {
            tracing::warn!(%error, "the power button's interrupt does not work");
        }
    }
}

fn serial_register(port: u16) -> u8 {
    u8::try_from(port - SERIAL).unwrap_or(u8::MAX)
}

/// A thread that panicked ends the machine; until then its devices are as they were between two accesses.
fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

const SERIAL: u16 = layout::SERIAL_PORT;
const SERIAL_END: u16 = SERIAL + 7;
const PCI_END: u16 = layout::PCI_ADDRESS + 7;
