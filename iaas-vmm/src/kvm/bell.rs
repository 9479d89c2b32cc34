//! An eventfd that KVM rings and that can be polled.

#![expect(unsafe_code, reason = "an eventfd as a borrowed descriptor")]

use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use iaas_core::Error;
use iaas_core::Result;
use nix::libc;
use vmm_sys_util::eventfd::EventFd;

/// Somebody rings it, somebody else waits for it. Rings that are not yet heard are one.
#[derive(Debug)]
pub(crate) struct Bell(EventFd);

impl Bell {
    /// A bell that never makes anybody wait but who polls it.
    pub(crate) fn new() -> Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        event.map(Self).map_err(|e| Error::unavailable("this process has no room for an eventfd").because(&e))
    }

    /// The same bell.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        let event = self.0.try_clone();
        event.map(Self).map_err(|e| Error::unavailable("this process has no room for an eventfd").because(&e))
    }

    pub(crate) fn ring(&self) -> io::Result<()> {
        match self.0.write(1) {
            // So often rung that it cannot count further: it is heard all the same.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Silences it; a ring that comes later is heard. Says whether it had rung.
    pub(crate) fn silence(&self) -> bool {
        self.0.read().is_ok()
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self.0`, which lives as long as this borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
