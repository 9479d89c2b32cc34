//! How a machine is described, checked as a whole, and made.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::FramePort;

use super::Vm;
use super::bus::Bus;
use super::control::Control;
use super::io;
use super::io::Served;
use super::processor::Job;
use super::processor::Meter;
use crate::acpi;
use crate::arch;
use crate::arch::layout;
use crate::boot::Boot;
use crate::device::serial::Scrollback;
use crate::device::serial::Serial;
use crate::kvm;
use crate::kvm::Bell;
use crate::kvm::Lines;
use crate::kvm::Machine;
use crate::kvm::Vcpu;
use crate::memory::guest;
use crate::pci;
use crate::pci::VirtioPci;
use crate::virtio::block;
use crate::virtio::block::Block;
use crate::virtio::device::Next;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;

/// The description of a machine. Nothing is made before [`build`](Self::build), which checks all of it.
#[derive(Debug)]
pub struct VmBuilder {
    vcpus: u8,
    memory: u64,
    boot: Option<Boot>,
    devices: Vec<Box<dyn VirtioDevice>>,
    console: usize,
    kick_signal: u8,
    refused: Vec<Error>,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory: 128 << 20,
            boot: None,
            devices: Vec::new(),
            console: 1 << 20,
            kick_signal: 0,
            refused: Vec::new(),
        }
    }
}

impl VmBuilder {
    /// Processors: 1 to [`VCPUS_MAX`], by default 1.
    #[must_use]
    pub fn with_vcpus(mut self, count: u8) -> Self {
        self.vcpus = count;
        self
    }

    /// Memory in bytes: whole pages of 4 KiB, at least 2 MiB, by default 128 MiB.
    #[must_use]
    pub fn with_memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// What the first processor runs. A machine needs it.
    #[must_use]
    pub fn with_boot(mut self, boot: Boot) -> Self {
        self.boot = Some(boot);
        self
    }

    /// A disk. `serial` is what the guest reads as its serial number, at most 20 bytes. The volume must stay open for as
    /// long as the machine lives.
    #[must_use]
    pub fn with_disk(mut self, volume: &dyn BlockDevice, serial: &str) -> Self {
        match Block::new(volume, serial, block::QUEUE_SIZE) {
            Ok(disk) => self.devices.push(Box::new(disk)),
            Err(error) => self.refused.push(error),
        }
        self
    }

    /// A NIC.
    #[must_use]
    pub fn with_nic(mut self, port: Box<dyn FramePort>, mac: [u8; 6]) -> Self {
        self.devices.push(Box::new(Net::new(port, mac)));
        self
    }

    /// A source of randomness: this host's.
    #[must_use]
    pub fn with_entropy(mut self) -> Self {
        match Rng::of_this_host() {
            Ok(rng) => self.devices.push(Box::new(rng)),
            Err(error) => self.refused.push(error),
        }
        self
    }

    /// A virtio device of your own.
    #[must_use]
    pub fn with_device(mut self, device: impl VirtioDevice + 'static) -> Self {
        self.devices.push(Box::new(device));
        self
    }

    /// Bytes of the serial console's output that are kept, by default 1 MiB.
    #[must_use]
    pub fn with_scrollback(mut self, bytes: usize) -> Self {
        self.console = bytes;
        self
    }

    /// The signal that interrupts processors, as an offset from `SIGRTMIN`, by default 0. All machines of a process may
    /// share one; it is only to be another when the program needs this one for itself.
    #[must_use]
    pub fn with_kick_signal(mut self, offset: u8) -> Self {
        self.kick_signal = offset;
        self
    }

    /// Makes the machine. It stands still until [`Vm::start`].
    ///
    /// # Errors
    /// `Invalid`: the description makes no sense; everything that is wrong with it is named. `Unavailable`: this host has
    /// no KVM for us, or no room. Whatever was made is gone again.
    pub fn build(mut self) -> Result<Vm> {
        self.check()?;
        let signal = kvm::kick_signal(self.kick_signal)?;
        let memory = Arc::new(guest::allocate(self.memory)?);
        let rsdp = acpi::write_tables(&memory, self.vcpus)?;
        let boot = self.boot.take().ok_or_else(|| Error::internal("a machine without a kernel"))?;
        let entry = boot.load(&memory, rsdp)?;
        let machine = Arc::new(Machine::new(memory)?);
        let vcpus = (0..self.vcpus).map(|index| {
            let vcpu = Vcpu::new(&machine, index)?;
            arch::set_up(&vcpu, &machine, (index, self.vcpus), entry)?;
            Ok(vcpu)
        });
        let vcpus: Vec<Vcpu> = vcpus.collect::<Result<_>>()?;
        let served = plug(&machine, self.devices)?;
        assemble(machine, vcpus, served, signal, self.console)
    }

    /// Collects everything that is wrong.
    fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            wrong.push(format!("{} vCPUs (1 to {VCPUS_MAX} are possible)", self.vcpus));
        }
        if self.memory < MEMORY_MIN || !self.memory.is_multiple_of(4096) || self.memory > MEMORY_MAX {
            wrong.push(format!("{} bytes of memory (whole pages, 2 MiB to 1 TiB)", self.memory));
        }
        if self.boot.is_none() {
            wrong.push("nothing to boot (give it a kernel)".to_owned());
        }
        if self.devices.len() > DEVICES_MAX {
            wrong.push(format!("{} devices (at most {DEVICES_MAX})", self.devices.len()));
        }
        if self.console == 0 {
            wrong.push("a console that keeps nothing".to_owned());
        }
        wrong.extend(self.refused.iter().map(ToString::to_string));
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!("this machine cannot be: {}", wrong.join("; "))))
    }
}

/// Puts devices on the bus, each with a window and wires of its own.
fn plug(machine: &Arc<Machine>, devices: Vec<Box<dyn VirtioDevice>>) -> Result<Vec<Served>> {
    let windows = (layout::PCI_WINDOW..layout::PCI_WINDOW_END).step_by(WINDOW_EACH);
    devices.into_iter().zip(windows).map(|(device, window)| plug_one(machine, device, window)).collect()
}

fn plug_one(machine: &Arc<Machine>, device: Box<dyn VirtioDevice>, window: u64) -> Result<Served> {
    let window = u32::try_from(window).map_err(|e| Error::internal("a window above 4 GiB").because(&e))?;
    let event = device.event_fd().map(|fd| fd.try_clone_to_owned()).transpose();
    let event: Option<OwnedFd> =
        event.map_err(|e| Error::unavailable("no descriptor for a device's event").because(&e))?;
    let doorbell = Bell::new()?;
    let queues = device.queue_sizes().len();
    let offset = |queue| u64::from(pci::NOTIFY) + queue * u64::from(pci::NOTIFY_STRIDE);
    let offsets = (0u64..).take(queues).map(offset).collect();
    let lines = Arc::new(Lines::new(machine, queues + 1, doorbell.try_clone()?, offsets)?);
    let device = VirtioPci::new(device, machine.memory().clone(), lines, window)?;
    Ok(Served { device: Arc::new(Mutex::new(device)), doorbell, event, next: Next::Kick })
}

/// Starts the threads, which stand still.
fn assemble(
    machine: Arc<Machine>,
    vcpus: Vec<Vcpu>,
    served: Vec<Served>,
    signal: i32,
    kept: usize,
) -> Result<Vm> {
    let console = Arc::new(Scrollback::new(kept));
    let pin = Bell::new()?;
    machine.connect_pin(&pin, layout::SERIAL_PIN)?;
    let devices: Vec<_> = served.iter().map(|served| served.device.clone()).collect();
    let root = pci::Root::new(devices.clone());
    let bus = Arc::new(Bus::new(machine, Serial::new(pin, console.clone()), root));
    let wake = Bell::new()?;
    let control = Arc::new(Control::new(signal, wake.try_clone()?));
    let meters = vcpus.iter().map(|_| Arc::new(Meter::default())).collect();
    // From here on, an error drops the machine, which stops the threads that were started.
    let vm = Vm { control, bus, console, devices, meters, io: Mutex::new(None) };
    start_io(&vm, served, wake)?;
    for (n, vcpu) in vcpus.into_iter().enumerate() {
        start_processor(&vm, n, vcpu)?;
    }
    Ok(vm)
}

fn start_io(vm: &Vm, served: Vec<Served>, wake: Bell) -> Result<()> {
    let presence = vm.control.enlist();
    let console = vm.console.clone();
    let work = move || {
        io::run(served, &wake, &presence);
        console.close();
    };
    let thread = std::thread::Builder::new().name("vm-io".into()).spawn(work).map_err(|e| no_thread(&e))?;
    if let Ok(mut io) = vm.io.lock() {
        *io = Some(thread);
    }
    Ok(())
}

fn start_processor(vm: &Vm, n: usize, vcpu: Vcpu) -> Result<()> {
    let kick = Arc::new(vcpu.kick()?);
    let meter = vm.meters.get(n).cloned().unwrap_or_default();
    let presence = vm.control.enlist();
    let job = Job { vcpu, kick: kick.clone(), bus: vm.bus.clone(), meter, presence };
    let thread = std::thread::Builder::new().name(format!("vcpu{n}")).spawn(move || job.run());
    vm.control.add_processor(kick, thread.map_err(|e| no_thread(&e))?);
    Ok(())
}

fn no_thread(error: &std::io::Error) -> Error {
    Error::unavailable("this process has no room for another thread").because(error)
}

/// The most processors of a machine.
pub const VCPUS_MAX: u8 = 64;
/// The most devices of a machine, its source of randomness counted.
pub const DEVICES_MAX: usize = pci::SLOTS - 1;
const MEMORY_MIN: u64 = 2 << 20;
const MEMORY_MAX: u64 = 1 << 40;
/// Windows lie this far apart, so that no two share a page table's large page.
const WINDOW_EACH: usize = 2 << 20;
