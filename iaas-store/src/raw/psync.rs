//! Operations on a few threads, where io_uring is missing or forbidden.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;

use super::queue::Ended;
use super::queue::Engine;
use crate::sys::Job;
use crate::sys::Vectors;

#[derive(Debug)]
pub(crate) struct Psync {
    shared: Arc<Shared>,
    /// Started and not yet shown to the threads.
    fresh: Vec<(u16, Job)>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    file: Arc<File>,
    event: Arc<EventFd>,
    work: Mutex<Work>,
    bell: Condvar,
}

#[derive(Debug, Default)]
struct Work {
    waiting: VecDeque<(u16, Job)>,
    ended: Vec<Ended>,
    over: bool,
}

impl Psync {
    pub(crate) fn new(depth: u16, file: Arc<File>, event: Arc<EventFd>) -> io::Result<Self> {
        let shared = Arc::new(Shared { file, event, work: Mutex::default(), bell: Condvar::new() });
        let mut this = Self { shared, fresh: Vec::new(), threads: Vec::new() };
        for _ in 0..depth.min(THREADS) {
            let shared = this.shared.clone();
            let thread = std::thread::Builder::new().name("volume-io".into());
            this.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(this)
    }
}

impl Engine for Psync {
    fn start(&mut self, slot: u16, job: Job) {
        self.fresh.push((slot, job));
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.fresh.is_empty() {
            self.shared.lock().waiting.extend(self.fresh.drain(..));
            self.shared.bell.notify_all();
        }
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.shared.lock().ended);
    }
}

impl Drop for Psync {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.bell.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut vectors = Vectors::default();
        while let Some((slot, job)) = self.next() {
            let result = job.run(&self.file, &mut vectors);
            self.lock().ended.push(Ended { slot, job, result });
            // A full counter is readable too.
            let _ = self.event.write(1);
        }
    }

    /// The next job; `None`: to stop.
    fn next(&self) -> Option<(u16, Job)> {
        let mut work = self.lock();
        loop {
            if let Some(job) = work.waiting.pop_front() {
                return Some(job);
            }
            if work.over {
                return None;
            }
            work = self.bell.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads of one queue.
pub(crate) const THREADS: u16 = 4;
