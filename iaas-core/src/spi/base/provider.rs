//! The common clauses around a [`Maker`].

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedMutexGuard;
use tokio::sync::OwnedRwLockReadGuard;
use tokio::sync::broadcast;

use super::Look;
use super::Maker;
use super::Spec;
use super::fence::Fence;
use super::fence::stamp;
use super::shelf::Shelf;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::spi::Call;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Feed;
use crate::spi::Found;
use crate::spi::Hello;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Provider;
use crate::spi::Pull;
use crate::spi::Reading;
use crate::spi::Seen;
use crate::spi::Tag;

/// The protocols that it speaks.
const PROTOCOL: (u16, u16) = (1, 1);

/// The things of a maker by id.
type Things<M> = BTreeMap<Id<<M as Maker>::Kind>, Thing<<M as Maker>::Kind>>;

/// The locks of the things that are being looked at or changed.
type Busy<M> = BTreeMap<Id<<M as Maker>::Kind>, Arc<tokio::sync::Mutex<()>>>;

/// A [`Maker`] made a provider. Needs a tokio runtime: a change goes on when its caller goes away.
#[derive(Debug)]
pub struct Base<M: Maker>(Arc<Inner<M>>);

#[derive(Debug)]
struct Inner<M: Maker> {
    maker: Arc<M>,
    shelf: Arc<dyn Shelf>,
    fence: Fence,
    things: Mutex<Things<M>>,
    /// One change or look at a time for each id.
    busy: Mutex<Busy<M>>,
    changed: broadcast::Sender<ObjectRef>,
}

/// What the shelf keeps of a thing, from before it is made until after it is gone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(bound = "")]
struct Thing<K: Kind> {
    id: Id<K>,
    tag: Tag,
    spec: K::Spec,
    state: State,
}

// Not derived: that would ask `Clone` of the kind itself.
impl<K: Kind> Clone for Thing<K> {
    fn clone(&self) -> Self {
        Self { id: self.id, tag: self.tag, spec: self.spec.clone(), state: self.state }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    Half,
    Made,
    Leaving,
}

impl<M: Maker> Base<M> {
    /// Opens it on what `shelf` remembers. Give each provider a shelf of its own.
    pub fn open(maker: Arc<M>, shelf: Arc<dyn Shelf>) -> Result<Self> {
        let mut kept = shelf.all()?;
        let site = kept.remove(Fence::key());
        let fence = Fence::open(Arc::clone(&shelf), site.as_deref())?;
        let things =
            kept.values().map(|bytes| decoded::<Thing<M::Kind>>(bytes).map(|thing| (thing.id, thing)));
        let things = Mutex::new(things.collect::<Result<_>>()?);
        let (changed, _) = broadcast::channel(256);
        Ok(Self(Arc::new(Inner { maker, shelf, fence, things, busy: Mutex::default(), changed })))
    }

    /// The maker.
    pub fn maker(&self) -> &Arc<M> {
        &self.0.maker
    }

    /// Waits until every change that is under way has ended: before the shelf is opened again in the same process.
    pub async fn drain(&self) {
        self.0.fence.drain().await;
    }

    /// The spec of a thing of the asking cloud.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn own(&self, cx: &Ctx, id: Id<M::Kind>) -> Result<Spec<M>> {
        let thing = self.0.thing(id).filter(|t| t.tag.cloud == cx.call.cloud);
        thing.map(|t| t.spec).ok_or_else(|| missing(id))
    }

    /// Does something else to a thing of the asking cloud, under the same fence as the four verbs.
    pub(super) async fn act<T: Send + 'static, F>(
        &self,
        cx: &Ctx,
        id: Id<M::Kind>,
        act: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (inner, call) = (Arc::clone(&self.0), cx.call.clone());
        let inside = inner.fence.enter(&call).await?;
        onward(inside, async move {
            let _alone = inner.alone(id).await;
            let ours = inner.thing(id).filter(|t| t.tag.cloud == call.cloud);
            ours.ok_or_else(|| missing(id))?;
            act().await
        })
        .await
    }
}

/// Runs `change` to its end even if the caller goes away. It was let in before, so that no claim can return between the
/// caller's going and the first step of the change.
async fn onward<T: Send + 'static>(
    inside: OwnedRwLockReadGuard<()>,
    change: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let task = tokio::spawn(async move {
        let _inside = inside;
        change.await
    });
    let ended = task.await;
    ended.unwrap_or_else(|e| Err(Error::internal("the provider failed in the midst of a change").because(&e)))
}

fn missing<K: Entity>(id: Id<K>) -> Error {
    Error::not_found(format!("there is no {} with this id", K::NAME)).about(id.object())
}

fn refused(why: impl Into<String>) -> Error {
    Error::conflict(why).outcome_is(Outcome::NotDone)
}

pub(super) fn encoded(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes)
        .map_err(|e| Error::internal("a note of the provider cannot be written").because(&e))?;
    Ok(bytes)
}

pub(super) fn decoded<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    ciborium::from_reader(bytes)
        .map_err(|e| Error::internal("a note of the provider cannot be read").because(&e))
}

impl<M: Maker> Inner<M> {
    fn things(&self) -> MutexGuard<'_, Things<M>> {
        self.things.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thing(&self, id: Id<M::Kind>) -> Option<Thing<M::Kind>> {
        self.things().get(&id).cloned()
    }

    async fn alone(&self, id: Id<M::Kind>) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(id).or_default())
        };
        lock.lock_owned().await
    }

    /// Keeps what is known of `id`, or forgets it.
    fn keep(&self, id: Id<M::Kind>, thing: Option<Thing<M::Kind>>) -> Result<()> {
        let bytes = thing.as_ref().map(encoded).transpose()?;
        self.shelf.put(&format!("{}-{id}", M::Kind::NAME), bytes.as_deref())?;
        match thing {
            Some(thing) => self.things().insert(id, thing),
            None => self.things().remove(&id),
        };
        Ok(())
    }

    async fn ensure(&self, call: &Call, id: Id<M::Kind>, rev: Rev, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let _alone = self.alone(id).await;
        let old = self.thing(id);
        self.may_ensure(old.as_ref(), call, rev, spec)
            .map_err(|e| e.outcome_is(Outcome::NotDone).about(id.object()))?;
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let made = Thing { id, tag, spec: self.maker.kept(spec), state: State::Made };
        let known =
            |old: &Thing<M::Kind>| (old.tag, old.state) == (tag, State::Made) && old.spec == made.spec;
        if old.as_ref().is_some_and(known) {
            // A repair.
            self.maker.make(id, spec).await?;
        } else {
            let half = Thing { state: State::Half, ..made.clone() };
            self.keep(id, Some(half)).map_err(|e| e.outcome_is(Outcome::Unknown))?;
            if let Err(error) = self.maker.make(id, spec).await {
                if error.outcome() == Outcome::NotDone {
                    self.keep(id, old)?;
                }
                return Err(error);
            }
            self.keep(id, Some(made.clone()))?;
            self.fence.accepted(call, rev)?;
        }
        let _ = self.changed.send(id.object()); // Nobody listening is fine.
        self.seen(&made, spec).await
    }

    fn may_ensure(&self, old: Option<&Thing<M::Kind>>, call: &Call, rev: Rev, spec: &Spec<M>) -> Result<()> {
        if let Some(old) = old {
            if old.tag.cloud != call.cloud {
                return Err(refused("this id is taken by something of another cloud"));
            }
            if old.state == State::Leaving {
                return Err(refused("it is being removed").remedy("wait until it is gone"));
            }
            if old.tag.incarnation == call.incarnation && rev < old.tag.rev {
                return Err(refused(format!("revision {rev} is older than {}", old.tag.rev)));
            }
        }
        self.maker.check(old.map(|o| &o.spec), spec)
    }

    async fn remove(&self, call: &Call, id: Id<M::Kind>, upto: Rev) -> Result<()> {
        let _alone = self.alone(id).await;
        let Some(thing) = self.thing(id) else { return Ok(()) };
        let Tag { cloud, incarnation, rev } = thing.tag;
        if (cloud, incarnation) != (call.cloud, call.incarnation) || rev > upto {
            return Err(refused("its tag is newer, or of another owner").about(id.object()));
        }
        self.keep(id, Some(Thing { state: State::Leaving, ..thing }))?;
        self.maker.unmake(id).await?;
        self.keep(id, None)?;
        let _ = self.changed.send(id.object());
        Ok(())
    }

    async fn seen(&self, thing: &Thing<M::Kind>, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let Look { phase, is, final_usage } = self.maker.look(thing.id, spec).await?;
        let phase = match thing.state {
            State::Made => phase,
            State::Half => {
                Phase::Broken(Error::conflict("this is half-made").remedy("ensure it again, or remove it"))
            }
            State::Leaving => Phase::Leaving,
        };
        Ok(Seen { applied: thing.tag.rev, phase, at: stamp()?, is, final_usage })
    }

    async fn observe(&self, call: &Call, id: Id<M::Kind>) -> Result<Option<Seen<M::Kind>>> {
        let _alone = self.alone(id).await;
        match self.thing(id).filter(|t| t.tag.cloud == call.cloud) {
            Some(thing) => self.seen(&thing, &thing.spec).await.map(Some),
            None => Ok(None),
        }
    }

    /// The things of a cloud, in order of id.
    fn ours(&self, call: &Call) -> Vec<Thing<M::Kind>> {
        self.things().values().filter(|t| t.tag.cloud == call.cloud).cloned().collect()
    }
}

#[async_trait]
impl<M: Maker> Provider for Base<M> {
    async fn hello(&self) -> Result<Hello> {
        let (install, newest) = self.0.fence.card();
        Ok(Hello {
            product: self.0.maker.product(),
            protocol: PROTOCOL,
            site: self.0.maker.site(),
            install,
            newest,
            seal_to: None,
            kinds: BTreeSet::from([M::Kind::NAME.to_owned()]),
            caps: self.0.maker.caps().iter().map(|&cap| cap.to_owned()).collect(),
        })
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.0.fence.claim(&cx.call).await?;
        self.hello().await
    }

    async fn changes(&self, _: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(Box::new(Changes(self.0.changed.subscribe())))
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let mut page = Vec::new();
        for thing in self.0.ours(&cx.call) {
            if page.len() >= limit {
                break;
            }
            if after.as_ref().is_some_and(|after| thing.id.object() <= *after) {
                continue;
            }
            let _alone = self.0.alone(thing.id).await;
            page.extend(self.0.maker.reading(thing.id, &thing.spec).await?);
        }
        Ok(page)
    }
}

#[async_trait]
impl<M: Maker> Converge<M::Kind> for Base<M> {
    async fn ensure(&self, cx: &Ctx, id: Id<M::Kind>, rev: Rev, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let (inner, call, spec) = (Arc::clone(&self.0), cx.call.clone(), spec.clone());
        let inside = inner.fence.enter(&call).await?;
        onward(inside, async move { inner.ensure(&call, id, rev, &spec).await }).await
    }

    async fn remove(&self, cx: &Ctx, id: Id<M::Kind>, upto: Rev) -> Result<()> {
        let (inner, call) = (Arc::clone(&self.0), cx.call.clone());
        let inside = inner.fence.enter(&call).await?;
        onward(inside, async move { inner.remove(&call, id, upto).await }).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<M::Kind>) -> Result<Option<Seen<M::Kind>>> {
        self.0.observe(&cx.call, id).await
    }

    async fn inventory(
        &self,
        cx: &Ctx,
        after: Option<Id<M::Kind>>,
        limit: usize,
    ) -> Result<Vec<Found<M::Kind>>> {
        let ours = self.0.ours(&cx.call).into_iter().filter(|t| after.is_none_or(|after| t.id > after));
        let mut page = Vec::new();
        for thing in ours.take(limit) {
            let _alone = self.0.alone(thing.id).await;
            let seen = self.0.seen(&thing, &thing.spec).await;
            page.push(Found {
                id: thing.id,
                tag: thing.tag,
                passport: self.0.maker.passport(&thing.spec),
                seen,
            });
        }
        Ok(page)
    }
}

struct Changes(broadcast::Receiver<ObjectRef>);

#[async_trait]
impl Pull<ObjectRef> for Changes {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        loop {
            match self.0.recv().await {
                Ok(object) => return Some(Ok(object)),
                Err(broadcast::error::RecvError::Lagged(_)) => {} // Lossy by contract.
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
