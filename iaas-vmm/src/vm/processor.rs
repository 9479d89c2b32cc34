//! The thread of one processor.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::spi::hypervisor::End;

use super::bus::Bus;
use super::control::Control;
use super::control::Presence;
use super::control::Want;
use crate::device::power::Wish;
use crate::kvm::Exit;
use crate::kvm::Kick;
use crate::kvm::ThreadClock;
use crate::kvm::Vcpu;

/// Runs until the machine ends.
pub(super) fn run(mut vcpu: Vcpu, kick: &Kick, bus: &Bus, meter: &Meter, presence: Presence) {
    meter.start();
    let control = presence.control();
    if let Some(end) = turns(&mut vcpu, kick, bus, meter, control) {
        control.end(end);
    }
    meter.stop();
    // The guest can no longer run before the machine counts as gone.
    drop(vcpu);
    drop(presence);
}

/// Enters the guest again and again; gives the reason if it is this processor that ends the machine.
fn turns(vcpu: &mut Vcpu, kick: &Kick, bus: &Bus, meter: &Meter, control: &Control) -> Option<End> {
    loop {
        // In this order: a kick after the first line is seen by the second or by the entry.
        kick.set(false);
        let leaving = control.want() != Want::Run;
        if leaving {
            // Lets KVM finish the instruction that the guest was stopped at, and no other.
            kick.set(true);
        }
        let wish = match vcpu.run() {
            Exit::PortOut(port, bytes) => bus.port_out(port, bytes),
            Exit::PortIn(port, bytes) => {
                bus.port_in(port, bytes);
                None
            }
            Exit::MemoryOut(at, bytes) => {
                bus.memory_out(at, bytes);
                None
            }
            Exit::MemoryIn(at, bytes) => {
                bus.memory_in(at, bytes);
                None
            }
            Exit::Interrupted if leaving && !meter.rest_while(|| control.park()) => return None,
            Exit::Interrupted => None,
            Exit::TripleFault => Some(Wish::Reset),
            Exit::Broken(why) => {
                return Some(End::Crashed(
                    Error::unavailable("the guest did what this host cannot run")
                        .remedy("see whether this host's KVM is real: `iaas_vmm::probe()`")
                        .detail(why),
                ));
            }
        };
        match wish {
            None => {}
            Some(Wish::Off) => return Some(End::GuestOff),
            Some(Wish::Reset) => return Some(End::GuestReset),
        }
    }
}

/// The processor time of one thread, from its start on, and beyond its end. It stands still while the thread rests.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<Reading>);

#[derive(Debug, Default)]
struct Reading {
    clock: Option<ThreadClock>,
    last: Duration,
    rests: bool,
}

impl Meter {
    fn start(&self) {
        self.lock().clock = ThreadClock::of_this_thread();
    }

    fn stop(&self) {
        self.read();
        self.lock().clock = None;
    }

    /// Does what stops the thread for a while. What the thread needs to lie down is told after it got up.
    fn rest_while<T>(&self, stand_still: impl FnOnce() -> T) -> T {
        self.read();
        self.lock().rests = true;
        let result = stand_still();
        self.lock().rests = false;
        result
    }

    pub(super) fn read(&self) -> Duration {
        let mut reading = self.lock();
        let now = reading.clock.filter(|_| !reading.rests).and_then(ThreadClock::read);
        reading.last = reading.last.max(now.unwrap_or_default());
        reading.last
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Reading> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a processor's thread holds.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) vcpu: Vcpu,
    pub(super) kick: Arc<Kick>,
    pub(super) bus: Arc<Bus>,
    pub(super) meter: Arc<Meter>,
    pub(super) presence: Presence,
}

impl Job {
    pub(super) fn run(self) {
        run(self.vcpu, &self.kick, &self.bus, &self.meter, self.presence);
    }
}
