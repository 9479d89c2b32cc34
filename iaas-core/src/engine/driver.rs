//! The loop that drives the queue: wakes, timers and looks, in tasks of the caller's runtime.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::audit;
use super::codec;
use super::commit::Committer;
use super::outbox;
use super::policy::Policies;
use super::queue::Next;
use super::queue::Queue;
use super::queue::errand;
use super::reconcile::Work;
use super::sweep;
use super::sweep::Sweeper;
use crate::Entity;
use crate::Error;
use crate::ErrorKind;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::*;
use crate::security::audit::AuditLog;
use crate::spi::audit::AuditSink;
use crate::spi::block::Access;
use crate::spi::block::PoolVolume;
use crate::spi::hypervisor::Vm;
use crate::spi::meter::MeterSink;
use crate::spi::network::Plug;

/// Everything that a look may need.
#[derive(Debug)]
pub struct Driver {
    /// What reconcilers work with.
    pub work: Work,
    /// Where usage goes.
    pub meter: Arc<dyn MeterSink>,
    /// Where the audit log is copied to.
    pub audit: Option<Arc<dyn AuditSink>>,
    /// The sequenced audit log.
    pub log: Arc<tokio::sync::Mutex<AuditTree>>,
    /// Looks for what nobody wants.
    pub sweeper: Sweeper,
    /// How often and why looks at an object failed.
    pub failures: Mutex<BTreeMap<ObjectRef, Failures>>,
    /// Roles and bindings on their way to the authorizer.
    pub policies: Arc<Policies>,
    /// Whether everything rests: for tests and for shutting down.
    pub rest: watch::Sender<Rest>,
}

/// Looks at one object that failed in a row.
#[derive(Clone, Copy, Debug)]
pub struct Failures {
    attempts: u32,
    since: jiff::Timestamp,
    /// Not before this moment of the monotonic clock is it looked at again, unless its record has changed since.
    until: Duration,
    version: Option<Rev>,
}

impl Failures {
    fn none(since: jiff::Timestamp) -> Self {
        Self { attempts: 0, since, until: Duration::ZERO, version: None }
    }
}

/// What the driver has left to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Nothing is under way and nothing waits.
    pub idle: bool,
    /// How many wake-ups it has taken.
    pub taken: u64,
}

/// The sequenced audit log: its leaves in order, and the tree over them.
#[derive(Debug, Default)]
pub struct AuditTree {
    /// The leaves.
    pub leaves: Vec<bytes::Bytes>,
    /// The tree.
    pub tree: AuditLog,
}

impl AuditTree {
    /// The log with these leaves.
    pub fn of(leaves: Vec<bytes::Bytes>) -> Self {
        let mut log = Self::default();
        log.extend(leaves);
        log
    }

    fn extend(&mut self, leaves: Vec<bytes::Bytes>) {
        for leaf in leaves {
            self.tree.append(&leaf);
            self.leaves.push(leaf);
        }
    }
}

impl Driver {
    /// Runs until the committer halts. Dropping the future aborts looks that are under way, as a crash would.
    pub async fn run(self: Arc<Self>, mut wakes: mpsc::UnboundedReceiver<ObjectRef>) {
        let clock = Arc::clone(self.work.committer.clock());
        let mut halts = self.work.committer.halts();
        let mut queue = Queue::default();
        let mut looks: JoinSet<(ObjectRef, Next)> = JoinSet::new();
        let mut taken = 0;
        self.want_all(&mut queue);
        loop {
            let now = clock.monotonic();
            while queue.running() < MOST_LOOKS
                && let Some(object) = queue.take(now)
            {
                let driver = Arc::clone(&self);
                looks.spawn(async move {
                    let next = driver.look(&object).await;
                    (object, next)
                });
            }
            let rest = Rest { idle: queue.is_idle(), taken };
            self.rest.send_if_modified(|old| std::mem::replace(old, rest) != rest);
            let due = queue.next_due().filter(|_| queue.running() < MOST_LOOKS);
            let timer = async {
                match due {
                    Some(due) => clock.sleep(due.saturating_sub(clock.monotonic())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                wake = wakes.recv() => match wake {
                    Some(object) => {
                        taken += 1;
                        queue.want(object, clock.monotonic());
                        while let Ok(object) = wakes.try_recv() {
                            taken += 1;
                            queue.want(object, clock.monotonic());
                        }
                    }
                    None => return,
                },
                Some(done) = looks.join_next(), if !looks.is_empty() => match done {
                    Ok((object, next)) => queue.done(&object, next, clock.monotonic()),
                    Err(error) => {
                        // A panic in a look is a defect of ours; what is in memory cannot be trusted any more.
                        self.work.committer.halt(Error::internal("a look at an object panicked").because(&error));
                    }
                },
                () = timer => {}
                _ = halts.wait_for(Option::is_some) => return,
            }
        }
    }

    fn want_all(&self, queue: &mut Queue) {
        let now = self.work.committer.clock().monotonic();
        self.work.committer.read(|s| {
            s.volumes.keys().for_each(|id| queue.want(id.object(), now));
            s.attachments.keys().for_each(|id| queue.want(id.object(), now));
            s.instances.keys().for_each(|id| queue.want(id.object(), now));
        });
        self.work.sites.fabrics.keys().for_each(|id| queue.want(id.object(), now));
        for name in ["outbox", "audit", "counters", "artifacts", "sweep"] {
            queue.want(errand(name), now);
        }
    }

    async fn look(self: &Arc<Self>, object: &ObjectRef) -> Next {
        if let Some(left) = self.backs_off(object) {
            return Next::After(left);
        }
        let result = match object.kind.as_str() {
            "outbox" => outbox::deliver(&self.work.committer, &self.meter, &self.work.caller).await,
            "audit" => self.sequence().await,
            "counters" => self.counters().await,
            "sweep" => self.sweeper.look(&self.work).await,
            "artifacts" => sweep::evict_artifacts(&self.work).await,
            "policies" => self.policies.load().await.map(|()| Next::Rest),
            _ => self.work.look(object).instrument(self.span(object)).await,
        };
        match result {
            Ok(next) => {
                let failed = self.failures().remove(object).is_some();
                // Also the trouble that was noted before a restart is over.
                if failed
                    || self.work.committer.read(|s| s.brief(object).is_some_and(|b| b.trouble.is_some()))
                {
                    self.report(object, None).await;
                }
                next
            }
            Err(error) if error.kind() == ErrorKind::Fenced => {
                self.work.committer.halt(error);
                Next::Rest
            }
            // Somebody changed the record meanwhile: look at it as it is now.
            Err(error) if error.kind() == ErrorKind::Conflict && self.first_conflict(object) => {
                Next::After(Duration::ZERO)
            }
            Err(error) => self.failed(object, error).await,
        }
    }

    /// The span of a look: what is looked at, and the operation on whose behalf, if one is open.
    fn span(&self, object: &ObjectRef) -> tracing::Span {
        let op = self.work.committer.read(|s| s.open_operations(object).first().map(|o| o.meta.id));
        tracing::info_span!("look", %object, operation = op.map(tracing::field::display))
    }

    /// How long an object that failed still rests. A provider's feed wakes it also for what our own try has changed there: without
    /// this each try would ask for the next one.
    fn backs_off(&self, object: &ObjectRef) -> Option<Duration> {
        let Failures { until, version, .. } = *self.failures().get(object)?;
        let left = until.saturating_sub(self.work.committer.clock().monotonic());
        (!left.is_zero() && version.is_some() && self.version(object) == version).then_some(left)
    }

    fn version(&self, object: &ObjectRef) -> Option<Rev> {
        self.work.committer.read(|s| s.brief(object).map(|brief| brief.version))
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, BTreeMap<ObjectRef, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the object's first failure in a row; the next one counts as an attempt.
    fn first_conflict(&self, object: &ObjectRef) -> bool {
        let now = self.work.committer.clock().now();
        let mut failures = self.failures();
        let first = !failures.contains_key(object);
        if first {
            failures.insert(object.clone(), Failures::none(now));
        }
        first
    }

    async fn failed(&self, object: &ObjectRef, error: Error) -> Next {
        let clock = self.work.committer.clock();
        let now = clock.now();
        let Failures { attempts, since, .. } = {
            let mut failures = self.failures();
            let entry = failures.entry(object.clone()).or_insert(Failures::none(now));
            entry.attempts += 1;
            *entry
        };
        let wait = error.retry_after().unwrap_or_else(|| backoff(attempts, clock.uuid().as_u128()));
        tracing::warn!(%object, attempts, %error, operator = ?error.operator(), "will be retried");
        if attempts.is_power_of_two() {
            let next_try = now.checked_add(wait).unwrap_or(now);
            self.report(object, Some(Trouble { since, attempts, next_try, reason: error })).await;
        }
        let (until, version) = (clock.monotonic() + wait, self.version(object));
        self.failures().insert(object.clone(), Failures { attempts, since, until, version });
        Next::After(wait)
    }

    async fn report(&self, object: &ObjectRef, trouble: Option<Trouble>) {
        if let Err(error) = self.work.note_trouble(object, trouble).await {
            tracing::debug!(%object, %error, "the trouble could not be noted");
        }
    }

    async fn counters(&self) -> Result<Next> {
        outbox::read_counters(&self.work.committer, &self.work.sites, &self.meter, &self.work.caller).await?;
        Ok(Next::Check(COUNTERS_EVERY))
    }

    /// Gives audit leaves their places, and copies them to the sink.
    ///
    /// A caller that drops the future loses only the answer.
    ///
    /// # Errors
    /// Those of the store and of the sink.
    pub async fn sequence(self: &Arc<Self>) -> Result<Next> {
        let this = Arc::clone(self);
        let task = async move { this.sequence_all().await };
        match tokio::spawn(task.in_current_span()).await {
            Ok(done) => done,
            Err(error) => Err(Error::internal("the audit log could not be sequenced").because(&error)),
        }
    }

    async fn sequence_all(&self) -> Result<Next> {
        let committer: &Arc<Committer> = &self.work.committer;
        let mut log = self.log.lock().await;
        loop {
            let (waiting, _) = committer.store().scan(codec::LEAVES.as_bytes(), None, 1000).await?;
            if waiting.is_empty() {
                break;
            }
            let next = log.leaves.len() as u64;
            let (leaves, checks, writes) = audit::sequence(waiting, next);
            committer.commit_raw(checks, writes).await?;
            log.extend(leaves);
        }
        if let Some(sink) = &self.audit {
            let checkpoint = log.tree.checkpoint(&audit::origin(self.work.caller.cloud))?;
            sink.append(0, &log.leaves, &checkpoint.to_string()).await?;
        }
        Ok(Next::Rest)
    }
}

/// Wakes the objects of the model of which the provider with that index says that they have changed.
///
/// A feed that ends is opened again: the provider may have been restarted. Without one the driver looks by itself.
pub async fn listen(work: Work, index: usize) {
    let cx = work.caller.own();
    while let Some(provider) = work.sites.providers().get(index) {
        match provider.changes(&cx).await {
            Ok(mut feed) => {
                while let Some(Ok(object)) = feed.next().await {
                    work.committer.wake(modelled(&object));
                }
            }
            Err(error) => tracing::debug!(%error, "no feed of changes"),
        }
        work.committer.clock().sleep(FEED_AGAIN).await;
    }
}

fn modelled(object: &ObjectRef) -> ObjectRef {
    let kind = match object.kind.as_str() {
        Vm::NAME => Instance::NAME,
        PoolVolume::NAME => Volume::NAME,
        Access::NAME | Plug::NAME => Attachment::NAME,
        other => other,
    };
    ObjectRef { kind: kind.to_owned(), id: object.id }
}

/// 0.1 s doubled with each attempt up to a minute, and up to a quarter more by chance.
fn backoff(attempts: u32, chance: u128) -> Duration {
    let base = Duration::from_millis(100) * (1 << attempts.saturating_sub(1).min(9));
    let jitter = u32::try_from(chance % 256).unwrap_or(0);
    base.min(Duration::from_secs(60)) + base / 1024 * jitter
}

/// How long after the end of a feed it is opened again.
const FEED_AGAIN: Duration = Duration::from_secs(5);
/// The most looks at once.
const MOST_LOOKS: usize = 64;
/// How often counters are read.
const COUNTERS_EVERY: Duration = Duration::from_secs(10);
