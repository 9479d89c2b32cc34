//! Guest-physical addresses, I/O ports and interrupt numbers of the machine.
//!
//! ```text
//! 0          boot data: GDT, zero page, page tables, command line
//! 0xA_0000   nothing of ours up to 0xE_0000, then the ACPI tables
//! 0x10_0000  memory: kernel, …, initrd at the end
//! 3 GiB      PCI windows, configuration space, interrupt controllers, KVM's own pages
//! 4 GiB      the rest of the memory
//! ```

/// Where the hole for devices starts. Memory ends here, and goes on at [`HIGH_MEMORY`].
pub(crate) const LOW_MEMORY_END: u64 = 0xc000_0000;
pub(crate) const HIGH_MEMORY: u64 = 1 << 32;

/// Boot data, below 640 KiB.
pub(crate) const GDT: u64 = 0x500;
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6800;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// One table of level 4, one of level 3 and four of level 2: 4 GiB by pages of 2 MiB.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const BOOT_STACK: u64 = 0x1_fff0;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// The end of what a BIOS would leave to the kernel below 1 MiB.
pub(crate) const EBDA: u64 = 0x9_fc00;
/// ACPI tables, in the range where a kernel without a hint looks for them.
pub(crate) const ACPI: u64 = 0xe_0000;
pub(crate) const ACPI_END: u64 = 0x10_0000;
/// Where kernels go.
pub(crate) const KERNEL: u64 = 0x10_0000;

/// Windows of PCI devices.
pub(crate) const PCI_WINDOW: u64 = LOW_MEMORY_END;
pub(crate) const PCI_WINDOW_END: u64 = 0xe000_0000;
/// The configuration space of bus 0, memory mapped.
pub(crate) const ECAM: u64 = 0xe000_0000;
pub(crate) const ECAM_SIZE: u64 = 1 << 20;

pub(crate) const IOAPIC: u64 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;
/// Pages that KVM uses on Intel's processors: one, and the three behind it.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const TSS: u64 = 0xfffb_d000;

pub(crate) const IOAPIC_PINS: u32 = 24;
pub(crate) const SERIAL_PIN: u32 = 4;
/// The pin of ACPI's own interrupt.
pub(crate) const SCI_PIN: u32 = 9;

/// I/O ports.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// PM1 event (4 bytes) and control (2 bytes) registers.
pub(crate) const PM1_EVENT: u16 = 0x600;
pub(crate) const PM1_CONTROL: u16 = 0x604;
pub(crate) const PCI_ADDRESS: u16 = 0xcf8;
pub(crate) const PCI_DATA: u16 = 0xcfc;
pub(crate) const RESET: u16 = 0xcf9;
pub(crate) const RESET_VALUE: u8 = 6;
/// The keyboard controller's command port, by which old kernels reset.
pub(crate) const KEYBOARD: u16 = 0x64;
