//! Guest memory as it leaves `vm-memory`: ranges of a descriptor become [`IoBuffers`] that keep the memory mapped.
//!
//! The only unsafe code of the device side. What the guest says about addresses is checked by `vm-memory` before a range
//! exists; what it does with the bytes meanwhile is its own affair, because nobody here makes a reference to them.

#![expect(unsafe_code, reason = "guest memory crosses the data-plane seam as raw ranges")]

#[cfg(feature = "kvm")]
pub(crate) mod guest;

use std::sync::Arc;

use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::buffer::IoRange;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

/// A stretch of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first byte.
    pub at: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// The host's ranges behind `spans`, in order, or `None` if a byte of them is not guest memory.
///
/// A span that crosses regions becomes several ranges.
pub fn host_ranges(memory: &GuestMemoryMmap, spans: &[Span]) -> Option<Vec<IoRange>> {
    let mut ranges = Vec::with_capacity(spans.len());
    for span in spans.iter().filter(|span| span.len > 0) {
        let len = usize::try_from(span.len).ok()?;
        let mut found = 0;
        for slice in memory.get_slices(span.at, len) {
            let slice = slice.ok()?;
            found += slice.len();
            ranges.push(IoRange { base: slice.ptr_guard_mut().as_ptr(), len: slice.len() });
        }
        if found != len {
            return None;
        }
    }
    Some(ranges)
}

/// Buffers over `ranges`, which [`host_ranges`] found in `memory`.
///
/// Ranges that do not lie in `memory` are left out, so that no caller can make buffers over anything else.
pub fn buffers(memory: &Arc<GuestMemoryMmap>, ranges: Vec<IoRange>) -> IoBuffers {
    let inside: Vec<IoRange> = ranges.into_iter().filter(|range| contains(memory, range)).collect();
    // SAFETY: each range lies inside a region that `memory` maps readable and writable, as just checked; `memory` is the
    // owner, so the mapping lives as long as the buffers. Guest memory is never borrowed as a Rust reference: `vm-memory`
    // and `IoBuffers` copy through raw pointers.
    unsafe { IoBuffers::from_raw(inside, memory.clone()) }
}

/// Whether `range` lies inside one mapped region of `memory`.
fn contains(memory: &GuestMemoryMmap, range: &IoRange) -> bool {
    memory.iter().any(|region| {
        let first = region.as_ptr().addr();
        let Some(offset) = range.base.addr().checked_sub(first) else { return false };
        offset.checked_add(range.len).is_some_and(|end| end <= region.size())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> Arc<GuestMemoryMmap> {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn a_span_may_cross_regions_but_not_leave_memory() {
        let memory = two_regions();
        let across = Span { at: GuestAddress(0xff0), len: 0x20 };
        let ranges = host_ranges(&memory, &[across]).unwrap();
        assert_eq!(ranges.iter().map(|r| r.len).sum::<usize>(), 0x20);
        for (at, len) in [(0x1ff0, 0x20), (0x2000, 1), (u64::MAX, 2), (0, u32::MAX)] {
            assert_eq!(host_ranges(&memory, &[Span { at: GuestAddress(at), len }]), None, "{at:#x}+{len:#x}");
        }
    }

    #[test]
    fn buffers_hold_nothing_but_guest_memory() {
        let memory = two_regions();
        let own = IoBuffers::zeroed(16);
        assert!(buffers(&memory, own.ranges().to_vec()).is_empty());
        let mut ranges = host_ranges(&memory, &[Span { at: GuestAddress(0x10), len: 16 }]).unwrap();
        assert_eq!(buffers(&memory, ranges.clone()).len(), 16);
        ranges[0].len = 1 << 40;
        assert!(buffers(&memory, ranges).is_empty());
    }
}
