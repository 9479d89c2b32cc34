//! The world that the fakes act on: what exists, each effect in order, and the faults that a test plans.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use uuid::Uuid;

use crate::Clock;
use crate::Epoch;
use crate::Error;
use crate::ErrorKind;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::spi::Ctx;
use crate::spi::Site;
use crate::spi::Stamp;
use crate::spi::Tag;

/// Hosts, pools and networks in memory, shared by every fake that is opened on it.
///
/// It outlives the providers: dropping them all and opening new ones is a restart of the process. Cheap to clone.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    clock: Arc<dyn Clock>,
    boot_id: Uuid,
    state: Mutex<State>,
    calls: AtomicU64,
    down: watch::Sender<bool>,
    sites: Mutex<BTreeMap<(Site, String), Arc<dyn Standing>>>,
}

#[derive(Debug, Default)]
struct State {
    effects: Vec<Effect>,
    plan: BTreeMap<u64, Fault>,
    delay: Duration,
    settle: Duration,
}

/// Something that happened in the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Its number; the first is 1.
    pub number: u64,
    /// Where.
    pub site: Site,
    /// `ensure`, `remove`, `sync`, `upload`, `fence` or `power`.
    pub verb: &'static str,
    /// To what.
    pub object: ObjectRef,
    /// By which leader.
    pub epoch: Epoch,
    /// Whether it was done: wholly, in part or not at all.
    pub landed: Landed,
}

/// How much of an effect was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// Nothing.
    No,
    /// The thing exists, tagged, but half-made or half-removed.
    Half,
    /// All of it.
    Whole,
}

/// What shall go wrong with an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused: nothing happens, and the error says so ([`Outcome::NotDone`]).
    Refused,
    /// The answer is lost ([`Outcome::Unknown`]) and nothing happened.
    NotLanded,
    /// The answer is lost ([`Outcome::Unknown`]) and the effect happened.
    ReplyLost,
    /// The answer is lost and the effect happened by half.
    Half,
    /// The process dies before the effect: this call and all later ones hang until [`World::restart`].
    CrashBefore,
    /// The process dies after the effect.
    CrashAfter,
}

/// A thing that exists, as an independent look at the world finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thing {
    /// Where.
    pub site: Site,
    /// What.
    pub object: ObjectRef,
    /// Whose, if it says.
    pub tag: Option<Tag>,
}

impl World {
    /// An empty world that lives by `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Inner {
            boot_id: clock.uuid(),
            clock,
            state: Mutex::default(),
            calls: AtomicU64::new(0),
            down: watch::Sender::new(false),
            sites: Mutex::default(),
        }))
    }

    /// Its clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// This moment, on the clocks of its hosts.
    pub fn stamp(&self) -> Stamp {
        let mono = self.0.clock.monotonic().as_nanos();
        Stamp {
            wall: self.0.clock.now(),
            boot_id: self.0.boot_id,
            mono_ns: u64::try_from(mono).unwrap_or(u64::MAX),
        }
    }

    /// Each effect so far, in order.
    pub fn effects(&self) -> Vec<Effect> {
        lock(&self.0.state).effects.clone()
    }

    /// How many effects there were.
    pub fn effect_count(&self) -> u64 {
        lock(&self.0.state).effects.len() as u64
    }

    /// How often a provider was asked for anything at all, reading included.
    pub fn call_count(&self) -> u64 {
        self.0.calls.load(Ordering::Relaxed)
    }

    /// Everything that exists, of every owner, in order of site and object.
    pub fn things(&self) -> Vec<Thing> {
        let sites: Vec<_> = lock(&self.0.sites).values().cloned().collect();
        let mut all: Vec<Thing> = sites.iter().flat_map(|s| s.things()).collect();
        all.sort_by(|a, b| (a.site, &a.object).cmp(&(b.site, &b.object)));
        all
    }

    /// Plans `fault` for the effect with that number.
    pub fn fail_at(&self, number: u64, fault: Fault) {
        lock(&self.0.state).plan.insert(number, fault);
    }

    /// Plans `fault` for the next effect.
    pub fn fail_next(&self, fault: Fault) {
        let mut state = lock(&self.0.state);
        let next = state.effects.len() as u64 + 1;
        state.plan.insert(next, fault);
    }

    /// Forgets the faults that have not come yet.
    pub fn forget_faults(&self) {
        lock(&self.0.state).plan.clear();
    }

    /// Lets each changing call wait so long, by the clock, before its effect.
    pub fn set_delay(&self, delay: Duration) {
        lock(&self.0.state).delay = delay;
    }

    /// Lets each object take so long, by the clock, to settle and to leave. Zero at first.
    pub fn set_settle(&self, settle: Duration) {
        lock(&self.0.state).settle = settle;
    }

    /// How long an object takes to settle.
    pub(super) fn settle(&self) -> Duration {
        lock(&self.0.state).settle
    }

    /// Whether a planned crash has come.
    pub fn is_down(&self) -> bool {
        *self.0.down.borrow()
    }

    /// Returns when a planned crash has come. Drop the control plane then, and [`restart`](Self::restart).
    pub async fn crashed(&self) {
        let mut down = self.0.down.subscribe();
        // `self` holds the sender.
        let _ = down.wait_for(|down| *down).await;
    }

    /// Ends the crash: providers answer again.
    pub fn restart(&self) {
        self.0.down.send_replace(false);
    }

    /// The way in of every call, which counts it. Returns at once, or never while the process that calls is dead.
    pub(super) async fn alive(&self) {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        let mut down = self.0.down.subscribe();
        let _ = down.wait_for(|down| !*down).await;
    }

    /// Waits for the delay that a test has set, unless the caller gives up.
    pub(super) async fn linger(&self, cx: &Ctx) -> Result<()> {
        let delay = lock(&self.0.state).delay;
        if !delay.is_zero() {
            tokio::select! {
                () = self.0.clock.sleep(delay) => {}
                () = cx.cancel.cancelled() => {}
            }
        }
        if cx.cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "the call was cancelled before its effect")
                .outcome_is(Outcome::NotDone));
        }
        Ok(())
    }

    /// Counts an effect and says how much of it shall happen, and how the call ends.
    pub(super) fn strike(&self, site: Site, verb: &'static str, object: ObjectRef, epoch: Epoch) -> Strike {
        let mut state = lock(&self.0.state);
        let number = state.effects.len() as u64 + 1;
        let fault = state.plan.remove(&number);
        let landed = match fault {
            None | Some(Fault::ReplyLost | Fault::CrashAfter) => Landed::Whole,
            Some(Fault::Half) => Landed::Half,
            Some(Fault::Refused | Fault::NotLanded | Fault::CrashBefore) => Landed::No,
        };
        state.effects.push(Effect { number, site, verb, object, epoch, landed });
        Strike { landed, fault, number }
    }

    /// Ends a call as its strike says: with its answer, an error, or never.
    pub(super) async fn finish<T>(&self, strike: Strike, answer: T) -> Result<T> {
        let lost = || Error::unavailable(format!("the answer to effect {} was lost", strike.number));
        match strike.fault {
            None => Ok(answer),
            Some(Fault::Refused) => Err(Error::unavailable(format!("effect {} was refused", strike.number))
                .outcome_is(Outcome::NotDone)),
            Some(Fault::NotLanded | Fault::ReplyLost | Fault::Half) => {
                Err(lost().outcome_is(Outcome::Unknown))
            }
            Some(Fault::CrashBefore | Fault::CrashAfter) => {
                self.0.down.send_replace(true);
                std::future::pending().await
            }
        }
    }

    /// The standing part of a site, made by `make` when it is asked for first.
    pub(super) fn stand<S: Standing>(&self, site: Site, name: &str, make: impl FnOnce() -> S) -> Arc<S> {
        let mut sites = lock(&self.0.sites);
        let found = sites.entry((site, name.to_owned())).or_insert_with(|| Arc::new(make()));
        match Arc::clone(found).any().downcast() {
            Ok(stand) => stand,
            // Names are the provider's, one type each, so this is a mistake in this module.
            Err(_) => unreachable!("site {site:?}/{name} is of another type"),
        }
    }

    /// The standing part of a site, if somebody opened it.
    pub(super) fn standing<S: Standing>(&self, site: Site, name: &str) -> Option<Arc<S>> {
        let found = lock(&self.0.sites).get(&(site, name.to_owned())).cloned()?;
        found.any().downcast().ok()
    }

    /// All standing parts of one type.
    pub(super) fn all_standing<S: Standing>(&self) -> Vec<Arc<S>> {
        let sites: Vec<_> = lock(&self.0.sites).values().cloned().collect();
        sites.into_iter().filter_map(|s| s.any().downcast().ok()).collect()
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("effects", &self.effect_count()).finish_non_exhaustive()
    }
}

/// What the world has decided about one effect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strike {
    pub(super) landed: Landed,
    fault: Option<Fault>,
    number: u64,
}

/// The part of a site that survives its provider.
pub(super) trait Standing: Any + Send + Sync {
    /// What exists there.
    fn things(&self) -> Vec<Thing>;
    /// For finding its type again.
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// Locks, also after a test thread has panicked with the lock held.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
