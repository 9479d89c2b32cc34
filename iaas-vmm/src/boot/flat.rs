//! A flat image.

use iaas_core::Error;
use iaas_core::Result;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use crate::arch::Entry;
use crate::arch::layout;

pub(super) fn load(memory: &GuestMemoryMmap, code: &[u8], at: u64) -> Result<Entry> {
    if at < layout::KERNEL {
        return Err(Error::invalid(format!("a flat image at {at:#x} lies on the machine's own tables"))
            .remedy("place it at 1 MiB or above"));
    }
    if code.is_empty() {
        return Err(Error::invalid("a flat image without a byte of code"));
    }
    memory.write_slice(code, GuestAddress(at)).map_err(|e| super::does_not_fit(&e))?;
    Ok(Entry::Long { at, rsi: 0 })
}
