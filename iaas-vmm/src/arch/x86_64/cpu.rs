//! The state in which processors start: the first where the kernel begins, the others waiting to be started by it.

use iaas_core::Error;
use iaas_core::Result;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_lapic_state;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::cpuid;
use super::layout;
use super::registers::CODE_TYPE;
use super::registers::CR0_ET;
use super::registers::CR0_PE;
use super::registers::CR0_PG;
use super::registers::CR4_PAE;
use super::registers::DATA_TYPE;
use super::registers::EFER_LMA;
use super::registers::EFER_LME;
use super::registers::LARGE;
use super::registers::PRESENT_WRITABLE;
use super::registers::segment;
use crate::kvm::Machine;
use crate::kvm::Vcpu;

/// Where the first processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 64-bit mode, the low 4 GiB mapped as they are.
    Long {
        /// The first instruction.
        at: u64,
        /// What `rsi` holds.
        rsi: u64,
    },
    /// In 32-bit protected mode, without paging.
    Protected {
        /// The first instruction.
        at: u64,
        /// What `ebx` holds.
        rbx: u64,
    },
}

/// Brings processor `index` of `count` to its start. `entry` is for the first; the kernel starts the others.
///
/// # Errors
/// `Unavailable`: KVM refuses a register; says which.
pub(crate) fn set_up(vcpu: &Vcpu, machine: &Machine, (index, count): (u8, u8), entry: Entry) -> Result<()> {
    let mut cpuid = machine.supported_cpuid()?;
    cpuid::shape(&mut cpuid, index, count, machine.has_deadline_timer());
    // Before the registers: some exist only for processors that have the feature.
    vcpu.set_cpuid(&cpuid)?;
    vcpu.set_msrs(&boot_msrs()?)?;
    wire_local_interrupts(vcpu)?;
    if index > 0 {
        return Ok(());
    }
    let mut sregs = vcpu.sregs()?;
    let regs = match entry {
        Entry::Long { at, rsi } => {
            write_tables(machine.memory())?;
            long_mode(&mut sregs);
            kvm_regs {
                rflags: 2,
                rip: at,
                rsi,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                ..Default::default()
            }
        }
        Entry::Protected { at, rbx } => {
            write_gdt(machine.memory(), FLAT_32)?;
            protected_mode(&mut sregs);
            kvm_regs { rflags: 2, rip: at, rbx, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// What a BIOS leaves: fast string moves on, and all memory write-back unless its page says otherwise.
fn boot_msrs() -> Result<Msrs> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    Msrs::from_entries(&entries).map_err(|e| Error::internal("a list of registers").detail(format!("{e:?}")))
}

/// Pins of the local APIC: the PIC on the first, non-maskable interrupts on the second.
fn wire_local_interrupts(vcpu: &Vcpu) -> Result<()> {
    let mut lapic = vcpu.lapic()?;
    set_delivery(&mut lapic, APIC_LVT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, APIC_LVT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    // Delivery mode is in bits 8 to 10, the low bits of the register's second byte.
    if let Some(byte) = lapic.regs.get_mut(register + 1) {
        *byte = *byte & !7 | mode.cast_signed();
    }
}

/// Intel SDM volume 3, §9.8.5. SSE is left to the kernel, as the boot protocol says.
fn long_mode(sregs: &mut kvm_sregs) {
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    flat_segments(sregs, true);
}

fn protected_mode(sregs: &mut kvm_sregs) {
    sregs.cr4 = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.efer = 0;
    flat_segments(sregs, false);
}

fn flat_segments(sregs: &mut kvm_sregs, long: bool) {
    sregs.cs = segment(CODE_SELECTOR, CODE_TYPE, long);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        *data = segment(DATA_SELECTOR, DATA_TYPE, false);
    }
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 11, present: 1, ..Default::default() };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&FLAT_64) - 1).unwrap_or(u16::MAX);
    sregs.idt.limit = 0;
}

/// The descriptor table, and page tables that map the low 4 GiB as they are.
fn write_tables(memory: &GuestMemoryMmap) -> Result<()> {
    write_gdt(memory, FLAT_64)?;
    let (level3, level2) = (layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    let put = |at: u64, entry: u64| memory.write_obj(entry, GuestAddress(at)).map_err(|e| too_small(&e));
    put(layout::PAGE_TABLES, level3 | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        put(level3 + gib * 8, (level2 + gib * 0x1000) | PRESENT_WRITABLE)?;
    }
    (0..2048).try_for_each(|page| put(level2 + page * 8, page << 21 | PRESENT_WRITABLE | LARGE))
}

fn write_gdt(memory: &GuestMemoryMmap, table: [u64; 5]) -> Result<()> {
    (0..).zip(table).try_for_each(|(n, entry)| {
        memory.write_obj(entry, GuestAddress(layout::GDT + n * 8)).map_err(|e| too_small(&e))
    })
}

fn too_small(error: &vm_memory::GuestMemoryError) -> Error {
    Error::invalid("the machine has too little memory to start in").because(error)
}

/// Two empty entries, code, data (the boot protocol's `__BOOT_CS` and `__BOOT_DS`), and a task state.
const FLAT_64: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
const FLAT_32: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVERY_NMI: u8 = 4;
const DELIVERY_EXTINT: u8 = 7;
