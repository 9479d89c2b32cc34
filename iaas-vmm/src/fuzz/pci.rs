//! The bus, configuration space, and the transport's registers, with a device behind them that only sees that it is used as
//! a device may be used.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::Result;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::Input;
use super::guest;
use super::guest::lock;
use crate::arch::layout;
use crate::pci::MsiMessage;
use crate::pci::Root;
use crate::pci::VirtioPci;
use crate::pci::Wiring;
use crate::virtio::chain::Fault;
use crate::virtio::device::Next;
use crate::virtio::device::Served;
use crate::virtio::device::VirtioDevice;

/// Whatever a guest does with the registers of a device.
pub fn pci(input: &[u8]) {
    let mut input = Input(input);
    let how = input.byte();
    let script = Arc::new(Mutex::new(Script::new(input.quad())));
    let sizes = [&[8][..], &[256, 256], &[1, 2, 32_768], &[64; 64]][usize::from(how & 3)].to_vec();
    let vectors = sizes.len() + 1;
    let wires = Arc::new(Wires { vectors, routes: Mutex::new(vec![None; vectors]) });
    let probe = Probe { sizes, script: script.clone() };
    let window = u32::try_from(layout::PCI_WINDOW).unwrap();
    let device = VirtioPci::new(Box::new(probe), guest::memory(), wires, window).unwrap();
    let device = Arc::new(Mutex::new(device));
    let root = Root::new(vec![device.clone()]);
    let identity = fixed(&root);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        step(&root, &device, &script, &mut input);
        check(&root, &device, &script);
    }
    assert_eq!(fixed(&root), identity, "a guest changed what the device is");
    finish(&device, &script);
}

fn step(root: &Root, device: &Mutex<VirtioPci>, script: &Mutex<Script>, input: &mut Input<'_>) {
    let window = lock(device).window();
    match input.byte() % 16 {
        // The register that matters most: the status, and its next step.
        0 | 1 => {
            let status = lock_read(device, 20) | 1 << (input.byte() & 7);
            lock(device).write(20, &[status]);
        }
        2..=4 => lock(device).write(u64::from(input.byte() & 0x3f), &input.value()),
        5 | 6 => {
            if let Some(window) = window {
                let at = window + u64::from(input.word() & 0x7fff);
                assert!(root.write(at, &input.value()), "nobody answers in the window at {at:#x}");
            }
        }
        7 => {
            let mut out = input.value();
            root.read(layout::PCI_WINDOW + u64::from(input.word()), &mut out);
        }
        8 | 9 => root.write_ecam(1 << 15 | u64::from(input.byte()), &input.value()),
        10 => root.write_ecam(u64::from(input.long() & 0xf_ffff), &input.value()),
        11 => ports(root, input),
        12 | 13 => {
            for _ in 0..8 {
                if lock(device).turn() != Next::Now {
                    break;
                }
            }
        }
        14 => lock(script).mood = input.byte(),
        _ => start(root, device, input),
    }
}

fn ports(root: &Root, input: &mut Input<'_>) {
    let mut out = input.value();
    root.write_port(layout::PCI_ADDRESS, &(1u32 << 31 | u32::from(input.word())).to_le_bytes());
    let port = layout::PCI_ADDRESS + u16::from(input.byte() & 7);
    if input.byte() & 1 == 0 {
        root.write_port(port, &input.value());
    } else {
        root.read_port(port, &mut out);
    }
}

/// A driver's start up to its last step.
fn start(root: &Root, device: &Mutex<VirtioPci>, input: &mut Input<'_>) {
    // Memory and bus master; MSI-X on.
    root.write_ecam(1 << 15 | 4, &[6, 0]);
    root.write_ecam(1 << 15 | 0x42, &[0, 0x80]);
    let mut device = lock(device);
    [1, 3].iter().for_each(|status| device.write(20, &[*status]));
    let mut write = |at: u64, value: u32| device.write(at, &value.to_le_bytes());
    [(8, 0), (12, input.long()), (8, 1), (12, input.long() | 1)]
        .iter()
        .for_each(|(at, value)| write(*at, *value));
    device.write(20, &[0xb]);
    for (at, offset) in [(32, 0), (40, 0x1000), (48, 0x1800)] {
        device.write(at, &(0x1000u64 + offset).to_le_bytes());
    }
    device.write(24, &(1u16 << input.below(9)).to_le_bytes());
    device.write(28, &[1, 0]);
    device.write(16, &[input.byte(), 0]);
    device.write(4 + 22, &[input.byte(), 0]);
}

/// What holds after each access.
fn check(root: &Root, device: &Mutex<VirtioPci>, script: &Mutex<Script>) {
    let (status, fault) = (lock_read(device, 20), lock(device).fault().cloned());
    assert_eq!(fault.is_some(), status & NEEDS_RESET != 0, "{fault:?} and status {status:#x}");
    assert!(status & 4 == 0 || status & 0xb == 0xb || fault.is_some(), "status {status:#x}");
    assert_eq!(lock(script).alive, lock(device).serves_driver(), "status {status:#x}");
    // Whatever way it is asked for, configuration space says the same.
    for register in [0, 4, 0x10, 0x40] {
        let (mut by_memory, mut by_port) = ([0; 4], [0; 4]);
        root.read_ecam(1 << 15 | register, &mut by_memory);
        let address = 1 << 31 | 1 << 11 | u32::try_from(register).unwrap();
        root.write_port(layout::PCI_ADDRESS, &address.to_le_bytes());
        root.read_port(layout::PCI_DATA, &mut by_port);
        assert_eq!(by_memory, by_port);
    }
    if let Some(window) = lock(device).window() {
        assert_eq!(window % 0x8000, 0, "a window at {window:#x}");
    }
}

/// A reset comes to its end when the device lets go.
fn finish(device: &Mutex<VirtioPci>, script: &Mutex<Script>) {
    let mut device = lock(device);
    device.write(20, &[0]);
    lock(script).mood = 0;
    for _ in 0..4 {
        device.turn();
    }
    let mut all = [0xff; 56];
    device.read(0, &mut all);
    assert_eq!(all[20], 0, "a reset that never ends");
    assert_eq!(all[22..24], [0, 0]);
    assert_eq!(all[28..30], [0, 0], "a queue that outlives the reset");
    assert!(all[32..].iter().all(|byte| *byte == 0));
    assert_eq!(device.wind_down(), 0);
}

fn lock_read(device: &Mutex<VirtioPci>, at: u64) -> u8 {
    let mut out = [0];
    lock(device).read(at, &mut out);
    out[0]
}

/// The registers that say what the device is.
fn fixed(root: &Root) -> Vec<u8> {
    let mut all = vec![0; 256];
    root.read_ecam(1 << 15, &mut all);
    // Command, BAR 0, the interrupt line, MSI-X control, and the access capability's own registers.
    [4..6, 0x10..0x14, 0x3c..0x3d, 0x42..0x44].into_iter().for_each(|part| all[part].fill(0));
    all.truncate(ACCESS);
    all
}

/// What the device behind the transport is to do, and how it stands with its driver.
#[derive(Debug)]
struct Script {
    features: u64,
    mood: u8,
    /// A driver runs it: it was activated, and neither reset nor failed since.
    alive: bool,
    /// It has failed by its own word, and is to be left alone.
    failed: bool,
    abandoned: bool,
}

impl Script {
    fn new(features: u64) -> Self {
        let features = features | 1 << VIRTIO_F_VERSION_1;
        Self { features, mood: 0, alive: false, failed: false, abandoned: false }
    }
}

#[derive(Debug)]
struct Probe {
    sizes: Vec<u16>,
    script: Arc<Mutex<Script>>,
}

impl VirtioDevice for Probe {
    fn kind(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        lock(&self.script).features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        vec![0xcf; 20]
    }

    fn activate(&mut self, features: u64) {
        let mut script = lock(&self.script);
        assert!(!script.alive, "two drivers at a time");
        assert_eq!(features & !script.features, 0, "features that were not offered");
        assert_ne!(features & 1 << VIRTIO_F_VERSION_1, 0);
        (script.alive, script.failed, script.abandoned) = (true, false, false);
    }

    fn serve(
        &mut self,
        queues: &mut [Queue],
        memory: &Arc<GuestMemoryMmap>,
    ) -> std::result::Result<Served, Fault> {
        let mut script = lock(&self.script);
        assert!(script.alive && !script.failed && !script.abandoned, "a device without a driver is served");
        assert_eq!(queues.len(), self.sizes.len());
        for (queue, most) in queues.iter().zip(&self.sizes).filter(|(queue, _)| queue.ready()) {
            assert!(queue.size() <= *most && queue.is_valid(&**memory), "a queue that was not checked");
        }
        if script.mood & 0xf == 0xf {
            (script.failed, script.alive) = (true, false);
            return Err(Fault("as told".into()));
        }
        let next = [Next::Event, Next::Kick, Next::Soon, Next::Now][usize::from(script.mood >> 4 & 3)];
        let all = if self.sizes.len() == 64 { u64::MAX } else { (1 << self.sizes.len()) - 1 };
        let notify = u64::from(script.mood) * 0x0101_0101_0101_0101;
        Ok(Served { notify: notify & all, next })
    }

    fn abandon(&mut self) -> usize {
        let mut script = lock(&self.script);
        (script.alive, script.abandoned) = (false, true);
        usize::from(script.mood >> 6)
    }

    fn reset(&mut self) {
        let script = lock(&self.script);
        assert!(script.abandoned && script.mood >> 6 == 0, "a reset while something is under way");
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Wires that refuse what does not exist.
#[derive(Debug)]
struct Wires {
    vectors: usize,
    routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl Wiring for Wires {
    fn route(&self, vector: usize, message: MsiMessage) -> Result<()> {
        // A machine refuses messages that go nowhere.
        if message.address_low == 0xdead_0000 {
            return Err(iaas_core::Error::unavailable("no such interrupt"));
        }
        lock(&self.routes)[vector] = Some(message);
        Ok(())
    }
    fn raise(&self, vector: usize) -> io::Result<()> {
        assert!(vector < self.vectors);
        assert!(lock(&self.routes)[vector].is_some(), "interrupt {vector} goes nowhere yet");
        Ok(())
    }
    fn place_doorbells(&self, window: Option<u64>) {
        assert!(window.is_none_or(|at| at % 0x8000 == 0));
    }
    fn wake(&self) {}
}

/// Where the capability begins whose registers are the driver's.
const ACCESS: usize = 0x90;
const NEEDS_RESET: u8 = 64;
const STEPS: usize = 300;
