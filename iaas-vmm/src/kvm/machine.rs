//! One virtual machine in the kernel: its memory slots, its interrupt controllers and its clock.

#![expect(unsafe_code, reason = "guest memory is handed to KVM by its address")]

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use iaas_core::Error;
use iaas_core::Outcome;
use iaas_core::Result;
use kvm_bindings::CpuId;
use kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
use kvm_bindings::KVM_IRQ_ROUTING_MSI;
use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KVM_IRQCHIP_PIC_MASTER;
use kvm_bindings::KVM_IRQCHIP_PIC_SLAVE;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::KVM_PIT_SPEAKER_DUMMY;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_irq_routing_irqchip;
use kvm_bindings::kvm_irq_routing_msi;
use kvm_bindings::kvm_pit_config;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Cap;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::NoDatamatch;
use kvm_ioctls::VmFd;
use vm_memory::Address;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion;

use super::Bell;
use crate::arch::layout;
use crate::pci::MsiMessage;

/// A machine with memory and interrupt controllers, and no processor yet.
///
/// Whoever can make the guest run holds an `Arc` of this, so its memory stays mapped.
pub(crate) struct Machine {
    // Dropped before the memory that it maps.
    vm: VmFd,
    kvm: Kvm,
    routes: Mutex<Routes>,
    memory: Arc<GuestMemoryMmap>,
}

impl Machine {
    /// Makes a machine over `memory`, with PIC, IOAPIC, local APICs and PIT in the kernel.
    ///
    /// # Errors
    /// `Unavailable`: there is no KVM for us, or it lacks what we need; says what.
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Result<Self> {
        let kvm = Kvm::new().map_err(|e| no_kvm(&e.into()))?;
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(Error::unavailable(format!("this host's KVM has no {name}"))
                    .outcome_is(Outcome::NotDone)
                    .remedy("use Linux 5.10 or newer"));
            }
        }
        let vm = kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?;
        // Only Intel's processors need these pages; they lie in the hole under 4 GiB.
        vm.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(|e| failed("KVM_SET_IDENTITY_MAP_ADDR", e))?;
        let tss = usize::try_from(layout::TSS).map_err(|e| Error::internal("an address").because(&e))?;
        vm.set_tss_address(tss).map_err(|e| failed("KVM_SET_TSS_ADDR", e))?;
        vm.create_irq_chip().map_err(|e| failed("KVM_CREATE_IRQCHIP", e))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(|e| failed("KVM_CREATE_PIT2", e))?;
        let machine = Self { vm, kvm, routes: Mutex::new(Routes::default()), memory };
        machine.map_memory()?;
        Ok(machine)
    }

    fn map_memory(&self) -> Result<()> {
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            let host = self.memory.get_host_address(region.start_addr());
            let host = host.map_err(|e| Error::internal("guest memory has no address").because(&e))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: u64::try_from(host.addr()).unwrap_or(u64::MAX),
            };
            // SAFETY: the region is a mapping of `memory_size` bytes that `self.memory` keeps; guest code runs only in
            // `Vcpu::run`, and each `Vcpu` holds an `Arc` of this machine, hence of the memory. Nobody makes a Rust
            // reference to these bytes: `vm-memory` copies through raw pointers.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(|e| failed("KVM_SET_USER_MEMORY_REGION", e))?;
        }
        Ok(())
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// What the processors of this host can offer to a guest.
    pub(crate) fn supported_cpuid(&self) -> Result<CpuId> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| failed("KVM_GET_SUPPORTED_CPUID", e))
    }

    /// Whether the local APIC's timer has a deadline mode.
    pub(crate) fn has_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Connects `bell` to a pin of the IOAPIC: each write is one edge.
    pub(crate) fn connect_pin(&self, bell: &Bell, pin: u32) -> Result<()> {
        self.vm.register_irqfd(bell.event(), pin).map_err(|e| failed("KVM_IRQFD", e))
    }

    /// Sets the level of a pin of the IOAPIC.
    pub(crate) fn set_pin(&self, pin: u32, high: bool) -> Result<()> {
        self.vm.set_irq_line(pin, high).map_err(|e| failed("KVM_IRQ_LINE", e))
    }

    /// Gives a number for a message-signalled interrupt, connected to `bell`.
    pub(super) fn connect_message(&self, bell: &Bell) -> Result<u32> {
        let gsi = self.routes.lock().unwrap_or_else(PoisonError::into_inner).allocate();
        self.vm.register_irqfd(bell.event(), gsi).map_err(|e| failed("KVM_IRQFD", e))?;
        Ok(gsi)
    }

    /// Sets what the interrupt `gsi` sends.
    pub(super) fn route(&self, gsi: u32, message: MsiMessage) -> Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.set(gsi, message) {
            let table = routes.table()?;
            // Under the lock: an older table must not overtake a newer one.
            self.vm.set_gsi_routing(&table).map_err(|e| failed("KVM_SET_GSI_ROUTING", e))?;
        }
        Ok(())
    }

    /// A guest's write of any length at `at` rings `bell`, without an exit to us.
    pub(super) fn connect_doorbell(&self, bell: &Bell, at: u64) -> Result<()> {
        self.vm
            .register_ioevent(bell.event(), &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(|e| failed("KVM_IOEVENTFD", e))
    }

    /// Undoes [`connect_doorbell`](Self::connect_doorbell).
    pub(super) fn disconnect_doorbell(&self, bell: &Bell, at: u64) -> Result<()> {
        self.vm
            .unregister_ioevent(bell.event(), &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(|e| failed("KVM_IOEVENTFD", e))
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("memory", &self.memory.num_regions()).finish_non_exhaustive()
    }
}

/// Which message each number above the pins sends. The kernel takes only whole tables.
#[derive(Debug, Default)]
struct Routes {
    messages: Vec<Option<MsiMessage>>,
}

impl Routes {
    fn allocate(&mut self) -> u32 {
        self.messages.push(None);
        FIRST_MESSAGE + u32::try_from(self.messages.len() - 1).unwrap_or(u32::MAX - FIRST_MESSAGE)
    }

    /// Whether that changed anything.
    fn set(&mut self, gsi: u32, message: MsiMessage) -> bool {
        let place = gsi.checked_sub(FIRST_MESSAGE).and_then(|n| usize::try_from(n).ok());
        let Some(place) = place.and_then(|n| self.messages.get_mut(n)) else { return false };
        place.replace(message) != Some(message)
    }

    fn table(&self) -> Result<KvmIrqRouting> {
        let messages = (FIRST_MESSAGE..).zip(&self.messages);
        let messages = messages.filter_map(|(gsi, message)| message.map(|m| message_entry(gsi, m)));
        let entries: Vec<_> = pins().chain(messages).collect();
        KvmIrqRouting::from_entries(&entries)
            .map_err(|e| Error::internal("too many interrupts in one machine").detail(format!("{e:?}")))
    }
}

/// The pins as the kernel wires them by default: 0–7 and 8–15 also to the two PICs, 0–23 to the IOAPIC.
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16u32).map(|pin| {
        let chip = if pin < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        pin_entry(pin, chip, pin % 8)
    });
    // The timer stands on pin 0 of both, as the MADT says.
    pic.chain((0..layout::IOAPIC_PINS).map(|pin| pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin)))
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address_low,
        address_hi: message.address_high,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// Why `/dev/kvm` cannot be used, and what to do.
fn no_kvm(error: &io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::PermissionDenied => ("this user may not use KVM", "add this user to the group `kvm`"),
        io::ErrorKind::NotFound => (
            "this host has no KVM",
            "turn on virtualization in the firmware, and load `kvm_intel` or `kvm_amd`",
        ),
        _ => ("this host's KVM does not answer", "see the kernel's log"),
    };
    Error::unavailable(what.0).outcome_is(Outcome::NotDone).remedy(what.1).because(error)
}

pub(super) fn failed(call: &str, error: kvm_ioctls::Error) -> Error {
    Error::unavailable("the host's KVM refused a part of the machine")
        .outcome_is(Outcome::NotDone)
        .detail(format!("{call}: {error}"))
}

const NEEDED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "timer (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "doorbells by eventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
    (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// Numbers below belong to the pins.
const FIRST_MESSAGE: u32 = layout::IOAPIC_PINS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_told_to_the_kernel_only_when_it_changes() {
        let mut routes = Routes::default();
        let (a, b) = (routes.allocate(), routes.allocate());
        assert_eq!((a, b), (24, 25));
        let message = MsiMessage { address_low: 0xfee0_0000, address_high: 0, data: 0x31 };
        assert!(routes.set(b, message));
        assert!(!routes.set(b, message));
        assert!(!routes.set(99, message));
        // 16 pins of the PICs, 24 of the IOAPIC, and the one message that is known.
        assert_eq!(routes.table().unwrap().as_slice().len(), 41);
    }
}
