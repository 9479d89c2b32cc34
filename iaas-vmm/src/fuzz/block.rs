//! A disk: a driver's requests and rings against a volume that finishes when, and as, the input says.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::Result;
use iaas_core::Term;
use iaas_core::spi::block::FreezeReceipt;
use iaas_core::spi::block::FreezeTicket;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::Geometry;
use iaas_core::spi::dataplane::IoBuffers;
use nix::sys::eventfd::EventFd;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Input;
use super::guest::Guest;
use super::guest::Subject;
use super::guest::lock;
use super::guest::run;
use super::guest::spans;
use super::walk;
use super::walk::Walk;
use crate::virtio::block::Block;

/// A driver of a disk.
pub fn block(input: &[u8]) {
    let mut input = Input(input);
    let mut disk = Disk::new(&mut input);
    let device = Block::new(&disk, "a-serial-number", disk.depth()).unwrap();
    run(Guest::new(Box::new(device)), &mut disk, &mut input);
}

/// A volume in memory.
#[derive(Clone, Debug)]
pub(super) struct Disk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    geometry: Geometry,
    depth: u16,
    bytes: Vec<u8>,
    /// Ends each operation when it is reaped.
    at_once: bool,
    /// How many of the next operations fail.
    failing: u8,
    waiting: Vec<(u64, BlockOp)>,
    done: Vec<BlockDone>,
    /// What the driver has asked to be changed.
    permitted: Vec<(u64, u64)>,
    anything: bool,
}

impl Disk {
    pub(super) fn new(input: &mut Input<'_>) -> Self {
        let how = input.byte();
        let geometry = Geometry {
            size: SIZE,
            block: if how & 1 == 0 { 512 } else { 4096 },
            preferred: 4096,
            max_bytes: [4096, 16 << 10, 1 << 20, 1 << 10][usize::from(how >> 1 & 3)],
            read_only: how & 0x18 == 0x18,
            discard: how & 0x20 == 0,
            write_zeroes: how & 0x40 == 0,
        };
        let depth = 1 + u16::from(input.byte() % 32);
        let bytes = vec![0x5d; usize::try_from(SIZE).unwrap()];
        let state = State {
            geometry,
            depth,
            bytes,
            at_once: how & 0x80 == 0,
            failing: 0,
            waiting: Vec::new(),
            done: Vec::new(),
            permitted: Vec::new(),
            anything: false,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    pub(super) fn depth(&self) -> u16 {
        lock(&self.0).depth
    }

    pub(super) fn permit_all(&self) {
        lock(&self.0).anything = true;
    }

    pub(super) fn finish_all(&self) {
        lock(&self.0).finish_all();
    }
}

impl State {
    fn finish_all(&mut self) {
        while !self.waiting.is_empty() {
            self.finish(0);
        }
    }

    /// Ends the operation in place `n`.
    fn finish(&mut self, n: usize) {
        let (tag, op) = self.waiting.remove(n);
        let fails = self.failing > 0;
        self.failing = self.failing.saturating_sub(1);
        let result = if fails { Err(io::Error::other("a broken disk")) } else { Ok(()) };
        let buffers = self.run(op, fails);
        self.done.push(BlockDone { tag, result, buffers });
    }

    fn run(&mut self, op: BlockOp, fails: bool) -> Option<IoBuffers> {
        match op {
            BlockOp::Read { at, into } => {
                let range = self.range(at, into.len());
                if !fails {
                    into.write_at(0, &self.bytes[range]);
                }
                Some(into)
            }
            BlockOp::Write { at, from } => {
                let range = self.changing(at, from.len());
                if !fails {
                    from.read_at(0, &mut self.bytes[range]);
                }
                Some(from)
            }
            BlockOp::Flush => None,
            BlockOp::Discard { at, len } => {
                assert!(self.geometry.discard, "a discard that was not offered");
                let range = self.changing(at, usize::try_from(len).unwrap());
                self.bytes[range].fill(0);
                None
            }
            BlockOp::WriteZeroes { at, len, .. } => {
                assert!(self.geometry.write_zeroes, "a write of zeroes that was not offered");
                let range = self.changing(at, usize::try_from(len).unwrap());
                self.bytes[range].fill(0);
                None
            }
        }
    }

    /// The bytes of an operation, which must keep to the volume's shape.
    fn range(&self, at: u64, len: usize) -> std::ops::Range<usize> {
        let (at, block) = (usize::try_from(at).unwrap(), usize::try_from(self.geometry.block).unwrap());
        assert!(at.is_multiple_of(block) && len.is_multiple_of(block), "{at}+{len} is not made of blocks");
        assert!(at + len <= self.bytes.len(), "{at}+{len} is not on the disk");
        at..at + len
    }

    /// As [`range`](Self::range); and the driver must have asked for it.
    fn changing(&self, at: u64, len: usize) -> std::ops::Range<usize> {
        assert!(!self.geometry.read_only, "a disk that is read only was changed");
        let end = at + u64::try_from(len).unwrap();
        let asked = self.permitted.iter().any(|(from, to)| *from <= at && end <= *to);
        assert!(asked || self.anything, "nobody asked to change {at}+{len}");
        self.range(at, len)
    }

    fn permit(&mut self, sector: u64, len: u64) {
        if let Some(at) = sector.checked_mul(512) {
            self.permitted.push((at, at.saturating_add(len)));
        }
    }
}

impl Subject for Disk {
    fn request(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let (kind, sector, how) = (input.byte(), input.byte(), input.byte());
        let kind = [0, 1, 4, 8, 11, 13, 0, 1, u32::from(kind)][usize::from(kind) % 9];
        // On the disk in most cases.
        let sector = if how & 8 == 0 { u64::from(sector % 128) } else { u64::from(sector) << (how >> 3) };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut all = vec![(guest.header(&header), 16, false)];
        let trims = matches!(kind, 11 | 13);
        if trims {
            let mut part = [u64::from(input.byte()).to_le_bytes(), [0; 8]].concat();
            part[8] = input.byte();
            part[12] = how & 1;
            all.push((guest.header(&part), 16, false));
        } else {
            let writes = matches!(kind, 0 | 8) ^ (how & 0xe0 == 0xe0);
            // Whole blocks in most cases.
            let whole = |len: u32| if how & 4 == 0 { len & !0xfff } else { len };
            all.extend(spans(input, 4).into_iter().map(|(at, len)| (at, whole(len), writes)));
        }
        let status = if how & 2 == 0 { guest.header(&[0xff; 16]) } else { super::guest::address(input) };
        all.push((status, 1, true));
        guest.offer(0, &all, how);
    }

    fn event(&mut self, input: &mut Input<'_>) {
        let mut state = lock(&self.0);
        match input.below(8) {
            0 => state.at_once = !state.at_once,
            1 => state.failing = input.byte() % 4,
            _ if state.waiting.is_empty() => {}
            _ => {
                let n = input.below(state.waiting.len());
                state.finish(n);
            }
        }
    }

    fn finish_all(&mut self) {
        Self::finish_all(self);
    }

    fn anything_goes(&mut self) {
        self.permit_all();
    }

    fn offered(&mut self, _: usize, chain: &Walk, memory: &GuestMemoryMmap) {
        let mut state = lock(&self.0);
        let mut header = [0; 16];
        if !walk::copy(memory, &chain.readable, &mut header) {
            return;
        }
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let len = walk::length(&chain.readable) - 16;
        match header[0] {
            1 => state.permit(sector, len),
            11 | 13 if len <= 1 << 16 => {
                let mut parts = vec![0; usize::try_from(16 + len).unwrap()];
                walk::copy(memory, &chain.readable, &mut parts);
                for part in parts[16..].chunks_exact(16) {
                    let count = u32::from_le_bytes(part[8..12].try_into().unwrap());
                    state.permit(u64::from_le_bytes(part[..8].try_into().unwrap()), u64::from(count) * 512);
                }
            }
            _ => {}
        }
    }

    fn judge(&self, _: usize, chain: &Walk, memory: &GuestMemoryMmap, _: u64) -> Option<bool> {
        let whole = walk::length(&chain.readable) >= 16 && walk::length(&chain.writable) >= 1;
        let inside = walk::is_memory(memory, &chain.readable) && walk::is_memory(memory, &chain.writable);
        match (whole, inside) {
            _ if chain.parts() > 132 => Some(false),
            (false, _) => Some(false),
            // Memory that is not there need not be touched for every kind of request.
            (true, false) => None,
            (true, true) => Some(true),
        }
    }

    fn answered(&self, chain: &Walk, memory: &GuestMemoryMmap) {
        let last = chain.writable.iter().rev().find(|(_, len)| *len > 0);
        let (at, len) = last.unwrap();
        let status: u8 = memory.read_obj(GuestAddress(at + u64::from(*len) - 1)).unwrap();
        assert!(status <= 2, "an answer without a status: {status:#x}");
    }

    fn taken_at_once(&self) -> usize {
        256
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        lock(&self.0).geometry
    }
    fn open_queue(&self, _: u16) -> Result<Box<dyn BlockQueue>> {
        Ok(Box::new(Queue(self.clone(), EventFd::new().unwrap())))
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
struct Queue(Disk, EventFd);

impl BlockQueue for Queue {
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp> {
        let mut state = lock(&self.0.0);
        if state.waiting.len() >= state.depth.into() {
            return Err(op);
        }
        let most = usize::try_from(state.geometry.max_bytes.max(state.geometry.block)).unwrap();
        if let BlockOp::Read { into: buffers, .. } | BlockOp::Write { from: buffers, .. } = &op {
            assert!((1..=most).contains(&buffers.len()), "an operation of {} bytes", buffers.len());
        }
        state.waiting.push((tag, op));
        Ok(())
    }
    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        let mut state = lock(&self.0.0);
        if state.at_once {
            state.finish_all();
        }
        let count = state.done.len();
        out.append(&mut state.done);
        count
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
}

const SIZE: u64 = 64 << 10;
