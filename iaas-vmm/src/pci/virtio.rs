//! The virtio transport over PCI: one for every device.
//!
//! Everything that a guest can reach of a device is here: registers, status, queues, interrupts. The device behind it sees
//! queues that were checked, and only while its driver runs it. What no driver does brings the device to NEEDS_RESET, tells
//! the driver so, and touches nothing else.

use std::sync::Arc;

use iaas_core::Error;
use iaas_core::Result;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Wiring;
use super::config::Config;
use super::config::Identity;
use super::msix;
use super::msix::Msix;
use super::status::Status;
use super::status::Step;
use crate::virtio::chain::Fault;
use crate::virtio::device::Next;
use crate::virtio::device::VirtioDevice;

/// A device with its transport.
#[derive(Debug)]
pub(crate) struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    wiring: Arc<dyn Wiring>,
    config: Config,
    msix: Msix,
    /// Where the capabilities are whose writes mean something.
    msix_at: usize,
    access_at: usize,
    status: Status,
    /// Which half of the features is shown, and which is taken.
    shown: u32,
    taken: u32,
    chosen: u64,
    selected: u16,
    rings: Vec<Ring>,
    /// The queues of a driver that runs the device; else none.
    queues: Vec<Queue>,
    config_vector: u16,
    isr: u8,
    resetting: bool,
    fault: Option<Fault>,
}

/// A queue as its driver has set it up so far.
#[derive(Clone, Copy, Debug)]
struct Ring {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    /// Addresses of descriptors, driver area, device area.
    areas: [u64; 3],
}

impl Ring {
    fn new(max: u16) -> Self {
        Self { max, size: max, vector: NO_VECTOR, enabled: false, areas: [0; 3] }
    }

    /// The queue, if it makes sense.
    fn queue(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Result<Queue, Fault> {
        let mut queue = Queue::new(self.max).map_err(Fault::ring)?;
        queue.set_event_idx(event_idx);
        if !self.enabled {
            return Ok(queue);
        }
        let [descriptors, driver, device] = self.areas.map(GuestAddress);
        queue.try_set_size(self.size).map_err(Fault::ring)?;
        queue.try_set_desc_table_address(descriptors).map_err(Fault::ring)?;
        queue.try_set_avail_ring_address(driver).map_err(Fault::ring)?;
        queue.try_set_used_ring_address(device).map_err(Fault::ring)?;
        queue.set_ready(true);
        if queue.is_valid(memory) { Ok(queue) } else { Err(Fault("a queue outside of guest memory".into())) }
    }
}

impl VirtioPci {
    /// Puts `device` behind a window at `window`. `wiring` has an interrupt for each queue and one more.
    ///
    /// # Errors
    /// `Invalid`: a device with queues that the transport cannot carry.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        wiring: Arc<dyn Wiring>,
        window: u32,
    ) -> Result<Self> {
        let sizes = device.queue_sizes();
        let fine = |size: &u16| size.is_power_of_two() && *size <= 32_768;
        if sizes.is_empty() || sizes.len() > QUEUES_MAX || !sizes.iter().all(fine) {
            return Err(Error::invalid("a device needs 1 to 64 queues with powers of two as their sizes"));
        }
        let rings: Vec<Ring> = sizes.iter().map(|size| Ring::new(*size)).collect();
        let msix = Msix::new(rings.len() + 1, wiring.clone());
        let config = Config::new(identity(device.kind())).with_window(window, WINDOW);
        let mut this = Self {
            device,
            memory,
            wiring,
            config,
            msix,
            msix_at: 0,
            access_at: 0,
            status: Status::default(),
            shown: 0,
            taken: 0,
            chosen: 0,
            selected: 0,
            rings,
            queues: Vec::new(),
            config_vector: NO_VECTOR,
            isr: 0,
            resetting: false,
            fault: None,
        };
        this.add_capabilities();
        Ok(this)
    }

    fn add_capabilities(&mut self) {
        let last = u16::try_from(self.msix.count() - 1).unwrap_or(0);
        let mut body = last.to_le_bytes().to_vec();
        // Both tables lie in BAR 0, whose number is the low bits.
        body.extend(TABLE.to_le_bytes());
        body.extend(PENDING.to_le_bytes());
        self.msix_at = self.config.add_capability(CAP_MSIX, &body, &[0, 0xc0]);
        let queues = u32::try_from(self.rings.len()).unwrap_or(0);
        for (kind, at, len) in [(1, COMMON, 64), (3, ISR, 1), (4, DEVICE, 0x1000)] {
            self.config.add_capability(CAP_VENDOR, &structure(16, kind, at, len), &[]);
        }
        let mut notify = structure(20, 2, NOTIFY, queues * NOTIFY_STRIDE);
        notify.extend(NOTIFY_STRIDE.to_le_bytes());
        self.config.add_capability(CAP_VENDOR, &notify, &[]);
        let mut access = structure(20, 5, 0, 0);
        access.extend([0; 4]);
        // BAR, offset, length and data are the driver's.
        let writable = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
        self.access_at = self.config.add_capability(CAP_VENDOR, &access, &writable);
    }

    /// Where the device answers, if it does.
    pub(crate) fn window(&self) -> Option<u64> {
        self.config.window()
    }

    /// Why the device no longer works, if so.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Reads configuration space.
    pub(crate) fn read_config(&mut self, at: usize, out: &mut [u8]) {
        if let Some((offset, len)) = self.accessed(at, out.len()) {
            let mut data = [0; 4];
            self.read(offset, data.get_mut(..len).unwrap_or_default());
            self.config.put(self.access_at + 16, &data);
        }
        self.config.read(at, out);
    }

    /// Writes configuration space.
    pub(crate) fn write_config(&mut self, at: usize, bytes: &[u8]) {
        self.config.write(at, bytes);
        if let Some((offset, len)) = self.accessed(at, bytes.len()) {
            let data = self.config.long(self.access_at + 16).to_le_bytes();
            self.write(offset, data.get(..len).unwrap_or_default());
        }
        let control = self.config.word(self.msix_at + 2);
        let routed = self.msix.control(control);
        self.survive(routed);
        self.wiring.place_doorbells(self.window());
        // It may have become a master, and have had to wait for that.
        self.wiring.wake();
    }

    /// Whether an access to configuration space is one to the window (virtio 1.2 §4.1.4.9), and to which part of it.
    fn accessed(&self, at: usize, len: usize) -> Option<(u64, usize)> {
        let data = self.access_at + 16;
        if at >= data + 4 || at + len <= data {
            return None;
        }
        let bar = self.config.long(self.access_at + 4) & 0xff;
        let (offset, length) = (self.config.long(self.access_at + 8), self.config.long(self.access_at + 12));
        let len = usize::try_from(length).ok().filter(|len| matches!(len, 1 | 2 | 4))?;
        (bar == 0 && offset < WINDOW).then_some((u64::from(offset), len))
    }

    /// Reads the window.
    pub(crate) fn read(&mut self, at: u64, out: &mut [u8]) {
        out.fill(0);
        let Some((part, at)) = split(at) else { return };
        match part {
            COMMON => copy(&self.common(), at, out),
            ISR if at == 0 => {
                // virtio 1.2 §4.1.4.5: reading clears.
                let isr = std::mem::take(&mut self.isr);
                out.iter_mut().take(1).for_each(|byte| *byte = isr);
            }
            DEVICE => copy(&self.device.config(), at, out),
            TABLE => self.msix.read_table(at, out),
            PENDING => self.msix.read_pending(at, out),
            _ => {}
        }
    }

    /// Writes the window.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        let Some((part, at)) = split(at) else { return };
        match part {
            COMMON => self.write_common(at, bytes),
            NOTIFY => self.wiring.wake(),
            TABLE => {
                let routed = self.msix.write_table(at, bytes);
                self.survive(routed);
            }
            // No device of ours has configuration that a driver writes; the rest is read-only.
            _ => {}
        }
    }

    /// virtio 1.2 §4.1.4.3, `struct virtio_pci_common_cfg`.
    fn common(&self) -> [u8; 64] {
        let mut all = [0; 64];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(room) = all.get_mut(at..at + bytes.len()) {
                room.copy_from_slice(bytes);
            }
        };
        put(0, &self.shown.to_le_bytes());
        put(4, &half(self.device.features(), self.shown).to_le_bytes());
        put(8, &self.taken.to_le_bytes());
        put(12, &half(self.chosen, self.taken).to_le_bytes());
        put(16, &self.config_vector.to_le_bytes());
        put(18, &u16::try_from(self.rings.len()).unwrap_or(0).to_le_bytes());
        put(20, &[self.status.byte(), 0]);
        put(22, &self.selected.to_le_bytes());
        // A queue that is not there has the size 0.
        if let Some(ring) = self.rings.get(usize::from(self.selected)) {
            put(24, &ring.size.to_le_bytes());
            put(26, &ring.vector.to_le_bytes());
            put(28, &u16::from(ring.enabled).to_le_bytes());
            put(30, &self.selected.to_le_bytes());
            for (n, area) in ring.areas.iter().enumerate() {
                put(32 + n * 8, &area.to_le_bytes());
            }
        }
        all
    }

    fn write_common(&mut self, at: usize, bytes: &[u8]) {
        match (at, bytes) {
            (20, [status]) => self.write_status(*status),
            (0..32, [a, b]) => self.write_word(at, u16::from_le_bytes([*a, *b])),
            (0..56, [a, b, c, d]) => self.write_long(at, u32::from_le_bytes([*a, *b, *c, *d])),
            (32..56, [a, b, c, d, e, f, g, h]) if at.is_multiple_of(8) => {
                self.write_long(at, u32::from_le_bytes([*a, *b, *c, *d]));
                self.write_long(at + 4, u32::from_le_bytes([*e, *f, *g, *h]));
            }
            // No driver accesses a register by another width than its own.
            _ => {}
        }
    }

    fn write_word(&mut self, at: usize, value: u16) {
        let known = |vector: u16| if usize::from(vector) < self.msix.count() { vector } else { NO_VECTOR };
        let vector = known(value);
        match at {
            16 => self.config_vector = vector,
            22 => self.selected = value,
            26 => {
                if let Some(ring) = self.rings.get_mut(usize::from(self.selected)) {
                    ring.vector = vector;
                }
            }
            24 => self.set_up_ring(|ring| {
                ring.size = value;
                value.is_power_of_two() && value <= ring.max
            }),
            28 => self.set_up_ring(|ring| {
                ring.enabled = true;
                value == 1
            }),
            _ => {}
        }
    }

    fn write_long(&mut self, at: usize, value: u32) {
        match at {
            0 => self.shown = value,
            8 => self.taken = value,
            12 if self.status.chooses() => {
                self.chosen = match self.taken {
                    0 => self.chosen & !0xffff_ffff | u64::from(value),
                    1 => self.chosen & 0xffff_ffff | u64::from(value) << 32,
                    // There are no more; zero is what an eager driver writes.
                    _ => self.chosen,
                }
            }
            32..56 if at.is_multiple_of(4) => self.set_up_ring(|ring| {
                if let Some(area) = ring.areas.get_mut((at - 32) / 8) {
                    let value = u64::from(value);
                    *area = if at.is_multiple_of(8) {
                        *area & !0xffff_ffff | value
                    } else {
                        *area & 0xffff_ffff | value << 32
                    };
                }
                true
            }),
            _ => {}
        }
    }

    /// Changes the selected queue; `change` says whether that makes sense. Too late or too early, nothing changes.
    fn set_up_ring(&mut self, change: impl FnOnce(&mut Ring) -> bool) {
        let sets_up = self.status.sets_up();
        let Some(ring) = self.rings.get_mut(usize::from(self.selected)) else { return };
        if sets_up && !ring.enabled && !change(ring) {
            self.fail(Fault(format!("queue {} was set up with a value that it cannot have", self.selected)));
        }
    }

    fn write_status(&mut self, value: u8) {
        // Until a reset is complete, the driver waits to read zero.
        if self.resetting {
            return;
        }
        match self.status.write(value) {
            Step::Note => {}
            Step::Reset => self.begin_reset(),
            Step::Choose => {
                let unknown = self.chosen & !self.device.features();
                // virtio 1.2 §6.1: without this one it is a driver of another age.
                if unknown == 0 && self.chosen & 1 << VIRTIO_F_VERSION_1 != 0 {
                    self.status.accept();
                }
            }
            Step::Start => match self.start() {
                Ok(()) => self.wiring.wake(),
                Err(fault) => self.fail(fault),
            },
            Step::Broken(why) => self.fail(Fault(why.into())),
        }
    }

    fn start(&mut self) -> Result<(), Fault> {
        let event_idx = self.chosen & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self.rings.iter().map(|ring| ring.queue(&self.memory, event_idx));
        self.queues = queues.collect::<Result<_, _>>()?;
        self.device.activate(self.chosen);
        Ok(())
    }

    fn begin_reset(&mut self) {
        self.resetting = true;
        self.queues.clear();
        self.end_reset();
        if self.resetting {
            self.wiring.wake();
        }
    }

    fn end_reset(&mut self) {
        if self.device.abandon() > 0 {
            return;
        }
        self.device.reset();
        self.resetting = false;
        self.status = Status::default();
        (self.shown, self.taken, self.chosen, self.selected, self.isr) = (0, 0, 0, 0, 0);
        self.config_vector = NO_VECTOR;
        self.rings.iter_mut().for_each(|ring| *ring = Ring::new(ring.max));
        self.fault = None;
    }

    /// The driver did what no driver does.
    fn fail(&mut self, fault: Fault) {
        if self.fault.is_some() {
            return;
        }
        tracing::warn!(%fault, kind = self.device.kind(), "a device stopped until its driver resets it");
        self.fault = Some(fault);
        self.status.fail();
        self.queues.clear();
        self.device.abandon();
        // virtio 1.2 §2.1.2: a driver that runs the device is told.
        self.isr |= ISR_CONFIG;
        self.msix.raise(self.config_vector);
    }

    fn survive(&mut self, routed: Result<()>) {
        if let Err(error) = routed {
            self.fail(Fault(format!("an interrupt that cannot be: {error}")));
        }
    }

    /// Gives the device a turn; says when it wants the next.
    pub(crate) fn turn(&mut self) -> Next {
        if self.resetting {
            self.end_reset();
            return if self.resetting { Next::Event } else { Next::Kick };
        }
        if !self.status.runs() {
            return if self.fault.is_some() && self.device.abandon() > 0 { Next::Event } else { Next::Kick };
        }
        if !self.config.is_master() {
            return Next::Kick;
        }
        match self.device.serve(&mut self.queues, &self.memory) {
            Ok(served) => {
                self.interrupt(served.notify);
                served.next
            }
            Err(fault) => {
                self.fail(fault);
                Next::Now
            }
        }
    }

    fn interrupt(&mut self, queues: u64) {
        for (n, ring) in self.rings.iter().enumerate().filter(|(n, _)| queues >> n & 1 != 0) {
            debug_assert!(n < QUEUES_MAX, "as many bits as queues");
            self.isr |= ISR_QUEUE;
            self.msix.raise(ring.vector);
        }
    }

    /// Whether the device's next turn is one with its driver.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn serves(&self) -> bool {
        self.serves_driver() && self.config.is_master()
    }

    /// Whether a driver runs the device, and the device is well.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn serves_driver(&self) -> bool {
        !self.resetting && self.status.runs()
    }

    /// How far the device has come in a queue: available entries taken, used entries given; none without a driver.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn positions(&self, queue: usize) -> Option<(u16, u16)> {
        self.queues.get(queue).map(|queue| (queue.next_avail(), queue.next_used()))
    }

    /// Stops for good; says what is still under way in guest memory.
    pub(crate) fn wind_down(&mut self) -> usize {
        self.queues.clear();
        self.status.fail();
        self.device.abandon()
    }
}

/// virtio 1.2 §4.1.2: vendor, and a device number made of the type.
fn identity(kind: u32) -> Identity {
    let number = u16::try_from(kind).unwrap_or(0x3f) & 0x3f;
    let class = match number {
        1 => [2, 0, 0],
        2 => [1, 0x80, 0],
        _ => [0xff, 0, 0],
    };
    Identity { vendor: VENDOR, device: 0x1040 + number, class, subsystem: (VENDOR, 0x40 + number) }
}

/// The head of a `struct virtio_pci_cap`, without the link.
fn structure(size: u8, kind: u8, at: u32, len: u32) -> Vec<u8> {
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend(at.to_le_bytes());
    body.extend(len.to_le_bytes());
    body
}

/// The part of the window that `at` is in, and the place in it.
fn split(at: u64) -> Option<(u32, usize)> {
    let at = u32::try_from(at).ok().filter(|at| *at < WINDOW)?;
    Some((at & !0xfff, usize::try_from(at & 0xfff).ok()?))
}

fn copy(from: &[u8], at: usize, out: &mut [u8]) {
    for (n, byte) in out.iter_mut().enumerate() {
        *byte = from.get(at + n).copied().unwrap_or(0);
    }
}

fn half(features: u64, select: u32) -> u32 {
    let wanted = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(wanted).unwrap_or(0)
}

/// Bytes of a device's window, and the parts of it, a page each.
pub(crate) const WINDOW: u32 = 0x8000;
const COMMON: u32 = 0;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
pub(crate) const NOTIFY: u32 = 0x3000;
const TABLE: u32 = 0x4000;
const PENDING: u32 = 0x5000;
/// Bytes between the doorbells of two queues.
pub(crate) const NOTIFY_STRIDE: u32 = 4;
const VENDOR: u16 = 0x1af4;
const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 9;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const NO_VECTOR: u16 = 0xffff;
/// As many as [`Served::notify`](crate::virtio::device::Served::notify) has bits; their entries fit the table's page.
const QUEUES_MAX: usize = 64;

const _: () = assert!((QUEUES_MAX + 1) * msix::ENTRY <= 0x1000);
