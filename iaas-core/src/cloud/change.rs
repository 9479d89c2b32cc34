//! A change before it is made, and the operation that follows it.

use std::future::Future;
use std::future::IntoFuture;
use std::pin::Pin;

use tracing::Instrument;
use tracing::Span;
use tracing::field::Empty;
use tracing::field::display;

use super::Session;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::engine::Options;
use crate::engine::Plan;
use crate::engine::explain;
use crate::engine::intent::Intent;
use crate::model::Operation;
use crate::model::OperationState;

/// A change that is asked for when it is awaited.
///
/// ```text
/// session.volumes().create(project, "data", spec).token("42").await?.wait().await?
/// ```
#[derive(Debug)]
#[must_use = "a change does nothing until it is awaited"]
pub struct Change<A: Intent> {
    session: Session,
    request: Result<A>,
    options: Options,
}

impl<A: Intent> Change<A> {
    pub(crate) fn new(session: &Session, request: Result<A>) -> Self {
        Self { session: session.clone(), request, options: Options::default() }
    }

    /// Sent again with the same token, the same request gives the same answer.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.options.token = Some(token.into());
        self
    }

    /// Only if the object is at this version.
    pub fn if_version(mut self, version: Rev) -> Self {
        self.options.if_version = Some(version);
        self
    }

    /// Says what would be done, and does nothing.
    ///
    /// # Errors
    /// Those of the change itself.
    pub async fn dry_run(self) -> Result<Plan> {
        let cloud = self.session.cloud();
        let permit = cloud.gate().check(self.session.principal(), self.request?).await?;
        cloud.engine().plan(&permit)
    }

    /// In a span of its own, which names the request, who made it, and the operation that it became.
    async fn make(self) -> Result<Op<A::Out>> {
        let who = self.session.principal().name.clone();
        let request = self.session.cloud().engine().committer().clock().uuid();
        let span = tracing::info_span!("request", id = %request, action = A::NAME, who, operation = Empty);
        async {
            let op = self.carry_out().await.inspect_err(|error| tracing::debug!(%error, "refused"))?;
            Span::current().record("operation", display(op.id));
            tracing::debug!("accepted");
            Ok(op)
        }
        .instrument(span)
        .await
    }

    async fn carry_out(self) -> Result<Op<A::Out>> {
        let cloud = self.session.cloud().clone();
        let (who, request) = (self.session.principal(), self.request?);
        // An object may be gone because this very request was carried out: its answer is the one that was given.
        let given = match &self.options.token {
            Some(token) if !who.name.is_empty() => cloud.engine().answered(who, token, &request).await?,
            _ => None,
        };
        let running = match (cloud.gate().check(who, request).await, given) {
            (Ok(permit), _) => cloud.engine().run(permit, self.options).await?,
            (Err(error), Some(given)) if error.kind() == ErrorKind::NotFound => given,
            (Err(error), _) => return Err(error),
        };
        Ok(Op { session: self.session, id: running.operation, out: running.out })
    }
}

impl<A: Intent> IntoFuture for Change<A> {
    type Output = Result<Op<A::Out>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.make())
    }
}

/// A change that was committed. Dropping it stops the waiting, never the work.
#[derive(Clone, Debug)]
pub struct Op<T> {
    session: Session,
    id: Id<Operation>,
    /// What the change gave at once: usually the id of what it made.
    pub out: T,
}

impl<T: Clone> Op<T> {
    /// The operation's id.
    pub fn id(&self) -> Id<Operation> {
        self.id
    }

    /// Waits until what was asked for was seen.
    ///
    /// # Errors
    /// What made it impossible; `Conflict` if a later operation replaced it; [`Outcome::Unknown`] with the reason if this
    /// control plane stops before the end was seen.
    pub async fn wait(&self) -> Result<T> {
        self.wait_with(|_| {}).await
    }

    /// Waits, and says at each change of the cloud what is still waited for.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn wait_with(&self, mut progress: impl FnMut(&[String])) -> Result<T> {
        let committer = self.session.cloud().engine().committer();
        let mut changes = committer.changes();
        let mut halts = committer.halts();
        loop {
            changes.borrow_and_update();
            let record = committer.read(|s| s.get(self.id).cloned());
            let Some(record) = record else {
                // Only what has ended is forgotten, with its project or after a day; how it ended went with it.
                return Err(Error::not_found("the operation has ended and is not known any more")
                    .about(self.id.object())
                    .remedy("look at the object that it was about")
                    .outcome_is(Outcome::Unknown));
            };
            match &record.status.state {
                OperationState::Done => return Ok(self.out.clone()),
                OperationState::Failed(error) => return Err(error.clone()),
                OperationState::Superseded => {
                    return Err(
                        Error::conflict("a later operation replaced this one").about(self.id.object())
                    );
                }
                OperationState::Open => {
                    let told = committer.read(|s| explain::explain(s, &record.spec.target));
                    progress(&told.map(|t| t.waits_for).unwrap_or_default());
                }
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    return Err(Error::unavailable("the cloud was closed"));
                },
                halted = halts.wait_for(Option::is_some) => {
                    let why = halted.ok().and_then(|why| why.clone());
                    let why = why.unwrap_or_else(|| Error::unavailable("the cloud was closed"));
                    // Only that nothing more is done here is certain: the operation stands, and whoever leads carries it out.
                    return Err(why
                        .about(self.id.object())
                        .remedy("ask the control plane that leads now what became of the operation")
                        .outcome_is(Outcome::Unknown));
                }
            }
        }
    }
}
