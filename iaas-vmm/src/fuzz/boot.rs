//! What a machine starts with: kernels of both kinds and flat images, command lines, initrds, memories.

use iaas_core::ErrorKind;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

use super::Input;
use crate::arch::Entry;
use crate::arch::layout;
use crate::boot::Boot;

/// An image with what goes with it, loaded.
pub fn boot(input: &[u8]) {
    let mut input = Input(input);
    let how = input.byte();
    let memory = memory(input.byte());
    if how & 1 != 0 {
        let at = input.quad() >> (how >> 2 & 0x38);
        return flat(&memory, input.0, at);
    }
    let line = "x".repeat(usize::from(input.word() & 0xfff));
    let len = usize::from(input.word()) << (how >> 4 & 7);
    let initrd: Option<Vec<u8>> = (how & 2 != 0).then(|| (0..251).cycle().take(len).collect());
    let mut boot = Boot::kernel(input.0.to_vec()).with_command_line(line.clone());
    if let Some(initrd) = &initrd {
        boot = boot.with_initrd(initrd.clone());
    }
    match boot.load(&memory, RSDP) {
        Ok(entry) => {
            check_line(&memory, &line);
            match entry {
                Entry::Long { at, rsi } => check_linux(&memory, at, rsi, line.len(), initrd.as_deref()),
                Entry::Protected { at, rbx } => check_pvh(&memory, at, rbx, initrd.as_deref()),
            }
        }
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unavailable), "{error:?}")
        }
    }
}

fn memory(how: u8) -> GuestMemoryMmap {
    let low = (GuestAddress(0), [2, 3, 4, 16][usize::from(how & 3)] << 20);
    let high = (GuestAddress(layout::HIGH_MEMORY), 2 << 20);
    GuestMemoryMmap::from_ranges(&[low, high][..1 + usize::from(how >> 2 & 1)]).unwrap()
}

fn flat(memory: &GuestMemoryMmap, code: &[u8], at: u64) {
    if let Ok(entry) = Boot::flat(code, at).load(memory, RSDP) {
        assert_eq!(entry, Entry::Long { at, rsi: 0 });
        assert!(at >= layout::KERNEL);
        assert!(memory.address_in_range(GuestAddress(at)), "it begins at {at:#x}, where there is no memory");
        assert_eq!(bytes(memory, at, code.len()), code);
    }
}

fn check_line(memory: &GuestMemoryMmap, line: &str) {
    let kept = bytes(memory, layout::COMMAND_LINE, line.len() + 1);
    assert_eq!(kept, [line.as_bytes(), &[0]].concat(), "the command line was written over");
}

/// What the kernel finds in its zero page.
fn check_linux(memory: &GuestMemoryMmap, at: u64, page: u64, line: usize, initrd: Option<&[u8]>) {
    assert!(memory.address_in_range(GuestAddress(at)));
    assert_eq!(long(memory, page + 0x202), 0x5372_6448);
    assert_eq!(u64::from(long(memory, page + 0x228)), layout::COMMAND_LINE);
    assert_eq!(usize::try_from(long(memory, page + 0x238)).unwrap(), line);
    let (at, len) = (long(memory, page + 0x218), long(memory, page + 0x21c));
    if let Some(initrd) = initrd {
        assert_eq!(usize::try_from(len).unwrap(), initrd.len());
        let highest = u64::from(long(memory, page + 0x22c));
        assert!(u64::from(at) + u64::from(len) <= highest + 1, "an initrd above {highest:#x}");
        check_initrd(memory, at.into(), initrd);
    }
    let count = u64::from(bytes(memory, page + 0x1e8, 1)[0]);
    let ranges = (0..count).map(|n| page + 0x2d0 + n * 20);
    check_map(
        memory,
        ranges.map(|at| (quad(memory, at), quad(memory, at + 8), long(memory, at + 16))).collect(),
    );
}

/// What the kernel finds in its start information.
fn check_pvh(memory: &GuestMemoryMmap, at: u64, info: u64, initrd: Option<&[u8]>) {
    assert!(at >= layout::KERNEL, "it begins at {at:#x}, in the machine's own tables");
    assert!(memory.address_in_range(GuestAddress(at)), "it begins at {at:#x}, where there is no memory");
    assert_eq!(long(memory, info), 0x336e_c578);
    assert_eq!(quad(memory, info + 24), layout::COMMAND_LINE);
    assert_eq!(long(memory, info + 12), u32::from(initrd.is_some()));
    if let Some(initrd) = initrd {
        let module = quad(memory, info + 16);
        assert_eq!(quad(memory, module + 8), u64::try_from(initrd.len()).unwrap());
        check_initrd(memory, quad(memory, module), initrd);
    }
    let (map, count) = (quad(memory, info + 40), u64::from(long(memory, info + 48)));
    let ranges = (0..count).map(|n| map + n * 24);
    check_map(
        memory,
        ranges.map(|at| (quad(memory, at), quad(memory, at + 8), long(memory, at + 16))).collect(),
    );
}

fn check_initrd(memory: &GuestMemoryMmap, at: u64, initrd: &[u8]) {
    assert!(at >= layout::KERNEL, "an initrd at {at:#x}, in the machine's own tables");
    assert_eq!(bytes(memory, at, initrd.len()), initrd, "an initrd that was written over");
}

/// Ranges in order that do not meet, and memory only where there is some.
fn check_map(memory: &GuestMemoryMmap, map: Vec<(u64, u64, u32)>) {
    assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
    for (at, len, _) in map.into_iter().filter(|(.., kind)| *kind == 1) {
        for end in [at, at + len - 1] {
            assert!(memory.address_in_range(GuestAddress(end)), "no memory at {end:#x}");
        }
    }
}

fn bytes(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    memory.read_slice(&mut out, GuestAddress(at)).unwrap();
    out
}

fn long(memory: &GuestMemoryMmap, at: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, at, 4).try_into().unwrap())
}

fn quad(memory: &GuestMemoryMmap, at: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, at, 8).try_into().unwrap())
}

const RSDP: u64 = layout::ACPI;
