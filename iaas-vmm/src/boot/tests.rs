//! Images that are no kernels, and how memory is described.

use proptest::prelude::*;

use super::*;

fn memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

#[test]
fn the_map_leaves_out_what_is_not_memory() {
    let memory = crate::memory::guest::allocate(5 << 30).unwrap();
    let map = memory_map(&memory);
    let usable: u64 = map.iter().filter(|(.., kind)| *kind == MEMORY).map(|(_, len, _)| len).sum();
    // All but the 385 KiB between the extended BIOS data and 1 MiB.
    assert_eq!(usable, (5 << 30) - (0x10_0000 - 0x9_fc00));
    assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
    assert_eq!(low_memory_end(&memory), 3 << 30);
}

#[test]
fn what_is_no_kernel_is_refused_with_a_remedy() {
    for image in [&b""[..], b"\x7fELF", &[0; 4096], b"#!/bin/sh\n"] {
        let error = Boot::kernel(image.to_vec()).load(&memory(4), 0).unwrap_err();
        assert!(matches!(error.kind(), iaas_core::ErrorKind::Invalid | iaas_core::ErrorKind::Unavailable));
    }
    let long = Boot::kernel(vec![0; 4096]).with_command_line("x".repeat(2048));
    assert!(long.load(&memory(4), 0).unwrap_err().what_to_do().unwrap().contains("2047"));
    assert!(Boot::flat([0xf4], 0x1000).load(&memory(4), 0).is_err());
    assert!(Boot::flat([0xf4], 4 << 20).load(&memory(4), 0).is_err());
}

#[test]
fn an_initrd_lies_at_the_end_and_never_on_its_kernel() {
    let memory = memory(8);
    let initrd = || Some(Image::from(vec![7u8; 5000]));
    let (at, len) = place_initrd(&memory, initrd(), 1 << 20, u64::MAX).unwrap().unwrap();
    assert_eq!((at, len), ((8 << 20) - 0x2000, 5000));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(at + 4999)).unwrap(), 7);
    assert!(place_initrd(&memory, initrd(), (8 << 20) - 0x1000, u64::MAX).is_err());
    let (at, _) = place_initrd(&memory, initrd(), 0, 0x3000).unwrap().unwrap();
    assert_eq!(at, 0x1000);
}

proptest! {
    /// Headers that say anything at all end in an answer.
    #[test]
    fn no_header_makes_the_loader_panic(bytes in prop::collection::vec(any::<u8>(), 64..2048), elf: bool) {
        let mut bytes = bytes;
        if elf {
            bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        } else if bytes.len() > 0x206 {
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
        }
        let _ = Boot::kernel(bytes).load(&memory(2), 0);
    }
}
