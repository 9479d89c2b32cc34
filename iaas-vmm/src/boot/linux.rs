//! Linux's own boot protocol: a bzImage, entered in 64-bit mode with a filled zero page.

use iaas_core::Error;
use iaas_core::Result;
use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Given;
use crate::arch::Entry;
use crate::arch::layout;

/// # Source
/// Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol".
pub(super) fn enter(memory: &GuestMemoryMmap, loaded: &KernelLoaderResult, given: Given) -> Result<Entry> {
    let header = loaded.setup_header.ok_or_else(|| Error::invalid("a kernel without a setup header"))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < WITH_64_BIT_ENTRY || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::invalid("this kernel has no 64-bit entry")
            .remedy("use a kernel for x86-64, version 3.8 or newer"));
    }
    let load = loaded.kernel_load.0;
    let end = room_for(&header, load, loaded.kernel_end)?;
    if end > super::low_memory_end(memory) {
        return Err(Error::invalid("the machine has too little memory for this kernel")
            .remedy(format!("give it more than {} MiB", end.div_ceil(1 << 20))));
    }
    let ceiling = u64::from(header.initrd_addr_max) + 1;
    let initrd = super::place_initrd(memory, given.initrd, end, ceiling)?;
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: given.rsdp, ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low(given.line.0)?;
    page.hdr.cmdline_size = given.line.1;
    if let Some((at, len)) = initrd {
        page.hdr.ramdisk_image = low(at)?;
        page.hdr.ramdisk_size = low(len)?;
    }
    for (place, (addr, size, type_)) in page.e820_table.iter_mut().zip(super::memory_map(memory)) {
        (place.addr, place.size, place.r#type) = (addr, size, type_);
        page.e820_entries += 1;
    }
    memory.write_obj(page, GuestAddress(layout::ZERO_PAGE)).map_err(|e| super::does_not_fit(&e))?;
    Ok(Entry::Long { at: load + ENTRY_64, rsi: layout::ZERO_PAGE })
}

/// The end of what the kernel uses while it unpacks itself.
fn room_for(header: &setup_header, load: u64, loaded_end: u64) -> Result<u64> {
    // A relocatable kernel unpacks itself to where it prefers to be, if that is above where it was put.
    let (preferred, room) = (header.pref_address, u64::from(header.init_size));
    let end = load.max(preferred).checked_add(room);
    end.map(|end| end.max(loaded_end)).ok_or_else(|| Error::invalid("a kernel that wants to be nowhere"))
}

fn low(number: u64) -> Result<u32> {
    u32::try_from(number).map_err(|e| Error::invalid("an initrd of more than 4 GiB").because(&e))
}

/// Version 2.12, the first whose header says whether there is a 64-bit entry.
const WITH_64_BIT_ENTRY: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// The entry's place in the loaded kernel.
const ENTRY_64: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xff;
