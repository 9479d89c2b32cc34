//! A virtual machine on KVM, in this process: built, started, paused, stopped, and waited for.
//!
//! ```no_run
//! use std::time::Duration;
//! use iaas_vmm::vm::{Boot, Vm};
//!
//! let kernel = std::fs::File::open("vmlinuz").map_err(|e| iaas_core::Error::invalid(e.to_string()))?;
//! let vm = Vm::builder()
//!     .with_vcpus(2)
//!     .with_memory(256 << 20)
//!     .with_boot(Boot::kernel(kernel).with_command_line("console=ttyS0"))
//!     .build()?;
//! vm.start()?;
//! let end = vm.wait(Duration::from_secs(60));
//! println!("{end:?}");
//! # Ok::<(), iaas_core::Error>(())
//! ```
//!
//! # Threads
//! One per processor, and one for all devices. They are this machine's own: any number of machines live in one process, and
//! the end of one, in whatever way, is an answer of [`Vm::wait`] and nothing else. The only thing that the process shares
//! is the signal that interrupts processors ([`VmBuilder::with_kick_signal`]), whose handler does nothing.

mod builder;
mod bus;
mod control;
mod io;
mod processor;

use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::End;

pub use self::builder::DEVICES_MAX;
pub use self::builder::VCPUS_MAX;
pub use self::builder::VmBuilder;
use self::bus::Bus;
use self::control::Control;
use self::control::Want;
use self::processor::Meter;
pub use crate::boot::Boot;
pub use crate::boot::Image;
use crate::device::serial::Scrollback;
use crate::pci::VirtioPci;

/// A machine. Dropping it ends it, like pulling the plug, and waits for its threads.
///
/// All calls may come from any thread.
pub struct Vm {
    control: Arc<Control>,
    bus: Arc<Bus>,
    console: Arc<Scrollback>,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    meters: Vec<Arc<Meter>>,
    io: Mutex<Option<JoinHandle<()>>>,
}

/// What a machine has used of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The processor time of each processor's thread: the guest's, and ours on its behalf.
    pub vcpus: Vec<Duration>,
}

impl Usage {
    /// That of all processors.
    pub fn total(&self) -> Duration {
        self.vcpus.iter().sum()
    }
}

/// A piece of the serial console's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleOutput {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The number of the byte behind them, to read on from.
    pub next: u64,
}

impl Vm {
    /// Describes a machine.
    pub fn builder() -> VmBuilder {
        VmBuilder::default()
    }

    /// Lets the processors run: for the first time, or after a pause.
    ///
    /// # Errors
    /// `Conflict`: the machine has ended.
    pub fn start(&self) -> Result<()> {
        self.control.set(Want::Run)
    }

    /// Halts processors and devices, and returns when all have. Nothing in the machine changes until [`start`](Self::start);
    /// operations that are under way in a volume may still finish in guest memory.
    ///
    /// # Errors
    /// `Conflict`: the machine has ended.
    pub fn pause(&self) -> Result<()> {
        self.control.set(Want::Pause)?;
        self.control.until_parked()
    }

    /// Presses the power button. What the guest does about it is its own affair.
    ///
    /// # Errors
    /// `Unavailable`: KVM refuses the interrupt.
    pub fn press_power_button(&self) -> Result<()> {
        self.bus.press()
    }

    /// Asks the guest to power off by the button, again each second because one that is still booting misses it, and ends
    /// it after `grace`. A paused guest is started for that.
    ///
    /// Answers [`End::Stopped`] if it went by itself, [`End::Forced`] if not, or the way in which it had ended before.
    pub fn stop(&self, grace: Duration) -> End {
        let deadline = Instant::now() + grace;
        self.control.ask_off();
        // Refused only if it has ended, which the wait answers.
        let _ = self.control.set(Want::Run);
        loop {
            if let Err(error) = self.bus.press() {
                tracing::warn!(%error, "the power button does not work");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(end) = self.wait(left.min(PRESS_EACH)) {
                return end;
            }
            if left.is_zero() {
                return self.kill();
            }
        }
    }

    /// Ends the machine at once, and does not wait until it has ended, as volumes may make that take a while.
    pub fn pull_plug(&self) {
        self.control.end(End::Forced);
    }

    /// Ends the machine at once; answers how it ended, which may have been in another way before.
    pub fn kill(&self) -> End {
        self.pull_plug();
        self.control.until_gone(None).unwrap_or(End::Forced)
    }

    /// Waits until the machine has ended and all its threads are gone, for `patience` at most; `None` if it runs on.
    pub fn wait(&self, patience: Duration) -> Option<End> {
        self.control.until_gone(Some(patience))
    }

    /// The serial console's output from byte number `from` on, or from the oldest that is kept; at most `most` bytes.
    /// Waits for `patience` for a first byte.
    pub fn read_console(&self, from: u64, most: usize, patience: Duration) -> ConsoleOutput {
        let (bytes, next) = self.console.read(from, most, patience);
        ConsoleOutput { bytes, next }
    }

    /// Types on the serial console; says how many bytes there was room for.
    pub fn write_console(&self, bytes: &[u8]) -> usize {
        self.bus.type_in(bytes)
    }

    /// What the machine has used so far. It never goes back, stands still during a pause, and stays after the end.
    pub fn usage(&self) -> Usage {
        Usage { vcpus: self.meters.iter().map(|meter| meter.read()).collect() }
    }

    /// Devices that stopped because their drivers broke the protocol, by their place in the order of the builder, and why.
    pub fn device_faults(&self) -> Vec<(usize, String)> {
        let fault = |device: &Mutex<VirtioPci>| {
            device.lock().unwrap_or_else(PoisonError::into_inner).fault().map(ToString::to_string)
        };
        self.devices.iter().enumerate().filter_map(|(n, device)| Some((n, fault(device)?))).collect()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.end(End::Forced);
        self.control.join();
        let io = self.io.lock().unwrap_or_else(PoisonError::into_inner).take();
        if io.is_some_and(|io| io.join().is_err()) {
            tracing::error!("a machine's device thread panicked");
        }
        self.console.close();
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("control", &self.control).field("devices", &self.devices.len()).finish()
    }
}

fn has_ended() -> Error {
    Error::conflict("the machine has ended").remedy("build a new one")
}

const PRESS_EACH: Duration = Duration::from_secs(1);
