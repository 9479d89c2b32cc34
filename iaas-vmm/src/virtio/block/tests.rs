//! A driver of our own against the device, on memory that nobody else uses.

use std::os::fd::AsFd;
use std::sync::Mutex;

use iaas_core::Term;
use iaas_core::spi::block::FreezeReceipt;
use iaas_core::spi::block::FreezeTicket;
use nix::sys::eventfd::EventFd;
use proptest::prelude::*;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::*;

/// A disk in memory that finishes the newest operation first, and only when asked to.
#[derive(Debug)]
pub(crate) struct Memory {
    geometry: Geometry,
    bytes: Arc<Mutex<Vec<u8>>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Memory {
    pub(crate) fn new(size: u64) -> Self {
        let geometry = Geometry {
            size,
            block: 512,
            preferred: 4096,
            max_bytes: 64 << 10,
            read_only: false,
            discard: true,
            write_zeroes: true,
        };
        let bytes = (0..size).map(|i| u8::try_from(i / 512 % 251).unwrap()).collect();
        Self { geometry, bytes: Arc::new(Mutex::new(bytes)), log: Arc::default() }
    }
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>> {
        let event = EventFd::new().unwrap();
        let (bytes, log) = (self.bytes.clone(), self.log.clone());
        Ok(Box::new(MemoryQueue { bytes, log, depth: depth.into(), waiting: Vec::new(), event }))
    }
    fn claim(&self, _: Term) -> Result<()> {
        Ok(())
    }
    fn release(&self) -> Result<()> {
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<()> {
        Ok(())
    }
    fn freeze(&self, _: &FreezeTicket) -> Result<FreezeReceipt> {
        Err(iaas_core::Error::unsupported("no snapshots"))
    }
}

#[derive(Debug)]
struct MemoryQueue {
    bytes: Arc<Mutex<Vec<u8>>>,
    log: Arc<Mutex<Vec<String>>>,
    depth: usize,
    waiting: Vec<(u64, BlockOp)>,
    event: EventFd,
}

impl MemoryQueue {
    fn run(&self, op: BlockOp) -> Option<IoBuffers> {
        let mut disk = self.bytes.lock().unwrap();
        let place = |at: u64, len: usize| usize::try_from(at).unwrap()..usize::try_from(at).unwrap() + len;
        let (line, buffers) = match op {
            BlockOp::Read { at, into } => {
                into.write_at(0, &disk[place(at, into.len())]);
                (format!("read {at}+{}", into.len()), Some(into))
            }
            BlockOp::Write { at, from } => {
                let room = &mut disk[place(at, from.len())];
                from.read_at(0, room);
                (format!("write {at}+{}", from.len()), Some(from))
            }
            BlockOp::Flush => ("flush".to_owned(), None),
            BlockOp::Discard { at, len } => (format!("discard {at}+{len}"), None),
            BlockOp::WriteZeroes { at, len, unmap } => (format!("zero {at}+{len} {unmap}"), None),
        };
        self.log.lock().unwrap().push(line);
        buffers
    }
}

impl BlockQueue for MemoryQueue {
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp> {
        if self.waiting.len() >= self.depth {
            return Err(op);
        }
        self.waiting.push((tag, op));
        Ok(())
    }
    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        let count = self.waiting.len();
        while let Some((tag, op)) = self.waiting.pop() {
            let buffers = self.run(op);
            out.push(BlockDone { tag, result: Ok(()), buffers });
        }
        count
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The driver's side: a ring of 16 descriptors at the bottom of 1 MiB of memory.
struct Driver {
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    device: Block,
    avail: u16,
}

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Driver {
    fn new(disk: &Memory) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let mut device = Block::new(disk, "a-serial-number-of-more-than-20", 4).unwrap();
        device.set_acked(device.features());
        Self { memory, queue, device, avail: 0 }
    }

    fn descriptor(&self, table: u64, index: u16, (at, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let place = AVAIL + 4 + u64::from(self.avail % SIZE) * 2;
        self.memory.write_slice(&head.to_le_bytes(), GuestAddress(place)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_slice(&self.avail.to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    fn serve(&mut self) -> Result<Turn, Fault> {
        self.device.serve(&mut self.queue, &self.memory)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    fn used(&self) -> Vec<(u32, u32)> {
        let number = |at: u64| u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap());
        let count = u16::from_le_bytes(self.bytes(USED + 2, 2).try_into().unwrap());
        (0..u64::from(count)).map(|i| (number(USED + 4 + i * 8), number(USED + 8 + i * 8))).collect()
    }

    /// A request of header, one buffer and status; gives the status byte.
    fn ask(&mut self, kind: u32, sector: u64, data: (u64, u32, bool)) -> u8 {
        let (at, len, write) = data;
        self.header(0x4000, kind, sector);
        self.memory.write_slice(&[0xff], GuestAddress(0x5000)).unwrap();
        self.descriptor(TABLE, 0, (0x4000, 16, NEXT, 1));
        self.descriptor(TABLE, 1, (at, len, NEXT | if write { WRITE } else { 0 }, 2));
        self.descriptor(TABLE, 2, (0x5000, 1, WRITE, 0));
        self.offer(0);
        self.serve().unwrap();
        self.bytes(0x5000, 1)[0]
    }
}

#[test]
fn a_read_fills_the_guests_memory_and_counts_its_bytes() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_IN, 3, (DATA, 1024, true)), OK);
    let mut want = vec![3; 512];
    want.extend([4; 512]);
    assert_eq!(driver.bytes(DATA, 1024), want);
    assert_eq!(driver.used(), [(0, 1025)]);
    assert_eq!(driver.device.outstanding(), 0);
}

#[test]
fn a_request_larger_than_the_volume_takes_is_cut_and_answered_once() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    let len = 300 << 10;
    driver.memory.write_slice(&vec![7; len], GuestAddress(DATA)).unwrap();
    let bytes = u32::try_from(len).unwrap();
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_OUT, 8, (DATA, bytes, false)), OK);
    assert!(disk.bytes.lock().unwrap()[4096..4096 + len].iter().all(|b| *b == 7));
    // 300 KiB in pieces of 64 KiB.
    assert_eq!(disk.log.lock().unwrap().len(), 5);
    assert_eq!(driver.used(), [(0, 1)]);
}

#[test]
fn data_that_is_not_aligned_passes_through_a_bounce() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    driver.memory.write_slice(&[9; 1024], GuestAddress(DATA + 3)).unwrap();
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_OUT, 1, (DATA + 3, 1024, false)), OK);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_IN, 1, (DATA + 8197, 1024, true)), OK);
    assert_eq!(driver.bytes(DATA + 8197, 1024), [9; 1024]);
    assert_eq!(driver.device.bounced, 0);
}

#[test]
fn a_request_may_be_cut_anywhere_and_hang_from_an_indirect_table() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    driver.header(0x4000, virtio_blk::VIRTIO_BLK_T_IN, 5);
    // Header in two parts; data and status in one.
    driver.descriptor(0x8000, 0, (0x4000, 5, NEXT, 1));
    driver.descriptor(0x8000, 1, (0x4005, 11, NEXT, 2));
    driver.descriptor(0x8000, 2, (DATA, 513, WRITE, 0));
    driver.descriptor(TABLE, 4, (0x8000, 48, INDIRECT, 0));
    driver.offer(4);
    driver.serve().unwrap();
    assert_eq!(driver.bytes(DATA, 512), [5; 512]);
    assert_eq!(driver.bytes(DATA + 512, 1), [OK]);
    assert_eq!(driver.used(), [(4, 513)]);
}

#[test]
fn what_a_disk_cannot_do_is_an_error_of_the_request_only() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    let end = (1 << 20) / 512;
    for (kind, sector, len, want) in [
        (virtio_blk::VIRTIO_BLK_T_IN, end, 512, IOERR),
        (virtio_blk::VIRTIO_BLK_T_IN, u64::MAX, 512, IOERR),
        (virtio_blk::VIRTIO_BLK_T_IN, 0, 100, IOERR),
        (virtio_blk::VIRTIO_BLK_T_GET_ID, 0, 19, IOERR),
        (0x77, 0, 512, UNSUPP),
        (virtio_blk::VIRTIO_BLK_T_GET_ID, 0, 20, OK),
    ] {
        assert_eq!(driver.ask(kind, sector, (DATA, len, true)), want, "kind {kind} sector {sector}");
    }
    assert_eq!(driver.bytes(DATA, 20), *b"a-serial-number-of-m");
    assert!(disk.log.lock().unwrap().is_empty());
}

#[test]
fn a_read_only_disk_refuses_writes_and_offers_nothing_that_changes_it() {
    let mut disk = Memory::new(1 << 20);
    disk.geometry.read_only = true;
    let mut driver = Driver::new(&disk);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_OUT, 0, (DATA, 512, false)), IOERR);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_DISCARD, 0, (DATA, 16, false)), UNSUPP);
    assert!(disk.log.lock().unwrap().is_empty());
}

#[test]
fn discard_and_write_zeroes_take_ranges() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let two = [range(2, 1, 0), range(8, 4, 0)].concat();
    driver.memory.write_slice(&two, GuestAddress(DATA)).unwrap();
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_DISCARD, 0, (DATA, 32, false)), OK);
    driver.memory.write_slice(&range(1, 1, 1), GuestAddress(DATA)).unwrap();
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, (DATA, 16, false)), OK);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_DISCARD, 0, (DATA, 16, false)), IOERR);
    driver.memory.write_slice(&range(4000, 1, 0), GuestAddress(DATA)).unwrap();
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, (DATA, 16, false)), IOERR);
    // The disk finishes the newest first.
    assert_eq!(*disk.log.lock().unwrap(), ["discard 4096+2048", "discard 1024+512", "zero 512+512 true"]);
}

#[test]
fn without_the_flush_feature_a_write_is_flushed_before_it_is_answered() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    driver.device.set_acked(1 << VIRTIO_F_VERSION_1);
    assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_OUT, 1, (DATA, 512, false)), OK);
    assert_eq!(*disk.log.lock().unwrap(), ["write 512+512", "flush"]);
}

#[test]
fn a_broken_chain_fails_the_device_until_it_is_reset() {
    for break_it in [
        |d: &Driver| d.descriptor(TABLE, 2, (0x5000, 1, WRITE | NEXT, 99)),
        |d: &Driver| d.descriptor(TABLE, 2, (0x5000, 1, NEXT | WRITE, 0)),
        |d: &Driver| d.descriptor(TABLE, 2, (0x5000, 1, 0, 0)),
        |d: &Driver| d.descriptor(TABLE, 0, (0x4000, 15, 0, 0)),
        |d: &Driver| d.descriptor(TABLE, 1, (0xffff_0000, 512, WRITE | NEXT, 2)),
        |d: &Driver| d.descriptor(TABLE, 0, (0x8000, 17, INDIRECT, 0)),
    ] {
        let disk = Memory::new(1 << 20);
        let mut driver = Driver::new(&disk);
        driver.header(0x4000, virtio_blk::VIRTIO_BLK_T_IN, 0);
        driver.descriptor(TABLE, 0, (0x4000, 16, NEXT, 1));
        driver.descriptor(TABLE, 1, (DATA, 512, WRITE | NEXT, 2));
        driver.descriptor(TABLE, 2, (0x5000, 1, WRITE, 0));
        break_it(&driver);
        driver.offer(0);
        driver.serve().unwrap_err();
        driver.serve().unwrap_err();
        assert!(disk.log.lock().unwrap().is_empty());
        driver.device.reset();
        assert_eq!(driver.ask(virtio_blk::VIRTIO_BLK_T_IN, 0, (DATA, 512, true)), OK);
    }
}

#[test]
fn an_available_index_beyond_the_ring_is_a_fault() {
    let disk = Memory::new(1 << 20);
    let mut driver = Driver::new(&disk);
    driver.memory.write_slice(&200u16.to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
    driver.serve().unwrap_err();
}

#[test]
fn the_configuration_space_says_what_the_volume_is() {
    let disk = Memory::new(1 << 20);
    let space = Block::new(&disk, "", 4).unwrap().config();
    assert_eq!(space[..8], 2048u64.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    // 4096 preferred = 2³ blocks of 512.
    assert_eq!(space[24], 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_descriptor_table_makes_the_device_panic_or_lose_count(
        table in prop::collection::vec((0u64..0x0012_0000, 0u32..0x2_0000, 0u16..8, 0u16..18), 16),
        indirect in prop::collection::vec((0u64..0x0012_0000, 0u32..2000, 0u16..8, 0u16..6), 4),
        heads in prop::collection::vec(0u16..18, 1..16),
        kind in 0u32..16, sector in 0u64..3000,
    ) {
        let disk = Memory::new(1 << 20);
        let mut driver = Driver::new(&disk);
        driver.header(0x4000, kind, sector);
        for (i, (at, len, flags, next)) in table.into_iter().enumerate() {
            // Every other descriptor starts like a real request, so that chains get past their header.
            let (at, len, flags) = if i % 2 == 0 { (0x4000, 16, flags & !INDIRECT & !WRITE) } else { (at, len, flags) };
            let at = if flags & INDIRECT != 0 { 0x8000 } else { at.max(0x4000) };
            driver.descriptor(TABLE, u16::try_from(i).unwrap(), (at, len, flags, next));
        }
        for (i, part) in indirect.into_iter().enumerate() {
            driver.descriptor(0x8000, u16::try_from(i).unwrap(), part);
        }
        let offered = heads.len();
        for head in heads {
            driver.offer(head);
        }
        for _ in 0..3 {
            let _ = driver.serve();
        }
        prop_assert!(driver.device.in_flight() <= offered);
        prop_assert_eq!(driver.device.outstanding(), 0);
        prop_assert_eq!(driver.device.bounced, 0);
    }
}
