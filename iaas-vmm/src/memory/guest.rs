//! The memory of a machine: one region below the hole for devices, and one above it if there is more.

use iaas_core::Error;
use iaas_core::Outcome;
use iaas_core::Result;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use crate::arch::layout;

/// Maps `size` bytes, all zero. The host's memory is taken page by page as the guest touches it.
///
/// # Errors
/// `Unavailable`: the host has no address space for it.
pub(crate) fn allocate(size: u64) -> Result<GuestMemoryMmap> {
    let regions = regions(size);
    let ranges = regions
        .into_iter()
        .filter(|(_, len)| *len > 0)
        .map(|(at, len)| usize::try_from(len).map(|len| (GuestAddress(at), len)));
    let ranges: Vec<_> = ranges.collect::<Result<_, _>>().map_err(|e| no_room(size, &e))?;
    GuestMemoryMmap::from_ranges(&ranges).map_err(|e| no_room(size, &e))
}

/// Start and length of both regions.
pub(crate) fn regions(size: u64) -> [(u64, u64); 2] {
    let low = size.min(layout::LOW_MEMORY_END);
    [(0, low), (layout::HIGH_MEMORY, size - low)]
}

fn no_room(size: u64, error: &dyn std::error::Error) -> Error {
    Error::unavailable(format!("this host cannot map {size} bytes for a guest"))
        .outcome_is(Outcome::NotDone)
        .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    #[test]
    fn memory_beyond_three_gib_goes_on_above_four() {
        assert_eq!(regions(128 << 20), [(0, 128 << 20), (4 << 30, 0)]);
        assert_eq!(regions(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        let memory = allocate(4 << 30).unwrap();
        assert!(memory.address_in_range(GuestAddress((3 << 30) - 1)));
        assert!(!memory.address_in_range(GuestAddress(3 << 30)));
        assert_eq!(memory.last_addr(), GuestAddress((5 << 30) - 1));
    }
}
