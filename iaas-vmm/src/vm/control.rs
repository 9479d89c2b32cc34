//! What all threads of a machine shall do, and what they do: run, stand still, or leave.

use std::fmt;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::End;
use vmm_sys_util::signal::Killable;

use crate::kvm::Bell;
use crate::kvm::Kick;

/// What the threads shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Run,
    Pause,
    Leave,
}

/// The wish, and who has followed it.
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// A copy of the wish, which processors read before each entry.
    want: AtomicU8,
    processors: Mutex<Vec<Processor>>,
    wake_io: Bell,
    signal: i32,
}

#[derive(Debug)]
struct State {
    want: Want,
    alive: usize,
    parked: usize,
    asked_off: bool,
    end: Option<End>,
}

struct Processor {
    kick: Arc<Kick>,
    thread: JoinHandle<()>,
}

impl Control {
    /// For threads that first stand still. They are interrupted by `signal` and `wake_io`.
    pub(super) fn new(signal: i32, wake_io: Bell) -> Self {
        let state = State { want: Want::Pause, alive: 0, parked: 0, asked_off: false, end: None };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            want: AtomicU8::new(Want::Pause as u8),
            processors: Mutex::default(),
            wake_io,
            signal,
        }
    }

    /// A thread is about to be started; what it holds tells when it has ended, in whatever way.
    pub(super) fn enlist(self: &Arc<Self>) -> Presence {
        self.lock().alive += 1;
        Presence(self.clone())
    }

    /// Takes a processor's thread, so that it can be interrupted.
    pub(super) fn add_processor(&self, kick: Arc<Kick>, thread: JoinHandle<()>) {
        self.lock_processors().push(Processor { kick, thread });
    }

    /// What to do; cheap.
    pub(super) fn want(&self) -> Want {
        match self.want.load(Ordering::SeqCst) {
            0 => Want::Run,
            1 => Want::Pause,
            _ => Want::Leave,
        }
    }

    /// Changes the wish and interrupts everybody.
    pub(super) fn set(&self, want: Want) -> Result<()> {
        let mut state = self.lock();
        if state.want == Want::Leave {
            return Err(super::has_ended());
        }
        self.wish(&mut state, want);
        drop(state);
        self.interrupt();
        Ok(())
    }

    /// From now on, a guest that powers off does what it was asked to.
    pub(super) fn ask_off(&self) {
        self.lock().asked_off = true;
    }

    /// The machine ends; the first reason stays.
    pub(super) fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_none() {
            let stopped = state.asked_off && end == End::GuestOff;
            state.end = Some(if stopped { End::Stopped } else { end });
        }
        self.wish(&mut state, Want::Leave);
        drop(state);
        self.interrupt();
    }

    /// Stands still while that is wished; says whether to go on.
    pub(super) fn park(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        while state.want == Want::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.want == Want::Run
    }

    /// Waits until everybody stands still.
    pub(super) fn until_parked(&self) -> Result<()> {
        let mut state = self.lock();
        while state.want == Want::Pause && state.parked < state.alive {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match state.want {
            Want::Pause => Ok(()),
            Want::Run => Err(Error::conflict("the machine was started while it was to pause")),
            Want::Leave => Err(super::has_ended()),
        }
    }

    /// Waits until the machine has ended and everybody is gone.
    pub(super) fn until_gone(&self, patience: Option<Duration>) -> Option<End> {
        let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
        let mut state = self.lock();
        while state.end.is_none() || state.alive > 0 {
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.end.clone()
    }

    /// Waits for the processors' threads, which were told to leave.
    pub(super) fn join(&self) {
        let processors = std::mem::take(&mut *self.lock_processors());
        for processor in processors {
            if processor.thread.join().is_err() {
                tracing::error!("a processor's thread panicked");
            }
        }
    }

    fn wish(&self, state: &mut State, want: Want) {
        state.want = want;
        self.want.store(want as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn interrupt(&self) {
        for processor in self.lock_processors().iter() {
            // In this order, and after the wish: see `Kick`.
            processor.kick.set(true);
            if let Err(error) = processor.thread.kill(self.signal) {
                // It has ended by itself.
                tracing::trace!(%error, "a processor's thread was not there to be interrupted");
            }
        }
        if let Err(error) = self.wake_io.ring() {
            tracing::error!(%error, "a machine's device thread could not be woken");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_processors(&self) -> MutexGuard<'_, Vec<Processor>> {
        self.processors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("state", &self.lock()).finish_non_exhaustive()
    }
}

/// A thread that lives.
#[derive(Debug)]
pub(super) struct Presence(Arc<Control>);

impl Presence {
    pub(super) fn control(&self) -> &Arc<Control> {
        &self.0
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(End::Crashed(Error::internal("a thread of the machine panicked")));
        }
        self.0.lock().alive -= 1;
        self.0.changed.notify_all();
    }
}
