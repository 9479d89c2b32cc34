//! A reader of descriptor chains that shares nothing with the devices' own: what they do is judged by it.

use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

/// A chain as the specification reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Walk {
    pub(super) head: u16,
    pub(super) readable: Vec<(u64, u32)>,
    pub(super) writable: Vec<(u64, u32)>,
    /// Where its descriptors were read.
    pub(super) read_from: Vec<(u64, u64)>,
}

impl Walk {
    pub(super) fn parts(&self) -> usize {
        self.readable.len() + self.writable.len()
    }
}

/// Reads the chain that starts at `head`, or says that it is none.
///
/// # Source
/// virtio 1.2 §2.7.5, §2.7.5.3.
pub(super) fn walk(memory: &GuestMemoryMmap, table: u64, size: u16, head: u16) -> Option<Walk> {
    let mut found = Walk { head, ..Walk::default() };
    let (mut table, mut size, mut index, mut inside) = (table, u32::from(size), u32::from(head), false);
    let (mut steps, mut total) = (0, 0u32);
    loop {
        // A chain with more steps than its table has places goes in circles.
        if index >= size || steps >= size {
            return None;
        }
        let at = table.checked_add(u64::from(index) * 16)?;
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(at)).ok()?;
        found.read_from.push((at, 16));
        let [addr @ .., l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        let (addr, len) = (u64::from_le_bytes(addr), u32::from_le_bytes([l0, l1, l2, l3]));
        let (flags, next) = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([n0, n1]));
        if flags & INDIRECT != 0 {
            if inside || !len.is_multiple_of(16) || len / 16 > u32::from(u16::MAX) {
                return None;
            }
            (table, size, index, steps, inside) = (addr, len / 16, 0, 0, true);
            continue;
        }
        total = total.checked_add(len)?;
        if flags & WRITE != 0 {
            found.writable.push((addr, len));
        } else if found.writable.is_empty() {
            found.readable.push((addr, len));
        } else {
            return None;
        }
        if flags & NEXT == 0 {
            return Some(found);
        }
        (index, steps) = (next.into(), steps + 1);
    }
}

/// Bytes in all.
pub(super) fn length(spans: &[(u64, u32)]) -> u64 {
    spans.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// Whether all bytes are memory.
pub(super) fn is_memory(memory: &GuestMemoryMmap, spans: &[(u64, u32)]) -> bool {
    spans.iter().all(|(at, len)| {
        *len == 0
            || places(*at, *len)
                .is_some_and(|mut all| all.all(|at| memory.address_in_range(GuestAddress(at))))
    })
}

/// One address of each small page that the span touches, and its last.
fn places(at: u64, len: u32) -> Option<impl Iterator<Item = u64>> {
    let last = at.checked_add(u64::from(len) - 1)?;
    Some((at..=last).step_by(0x400).chain([last]))
}

/// The first bytes, as many as `out` takes; says whether there were so many, all of them memory.
pub(super) fn copy(memory: &GuestMemoryMmap, spans: &[(u64, u32)], out: &mut [u8]) -> bool {
    let mut rest = out;
    for (at, len) in spans {
        let len = usize::try_from(*len).unwrap_or(usize::MAX).min(rest.len());
        let (here, after) = rest.split_at_mut(len);
        if len > 0 && memory.read_slice(here, GuestAddress(*at)).is_err() {
            return false;
        }
        rest = after;
    }
    rest.is_empty()
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
