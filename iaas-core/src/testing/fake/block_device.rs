//! The fake's disk: bytes in memory behind a volatile write cache, with one writer by term.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;

use super::world::lock;
use crate::Error;
use crate::Result;
use crate::Term;
use crate::spi::block::FreezeReceipt;
use crate::spi::block::FreezeTicket;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOp;
use crate::spi::dataplane::BlockQueue;
use crate::spi::dataplane::Geometry;
use crate::spi::dataplane::IoBuffers;
use crate::spi::dataplane::at_once;
use crate::spi::dataplane::at_once::AtOnce;

const BLOCK: u32 = 512;
const BLOCK_BYTES: usize = 512;

type Blocks = BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>;

/// The durable part of a volume.
#[derive(Debug, Default)]
pub struct Disk(Mutex<Durable>);

#[derive(Debug, Default)]
struct Durable {
    blocks: Blocks,
    size: u64,
    writer: Term,
    gone: bool,
}

impl Disk {
    pub(super) fn size(&self) -> u64 {
        lock(&self.0).size
    }
    pub(super) fn used(&self) -> u64 {
        lock(&self.0).blocks.len() as u64 * u64::from(BLOCK)
    }
    pub(super) fn writer(&self) -> Term {
        lock(&self.0).writer
    }
    pub(super) fn grow(&self, size: u64) {
        let mut durable = lock(&self.0);
        durable.size = durable.size.max(size);
    }
    pub(super) fn destroy(&self) {
        *lock(&self.0) = Durable { gone: true, ..Durable::default() };
    }
    /// Keeps every writer below `below` out.
    pub(super) fn fence(&self, below: Term) {
        let mut durable = lock(&self.0);
        durable.writer = durable.writer.max(below);
    }
    pub(super) fn open(self: &Arc<Self>, read_only: bool) -> Result<FakeDevice> {
        if lock(&self.0).gone {
            return Err(Error::not_found("the volume is gone"));
        }
        let cache = Mutex::new(Cache { term: None, dirty: Blocks::new() });
        Ok(FakeDevice(Arc::new(Open { disk: self.clone(), cache, read_only })))
    }
}

/// A volume of a fake pool, opened.
#[derive(Debug)]
pub struct FakeDevice(Arc<Open>);

#[derive(Debug)]
struct Open {
    disk: Arc<Disk>,
    cache: Mutex<Cache>,
    read_only: bool,
}

/// What this writer has written and not flushed.
#[derive(Debug)]
struct Cache {
    term: Option<Term>,
    dirty: Blocks,
}

impl BlockDevice for FakeDevice {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn open_queue(&self, depth: u16) -> Result<Box<dyn BlockQueue>> {
        at_once::queue(&self.0, depth)
    }

    fn claim(&self, term: Term) -> Result<()> {
        let mut durable = lock(&self.0.disk.0);
        if term < durable.writer {
            return Err(Error::fenced(format!("writer {} has claimed the volume", durable.writer)));
        }
        durable.writer = term;
        lock(&self.0.cache).term = Some(term);
        Ok(())
    }

    fn release(&self) -> Result<()> {
        self.0.flush().map_err(|e| Error::fenced("the last flush was refused").because(&e))?;
        lock(&self.0.cache).term = None;
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<()> {
        at_once::resize(&*self.0, size)
    }

    fn freeze(&self, ticket: &FreezeTicket) -> Result<FreezeReceipt> {
        self.0.flush().map_err(|e| Error::fenced("the flush was refused").because(&e))?;
        Ok(FreezeReceipt(ticket.0.clone()))
    }
}

impl AtOnce for Open {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.disk.size(),
            block: BLOCK,
            preferred: 4096,
            max_bytes: 1 << 20,
            read_only: self.read_only,
            discard: true,
            write_zeroes: true,
        }
    }

    fn run(&self, op: &BlockOp) -> io::Result<()> {
        match op {
            BlockOp::Read { at, into } => self.read(*at, into),
            BlockOp::Write { at, from } => self.write(*at, from),
            BlockOp::Flush => self.flush(),
            BlockOp::Discard { at, len } | BlockOp::WriteZeroes { at, len, .. } => self.zero(*at, *len),
        }
    }
}

impl Open {
    /// Makes the cache durable, if its writer is still the one.
    fn flush(&self) -> io::Result<()> {
        let mut durable = lock(&self.disk.0);
        let mut cache = lock(&self.cache);
        if durable.gone {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the volume is gone"));
        }
        if cache.term.is_some_and(|term| term < durable.writer) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "a newer writer has claimed the volume",
            ));
        }
        for (at, block) in std::mem::take(&mut cache.dirty) {
            if block.iter().all(|b| *b == 0) {
                durable.blocks.remove(&at);
            } else {
                durable.blocks.insert(at, block);
            }
        }
        Ok(())
    }

    fn read(&self, at: u64, into: &IoBuffers) -> io::Result<()> {
        let durable = lock(&self.disk.0);
        let cache = lock(&self.cache);
        let mut offset = 0;
        for block in span(at, into.len() as u64) {
            let bytes = cache.dirty.get(&block).or_else(|| durable.blocks.get(&block));
            into.write_at(offset, bytes.map_or(&[0; BLOCK_BYTES], |b| &**b));
            offset += BLOCK_BYTES;
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &IoBuffers) -> io::Result<()> {
        let blocks = self.writable(at, from.len() as u64)?;
        let mut cache = lock(&self.cache);
        let mut offset = 0;
        for block in blocks {
            let mut bytes = Box::new([0; BLOCK_BYTES]);
            from.read_at(offset, &mut bytes[..]);
            cache.dirty.insert(block, bytes);
            offset += BLOCK_BYTES;
        }
        Ok(())
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        let blocks = self.writable(at, len)?;
        let used: Vec<u64> = {
            let durable = lock(&self.disk.0);
            let mut cache = lock(&self.cache);
            cache.dirty.retain(|block, _| !blocks.contains(block));
            durable.blocks.range(blocks).map(|(block, _)| *block).collect()
        };
        let mut cache = lock(&self.cache);
        cache.dirty.extend(used.into_iter().map(|block| (block, Box::new([0; BLOCK_BYTES]))));
        Ok(())
    }

    fn writable(&self, at: u64, len: u64) -> io::Result<std::ops::Range<u64>> {
        if lock(&self.cache).term.is_none() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "no writer has claimed it here"));
        }
        Ok(span(at, len))
    }
}

/// The blocks of a range that fits the device.
fn span(at: u64, len: u64) -> std::ops::Range<u64> {
    at / u64::from(BLOCK)..(at + len) / u64::from(BLOCK)
}
