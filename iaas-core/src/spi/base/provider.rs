//! The common clauses around a [`Maker`].

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;
use tokio::sync::OwnedMutexGuard;
use tokio::sync::broadcast;

use super::fence::Fence;
use super::fence::stamp;
use super::maker::Look;
use super::maker::Maker;
use super::maker::Spec;
use super::notes::Notes;
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

/// A [`Maker`] made a provider. A change goes on when its caller goes away.
#[derive(Debug)]
pub(super) struct Base<M: Maker>(Arc<Inner<M>>);

#[derive(Debug)]
struct Inner<M: Maker> {
    maker: M,
    notes: Arc<Notes>,
    fence: Fence,
    things: Mutex<Things<M>>,
    /// One change or look at a time for each id.
    busy: Mutex<Busy<M>>,
    changed: broadcast::Sender<ObjectRef>,
}

/// What the notes keep of a thing, from before it is made until after it is gone.
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
    /// Being made for the first time.
    Half,
    /// Made before, and being brought to a new spec.
    Changing,
    Made,
    Leaving,
}

impl<M: Maker> Base<M> {
    /// Opens it on what `notes` remember.
    pub(super) fn open(maker: M, notes: Arc<Notes>) -> Result<Self> {
        let fence = Fence::open(Arc::clone(&notes))?;
        let things = notes.all::<Thing<M::Kind>>(&format!("{}-", M::Kind::NAME))?;
        let things = Mutex::new(things.into_iter().map(|thing| (thing.id, thing)).collect());
        let (changed, _) = broadcast::channel(256);
        Ok(Self(Arc::new(Inner { maker, notes, fence, things, busy: Mutex::default(), changed })))
    }

    pub(super) fn maker(&self) -> &M {
        &self.0.maker
    }

    /// The spec of a thing of the asking cloud.
    pub(super) fn own(&self, cx: &Ctx, id: Id<M::Kind>) -> Result<Spec<M>> {
        self.0.own(&cx.call, id).map(|thing| thing.spec)
    }

    /// Changes `id` as the only one, if the fence admits the call. Goes on if the caller goes away: it was let in before,
    /// so that no claim can return between the caller's going and the end of the change.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        cx: &Ctx,
        id: Id<M::Kind>,
        act: impl FnOnce(&M) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.inside(cx, id, move |inner, call| inner.own(call, id).and_then(|_| act(&inner.maker))).await
    }

    async fn inside<T: Send + 'static>(
        &self,
        cx: &Ctx,
        id: Id<M::Kind>,
        act: impl FnOnce(&Inner<M>, &Call) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (inner, call) = (Arc::clone(&self.0), cx.call.clone());
        let inside = inner.fence.inside().await;
        let alone = inner.alone(id).await;
        blocking(move || {
            let _held = (inside, alone);
            inner.fence.learn(|leaders| leaders.admit(&call))?;
            act(&inner, &call)
        })
        .await
    }

    /// Looks at `id` while nobody changes it.
    async fn looking<T: Send + 'static>(
        &self,
        id: Id<M::Kind>,
        look: impl FnOnce(&Inner<M>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        let alone = inner.alone(id).await;
        blocking(move || {
            let _held = alone;
            look(&inner)
        })
        .await
    }
}

/// Runs what may block, to its end. A panic of it is an error.
pub(super) async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let ended = tokio::task::spawn_blocking(act).await;
    ended
        .unwrap_or_else(|e| Err(Error::internal("the provider broke off in the midst of a call").because(&e)))
}

/// Opens the provider of a maker on a folder of notes.
pub(super) async fn open<M: Maker>(
    folder: PathBuf,
    maker: impl FnOnce(&Arc<Notes>) -> M + Send + 'static,
) -> Result<Base<M>> {
    let notes = Notes::open(folder).await?;
    blocking(move || Base::open(maker(&notes), notes)).await
}

fn refused(why: impl Into<String>) -> Error {
    Error::conflict(why).outcome_is(Outcome::NotDone)
}

impl<M: Maker> Inner<M> {
    fn things(&self) -> MutexGuard<'_, Things<M>> {
        self.things.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thing(&self, id: Id<M::Kind>) -> Option<Thing<M::Kind>> {
        self.things().get(&id).cloned()
    }

    fn own(&self, call: &Call, id: Id<M::Kind>) -> Result<Thing<M::Kind>> {
        self.thing(id).filter(|t| t.tag.cloud == call.cloud).ok_or_else(|| {
            Error::not_found(format!("there is no {} with this id", M::Kind::NAME)).about(id.object())
        })
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
        self.notes.put(&format!("{}-{}", M::Kind::NAME, id.uuid()), thing.as_ref())?;
        match thing {
            Some(thing) => self.things().insert(id, thing),
            None => self.things().remove(&id),
        };
        Ok(())
    }

    fn ensure(&self, call: &Call, id: Id<M::Kind>, rev: Rev, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let old = self.thing(id);
        self.may_ensure(old.as_ref(), call, id, rev, spec)
            .map_err(|e| e.outcome_is(Outcome::NotDone).about(id.object()))?;
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let whole = old.as_ref().is_some_and(|old| old.state != State::Half);
        let made = Thing { id, tag, spec: self.maker.kept(spec), state: State::Made };
        let repair = old
            .as_ref()
            .is_some_and(|old| (old.tag, old.state) == (tag, State::Made) && old.spec == made.spec);
        // Whatever it says of itself: part of it may have happened.
        let cut = |e: Error| e.outcome_is(Outcome::Unknown).about(id.object());
        if repair {
            self.maker.make(id, spec, true).map_err(cut)?;
        } else {
            let state = if whole { State::Changing } else { State::Half };
            self.keep(id, Some(Thing { state, ..made.clone() }))?;
            self.maker.make(id, spec, whole).map_err(cut)?;
            self.keep(id, Some(made.clone()))?;
            self.fence.learn(|leaders| {
                leaders.applied(call, rev);
                Ok(())
            })?;
        }
        let _ = self.changed.send(id.object()); // Nobody listening is fine.
        self.seen(&made, spec)
    }

    fn may_ensure(
        &self,
        old: Option<&Thing<M::Kind>>,
        call: &Call,
        id: Id<M::Kind>,
        rev: Rev,
        spec: &Spec<M>,
    ) -> Result<()> {
        if let Some(old) = old {
            if old.tag.cloud != call.cloud {
                return Err(refused("this id is taken by something of another cloud"));
            }
            if old.state == State::Leaving {
                return Err(refused("it is being removed").remedy("remove it, and wait until it is gone"));
            }
            if old.tag.incarnation == call.incarnation && rev < old.tag.rev {
                return Err(refused(format!("revision {rev} is older than {}", old.tag.rev)));
            }
        }
        self.maker.check(id, old.map(|o| &o.spec), spec)
    }

    fn remove(&self, call: &Call, id: Id<M::Kind>, upto: Rev) -> Result<()> {
        let Some(thing) = self.thing(id) else { return Ok(()) };
        let Tag { cloud, incarnation, rev } = thing.tag;
        if (cloud, incarnation) != (call.cloud, call.incarnation) || rev > upto {
            return Err(refused("its tag is newer, or of another owner").about(id.object()));
        }
        self.keep(id, Some(Thing { state: State::Leaving, ..thing }))?;
        self.maker.unmake(id).map_err(|e| e.outcome_is(Outcome::Unknown).about(id.object()))?;
        self.keep(id, None)?;
        let _ = self.changed.send(id.object());
        Ok(())
    }

    fn seen(&self, thing: &Thing<M::Kind>, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let Look { phase, is, final_usage } = self.maker.look(thing.id, spec)?;
        let phase = match thing.state {
            State::Made => phase,
            State::Half | State::Changing => {
                Phase::Broken(Error::conflict("this is half-made").remedy("ensure it again, or remove it"))
            }
            State::Leaving => Phase::Leaving,
        };
        Ok(Seen { applied: thing.tag.rev, phase, at: stamp()?, is, final_usage })
    }

    /// The ids of a cloud's things after `after`, in order.
    fn ids(&self, call: &Call, after: Option<ObjectRef>) -> Vec<Id<M::Kind>> {
        let things = self.things();
        let ours = things.values().filter(|t| t.tag.cloud == call.cloud).map(|t| t.id);
        ours.filter(|id| after.as_ref().is_none_or(|after| id.object() > *after)).collect()
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
        let (inner, call) = (Arc::clone(&self.0), cx.call.clone());
        let alone = inner.fence.alone().await;
        blocking(move || {
            let _held = alone;
            inner.fence.learn(|leaders| leaders.claim(&call))
        })
        .await?;
        self.hello().await
    }

    async fn changes(&self, _: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(changes(&self.0.changed))
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let mut page = Vec::new();
        for id in self.0.ids(&cx.call, after) {
            if page.len() >= limit {
                break;
            }
            let call = cx.call.clone();
            let reading = self.looking(id, move |inner| match inner.own(&call, id) {
                Ok(thing) => inner.maker.reading(id, &thing.spec),
                Err(_) => Ok(None), // It went meanwhile.
            });
            page.extend(reading.await?);
        }
        Ok(page)
    }
}

#[async_trait]
impl<M: Maker> Converge<M::Kind> for Base<M> {
    async fn ensure(&self, cx: &Ctx, id: Id<M::Kind>, rev: Rev, spec: &Spec<M>) -> Result<Seen<M::Kind>> {
        let spec = spec.clone();
        self.inside(cx, id, move |inner, call| inner.ensure(call, id, rev, &spec)).await
    }

    async fn remove(&self, cx: &Ctx, id: Id<M::Kind>, upto: Rev) -> Result<()> {
        self.inside(cx, id, move |inner, call| inner.remove(call, id, upto)).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<M::Kind>) -> Result<Option<Seen<M::Kind>>> {
        let call = cx.call.clone();
        let looking = self.looking(id, move |inner| match inner.own(&call, id) {
            Ok(thing) => inner.seen(&thing, &thing.spec).map(Some),
            Err(_) => Ok(None),
        });
        looking.await
    }

    async fn inventory(
        &self,
        cx: &Ctx,
        after: Option<Id<M::Kind>>,
        limit: usize,
    ) -> Result<Vec<Found<M::Kind>>> {
        let mut page = Vec::new();
        for id in self.0.ids(&cx.call, after.map(|after| after.object())) {
            if page.len() >= limit {
                break;
            }
            let call = cx.call.clone();
            let looking = self.looking(id, move |inner| {
                let Ok(thing) = inner.own(&call, id) else { return Ok(None) };
                let (seen, passport) = (inner.seen(&thing, &thing.spec), inner.maker.passport(&thing.spec));
                Ok(Some(Found { id, tag: thing.tag, passport, seen }))
            });
            page.extend(looking.await?);
        }
        Ok(page)
    }
}

/// What a provider sends from now on. A listener that is too slow misses some, by contract.
pub(crate) fn changes(sender: &broadcast::Sender<ObjectRef>) -> Feed<ObjectRef> {
    Box::new(Changes(sender.subscribe()))
}

struct Changes(broadcast::Receiver<ObjectRef>);

#[async_trait]
impl Pull<ObjectRef> for Changes {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        loop {
            match self.0.recv().await {
                Ok(object) => return Some(Ok(object)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
