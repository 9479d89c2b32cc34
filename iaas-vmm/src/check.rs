//! What can never run is refused before anything is made of it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::VmSpec;

/// Refuses a spec that can never be met.
///
/// # Errors
/// `Invalid`: a number or text is out of its bounds. `Unsupported`: something that this hypervisor does not do.
pub(crate) fn spec(spec: &VmSpec) -> Result<()> {
    if !(1..=256).contains(&spec.vcpus) {
        return Err(Error::invalid(format!("a VM of {} vCPUs", spec.vcpus)).remedy("use 1 to 256"));
    }
    if spec.memory == 0 || !spec.memory.is_multiple_of(1 << 20) {
        return Err(Error::invalid(format!("a VM of {} bytes of memory", spec.memory))
            .remedy("use a multiple of 1 MiB"));
    }
    if spec.passport.len() > PASSPORT_MAX {
        return Err(Error::invalid("the passport is too large").remedy("use at most 16 KiB"));
    }
    if spec.lease.is_some() {
        return Err(Error::unsupported("this hypervisor keeps no leases").remedy("leave `lease` out"));
    }
    if spec.metadata.is_some() {
        return Err(Error::unsupported("this hypervisor opens no sealed metadata").remedy("leave it out"));
    }
    let disks = spec.devices.values().filter(|device| matches!(device, Device::Disk { .. })).count();
    let most = PLACES;
    if disks > most || spec.devices.len() - disks > most {
        return Err(Error::invalid("too many devices").remedy(format!("use at most {most} of a kind")));
    }
    origin(&spec.origin)
}

fn origin(origin: &Origin) -> Result<()> {
    match origin {
        Origin::Kernel { cmdline, .. } => {
            let plain = cmdline.bytes().all(|byte| (0x20..0x7f).contains(&byte));
            if cmdline.len() > CMDLINE_MAX || !plain {
                return Err(Error::invalid("the kernel command line is too long or not printable ASCII")
                    .remedy(format!("use at most {CMDLINE_MAX} bytes of printable ASCII")));
            }
            Ok(())
        }
        Origin::Disk => Ok(()),
        Origin::Firmware(_) => Err(Error::unsupported("this hypervisor starts no firmware of your own yet")),
        Origin::Image { .. } => Err(Error::unsupported("this hypervisor has no checkpoints")),
        Origin::Incoming { .. } => Err(Error::unsupported("this hypervisor takes no migrations")),
    }
}

/// Refuses a file that is no kernel for x86-64.
///
/// # Errors
/// `Invalid`: it is something else.
///
/// # Source
/// Linux x86 boot protocol, `Documentation/arch/x86/boot.rst`: `boot_flag` at 0x1fe, `header` at 0x202, `xloadflags` at
/// 0x236. ELF: `e_machine` at 18.
pub(crate) fn kernel(file: &File) -> Result<()> {
    let mut head = [0; 0x238];
    let mut have = 0;
    while let Some(rest) = head.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, u64::try_from(have).unwrap_or(0)) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(e) => return Err(Error::unavailable("a kernel could not be read").because(&e)),
        }
    }
    let word = |at: usize| head.get(at..at + 2).and_then(|two| two.try_into().ok()).map(u16::from_le_bytes);
    let is_linux = head.get(0x202..0x206) == Some(b"HdrS".as_slice()) && word(0x1fe) == Some(0xaa55);
    let is_64_bit = word(0x236).is_some_and(|flags| flags & 1 != 0);
    let is_elf = head.starts_with(b"\x7fELF\x02\x01") && word(18) == Some(ELF_X86_64);
    if (is_linux && is_64_bit) || is_elf {
        return Ok(());
    }
    Err(Error::invalid("the kernel is not a 64-bit x86 Linux kernel")
        .remedy("give a bzImage or vmlinux that was built for x86-64"))
}

/// Devices of a kind: as many as a bus takes.
const PLACES: usize = 31;
const ELF_X86_64: u16 = 62;
/// The longest command line that Linux takes on x86.
const CMDLINE_MAX: usize = 2047;
const PASSPORT_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn only_kernels_for_this_architecture_pass() {
        let mut bz_image = vec![0; 0x1000];
        bz_image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bz_image[0x202..0x206].copy_from_slice(b"HdrS");
        let mut for_32_bit = bz_image.clone();
        bz_image[0x236] = 1;
        kernel(&file(&bz_image)).unwrap();
        for_32_bit[0x236] = 0;
        let mut arm = b"\x7fELF\x02\x01".to_vec();
        arm.resize(64, 0);
        arm[18] = 183;
        for wrong in [for_32_bit, arm, Vec::new(), b"#!/bin/sh\n".to_vec(), vec![0; 0x300]] {
            let error = kernel(&file(&wrong)).unwrap_err();
            assert_eq!(error.kind(), iaas_core::ErrorKind::Invalid);
        }
    }
}
