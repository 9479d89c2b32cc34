//! The configuration space of one function: 256 bytes, and which of their bits a guest can change.

/// A function's registers.
///
/// # Source
/// PCI Local Bus 3.0 §6.1, §6.7.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes.
    next: usize,
    /// The pointer that will name it.
    link: usize,
}

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    /// Class, subclass, programming interface.
    pub(super) class: [u8; 3],
    pub(super) subsystem: (u16, u16),
}

impl Config {
    pub(super) fn new(identity: Identity) -> Self {
        let mut config =
            Self { bytes: [0; SIZE], writable: [0; SIZE], next: FIRST_CAPABILITY, link: CAPABILITIES };
        let Identity { vendor, device, class: [class, subclass, interface], subsystem } = identity;
        config.put(0, &vendor.to_le_bytes());
        config.put(2, &device.to_le_bytes());
        // Revision 1: no transitional device.
        config.put(8, &[1, interface, subclass, class]);
        config.put(0x2c, &subsystem.0.to_le_bytes());
        config.put(0x2e, &subsystem.1.to_le_bytes());
        config.allow(COMMAND, &(MEMORY_SPACE | BUS_MASTER | INTX_OFF).to_le_bytes());
        // The interrupt line is a scratch register.
        config.allow(0x3c, &[0xff]);
        config
    }

    /// Gives the function a window of `size` bytes, a power of two, at `at`, as its BAR 0.
    pub(super) fn with_window(mut self, at: u32, size: u32) -> Self {
        self.put(BAR_0, &at.to_le_bytes());
        self.allow(BAR_0, &(!(size - 1)).to_le_bytes());
        self
    }

    /// Adds a capability: its bytes behind the link, and which of their bits can be written. Gives its place.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        self.put(self.link, &[u8::try_from(at).unwrap_or(0)]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        // Status: there are capabilities.
        self.put(STATUS, &[1 << 4]);
        at
    }

    pub(super) fn read(&self, at: usize, out: &mut [u8]) {
        for (n, byte) in out.iter_mut().enumerate() {
            *byte = self.bytes.get(at + n).copied().unwrap_or(0xff);
        }
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) {
        for (n, new) in bytes.iter().enumerate() {
            let places = (self.bytes.get_mut(at + n), self.writable.get(at + n));
            if let (Some(byte), Some(mask)) = places {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    pub(super) fn word(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn long(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the window is, if the function answers there.
    pub(super) fn window(&self) -> Option<u64> {
        let on = self.word(COMMAND) & MEMORY_SPACE != 0;
        let at = u64::from(self.long(BAR_0));
        (on && at != 0).then_some(at)
    }

    /// Whether the function may read and write memory.
    pub(super) fn is_master(&self) -> bool {
        self.word(COMMAND) & BUS_MASTER != 0
    }

    /// Puts bytes where our own code says, inside the space.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        if let Some(room) = self.writable.get_mut(at..at + bits.len()) {
            room.copy_from_slice(bits);
        }
    }
}

const SIZE: usize = 256;
const COMMAND: usize = 4;
const STATUS: usize = 6;
const BAR_0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_OFF: u16 = 1 << 10;
