//! The engine: takes permits, commits what they mean, and lets the driver do the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::RwLock;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::adopt;
use super::adopt::CloudRecord;
use super::codec;
use super::commit::Committer;
use super::commit::Parts;
use super::draft::Draft;
use super::draft::Plan;
use super::driver::AuditTree;
use super::driver::Driver;
use super::driver::Rest;
use super::driver::listen;
use super::intent::Intent;
use super::policy::Policies;
use super::reconcile::Work;
use super::sites::Blobs;
use super::sites::Caller;
use super::sites::Sites;
use super::sweep::Sweeper;
use super::tokens;
use super::tokens::Running;
use crate::Clock;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::Operation;
use crate::security::Action;
use crate::security::Entities;
use crate::security::Gate;
use crate::security::Permit;
use crate::spi::audit::AuditSink;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::Principal;
use crate::spi::meter::MeterSink;
use crate::spi::placement::Placement;
use crate::spi::state_store::Lead;
use crate::spi::state_store::StateStore;

/// How a change is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The same token with the same request gives the same answer, for a day at least; with another request it is a conflict.
    pub token: Option<String>,
    /// Only if the object is at this version.
    pub if_version: Option<Rev>,
}

/// What an engine is made of.
#[derive(Debug)]
pub struct EngineParts {
    /// The id that the cloud must have, where its hosts know it already.
    pub id: Option<Id<crate::id::Cloud>>,
    /// Where state is kept.
    pub store: Arc<dyn StateStore>,
    /// Time and ids.
    pub clock: Arc<dyn Clock>,
    /// Where instances go.
    pub placement: Arc<dyn Placement>,
    /// The providers.
    pub sites: Sites,
    /// Who decides.
    pub authorizer: Arc<dyn Authorizer>,
    /// Where usage goes.
    pub meter: Arc<dyn MeterSink>,
    /// Where the audit log is copied to.
    pub audit: Option<Arc<dyn AuditSink>>,
    /// Kernels and initrds.
    pub blobs: Arc<dyn Blobs>,
    /// The principal that may do everything.
    pub operator: String,
    /// How long the lead lasts without renewal.
    pub lease: Duration,
}

/// Runs one cloud. Dropping it stops every task, as a crash would; what runs on hosts goes on.
#[derive(Debug)]
pub struct Engine {
    committer: Arc<Committer>,
    record: CloudRecord,
    driver: Arc<Driver>,
    gate: Gate,
    meter: Arc<dyn MeterSink>,
    _tasks: JoinSet<()>,
}

impl Engine {
    /// Takes the lead, reads the state, claims the sites and starts to converge.
    ///
    /// # Errors
    /// Those of the store and of the providers; nothing was changed on any site before the claim.
    pub async fn open(parts: EngineParts) -> Result<Self> {
        let (store, clock) = (Arc::clone(&parts.store), Arc::clone(&parts.clock));
        let mut lead = adopt::take_lead(&store, &clock, parts.lease, crate::Epoch(0)).await?;
        let opened = Self::open_as(&mut lead, parts).await;
        if opened.is_err()
            && let Err(error) = store.resign(lead).await
        {
            // It lapses by itself; why the cloud could not be opened is what matters.
            tracing::warn!(%error, "the lead could not be given back");
        }
        opened
    }

    async fn open_as(lead: &mut Lead, parts: EngineParts) -> Result<Self> {
        let EngineParts {
            id,
            store,
            clock,
            placement,
            sites,
            authorizer,
            meter,
            audit,
            blobs,
            operator,
            lease,
        } = parts;
        let record = adopt::cloud_record(&store, &clock, lead, id).await?;
        let state = adopt::load(&store).await?;
        let floor = adopt::check_newest(&sites, &record, &state).await?;
        if floor >= lead.epoch {
            store.resign(lead.clone()).await?;
            *lead = adopt::take_lead(&store, &clock, lease, floor).await?;
        }
        let caller = Caller { cloud: record.id, incarnation: record.incarnation, epoch: lead.epoch };
        let claimed = adopt::claim(&sites, &caller).await?;
        let leaves = read_log(&store).await?;
        let state = Arc::new(RwLock::new(state));
        let (wake, wakes) = mpsc::unbounded_channel();
        let committer = Arc::new(Committer::new(Parts {
            store,
            clock,
            placement,
            sites: sites.facts(claimed.installs.clone()),
            state: Arc::clone(&state),
            lead: lead.clone(),
            wake,
            fabrics: sites.fabrics.keys().copied().collect(),
        }));
        committer.commit(&operator, |draft| adopt::seed(draft, &operator, &claimed)).await?;
        let policies = Arc::new(Policies::new(Arc::clone(&authorizer), state));
        policies.load().await?;
        let gate = Gate::new(authorizer, Arc::clone(&policies) as Arc<dyn Entities>);
        let work = Work {
            committer: Arc::clone(&committer),
            sites: Arc::new(sites),
            caller,
            blobs,
            targets: Arc::default(),
            asked: Arc::default(),
        };
        let driver = Arc::new(Driver {
            work,
            meter: Arc::clone(&meter),
            audit,
            log: Arc::new(tokio::sync::Mutex::new(AuditTree::of(leaves))),
            sweeper: Sweeper::default(),
            policies,
            failures: std::sync::Mutex::new(BTreeMap::new()),
            rest: watch::Sender::new(Rest::default()),
        });
        let mut engine = Self { committer, record, driver, gate, meter, _tasks: JoinSet::new() };
        engine.start(wakes, lease);
        Ok(engine)
    }

    fn start(&mut self, wakes: mpsc::UnboundedReceiver<ObjectRef>, lease: Duration) {
        let tasks = &mut self._tasks;
        for index in 0..self.driver.work.sites.providers().len() {
            drop(tasks.spawn(listen(self.driver.work.clone(), index)));
        }
        drop(tasks.spawn(renew(Arc::clone(&self.committer), lease / 3)));
        drop(tasks.spawn(Arc::clone(&self.driver).run(wakes)));
    }

    /// Which cloud this is.
    pub fn cloud(&self) -> &CloudRecord {
        &self.record
    }

    /// Decides who may do what with this cloud's objects.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Reads and commits. Not for a program that embeds the cloud: a commit needs a permit.
    pub(crate) fn committer(&self) -> &Arc<Committer> {
        &self.committer
    }

    /// The parts of the loop.
    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// Where usage goes.
    pub fn meter(&self) -> &Arc<dyn MeterSink> {
        &self.meter
    }

    /// What `permit` would do. Nothing is committed.
    ///
    /// # Errors
    /// Those of the action.
    pub fn plan<A: Intent>(&self, permit: &Permit<A>) -> Result<Plan> {
        let request = codec::encode(permit.request())?;
        let (_, mut plan) =
            self.committer.plan(&permit.who().name, |draft| self.draw(draft, permit, &request, None))?;
        plan.policy = permit.policy();
        Ok(plan)
    }

    /// Does what `permit` allows: one commit, then the driver.
    ///
    /// # Errors
    /// Those of the action; `Conflict` if the token was used for another request, if the version is another, or if an
    /// object of the decision changed since; `Fenced` if another leader exists.
    pub async fn run<A: Intent>(&self, permit: Permit<A>, options: Options) -> Result<Running<A::Out>> {
        let mut permit = permit;
        let request = codec::encode(permit.request())?;
        if let Some(token) = &options.token
            && let Some(answer) = self.answered(permit.who(), token, permit.request()).await?
        {
            return Ok(answer);
        }
        let token = options.token.as_deref().map(|token| codec::token_key(&permit.who().name, token));
        loop {
            let draw = |draft: &mut Draft<'_>| {
                // Roles or bindings changed since the decision: it is not made by what holds now.
                if draft.state().policy_rev > permit.policy() {
                    return Ok(None);
                }
                check_version(draft, &permit, options.if_version)?;
                self.draw(draft, &permit, &request, token.clone()).map(Some)
            };
            let done = match self.committer.commit(&permit.who().name, draw).await {
                Ok(done) => done,
                Err(error) => return self.raced(error, &permit, &options).await,
            };
            if let Some((operation, out)) = done.out {
                if let Err(error) = self.driver.policies.load().await {
                    // The change stands; the driver goes on trying.
                    tracing::warn!(%error, "the new policies could not be loaded yet");
                }
                return Ok(Running { operation, out });
            }
            self.driver.policies.load().await?;
            permit = self.gate.renew(permit).await?;
        }
    }

    /// The answer to an equal request of the same principal with the same token, if there was one.
    ///
    /// # Errors
    /// `Conflict` if the token was used for another request; those of the store.
    pub async fn answered<A: Action>(
        &self,
        who: &Principal,
        token: &str,
        request: &A,
    ) -> Result<Option<Running<A::Out>>> {
        match self.committer.store().get(&codec::token_key(&who.name, token)).await? {
            Some(entry) => tokens::replay::<A>(&entry.value, &codec::encode(request)?).map(Some),
            None => Ok(None),
        }
    }

    /// Two equal requests with one token at the same time: the second gets the answer of the first.
    async fn raced<A: Intent>(
        &self,
        error: Error,
        permit: &Permit<A>,
        options: &Options,
    ) -> Result<Running<A::Out>> {
        let same_moment = [ErrorKind::Conflict, ErrorKind::AlreadyExists].contains(&error.kind());
        if let Some(token) = options.token.as_ref().filter(|_| same_moment)
            && let Some(answer) = self.answered(permit.who(), token, permit.request()).await?
        {
            return Ok(answer);
        }
        Err(error)
    }

    fn draw<A: Intent>(
        &self,
        draft: &mut Draft<'_>,
        permit: &Permit<A>,
        request: &bytes::Bytes,
        token: Option<bytes::Bytes>,
    ) -> Result<(Id<Operation>, A::Out)> {
        for (object, _) in permit.basis() {
            // The decision read these: they must still exist, or the answer is that they do not.
            if draft.state().lineage(object).is_none() {
                return Err(crate::security::gate::not_found(object));
            }
        }
        let meant = permit.request().intend(draft)?;
        let operation = draft.operation();
        draft.operate(A::NAME, meant.target.clone(), meant.open)?;
        draft.audit(A::NAME, &meant.target, request.clone())?;
        if let Some(key) = token {
            let answer = tokens::answer::<A>(request, operation, &meant.out, draft.now())?;
            draft.put_new(key, answer);
        }
        Ok((operation, meant.out))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self._tasks.abort_all();
    }
}

fn check_version<A: Action>(draft: &Draft<'_>, permit: &Permit<A>, wanted: Option<Rev>) -> Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    let asks = permit.request().asks();
    let Some((_, object)) = asks.first() else { return Ok(()) };
    let is = draft.state().brief(object).map(|b| b.version);
    if is == Some(wanted) {
        return Ok(());
    }
    Err(Error::conflict(format!("the {} is not at version {wanted} any more", object.kind))
        .about(object.clone())
        .remedy("read it again and decide anew"))
}

async fn read_log(store: &Arc<dyn StateStore>) -> Result<Vec<bytes::Bytes>> {
    let mut leaves = Vec::new();
    let mut after: Option<bytes::Bytes> = None;
    loop {
        let (page, _) = store.scan(codec::AUDIT.as_bytes(), after.as_deref(), 512).await?;
        let Some(last) = page.last() else { return Ok(leaves) };
        after = Some(last.key.clone());
        leaves.extend(page.into_iter().map(|entry| entry.value));
    }
}

/// Prolongs the lead until it is lost.
async fn renew(committer: Arc<Committer>, every: Duration) {
    let mut failing_since: Option<Duration> = None;
    loop {
        committer.clock().sleep(every).await;
        match committer.store().renew(committer.lead()).await {
            Ok(()) => failing_since = None,
            Err(error) if error.kind() == crate::ErrorKind::Fenced => return committer.halt(error),
            Err(error) => {
                let now = committer.clock().monotonic();
                let since = *failing_since.get_or_insert(now);
                tracing::warn!(%error, "the lead could not be renewed");
                if now.saturating_sub(since) > committer.lead().ttl {
                    return committer.halt(error);
                }
            }
        }
    }
}
