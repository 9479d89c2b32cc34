//! The ACPI tables: processors, interrupt controllers, the PCI bus, the serial port, and how to be switched off.
//!
//! Fixed hardware, not the reduced kind: a power button and a sleep register in I/O ports need no code of the guest's
//! firmware, and every kernel knows them. There is no embedded controller, no timer and no battery.

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::aml::AddressSpaceCacheable;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::fadt::Flags;
use acpi_tables::gas::AccessSize;
use acpi_tables::gas::AddressSpace;
use acpi_tables::gas::GAS;
use acpi_tables::madt::EnabledStatus;
use acpi_tables::madt::IoApic;
use acpi_tables::madt::LocalInterruptController;
use acpi_tables::madt::MADT;
use acpi_tables::madt::ProcessorLocalApic;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use iaas_core::Error;
use iaas_core::Result;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use crate::arch::layout;

/// Writes the tables of a machine with `vcpus` processors; gives the address of the root pointer.
///
/// # Errors
/// `Internal`: they do not fit.
pub(crate) fn write_tables(memory: &GuestMemoryMmap, vcpus: u8) -> Result<u64> {
    // The root pointer stands first, where a kernel without a hint finds it.
    let mut place = Place { memory, next: layout::ACPI + 64 };
    let facs = place.put(&bytes(&FACS::new()))?;
    let dsdt = place.put(dsdt(vcpus).as_slice())?;
    let fadt = place.put(&bytes(&fadt(facs, dsdt)?.finalize()))?;
    let madt = place.put(&bytes_of_sdt(&madt(vcpus)))?;
    let mut mcfg = MCFG::new(OEM, TABLE, 1);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = place.put(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = place.put(&bytes(&xsdt))?;
    place.next = layout::ACPI;
    place.put(&bytes(&Rsdp::new(OEM, xsdt)))
}

struct Place<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64> {
        let at = self.next;
        let end = at + u64::try_from(table.len()).unwrap_or(u64::MAX / 2);
        if end > layout::ACPI_END {
            return Err(Error::internal("the machine's tables do not fit"));
        }
        self.memory
            .write_slice(table, GuestAddress(at))
            .map_err(|e| Error::invalid("the machine has too little memory for its tables").because(&e))?;
        self.next = end.next_multiple_of(64);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// # Source
/// ACPI 6.5 §5.2.9.
fn fadt(facs: u64, dsdt: u64) -> Result<FADTBuilder> {
    let low = |at: u64| u32::try_from(at).map_err(|e| Error::internal("a table above 4 GiB").because(&e));
    let port = |at: u16, bits: u8, size| GAS::new(AddressSpace::SystemIo, bits, 0, size, u64::from(at));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .firmware_ctrl_32(low(facs)?)
        .dsdt_32(low(dsdt)?)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    // The power button is fixed hardware: its flag, which would say otherwise, stays off.
    fadt.sci_int = u16::try_from(layout::SCI_PIN).unwrap_or(9).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(layout::PM1_EVENT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(layout::PM1_CONTROL, 16, AccessSize::WordAccess);
    // No processor power states beyond halting.
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(layout::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = layout::RESET_VALUE;
    Ok(fadt)
}

/// # Source
/// ACPI 6.5 §5.2.12.
fn madt(vcpus: u8) -> Sdt {
    let address = u32::try_from(layout::LOCAL_APIC).unwrap_or(u32::MAX);
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(address));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, u32::try_from(layout::IOAPIC).unwrap_or(u32::MAX), 0));
    let head = bytes(&madt);
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, 1);
    table.append_slice(head.get(36..).unwrap_or_default());
    // Bit 0 of the flags: there are also two 8259.
    table.write_u32(40, 1);
    // ACPI's interrupt is active high and level triggered, unlike other legacy ones. The timer stays on pin 0.
    table.append_slice(&[2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
    // Non-maskable interrupts come in on the second pin of each local APIC.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table
}

fn bytes_of_sdt(table: &Sdt) -> Vec<u8> {
    table.as_slice().to_vec()
}

fn dsdt(vcpus: u8) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    let mut body = Vec::new();
    pci_root(&mut body);
    serial(&mut body);
    processors(vcpus).to_aml_bytes(&mut body);
    let off = SLEEP_OFF;
    let package = aml::Package::new(vec![&off, &off, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &package).to_aml_bytes(&mut body);
    table.append_slice(&body);
    table
}

fn pci_root(out: &mut Vec<u8>) {
    let (hid, cid) = (aml::EISAName::new("PNP0A08"), aml::EISAName::new("PNP0A03"));
    let buses = aml::AddressSpace::new_bus_number(0u16, 0u16);
    let ports = aml::IO::new(layout::PCI_ADDRESS, layout::PCI_ADDRESS, 1, 8);
    let end = u32::try_from(layout::PCI_WINDOW_END - 1).unwrap_or(u32::MAX);
    let start = u32::try_from(layout::PCI_WINDOW).unwrap_or(u32::MAX);
    let window = aml::AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, end, None);
    let resources = aml::ResourceTemplate::new(vec![&buses, &ports, &window]);
    let zero = aml::ZERO;
    let names = [
        aml::Name::new("_HID".into(), &hid),
        aml::Name::new("_CID".into(), &cid),
        aml::Name::new("_ADR".into(), &zero),
        aml::Name::new("_SEG".into(), &zero),
        aml::Name::new("_BBN".into(), &zero),
        aml::Name::new("_UID".into(), &zero),
        aml::Name::new("_CRS".into(), &resources),
    ];
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    aml::Device::new("_SB_.PCI0".into(), children).to_aml_bytes(out);
}

fn serial(out: &mut Vec<u8>) {
    let hid = aml::EISAName::new("PNP0501");
    let ports = aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, layout::SERIAL_PIN);
    let resources = aml::ResourceTemplate::new(vec![&ports, &interrupt]);
    let names = [
        aml::Name::new("_HID".into(), &hid),
        aml::Name::new("_UID".into(), &aml::ZERO),
        aml::Name::new("_DDN".into(), &"COM1"),
        aml::Name::new("_CRS".into(), &resources),
    ];
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    aml::Device::new("_SB_.COM1".into(), children).to_aml_bytes(out);
}

/// Processor devices, as tables since ACPI 6 have them.
struct Processors(u8);

fn processors(vcpus: u8) -> Processors {
    Processors(vcpus)
}

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for id in 0..self.0 {
            let names = [aml::Name::new("_HID".into(), &"ACPI0007"), aml::Name::new("_UID".into(), &id)];
            let path = format!("_SB_.C{id:03}");
            let children = names.iter().map(|name| name as &dyn Aml).collect();
            aml::Device::new(path.as_str().into(), children).to_aml_bytes(sink);
        }
    }
}

/// What the sleep register is told for "off"; `device::power` understands it.
pub(crate) const SLEEP_OFF: u8 = 5;
const OEM: [u8; 6] = *b"IAASDK";
const TABLE: [u8; 8] = *b"IAASVMM ";
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(vcpus: u8) -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert_eq!(write_tables(&memory, vcpus).unwrap(), layout::ACPI);
        memory
    }

    fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        memory.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    fn number(memory: &GuestMemoryMmap, at: u64) -> u64 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Each table that a table names, checked as a kernel would: its length, and that its bytes add up to zero.
    #[test]
    fn every_table_is_found_from_the_root_and_adds_up() {
        let memory = tables(4);
        let root = read(&memory, layout::ACPI, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        let xsdt = number(&memory, layout::ACPI + 24);
        let mut found = Vec::new();
        let mut check = |at: u64| {
            let head = read(&memory, at, 8);
            let len = u32::from_le_bytes(head[4..8].try_into().unwrap());
            let table = read(&memory, at, len.try_into().unwrap());
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{at:#x}");
            found.push(String::from_utf8(head[..4].to_vec()).unwrap());
            table
        };
        let list = check(xsdt);
        for entry in list[36..].chunks_exact(8) {
            check(u64::from_le_bytes(entry.try_into().unwrap()));
        }
        let fadt = u64::from_le_bytes(list[36..44].try_into().unwrap());
        check(number(&memory, fadt + 140));
        assert_eq!(found, ["XSDT", "FACP", "APIC", "MCFG", "DSDT"]);
    }

    #[test]
    fn each_processor_is_listed_once() {
        let memory = tables(3);
        let all = read(&memory, layout::ACPI, 0x2000);
        let start = all.windows(4).position(|word| word == b"APIC").unwrap();
        let len = usize::from(all[start + 4]);
        let mut entries = &all[start + 44..start + len];
        let mut kinds = Vec::new();
        while let [kind, size, ..] = *entries {
            kinds.push(kind);
            entries = &entries[usize::from(size)..];
        }
        // Three processors, one IOAPIC, one override, one wire for NMIs.
        assert_eq!(kinds, [0, 0, 0, 1, 2, 4]);
    }
}
