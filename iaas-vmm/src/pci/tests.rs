//! Drivers that others wrote against our devices, through the bus as a guest sees it; and drivers that nobody should write.

#![expect(unsafe_code, reason = "the drivers' interface to memory")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::Result;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use nix::sys::eventfd::EventFd;
use proptest::prelude::*;
use virtio_drivers::BufferDirection;
use virtio_drivers::Hal;
use virtio_drivers::PhysAddr;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::net::TxBuffer;
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceStatus;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::InterruptStatus;
use virtio_drivers::transport::Transport;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::arch::layout;
use crate::virtio::block::Block;
use crate::virtio::block::tests::Memory as MemoryDisk;
use crate::virtio::device::Next;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;

const SIZE: usize = 8 << 20;

/// Wires that only count.
#[derive(Debug, Default)]
struct Counted {
    raised: Mutex<Vec<usize>>,
    routes: Mutex<Vec<(usize, MsiMessage)>>,
}

impl Wiring for Counted {
    fn route(&self, vector: usize, message: MsiMessage) -> Result<()> {
        self.routes.lock().unwrap().push((vector, message));
        Ok(())
    }
    fn raise(&self, vector: usize) -> io::Result<()> {
        self.raised.lock().unwrap().push(vector);
        Ok(())
    }
    fn place_doorbells(&self, _: Option<u64>) {}
    fn wake(&self) {}
}

/// One device on a bus, with the thread that serves it being whoever rings.
struct Guest {
    root: Root,
    device: Arc<Mutex<VirtioPci>>,
    wires: Arc<Counted>,
    memory: Arc<GuestMemoryMmap>,
}

impl Guest {
    fn new(device: impl VirtioDevice + 'static) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap());
        let wires = Arc::new(Counted::default());
        let window = u32::try_from(layout::PCI_WINDOW).unwrap();
        let device = VirtioPci::new(Box::new(device), memory.clone(), wires.clone(), window).unwrap();
        let device = Arc::new(Mutex::new(device));
        let root = Root::new(vec![device.clone()]);
        let guest = Self { root, device, wires, memory };
        // Memory space and bus master, by the memory-mapped configuration of slot 1.
        guest.root.write_ecam(1 << 15 | 4, &6u16.to_le_bytes());
        guest
    }

    fn read<const N: usize>(&self, at: u32) -> [u8; N] {
        let mut out = [0; N];
        assert!(self.root.read(layout::PCI_WINDOW + u64::from(at), &mut out));
        out
    }

    fn write(&self, at: u32, bytes: &[u8]) {
        assert!(self.root.write(layout::PCI_WINDOW + u64::from(at), bytes));
    }

    fn serve(&self) {
        for _ in 0..1000 {
            if self.device.lock().unwrap().turn() != Next::Now {
                return;
            }
        }
        panic!("a device that is never done");
    }

    fn status(&self) -> u8 {
        self.read::<1>(20)[0]
    }
}

/// The drivers' way to the registers.
struct Way {
    guest: Arc<Guest>,
    kind: DeviceType,
}

impl Transport for Way {
    fn device_type(&self) -> DeviceType {
        self.kind
    }
    fn read_device_features(&mut self) -> u64 {
        let half = |n: u32| {
            self.guest.write(0, &n.to_le_bytes());
            u64::from(u32::from_le_bytes(self.guest.read(4)))
        };
        half(0) | half(1) << 32
    }
    fn write_driver_features(&mut self, features: u64) {
        for (n, half) in (0u32..).zip(features.to_le_bytes().chunks(4)) {
            self.guest.write(8, &n.to_le_bytes());
            self.guest.write(12, half);
        }
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.guest.write(22, &queue.to_le_bytes());
        u16::from_le_bytes(self.guest.read(24)).into()
    }
    fn notify(&mut self, queue: u16) {
        self.guest.write(NOTIFY + u32::from(queue) * NOTIFY_STRIDE, &queue.to_le_bytes());
        self.guest.serve();
    }
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.guest.status().into())
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.guest.write(20, &[u8::try_from(status.bits()).unwrap()]);
        self.guest.serve();
    }
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, queue: u16, size: u32, desc: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.guest.write(22, &queue.to_le_bytes());
        self.guest.write(24, &u16::try_from(size).unwrap().to_le_bytes());
        for (at, area) in [(32, desc), (40, driver), (48, device)] {
            self.guest.write(at, &area.to_le_bytes());
        }
        self.guest.write(28, &1u16.to_le_bytes());
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, queue: u16) -> bool {
        self.guest.write(22, &queue.to_le_bytes());
        self.guest.read::<2>(28) == [1, 0]
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.guest.read::<1>(0x1000)[0].into())
    }
    fn read_config_generation(&self) -> u32 {
        self.guest.read::<1>(21)[0].into()
    }
    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        at: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        let at = layout::PCI_WINDOW + 0x2000 + u64::try_from(at).unwrap();
        assert!(self.guest.root.read(at, value.as_mut_bytes()));
        Ok(value)
    }
    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        at: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.guest.write(0x2000 + u32::try_from(at).unwrap(), value.as_bytes());
        Ok(())
    }
}

thread_local! {
    /// The memory of this thread's guest, and the next page of it that is free.
    static RAM: RefCell<Option<(Arc<GuestMemoryMmap>, u64)>> = const { RefCell::new(None) };
}

fn allocate(len: usize) -> (PhysAddr, NonNull<u8>) {
    RAM.with_borrow_mut(|ram| {
        let (memory, next) = ram.as_mut().unwrap();
        let at = *next;
        *next += u64::try_from(len.next_multiple_of(4096)).unwrap();
        assert!(*next <= u64::try_from(SIZE).unwrap());
        (at, NonNull::new(memory.get_host_address(GuestAddress(at)).unwrap()).unwrap())
    })
}

struct Pages;

// SAFETY: each allocation is a page-aligned stretch of a mapping that lives as long as the test, handed out once, zeroed by
// the kernel.
unsafe impl Hal for Pages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        allocate(pages * 4096)
    }
    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }
    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are reached through the bus")
    }
    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (at, place) = allocate(buffer.len());
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller's buffer is valid, and the new place has its length and is nobody else's.
            unsafe { buffer.cast::<u8>().copy_to_nonoverlapping(place, buffer.len()) };
        }
        at
    }
    unsafe fn unshare(at: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            let place =
                RAM.with_borrow(|ram| ram.as_ref().unwrap().0.get_host_address(GuestAddress(at)).unwrap());
            // SAFETY: `share` made this place with the length of the buffer, which is valid.
            unsafe {
                buffer.cast::<u8>().copy_from_nonoverlapping(NonNull::new(place).unwrap(), buffer.len())
            };
        }
    }
}

fn way(device: impl VirtioDevice + 'static, kind: DeviceType) -> (Way, Arc<Guest>) {
    let guest = Arc::new(Guest::new(device));
    RAM.set(Some((guest.memory.clone(), 0x10_0000)));
    (Way { guest: guest.clone(), kind }, guest)
}

fn disk() -> Block {
    Block::new(&MemoryDisk::new(1 << 20), "serial-1", 16).unwrap()
}

#[test]
fn a_foreign_driver_reads_and_writes_a_disk() {
    let (way, guest) = way(disk(), DeviceType::Block);
    let mut driver = VirtIOBlk::<Pages, _>::new(way).unwrap();
    assert_eq!(driver.capacity(), 2048);
    let mut sector = [0; 1024];
    driver.read_blocks(7, &mut sector).unwrap();
    assert_eq!((sector[0], sector[512]), (7, 8));
    driver.write_blocks(7, &[0xaa; 512]).unwrap();
    driver.flush().unwrap();
    driver.read_blocks(7, &mut sector).unwrap();
    assert_eq!((sector[0], sector[511], sector[512]), (0xaa, 0xaa, 8));
    let mut id = [0; 20];
    driver.device_id(&mut id).unwrap();
    assert_eq!(&id[..9], b"serial-1\0");
    assert_eq!(guest.device.lock().unwrap().fault(), None);
}

#[test]
fn a_foreign_driver_gets_randomness() {
    let (way, _) = way(Rng::new(io::repeat(0x5a)), DeviceType::EntropySource);
    let mut driver = VirtIORng::<Pages, _>::new(way).unwrap();
    let mut bytes = [0; 100];
    assert_eq!(driver.request_entropy(&mut bytes).unwrap(), 100);
    assert_eq!(bytes, [0x5a; 100]);
}

/// Gives back what it is sent.
#[derive(Debug)]
struct Mirror(VecDeque<Vec<u8>>, EventFd);

impl FramePort for Mirror {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        want
    }
    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let mut count = 0;
        for (buffers, len) in into.iter().zip(lens) {
            let Some(frame) = self.0.pop_front() else { break };
            *len = u32::try_from(buffers.write_at(0, &frame)).unwrap();
            count += 1;
        }
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }
    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for frame in frames {
            let mut bytes = vec![0; frame.len()];
            frame.read_at(0, &mut bytes);
            self.0.push_back(bytes);
        }
        Ok(frames.len())
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
}

#[test]
fn a_foreign_driver_sends_and_receives_frames() {
    let mac = [2, 0, 0, 0, 0, 7];
    let (way, guest) =
        way(Net::new(Box::new(Mirror(VecDeque::new(), EventFd::new().unwrap())), mac), DeviceType::Network);
    let mut driver = VirtIONet::<Pages, _, 16>::new(way, 2048).unwrap();
    assert_eq!(driver.mac_address(), mac);
    for n in 0..100u8 {
        let frame = vec![n; 60 + usize::from(n)];
        driver.send(TxBuffer::from(&frame)).unwrap();
        guest.serve();
        let got = driver.receive().unwrap();
        assert_eq!(got.packet(), frame);
        driver.recycle_rx_buffer(got).unwrap();
    }
    assert_eq!(guest.device.lock().unwrap().fault(), None);
}

/// Brings a disk to DRIVER_OK with its queue at `area`.
fn started(area: u64) -> Guest {
    let guest = Guest::new(disk());
    guest.write(20, &[1]);
    guest.write(20, &[3]);
    guest.write(8, &1u32.to_le_bytes());
    guest.write(12, &1u32.to_le_bytes());
    guest.write(20, &[0xb]);
    assert_eq!(guest.status(), 0xb);
    guest.write(24, &16u16.to_le_bytes());
    for (at, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
        guest.write(at, &area.wrapping_add(offset).to_le_bytes());
    }
    guest.write(28, &1u16.to_le_bytes());
    guest.write(20, &[0xf]);
    guest
}

const NEEDS_RESET: u8 = 64;

#[test]
fn a_broken_driver_breaks_its_device_until_it_resets_it() {
    let guest = started(0x10_0000);
    assert_eq!(guest.status(), 0xf);
    // An available index far beyond the ring.
    guest.memory.write_obj(999u16, GuestAddress(0x10_1002)).unwrap();
    guest.serve();
    assert_eq!(guest.status(), 0xf | NEEDS_RESET);
    assert!(guest.device.lock().unwrap().fault().is_some());
    // The driver is told by a configuration change.
    assert_eq!(guest.read::<1>(0x1000), [2]);
    guest.write(20, &[0]);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.device.lock().unwrap().fault(), None);
}

#[test]
fn queues_outside_of_memory_and_odd_sizes_are_refused() {
    for area in [0xffff_ffff_ffff_f000, u64::try_from(SIZE).unwrap(), 0x10_0001] {
        assert_eq!(started(area).status() & NEEDS_RESET, NEEDS_RESET, "{area:#x}");
    }
    let guest = Guest::new(disk());
    [1u8, 3].iter().for_each(|status| guest.write(20, &[*status]));
    guest.write(8, &1u32.to_le_bytes());
    guest.write(12, &1u32.to_le_bytes());
    guest.write(20, &[0xb]);
    guest.write(24, &3u16.to_le_bytes());
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let guest = Guest::new(disk());
    [1u8, 3].iter().for_each(|status| guest.write(20, &[*status]));
    for (half, bits) in [(0u32, 1u32 << 31), (1, 1)] {
        guest.write(8, &half.to_le_bytes());
        guest.write(12, &bits.to_le_bytes());
    }
    guest.write(20, &[0xb]);
    assert_eq!(guest.status(), 3);
}

#[test]
fn a_masked_interrupt_waits_for_its_mask() {
    let guest = started(0x10_0000);
    // Entry 1: its message, masked as reset leaves it; then MSI-X is enabled and the configuration's vector is 1.
    guest.write(0x4010, &0xfee0_0000u32.to_le_bytes());
    guest.write(0x4018, &0x41u32.to_le_bytes());
    let at = u64::from(1u32 << 15);
    guest.root.write_ecam(at | 0x42, &0x8000u16.to_le_bytes());
    guest.write(16, &1u16.to_le_bytes());
    guest.memory.write_obj(999u16, GuestAddress(0x10_1002)).unwrap();
    guest.serve();
    assert_eq!(*guest.wires.raised.lock().unwrap(), [] as [usize; 0]);
    assert_eq!(guest.read::<1>(0x5000), [2]);
    guest.write(0x401c, &0u32.to_le_bytes());
    assert_eq!(*guest.wires.raised.lock().unwrap(), [1]);
    let message = MsiMessage { address_low: 0xfee0_0000, address_high: 0, data: 0x41 };
    assert!(guest.wires.routes.lock().unwrap().contains(&(1, message)));
    assert_eq!(guest.read::<1>(0x5000), [0]);
}

#[test]
fn the_bus_is_found_by_ports_as_by_memory() {
    let guest = Guest::new(disk());
    let by_ports = |slot: u32, register: u32| {
        guest.root.write_port(0xcf8, &(1 << 31 | slot << 11 | register).to_le_bytes());
        let mut out = [0; 4];
        guest.root.read_port(0xcfc, &mut out);
        u32::from_le_bytes(out)
    };
    assert_eq!(by_ports(1, 0), 0x1042_1af4);
    assert_eq!(by_ports(2, 0), u32::MAX);
    // A window's size is found by writing ones.
    guest.root.write_port(0xcf8, &(1u32 << 31 | 1 << 11 | 0x10).to_le_bytes());
    guest.root.write_port(0xcfc, &u32::MAX.to_le_bytes());
    assert_eq!(by_ports(1, 0x10), 0xffff_8000);
}

proptest! {
    /// Whatever is written to registers, queues and configuration: no panic, no endless turn, and other devices' memory is
    /// not theirs to reach.
    #[test]
    fn no_writes_of_a_guest_make_a_device_panic(
        writes in prop::collection::vec((0u32..0x6000, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 1..60),
        ring in prop::collection::vec(any::<u8>(), 0x400),
    ) {
        let guest = started(0x10_0000);
        guest.memory.write_slice(&ring, GuestAddress(0x10_0000)).unwrap();
        guest.memory.write_slice(&ring, GuestAddress(0x10_1000)).unwrap();
        for (at, bytes, config) in writes {
            if config {
                guest.root.write_ecam(1 << 15 | u64::from(at & 0xff), &bytes);
                let mut out = [0; 4];
                guest.root.read_ecam(1 << 15 | u64::from(at & 0xff), &mut out);
            } else {
                let _ = guest.root.write(layout::PCI_WINDOW + u64::from(at), &bytes);
            }
            guest.serve();
        }
    }
}
