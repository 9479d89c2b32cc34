//! One virtual processor, what it stops at, and how another thread makes it stop.

#![expect(unsafe_code, reason = "the page that KVM shares with us, and the clock of a thread")]

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use kvm_bindings::CpuId;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_lapic_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_run;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use nix::libc;
use vmm_sys_util::signal;

use super::Machine;
use super::machine::failed;

/// A processor. One thread uses it.
pub(crate) struct Vcpu {
    fd: VcpuFd,
    // Keeps the memory mapped that guest code runs in.
    _machine: Arc<Machine>,
}

/// Why guest code stopped.
#[derive(Debug)]
pub(crate) enum Exit<'a> {
    /// The guest writes to an I/O port.
    PortOut(u16, &'a [u8]),
    /// The guest reads an I/O port; the bytes are to be filled in before the next run.
    PortIn(u16, &'a mut [u8]),
    /// The guest writes where there is no memory.
    MemoryOut(u64, &'a [u8]),
    /// The guest reads where there is no memory; the bytes are to be filled in before the next run.
    MemoryIn(u64, &'a mut [u8]),
    /// Nothing happened, or somebody kicked.
    Interrupted,
    /// A fault while handling a fault while handling a fault, which on a real machine is a reset.
    TripleFault,
    /// The processor cannot go on.
    Broken(String),
}

impl Vcpu {
    /// Makes processor `index` of `machine`.
    pub(crate) fn new(machine: &Arc<Machine>, index: u8) -> Result<Self> {
        let fd = machine.vm().create_vcpu(u64::from(index)).map_err(|e| failed("KVM_CREATE_VCPU", e))?;
        Ok(Self { fd, _machine: machine.clone() })
    }

    /// Runs guest code until it stops.
    pub(crate) fn run(&mut self) -> Exit<'_> {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => Exit::PortOut(port, bytes),
            Ok(VcpuExit::IoIn(port, bytes)) => Exit::PortIn(port, bytes),
            Ok(VcpuExit::MmioWrite(at, bytes)) => Exit::MemoryOut(at, bytes),
            Ok(VcpuExit::MmioRead(at, bytes)) => Exit::MemoryIn(at, bytes),
            Ok(VcpuExit::Shutdown) => Exit::TripleFault,
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => Exit::Interrupted,
            Ok(VcpuExit::InternalError) => {
                Exit::Broken("KVM cannot run an instruction of the guest (internal error)".into())
            }
            Ok(other) => Exit::Broken(format!("{other:?}")),
            // EAGAIN: a processor that waited to be started was started.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(e) => Exit::Broken(format!("KVM_RUN: {e}")),
        }
    }

    /// How another thread stops this processor.
    pub(crate) fn kick(&self) -> Result<Kick> {
        Kick::new(&self.fd).map_err(|e| Error::unavailable("no page to stop a processor by").because(&e))
    }

    pub(crate) fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid).map_err(|e| failed("KVM_SET_CPUID2", e))
    }

    /// Sets model-specific registers; an error names the first that was refused.
    pub(crate) fn set_msrs(&self, msrs: &Msrs) -> Result<()> {
        let set = self.fd.set_msrs(msrs).map_err(|e| failed("KVM_SET_MSRS", e))?;
        match msrs.as_slice().get(set) {
            None => Ok(()),
            Some(refused) => Err(Error::unavailable("the host's KVM refused a register of the processor")
                .detail(format!("MSR {:#x} = {:#x}", refused.index, refused.data))),
        }
    }

    pub(crate) fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd.set_regs(regs).map_err(|e| failed("KVM_SET_REGS", e))
    }

    pub(crate) fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(|e| failed("KVM_GET_SREGS", e))
    }

    pub(crate) fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs).map_err(|e| failed("KVM_SET_SREGS", e))
    }

    pub(crate) fn lapic(&self) -> Result<kvm_lapic_state> {
        self.fd.get_lapic().map_err(|e| failed("KVM_GET_LAPIC", e))
    }

    pub(crate) fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd.set_lapic(lapic).map_err(|e| failed("KVM_SET_LAPIC", e))
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("fd", &self.fd.as_raw_fd()).finish_non_exhaustive()
    }
}

/// A flag that KVM reads before it enters the guest: a mapping of our own of the page that it shares with the processor's
/// thread, so that it outlives that thread's.
///
/// Together with a signal to the thread it closes the race between "shall I stop?" and the entry: whichever of the two the
/// kick falls into, the next entry returns at once.
pub(crate) struct Kick {
    page: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone, and is accessed only through an atomic.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    fn new(fd: &VcpuFd) -> io::Result<Self> {
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice; the descriptor is open for the length of the call.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, read_write, shared, fd.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { page })
    }

    /// Whether the next entry shall return at once.
    pub(crate) fn set(&self, on: bool) {
        // SAFETY: the offset lies in the page, which is mapped while `self` lives. The kernel reads this byte at any time,
        // and no Rust reference to it exists: `kvm-ioctls` has another mapping.
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, and nobody else knows the address.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

impl fmt::Debug for Kick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kick")
    }
}

/// Makes signal `SIGRTMIN + offset` one that only interrupts, and gives its number.
///
/// The handler does nothing; the kernel's part is that a thread in `KVM_RUN` returns. It is the one thing of ours that
/// belongs to the whole process, and setting it again changes nothing.
pub(crate) fn kick_signal(offset: u8) -> Result<i32> {
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let number = signal::SIGRTMIN() + i32::from(offset);
    signal::register_signal_handler(number, interrupt).map_err(|e| {
        Error::invalid(format!("signal SIGRTMIN+{offset} cannot stop processors"))
            .remedy("choose a smaller number")
            .detail(e.to_string())
    })?;
    Ok(number)
}

/// The processor time of one thread, readable from any thread of the process while it lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    /// The clock of the calling thread.
    pub(crate) fn of_this_thread() -> Option<Self> {
        let mut clock = 0;
        // SAFETY: the thread that calls exists, and `clock` is ours to write.
        let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        (failed == 0).then_some(Self(clock))
    }

    /// Its time so far; `None` once the thread has ended.
    pub(crate) fn read(self) -> Option<Duration> {
        let clock = nix::time::ClockId::from_raw(self.0);
        nix::time::clock_gettime(clock).ok().map(Duration::from)
    }
}

/// The part of KVM's page that we map: its head.
const PAGE: usize = 4096;

const _: () = assert!(offset_of!(kvm_run, immediate_exit) < PAGE);
