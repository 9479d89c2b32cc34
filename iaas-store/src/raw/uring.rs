//! Operations through io_uring: one system call for a batch, none to reap.

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use super::queue::Ended;
use super::queue::Engine;
use crate::sys::Job;
use crate::sys::Ring;

#[derive(Debug)]
pub(crate) struct Uring {
    ring: Ring,
    /// Jobs that the ring did not take.
    refused: Vec<Ended>,
}

impl Uring {
    pub(crate) fn new(depth: u16, file: Arc<File>, event: &EventFd) -> io::Result<Self> {
        Ok(Self { ring: Ring::new(depth, file, &event.as_fd().as_raw_fd())?, refused: Vec::new() })
    }
}

impl Engine for Uring {
    fn start(&mut self, slot: u16, job: Job) {
        if let Err((job, error)) = self.ring.push(slot, job) {
            self.refused.push(Ended { slot, job, result: Err(error) });
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.refused);
        self.ring.reap(|slot, job, result| ended.push(Ended { slot, job, result }));
    }
}
