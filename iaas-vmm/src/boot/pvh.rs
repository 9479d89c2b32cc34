//! PVH: an ELF image whose note names a 32-bit entry.

use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;

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
    if loaded.kernel_end > super::low_memory_end(memory) {
        return Err(Error::invalid("the machine has too little memory for this kernel")
            .remedy(format!("give it more than {} MiB", loaded.kernel_end.div_ceil(1 << 20))));
    }
    if at < layout::KERNEL || at >= loaded.kernel_end {
        return Err(Error::invalid(format!("this kernel begins at {at:#x}, where nothing of it is")));
    }
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

/// Refuses an image that would lie on the machine's own tables, below where kernels go.
///
/// # Source
/// System V ABI, "Program Header" and "ELF Header", of 64 bits.
pub(super) fn check_segments(image: &mut (impl Read + Seek)) -> Result<()> {
    let mut header = [0; 64];
    let cut = |e: io::Error| super::no_kernel(&e);
    image.seek(SeekFrom::Start(0)).and_then(|_| image.read_exact(&mut header)).map_err(cut)?;
    image.seek(SeekFrom::Start(number(&header, 32, 8))).map_err(cut)?;
    for _ in 0..number(&header, 56, 2) {
        let mut segment = [0; 56];
        image.read_exact(&mut segment).map_err(cut)?;
        let (kind, at, len) = (number(&segment, 0, 4), number(&segment, 24, 8), number(&segment, 32, 8));
        if kind == LOAD && len > 0 && at < layout::KERNEL {
            return Err(Error::invalid(format!(
                "a part of this kernel at {at:#x} lies on the machine's own tables"
            ))
            .remedy("link it at 1 MiB or above"));
        }
    }
    Ok(())
}

/// The little-endian number of `len` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let digits = bytes.iter().skip(at).take(len).rev();
    digits.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Writes `value` and gives the address behind it.
fn put<T: ByteValued>(memory: &GuestMemoryMmap, at: u64, value: T) -> Result<u64> {
    memory.write_obj(value, GuestAddress(at)).map_err(|e| super::does_not_fit(&e))?;
    Ok(at + u64::try_from(size_of::<T>()).unwrap_or(u64::MAX))
}

const MAGIC: u32 = 0x336e_c578;
/// A segment that is to be loaded.
const LOAD: u64 = 1;
