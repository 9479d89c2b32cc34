//! Bits of the processor's registers and tables that more than one guest is started with.
//!
//! Intel SDM volume 3: §2.5 (control registers), §2.2.1 (`IA32_EFER`), §3.4.5 (segments), §4.5 (page tables).

use kvm_bindings::kvm_segment;

/// A flat segment of 4 GiB.
pub(crate) fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Accessed, readable code; accessed, writable data.
pub(crate) const CODE_TYPE: u8 = 11;
pub(crate) const DATA_TYPE: u8 = 3;

pub(crate) const PRESENT_WRITABLE: u64 = 3;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const CR0_PE: u64 = 1;
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_ET: u64 = 1 << 4;
pub(crate) const CR0_PG: u64 = 1 << 31;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
