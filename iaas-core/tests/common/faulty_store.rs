//! A store whose commits go wrong where a test wants it, and that dies with its control plane.

use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Epoch;
use iaas_core::Error;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::Feed;
use iaas_core::spi::state_store::Change;
use iaas_core::spi::state_store::Check;
use iaas_core::spi::state_store::Entry;
use iaas_core::spi::state_store::Lead;
use iaas_core::spi::state_store::StateStore;
use iaas_core::spi::state_store::Write;
use iaas_core::store::MemoryStore;
use tokio::sync::watch;
use uuid::Uuid;

/// What goes wrong with a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitFault {
    /// Nothing is written, and the error says so.
    Refused,
    /// The answer is lost, and nothing was written.
    NotLanded,
    /// The answer is lost, and everything was written.
    ReplyLost,
    /// The process dies before.
    CrashBefore,
    /// The process dies after.
    CrashAfter,
}

impl CommitFault {
    pub const ALL: [Self; 5] =
        [Self::Refused, Self::NotLanded, Self::ReplyLost, Self::CrashBefore, Self::CrashAfter];
}

/// The plan of what goes wrong; outlives the stores.
#[derive(Debug)]
pub struct Plan {
    commits: Mutex<(u64, Option<(u64, CommitFault)>)>,
    down: watch::Sender<bool>,
    /// Deletions of keys that begin so are lost: a defect, for judges to find.
    pub loses: Mutex<Option<&'static str>>,
}

impl Plan {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { commits: Mutex::default(), down: watch::Sender::new(false), loses: Mutex::default() })
    }

    /// How many commits were asked for so far.
    pub fn count(&self) -> u64 {
        self.commits.lock().unwrap().0
    }

    pub fn fail_at(&self, number: u64, fault: CommitFault) {
        self.commits.lock().unwrap().1 = Some((number, fault));
    }

    pub async fn crashed(&self) {
        let _ = self.down.subscribe().wait_for(|down| *down).await;
    }

    /// Whether the process is dead.
    pub fn is_down(&self) -> bool {
        *self.down.borrow()
    }

    /// Whether the planned fault has come.
    pub fn over(&self) -> bool {
        let commits = self.commits.lock().unwrap();
        commits.1.is_some_and(|(number, _)| number <= commits.0)
    }

    /// Plans no fault any more.
    pub fn forget(&self) {
        self.commits.lock().unwrap().1 = None;
    }

    /// Whether the planned fault left a control plane behind that does not know what is stored.
    pub fn lost(&self) -> bool {
        let commits = self.commits.lock().unwrap();
        let fault = commits.1.filter(|(number, _)| *number <= commits.0);
        matches!(fault, Some((_, CommitFault::NotLanded | CommitFault::ReplyLost)))
    }

    fn next(&self) -> Option<CommitFault> {
        let mut commits = self.commits.lock().unwrap();
        commits.0 += 1;
        assert!(commits.0 < 3000, "the control plane commits without end");
        let (number, fault) = commits.1?;
        (number == commits.0).then_some(fault)
    }
}

/// A handle on the state in memory, for one life of the process.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<MemoryStore>,
    plan: Arc<Plan>,
}

impl FaultyStore {
    pub fn new(inner: MemoryStore, plan: &Arc<Plan>) -> Arc<Self> {
        plan.down.send_replace(false);
        Arc::new(Self { inner: Arc::new(inner), plan: Arc::clone(plan) })
    }

    /// The state itself, without faults.
    pub fn inner(&self) -> Arc<dyn StateStore> {
        Arc::clone(&self.inner) as Arc<dyn StateStore>
    }

    /// The process starts again: this handle is dead.
    pub fn reopen(&self) -> Arc<Self> {
        Self::new(self.inner.reopen(), &self.plan)
    }

    async fn alive(&self) {
        if *self.plan.down.borrow() {
            std::future::pending().await
        }
    }

    async fn die<T>(&self) -> T {
        self.plan.down.send_replace(true);
        std::future::pending().await
    }

    async fn write(&self, lead: &Lead, checks: Vec<Check>, mut writes: Vec<Write>) -> Result<Rev> {
        if let Some(prefix) = *self.plan.loses.lock().unwrap() {
            writes.retain(|w| !matches!(w, Write::Delete(key) if key.starts_with(prefix.as_bytes())));
        }
        self.inner.commit(lead, checks, writes).await
    }
}

#[async_trait]
impl StateStore for FaultyStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>> {
        self.alive().await;
        self.inner.get(key).await
    }
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<(Vec<Entry>, Rev)> {
        self.alive().await;
        self.inner.scan(prefix, after, limit).await
    }
    async fn commit(&self, lead: &Lead, checks: Vec<Check>, writes: Vec<Write>) -> Result<Rev> {
        self.alive().await;
        let lost = || Error::unavailable("the answer of the store was lost").outcome_is(Outcome::Unknown);
        match self.plan.next() {
            None => self.write(lead, checks, writes).await,
            Some(CommitFault::Refused) => {
                Err(Error::unavailable("the store is busy").outcome_is(Outcome::NotDone))
            }
            Some(CommitFault::NotLanded) => Err(lost()),
            Some(CommitFault::ReplyLost) => {
                self.write(lead, checks, writes).await?;
                Err(lost())
            }
            Some(CommitFault::CrashBefore) => self.die().await,
            Some(CommitFault::CrashAfter) => {
                self.write(lead, checks, writes).await?;
                self.die().await
            }
        }
    }
    async fn watch(&self, prefix: &[u8], after: Rev) -> Result<Feed<Change>> {
        self.inner.watch(prefix, after).await
    }
    async fn lead(&self, me: Uuid, ttl: std::time::Duration, floor: Epoch) -> Result<Option<Lead>> {
        self.alive().await;
        self.inner.lead(me, ttl, floor).await
    }
    async fn renew(&self, lead: &Lead) -> Result<()> {
        self.alive().await;
        self.inner.renew(lead).await
    }
    async fn resign(&self, lead: Lead) -> Result<()> {
        self.alive().await;
        self.inner.resign(lead).await
    }
}

/// Every entry whose key begins with `prefix`.
pub async fn entries(store: &Arc<dyn StateStore>, prefix: &str) -> Vec<Bytes> {
    let (found, _) = store.scan(prefix.as_bytes(), None, 10_000).await.unwrap();
    found.into_iter().map(|entry| entry.key).collect()
}
