//! A guest of four instructions that tells a real KVM from an interpreted one.

#![expect(unsafe_code, reason = "memory is handed to KVM by its address")]

use std::io;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::registers::CODE_TYPE;
use crate::arch::x86_64::registers::CR0_ET;
use crate::arch::x86_64::registers::CR0_MP;
use crate::arch::x86_64::registers::CR0_PE;
use crate::arch::x86_64::registers::CR0_PG;
use crate::arch::x86_64::registers::CR4_OSFXSR;
use crate::arch::x86_64::registers::CR4_OSXMMEXCPT;
use crate::arch::x86_64::registers::CR4_PAE;
use crate::arch::x86_64::registers::DATA_TYPE;
use crate::arch::x86_64::registers::EFER_LMA;
use crate::arch::x86_64::registers::EFER_LME;
use crate::arch::x86_64::registers::LARGE;
use crate::arch::x86_64::registers::PRESENT_WRITABLE;
use crate::arch::x86_64::registers::segment;

/// How the test guest ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It halted with the right result.
    AsItShould,
    /// In another way.
    Otherwise(String),
}

/// Runs a 64-bit guest that moves a number through an SSE register and halts.
pub(crate) fn run_test_guest() -> io::Result<Ended> {
    let memory = guest_memory().map_err(io::Error::other)?;
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(io::Error::other)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: u64::try_from(host.addr()).map_err(io::Error::other)?,
    };
    // SAFETY: the region is a private mapping of `MEMORY` bytes that nothing else uses; it lives in `memory`, which is
    // dropped after `vm` and `vcpu` at the end of this function.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu)?;
    let ended = match vcpu.run()? {
        VcpuExit::Hlt => None,
        other => Some(format!("{other:?}")),
    };
    let result = vcpu.get_regs()?.rbx;
    Ok(match ended {
        None if result == NUMBER => Ended::AsItShould,
        None => Ended::Otherwise(format!("a wrong result: {result:#x}")),
        Some(exit) => Ended::Otherwise(format!("the test guest ended in {exit}")),
    })
}

/// Code and page tables: one table of each level, and one page of 2 MiB that maps itself.
fn guest_memory() -> Result<GuestMemoryMmap, Box<dyn std::error::Error + Send + Sync>> {
    let size = usize::try_from(MEMORY)?;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)])?;
    memory.write_obj(DIRECTORIES | PRESENT_WRITABLE, GuestAddress(TABLES))?;
    memory.write_obj(PAGES | PRESENT_WRITABLE, GuestAddress(DIRECTORIES))?;
    memory.write_obj(PRESENT_WRITABLE | LARGE, GuestAddress(PAGES))?;
    memory.write_slice(&CODE, GuestAddress(ENTRY))?;
    Ok(memory)
}

/// Intel SDM volume 3, §9.8.5: paging and long mode, with SSE allowed (§13.1.3).
fn enter_long_mode(vcpu: &VcpuFd) -> io::Result<()> {
    let mut regs = vcpu.get_regs()?;
    regs.rip = ENTRY;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    let mut sregs: kvm_sregs = vcpu.get_sregs()?;
    sregs.cr3 = TABLES;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.cs = segment(8, CODE_TYPE, true);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        *data = segment(16, DATA_TYPE, false);
    }
    vcpu.set_sregs(&sregs)?;
    Ok(())
}

/// `mov eax, 42` · `movd xmm0, eax` · `movd ebx, xmm0` · `hlt`.
const CODE: [u8; 14] = [0xb8, 42, 0, 0, 0, 0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0x7e, 0xc3, 0xf4];
const NUMBER: u64 = 42;
const MEMORY: u64 = 2 << 20;
const ENTRY: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const DIRECTORIES: u64 = 0x3000;
const PAGES: u64 = 0x4000;
