//! PVH: an ELF image whose note names a 32-bit entry.

use iaas_core::Error;
use iaas_core::Result;
use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use linux_loader::loader::elf::start_info::hvm_modlist_entry;
use linux_loader::loader::elf::start_info::hvm_start_info;
use vm_memory::ByteValued;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Given;
use crate::arch::Entry;
use crate::arch::layout;

/// # Source
/// Xen `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`.
pub(super) fn enter(memory: &GuestMemoryMmap, loaded: &KernelLoaderResult, given: Given) -> Result<Entry> {
    let at = super::pvh_entry(loaded).ok_or_else(|| {
        Error::invalid("this ELF image has no PVH entry")
            .remedy("use the bzImage, or build the kernel with CONFIG_PVH")
    })?;
    let initrd = super::place_initrd(memory, given.initrd, loaded.kernel_end, layout::LOW_MEMORY_END)?;
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: given.line.0,
        rsdp_paddr: given.rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..Default::default()
    };
    let mut next = layout::PVH_MEMORY_MAP;
    for (addr, size, type_) in super::memory_map(memory) {
        next = put(memory, next, hvm_memmap_table_entry { addr, size, type_, reserved: 0 })?;
        info.memmap_entries += 1;
    }
    if let Some((paddr, size)) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_START_INFO + 0x100;
        put(memory, info.modlist_paddr, hvm_modlist_entry { paddr, size, ..Default::default() })?;
    }
    put(memory, layout::PVH_START_INFO, info)?;
    Ok(Entry::Protected { at, rbx: layout::PVH_START_INFO })
}

/// Writes `value` and gives the address behind it.
fn put<T: ByteValued>(memory: &GuestMemoryMmap, at: u64, value: T) -> Result<u64> {
    memory.write_obj(value, GuestAddress(at)).map_err(|e| super::does_not_fit(&e))?;
    Ok(at + u64::try_from(size_of::<T>()).unwrap_or(u64::MAX))
}

const MAGIC: u32 = 0x336e_c578;
