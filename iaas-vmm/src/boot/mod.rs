//! What a machine starts with: a Linux kernel, any ELF kernel with a PVH entry, or a flat image of 64-bit code.

mod flat;
mod linux;
mod pvh;

use std::fs::File;
use std::io;
use std::io::Cursor;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::sync::Arc;

use iaas_core::Error;
use iaas_core::Result;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::PvhBootCapability;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use vm_memory::ReadVolatile;

use crate::arch::Entry;
use crate::arch::layout;

/// The bytes of an image, read once, when the machine is built.
#[derive(Debug)]
pub enum Image {
    /// From a file. It is read from its start, wherever it stands.
    File(File),
    /// From memory.
    Bytes(Arc<[u8]>),
}

impl From<File> for Image {
    fn from(file: File) -> Self {
        Self::File(file)
    }
}

impl From<Vec<u8>> for Image {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

/// What the first processor runs.
#[derive(Debug)]
pub struct Boot(What);

#[derive(Debug)]
enum What {
    Kernel { image: Image, initrd: Option<Image>, command_line: String },
    Flat { code: Vec<u8>, at: u64 },
}

impl Boot {
    /// A kernel: a bzImage of 64 bits, or an ELF image with a PVH entry. Which one it is shows its first bytes.
    pub fn kernel(image: impl Into<Image>) -> Self {
        Self(What::Kernel { image: image.into(), initrd: None, command_line: String::new() })
    }

    /// A flat image of 64-bit code, placed and entered at `at` (bytes, at least 1 MiB): a unikernel, or a test.
    ///
    /// It starts with the low 4 GiB mapped as they are, a stack, and interrupts off.
    pub fn flat(code: impl Into<Vec<u8>>, at: u64) -> Self {
        Self(What::Flat { code: code.into(), at })
    }

    /// Gives the kernel an initial file system. A flat image has none.
    #[must_use]
    pub fn with_initrd(mut self, image: impl Into<Image>) -> Self {
        if let What::Kernel { initrd, .. } = &mut self.0 {
            *initrd = Some(image.into());
        }
        self
    }

    /// Gives the kernel its command line, at most 2047 bytes without a zero. A flat image has none.
    #[must_use]
    pub fn with_command_line(mut self, line: impl Into<String>) -> Self {
        if let What::Kernel { command_line, .. } = &mut self.0 {
            *command_line = line.into();
        }
        self
    }

    /// Puts everything into `memory` and says where to begin. `rsdp` is the root of the ACPI tables.
    ///
    /// # Errors
    /// `Invalid`: an image is no kernel, or does not fit. `Unavailable`: it cannot be read.
    pub(crate) fn load(self, memory: &GuestMemoryMmap, rsdp: u64) -> Result<Entry> {
        match self.0 {
            What::Flat { code, at } => flat::load(memory, &code, at),
            What::Kernel { image, initrd, command_line } => {
                let line = write_command_line(memory, &command_line)?;
                let given = Given { rsdp, line, initrd };
                match image {
                    Image::File(file) => load_kernel(memory, file, given),
                    Image::Bytes(bytes) => load_kernel(memory, Cursor::new(bytes), given),
                }
            }
        }
    }
}

/// What a kernel is told.
#[derive(Debug)]
struct Given {
    rsdp: u64,
    /// Address and length, the final zero not counted.
    line: (u64, u32),
    initrd: Option<Image>,
}

/// Where the initrd lies, and its length.
type Placed = Option<(u64, u64)>;

fn load_kernel<F>(memory: &GuestMemoryMmap, mut image: F, given: Given) -> Result<Entry>
where
    F: Read + ReadVolatile + Seek,
{
    let mut magic = [0; 4];
    image.seek(SeekFrom::Start(0)).and_then(|_| image.read_exact(&mut magic)).map_err(|e| unreadable(&e))?;
    let start = GuestAddress(layout::KERNEL);
    if magic == *b"\x7fELF" {
        pvh::check_segments(&mut image)?;
        let loaded = Elf::load(memory, None, &mut image, Some(start)).map_err(|e| no_kernel(&e))?;
        pvh::enter(memory, &loaded, given)
    } else {
        let loaded = BzImage::load(memory, Some(start), &mut image, None).map_err(|e| no_kernel(&e))?;
        linux::enter(memory, &loaded, given)
    }
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(u64, u32)> {
    let bad = |why: &str| Error::invalid(format!("the kernel's command line {why}"));
    if line.as_bytes().contains(&0) {
        return Err(bad("has a zero byte in it"));
    }
    let len = u32::try_from(line.len()).ok().filter(|len| *len <= COMMAND_LINE_MAX).ok_or_else(|| {
        bad(&format!("has {} bytes", line.len())).remedy(format!("at most {COMMAND_LINE_MAX} fit"))
    })?;
    let bytes = [line.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(layout::COMMAND_LINE)).map_err(|e| does_not_fit(&e))?;
    Ok((layout::COMMAND_LINE, len))
}

/// Puts the initrd as high as it may lie: below `ceiling`, above `floor`.
fn place_initrd(memory: &GuestMemoryMmap, initrd: Option<Image>, floor: u64, ceiling: u64) -> Result<Placed> {
    match initrd {
        None => Ok(None),
        Some(Image::File(file)) => place(memory, file, floor, ceiling).map(Some),
        Some(Image::Bytes(bytes)) => place(memory, Cursor::new(bytes), floor, ceiling).map(Some),
    }
}

fn place<F>(memory: &GuestMemoryMmap, mut image: F, floor: u64, ceiling: u64) -> Result<(u64, u64)>
where
    F: ReadVolatile + Seek,
{
    let len = image.seek(SeekFrom::End(0)).map_err(|e| unreadable(&e))?;
    image.seek(SeekFrom::Start(0)).map_err(|e| unreadable(&e))?;
    let top = low_memory_end(memory).min(ceiling);
    let at = top.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= floor).ok_or_else(|| {
        Error::invalid(format!("an initrd of {len} bytes does not fit beside its kernel"))
            .remedy("give the machine more memory")
    })?;
    let count = usize::try_from(len).map_err(|e| does_not_fit(&e))?;
    memory
        .read_exact_volatile_from(GuestAddress(at), &mut image, count)
        .map_err(|e| Error::unavailable("an initrd could not be read").because(&e))?;
    Ok((at, len))
}

/// The end of the memory below the hole.
fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    memory_map(memory)
        .into_iter()
        .filter(|(at, ..)| *at < layout::LOW_MEMORY_END)
        .fold(0, |end, (at, len, _)| end.max(at + len))
}

/// Start, length and kind of each range that a kernel must know: memory, and what it must leave alone.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    use vm_memory::Address;
    use vm_memory::GuestMemoryBackend;
    use vm_memory::GuestMemoryRegion;
    let mut map = vec![
        (0, layout::EBDA, MEMORY),
        (layout::EBDA, 0xa_0000 - layout::EBDA, RESERVED),
        (layout::ACPI, layout::ACPI_END - layout::ACPI, RESERVED),
        (layout::ECAM, layout::ECAM_SIZE, RESERVED),
    ];
    for region in memory.iter() {
        let (at, end) = (region.start_addr().raw_value(), region.last_addr().raw_value() + 1);
        let at = if at == 0 { layout::KERNEL } else { at };
        map.push((at, end.saturating_sub(at), MEMORY));
    }
    map.retain(|(_, len, _)| *len > 0);
    map.sort_unstable();
    map
}

fn pvh_entry(loaded: &KernelLoaderResult) -> Option<u64> {
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(at) => Some(at.0),
        _ => None,
    }
}

fn no_kernel(error: &dyn std::error::Error) -> Error {
    Error::invalid("an image is not a kernel that this machine can start")
        .remedy("use a bzImage or an ELF kernel with a PVH note, and enough memory for it")
        .because(error)
}

fn unreadable(error: &io::Error) -> Error {
    Error::unavailable("an image could not be read").because(error)
}

fn does_not_fit(error: &dyn std::error::Error) -> Error {
    Error::invalid("an image does not fit into the machine's memory")
        .remedy("give the machine more memory")
        .because(error)
}

/// What Linux keeps of a command line on x86 (`COMMAND_LINE_SIZE`, the final zero not counted).
const COMMAND_LINE_MAX: u32 = 2047;
/// Kinds of ranges, the same numbers in the zero page and for PVH.
const MEMORY: u32 = 1;
const RESERVED: u32 = 2;

#[cfg(test)]
mod tests;
