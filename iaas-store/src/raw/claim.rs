//! The right to write: taken durably before the first write, watched, and lost for good when a newer writer comes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::spi::block::PoolVolume;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use super::sidecar;
use super::sidecar::Sidecar;
use super::sidecar::State;
use super::sidecar::WRITER;
use super::trouble;
use crate::rawio::RawFile;

/// A process's right to write one volume.
#[derive(Debug)]
pub(crate) struct Writer {
    core: Arc<Core>,
    /// Tells of changes of the record; without it the record is looked at now and then.
    news: Option<Arc<OwnedFd>>,
    watch: Mutex<Option<Watch>>,
}

/// What operations, claims and the watch share.
#[derive(Debug)]
pub(crate) struct Core {
    record: File,
    volume: Id<PoolVolume>,
    term: AtomicU64,
    /// Writes may start.
    open: AtomicBool,
    /// A newer writer came: nothing may start any more, ever.
    fenced: AtomicBool,
    /// A sync failed: the kernel may have forgotten what was not written, so nothing is durable any more.
    poisoned: AtomicBool,
    running: AtomicUsize,
}

impl Writer {
    /// For the volume with this record. `news` is an inotify descriptor that watches the record.
    pub(crate) fn new(record: File, volume: Id<PoolVolume>, news: Option<OwnedFd>) -> Self {
        let core = Core {
            record,
            volume,
            term: AtomicU64::new(0),
            open: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            running: AtomicUsize::new(0),
        };
        Self { core: Arc::new(core), news: news.map(Arc::new), watch: Mutex::default() }
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub(crate) fn record(&self) -> Result<Sidecar> {
        Sidecar::read(&self.core.record)
    }

    /// Becomes the writer with `term`. An older writer is told to stop, and waited for.
    ///
    /// # Errors
    /// - `Fenced`: a higher term has claimed the volume.
    /// - `Conflict`: an older writer does not let go. It makes nothing durable any more; claim again when it has ended.
    pub(crate) fn claim(&self, term: Term) -> Result<()> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if self.core.fenced.load(SeqCst) {
            return Err(fenced());
        }
        // Before the record, so that the watch does not take our own claim for somebody else's.
        let before = self.core.term.swap(term.0, SeqCst);
        match self.core.take(term) {
            Ok(()) => {}
            Err(error) => {
                self.core.term.store(before, SeqCst);
                if !self.core.open.load(SeqCst) {
                    let _ = self.core.record.unlock_byte(WRITER);
                }
                return Err(error);
            }
        }
        if watch.is_none() {
            *watch = Some(Watch::start(self.core.clone(), self.news.clone())?);
        }
        self.core.open.store(true, SeqCst);
        Ok(())
    }

    /// Gives the right up, when the operations under way have ended and `sync` has made them durable.
    ///
    /// # Errors
    /// - `Conflict`: they do not end; the right is still ours.
    /// - `Fenced`: a newer writer came before. `Unavailable`: the sync failed. The right is given up.
    pub(crate) fn release(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<()> {
        let _turn = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.core.owes_flush() {
            return Ok(());
        }
        self.core.open.store(false, SeqCst);
        let until = Instant::now() + PATIENCE;
        while self.core.running.load(SeqCst) > 0 {
            if Instant::now() >= until {
                let fenced = self.core.fenced.load(SeqCst);
                self.core.open.store(!fenced, SeqCst);
                return Err(Error::conflict("operations are under way").remedy("reap them, then release"));
            }
            std::thread::sleep(PAUSE);
        }
        let synced = self.core.judge_sync(sync()).map_err(|e| unwrapped(&e));
        let unlocked = self.core.record.unlock_byte(WRITER).map_err(|e| trouble("unlock", &e));
        synced.and(unlocked)
    }
}

impl Core {
    fn take(&self, term: Term) -> Result<()> {
        let lock = || self.record.try_lock_byte(WRITER).map_err(|e| trouble("lock", &e));
        let free = sidecar::update(&self.record, |old| {
            self.admit(old, term)?;
            let free = lock()?;
            let changed = old.term != term || (free && old.holder != term);
            old.term = term;
            if free {
                old.holder = term;
            }
            Ok((changed, free))
        })?;
        if free {
            return Ok(());
        }
        self.wait_for(term, lock)?;
        sidecar::update(&self.record, |old| {
            self.admit(old, term)?;
            old.holder = term;
            Ok((true, ()))
        })
    }

    fn wait_for(&self, term: Term, lock: impl Fn() -> Result<bool>) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !lock()? {
            if sidecar::claim(&self.record)?.term > term {
                return Err(fenced());
            }
            if Instant::now() >= until {
                return Err(Error::conflict("the older writer of the volume does not let go")
                    .remedy("end its process, then claim again; it makes nothing durable any more"));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn admit(&self, record: &Sidecar, term: Term) -> Result<()> {
        if record.volume != self.volume {
            return Err(Error::conflict("the record is that of another volume"));
        }
        if record.state != State::Whole {
            return Err(Error::not_found("the volume is going, or half-made").about(self.volume.object()));
        }
        if record.term > term {
            return Err(fenced().detail(format!("{term} is older than {}", record.term)));
        }
        Ok(())
    }

    /// Lets an operation start. What is let in must [`leave`](Self::leave).
    pub(crate) fn enter(&self, writes: bool) -> io::Result<()> {
        // Counted before the question, so that who closes the door either sees us or we see it closed.
        self.running.fetch_add(1, SeqCst);
        let refused = if self.fenced.load(SeqCst) {
            Some(denied(fenced()))
        } else if writes && !self.open.load(SeqCst) {
            Some(denied(Error::conflict("no writer has claimed the volume here").remedy("claim it first")))
        } else {
            None
        };
        match refused {
            Some(error) => {
                self.leave();
                Err(error)
            }
            None => Ok(()),
        }
    }

    pub(crate) fn leave(&self) {
        self.running.fetch_sub(1, SeqCst);
    }

    /// Whether a flush has something to prove: there is a right to write here, or it was lost.
    pub(crate) fn owes_flush(&self) -> bool {
        self.open.load(SeqCst) || self.fenced.load(SeqCst)
    }

    /// Judges a sync that has ended: what it made durable counts only if we are still the writer.
    pub(crate) fn judge_sync(&self, synced: io::Result<()>) -> io::Result<()> {
        if let Err(error) = synced {
            self.poisoned.store(true, SeqCst);
            return Err(error);
        }
        if self.poisoned.load(SeqCst) {
            return Err(io::Error::other("an earlier sync of this volume failed; open it anew"));
        }
        let claim = sidecar::claim(&self.record).map_err(io::Error::other)?;
        if claim.term.0 > self.term.load(SeqCst) {
            self.fenced.store(true, SeqCst);
            return Err(denied(fenced()));
        }
        if claim.state != State::Whole {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the volume is being removed"));
        }
        Ok(())
    }

    /// Whether somebody else has the right now, or the volume goes.
    fn is_over(&self) -> bool {
        match sidecar::claim(&self.record) {
            Ok(claim) => claim.term.0 > self.term.load(SeqCst) || claim.state != State::Whole,
            // Nothing is known. The next flush asks again, and fails if it is told nothing either.
            Err(_) => false,
        }
    }

    /// Closes the door for good.
    fn close(&self) {
        self.open.store(false, SeqCst);
        self.fenced.store(true, SeqCst);
    }
}

/// The thread that hears of a newer writer, lets our operations end and gives the lock up.
#[derive(Debug)]
struct Watch {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(core: Arc<Core>, news: Option<Arc<OwnedFd>>) -> Result<Self> {
        let stop = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| trouble("make an event", &e.into()))?;
        let stop = Arc::new(stop);
        let asked = stop.clone();
        let thread = std::thread::Builder::new()
            .name("volume-watch".into())
            .spawn(move || watch(&core, news.as_deref(), &asked))
            .map_err(|e| trouble("start a thread", &e))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(core: &Core, news: Option<&OwnedFd>, stop: &EventFd) {
    loop {
        // The first look is before the first wait: a change may have come before the watch.
        if core.open.load(SeqCst) && core.is_over() {
            core.close();
            break;
        }
        if wait(news, stop) {
            return;
        }
        if let Some(news) = news {
            // What happened does not matter: the record tells.
            let mut events = [0; 4096];
            while nix::unistd::read(news, &mut events).is_ok_and(|count| count == events.len()) {}
        }
    }
    while core.running.load(SeqCst) > 0 {
        if stopped(stop) {
            return;
        }
        std::thread::sleep(PAUSE);
    }
    tracing::warn!(volume = %core.volume, "a newer writer took the volume over");
    let _ = core.record.unlock_byte(WRITER);
}

/// Waits for news; `true`: to stop.
fn wait(news: Option<&OwnedFd>, stop: &EventFd) -> bool {
    let mut fds = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    fds.extend(news.map(|news| PollFd::new(news.as_fd(), PollFlags::POLLIN)));
    // A slow look beside the news costs nothing and forgives a lost one.
    let timeout = if news.is_some() { PollTimeout::from(1000_u16) } else { PollTimeout::from(50_u16) };
    let _ = poll(&mut fds, timeout);
    stopped(stop)
}

fn stopped(stop: &EventFd) -> bool {
    stop.read().is_ok()
}

fn fenced() -> Error {
    Error::fenced("a newer writer has claimed the volume")
        .remedy("stop; the volume is used elsewhere")
        .outcome_is(Outcome::NotDone)
}

/// Our own error in one of the system's, if it holds one.
fn unwrapped(error: &io::Error) -> Error {
    let ours = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    ours.cloned().unwrap_or_else(|| trouble("sync", error))
}

fn denied(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, error)
}

/// How long a claim waits for an older writer that lives, and a release for operations under way.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(1);
