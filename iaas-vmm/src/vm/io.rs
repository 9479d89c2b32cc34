//! The thread of all devices of a machine.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;

use super::control::Control;
use super::control::Presence;
use super::control::Want;
use crate::kvm::Bell;
use crate::pci::VirtioPci;
use crate::virtio::device::Next;

/// A device, and what calls for a turn of it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) device: Arc<Mutex<VirtioPci>>,
    /// Rung by the driver and by the transport.
    pub(super) doorbell: Bell,
    /// The other side's.
    pub(super) event: Option<OwnedFd>,
    pub(super) next: Next,
}

/// Serves the devices until the machine ends, and then waits until nothing is under way in guest memory.
pub(super) fn run(mut devices: Vec<Served>, wake: &Bell, presence: &Presence) {
    let control = presence.control();
    while serves(control, wake) {
        devices.iter_mut().for_each(turn);
        listen(&devices, wake);
    }
    while devices.iter().map(|served| lock(&served.device).wind_down()).sum::<usize>() > 0 {
        devices.iter_mut().for_each(|served| served.next = Next::Event);
        listen(&devices, wake);
    }
}

/// Stands still as long as that is wished; says whether to go on.
fn serves(control: &Control, wake: &Bell) -> bool {
    wake.silence();
    match control.want() {
        Want::Run => true,
        Want::Pause => control.park(),
        Want::Leave => false,
    }
}

fn turn(served: &mut Served) {
    served.doorbell.silence();
    served.next = lock(&served.device).turn();
}

/// Waits until a device may have something to do.
fn listen(devices: &[Served], wake: &Bell) {
    let mut fds = vec![poll_for(wake.as_fd())];
    let mut patience = PollTimeout::NONE;
    for served in devices {
        fds.push(poll_for(served.doorbell.as_fd()));
        match (served.next, &served.event) {
            (Next::Event, Some(event)) => fds.push(poll_for(event.as_fd())),
            (Next::Now, _) => patience = PollTimeout::ZERO,
            (Next::Soon, _) if patience.is_none() => patience = PollTimeout::from(SOON_MS),
            _ => {}
        }
    }
    match nix::poll::poll(&mut fds, patience) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        // Only a lack of memory is left; the next turn tries again.
        Err(error) => tracing::warn!(%error, "devices could not wait"),
    }
}

fn poll_for(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

const SOON_MS: u8 = 5;
