//! The root of the bus: finds the function that an access is for.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use super::config::Config;
use super::config::Identity;
use super::virtio::VirtioPci;
use super::virtio::WINDOW;
use crate::arch::layout;

/// Bus 0. Function 0 of slot 0 is the host's bridge; device n is in slot n + 1.
#[derive(Debug)]
pub(crate) struct Root {
    bridge: Config,
    functions: Vec<Function>,
    /// What the configuration ports point at.
    address: Mutex<u32>,
}

#[derive(Debug)]
struct Function {
    device: Arc<Mutex<VirtioPci>>,
    /// Where its window is, or 0; a copy, so that an access finds its function without locking all of them.
    window: AtomicU64,
}

impl Root {
    pub(crate) fn new(devices: Vec<Arc<Mutex<VirtioPci>>>) -> Self {
        let bridge = Config::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [6, 0, 0],
            subsystem: (0x1af4, 0x1100),
        });
        let functions = devices.into_iter().map(|device| Function { device, window: AtomicU64::new(0) });
        Self { bridge, functions: functions.collect(), address: Mutex::new(0) }
    }

    /// Reads configuration space, memory mapped.
    pub(crate) fn read_ecam(&self, at: u64, out: &mut [u8]) {
        self.read_config(slot_of(at >> 15, at >> 12 & 7), register_of(at, 0xfff), out);
    }

    /// Writes configuration space, memory mapped.
    pub(crate) fn write_ecam(&self, at: u64, bytes: &[u8]) {
        self.write_config(slot_of(at >> 15, at >> 12 & 7), register_of(at, 0xfff), bytes);
    }

    /// Reads one of the eight configuration ports.
    pub(crate) fn read_port(&self, port: u16, out: &mut [u8]) {
        let address = *lock(&self.address);
        if port >= layout::PCI_DATA {
            match selected(address, port) {
                Some((slot, register)) => self.read_config(slot, register, out),
                None => out.fill(0xff),
            }
        } else if port == layout::PCI_ADDRESS && out.len() == 4 {
            out.copy_from_slice(&address.to_le_bytes());
        } else {
            out.fill(0xff);
        }
    }

    /// Writes one of the eight configuration ports.
    pub(crate) fn write_port(&self, port: u16, bytes: &[u8]) {
        let mut address = lock(&self.address);
        if port >= layout::PCI_DATA {
            let target = selected(*address, port);
            drop(address);
            if let Some((slot, register)) = target {
                self.write_config(slot, register, bytes);
            }
        } else if let (layout::PCI_ADDRESS, Ok(bytes)) = (port, bytes.try_into()) {
            // Only a whole address is one; smaller writes belong to other devices.
            *address = u32::from_le_bytes(bytes);
        }
    }

    /// Reads where there is no memory; says whether a device answered.
    pub(crate) fn read(&self, at: u64, out: &mut [u8]) -> bool {
        let Some((function, offset)) = self.at(at) else { return false };
        lock(&function.device).read(offset, out);
        true
    }

    /// Writes where there is no memory; says whether a device answered.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> bool {
        let Some((function, offset)) = self.at(at) else { return false };
        lock(&function.device).write(offset, bytes);
        true
    }

    fn at(&self, at: u64) -> Option<(&Function, u64)> {
        self.functions.iter().find_map(|function| {
            let window = function.window.load(Ordering::Acquire);
            let offset = at.checked_sub(window)?;
            (window != 0 && offset < u64::from(WINDOW)).then_some((function, offset))
        })
    }

    fn read_config(&self, slot: Option<usize>, register: usize, out: &mut [u8]) {
        match slot {
            Some(0) => self.bridge.read(register, out),
            Some(slot) if let Some(function) = self.functions.get(slot - 1) => {
                lock(&function.device).read_config(register, out);
            }
            // Nobody there.
            _ => out.fill(0xff),
        }
    }

    fn write_config(&self, slot: Option<usize>, register: usize, bytes: &[u8]) {
        // The bridge has nothing to set.
        let function = slot.and_then(|slot| slot.checked_sub(1)).and_then(|n| self.functions.get(n));
        if let Some(function) = function {
            let mut device = lock(&function.device);
            device.write_config(register, bytes);
            function.window.store(device.window().unwrap_or(0), Ordering::Release);
        }
    }
}

/// A slot of bus 0 with only its first function.
fn slot_of(slot: u64, function: u64) -> Option<usize> {
    usize::try_from(slot).ok().filter(|slot| *slot < SLOTS && function == 0)
}

fn register_of(at: u64, mask: u64) -> usize {
    usize::try_from(at & mask).unwrap_or(usize::MAX)
}

/// What the ports point at: slot and register.
fn selected(address: u32, port: u16) -> Option<(Option<usize>, usize)> {
    let enabled = address >> 31 != 0 && address >> 16 & 0xff == 0;
    let slot = slot_of(u64::from(address >> 11 & 31), u64::from(address >> 8 & 7));
    let register = register_of(u64::from(address), 0xfc) + usize::from(port - layout::PCI_DATA);
    enabled.then_some((slot, register))
}

/// A thread that panicked has left a device between two requests at worst.
fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Slots of a bus.
pub(crate) const SLOTS: usize = 32;
