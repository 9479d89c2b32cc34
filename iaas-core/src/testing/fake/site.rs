//! One site of one kind: the four verbs, written once for all kinds.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::base::Base;
use super::base::Fence;
use super::world::Landed;
use super::world::Standing;
use super::world::Thing;
use super::world::World;
use super::world::lock;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
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
use crate::spi::Reading;
use crate::spi::Seen;
use crate::spi::Site;
use crate::spi::Tag;

/// What is peculiar to a kind of fake object.
pub trait FakeKind: Kind {
    /// What an object has beside its spec; it lives in the world.
    type Body: Debug + Send + 'static;

    /// Refuses a spec that can never be met, or that `old` cannot become.
    fn check(place: &Place, old: Option<&Self::Spec>, spec: &Self::Spec) -> Result<()>;

    /// Makes the body, or brings `body` to `spec`.
    fn apply(place: &Place, id: Id<Self>, body: Option<Self::Body>, spec: &Self::Spec) -> Self::Body;

    /// Looks at an object: what the clock has done to it, what it is, and how far.
    fn look(place: &Place, id: Id<Self>, spec: &Self::Spec, body: &mut Self::Body) -> Look<Self>;

    /// Lets go of what the body holds, when the object is removed.
    fn gone(_: &Place, _: Id<Self>, _: &mut Self::Body) {}

    /// A reading of an object, if it is metered.
    fn reading(_: &Place, _: Id<Self>, _: &Self::Spec, _: &mut Self::Body) -> Option<Reading> {
        None
    }

    /// The passport in a spec.
    fn passport(_: &Self::Spec) -> Option<Bytes> {
        None
    }
}

/// What [`FakeKind::look`] sees.
#[derive(Debug)]
pub struct Look<K: Kind> {
    /// How far it is.
    pub phase: Phase,
    /// What it is.
    pub is: K::Observed,
    /// The readings of lives that ended.
    pub final_usage: Vec<Reading>,
}

impl<K: Kind> Look<K> {
    /// A settled object.
    pub fn settled(is: K::Observed) -> Self {
        Self { phase: Phase::Settled, is, final_usage: Vec::new() }
    }
}

/// Where a fake acts, for the hooks of its kind.
#[derive(Clone, Debug)]
pub struct Place {
    /// The world.
    pub world: World,
    /// The site in it.
    pub site: Site,
    /// The other site that it depends on: the pool of an access, the fabric of a plug.
    pub beside: Option<Site>,
}

/// The fake provider of kind `K` on one site: a handle without memory of its own.
#[derive(Debug)]
pub struct FakeSite<K: FakeKind> {
    pub(super) base: Base,
    pub(super) place: Place,
    pub(super) stand: Arc<Stand<K>>,
}

/// What stands in the world of a site of kind `K`.
#[derive(Debug)]
pub(super) struct Stand<K: FakeKind> {
    site: Site,
    fence: Arc<Fence>,
    objects: Mutex<BTreeMap<Id<K>, Object<K>>>,
}

#[derive(Debug)]
struct Object<K: FakeKind> {
    /// `None`: somebody else's, without a tag.
    tag: Option<Tag>,
    spec: K::Spec,
    body: K::Body,
    /// The world's time at which it is as wanted.
    ready: Duration,
    /// Half-made: only `ensure` or `remove` helps. Half-removed if it leaves: only `remove` helps.
    half: bool,
    /// Set when it is being removed: the world's time at which it is gone; the end of time for a removal that was cut off.
    leaves: Option<Duration>,
}

impl<K: FakeKind> FakeSite<K> {
    pub(super) fn stand(world: &World, site: Site, name: &str, beside: Option<Site>, caps: &[&str]) -> Self {
        let make = || Stand { site, fence: Arc::new(Fence::new(world)), objects: Mutex::default() };
        let stand = world.stand(site, name, make);
        let base = Base::new(world, site, name, stand.fence.clone()).with_kind(K::NAME).with_caps(caps);
        Self { base, place: Place { world: world.clone(), site, beside }, stand }
    }

    /// The world that it acts on.
    pub fn world(&self) -> &World {
        &self.place.world
    }

    /// Puts an object there behind the provider's back; `tag: None` is a thing that nobody tagged.
    pub fn plant(&self, id: Id<K>, tag: Option<Tag>, spec: K::Spec) {
        let body = K::apply(&self.place, id, None, &spec);
        let object = Object { tag, spec, body, ready: Duration::ZERO, half: false, leaves: None };
        lock(&self.stand.objects).insert(id, object);
    }

    /// Does something to the body of an object behind the provider's back; `None` if it is not there.
    pub(super) fn touch<T>(
        &self,
        id: Id<K>,
        act: impl FnOnce(&Place, &K::Spec, &mut K::Body) -> T,
    ) -> Option<T> {
        self.stand.touch(id, |spec, body| act(&self.place, spec, body))
    }

    fn now(&self) -> Duration {
        self.place.world.clock().monotonic()
    }

    /// Forgets the objects whose time to leave has come.
    fn sweep(&self, objects: &mut BTreeMap<Id<K>, Object<K>>) {
        let now = self.now();
        objects.retain(|_, o| o.leaves.is_none_or(|at| at > now));
    }

    fn seen(&self, id: Id<K>, object: &mut Object<K>) -> Seen<K> {
        let now = self.now();
        let Look { phase, is, final_usage } = K::look(&self.place, id, &object.spec, &mut object.body);
        let phase = match object.leaves {
            Some(_) => Phase::Leaving,
            None if object.half => {
                Phase::Broken(Error::conflict("this is half-made").remedy("ensure it again, or remove it"))
            }
            None if object.ready > now => {
                Phase::Working { done: 0, total: None, poll_in: object.ready - now }
            }
            None => phase,
        };
        let applied = object.tag.map_or(Rev(0), |t| t.rev);
        Seen { applied, phase, at: self.place.world.stamp(), is, final_usage }
    }

    /// Checks a wish against what is there.
    fn may_ensure(&self, old: Option<&Object<K>>, call: &Call, rev: Rev, spec: &K::Spec) -> Result<()> {
        if let Some(old) = old {
            own(old, call)?;
            if old.leaves.is_some() {
                return Err(Error::conflict("it is being removed").remedy("wait until it is gone"));
            }
            let tag = old.tag.filter(|t| t.incarnation == call.incarnation);
            if let Some(tag) = tag.filter(|t| rev < t.rev) {
                return Err(Error::conflict(format!("revision {rev} is older than {}", tag.rev)));
            }
        }
        // A half-made thing may become anything.
        K::check(&self.place, old.filter(|o| !o.half).map(|o| &o.spec), spec)
    }

    /// Applies a wish, whole or by half.
    fn put(&self, objects: &mut BTreeMap<Id<K>, Object<K>>, id: Id<K>, tag: Tag, spec: &K::Spec, half: bool) {
        let old = objects.remove(&id);
        let same = old.as_ref().is_some_and(|o| o.spec == *spec && !o.half);
        let ready = match &old {
            Some(old) if same => old.ready,
            _ => self.now() + self.place.world.settle(),
        };
        let body = K::apply(&self.place, id, old.map(|o| o.body), spec);
        objects.insert(id, Object { tag: Some(tag), spec: spec.clone(), body, ready, half, leaves: None });
    }

    fn take(&self, objects: &mut BTreeMap<Id<K>, Object<K>>, id: Id<K>, half: bool) {
        let (now, settle) = (self.now(), self.place.world.settle());
        let Some(object) = objects.get_mut(&id) else { return };
        K::gone(&self.place, id, &mut object.body);
        if half {
            object.half = true;
            object.leaves = Some(Duration::MAX);
        } else if settle.is_zero() {
            objects.remove(&id);
        } else if object.half || object.leaves.is_none() {
            object.half = false;
            object.leaves = Some(now + settle);
        }
    }
}

impl<K: FakeKind> Stand<K> {
    /// Does something to the body of an object; `None` if it is not there.
    pub(super) fn touch<T>(&self, id: Id<K>, act: impl FnOnce(&K::Spec, &mut K::Body) -> T) -> Option<T> {
        let mut objects = lock(&self.objects);
        let object = objects.get_mut(&id)?;
        Some(act(&object.spec, &mut object.body))
    }

    /// The first answer that `act` gives for an object.
    pub(super) fn find<T>(
        &self,
        mut act: impl FnMut(Id<K>, &K::Spec, &mut K::Body) -> Option<T>,
    ) -> Option<T> {
        lock(&self.objects).iter_mut().find_map(|(id, o)| act(*id, &o.spec, &mut o.body))
    }
}

/// Refuses what is another cloud's.
fn own<K: FakeKind>(object: &Object<K>, call: &Call) -> Result<()> {
    match object.tag {
        Some(tag) if tag.cloud == call.cloud => Ok(()),
        _ => Err(Error::conflict("this id is taken by something that is not ours")),
    }
}

impl<K: FakeKind> Standing for Stand<K> {
    fn things(&self) -> Vec<Thing> {
        let thing =
            |(id, o): (&Id<K>, &Object<K>)| Thing { site: self.site, object: id.object(), tag: o.tag };
        lock(&self.objects).iter().map(thing).collect()
    }
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[async_trait]
impl<K: FakeKind> Provider for FakeSite<K> {
    async fn hello(&self) -> Result<Hello> {
        self.base.hello().await
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.base.claim(cx).await
    }

    async fn changes(&self, _: &Ctx) -> Result<Feed<ObjectRef>> {
        self.base.changes().await
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        self.place.world.alive().await;
        let mut objects = lock(&self.stand.objects);
        self.sweep(&mut objects);
        let ours = objects.iter_mut().filter(|(_, o)| o.tag.is_some_and(|t| t.cloud == cx.call.cloud));
        let mut all: Vec<Reading> =
            ours.filter_map(|(id, o)| K::reading(&self.place, *id, &o.spec, &mut o.body)).collect();
        all.sort_by(|a, b| a.of.cmp(&b.of));
        all.retain(|r| after.as_ref().is_none_or(|a| r.of > *a));
        all.truncate(limit);
        Ok(all)
    }
}

#[async_trait]
impl<K: FakeKind> Converge<K> for FakeSite<K> {
    #[tracing::instrument(name = "fake.ensure", skip_all, fields(op = %cx.call.op, object = %id.object()))]
    async fn ensure(&self, cx: &Ctx, id: Id<K>, rev: Rev, spec: &K::Spec) -> Result<Seen<K>> {
        let _inside = self.base.enter(cx).await?;
        let (strike, seen) = {
            let mut objects = lock(&self.stand.objects);
            self.sweep(&mut objects);
            self.may_ensure(objects.get(&id), &cx.call, rev, spec).map_err(|e| e.about(id.object()))?;
            let strike = self.place.world.strike(self.place.site, "ensure", id.object(), cx.call.epoch);
            let tag = Tag { cloud: cx.call.cloud, incarnation: cx.call.incarnation, rev };
            if strike.landed != Landed::No {
                self.put(&mut objects, id, tag, spec, strike.landed == Landed::Half);
                self.base.fence.applied(&cx.call, rev);
            }
            (strike, objects.get_mut(&id).map(|o| self.seen(id, o)))
        };
        self.base.wake(id.object());
        let seen = self.place.world.finish(strike, seen).await?;
        seen.ok_or_else(|| Error::internal("an effect landed and left nothing"))
    }

    #[tracing::instrument(name = "fake.remove", skip_all, fields(op = %cx.call.op, object = %id.object()))]
    async fn remove(&self, cx: &Ctx, id: Id<K>, upto: Rev) -> Result<()> {
        let _inside = self.base.enter(cx).await?;
        let strike = {
            let mut objects = lock(&self.stand.objects);
            self.sweep(&mut objects);
            let Some(object) = objects.get(&id) else { return Ok(()) };
            own(object, &cx.call).map_err(|e| e.about(id.object()))?;
            let tag = object.tag.filter(|t| t.incarnation == cx.call.incarnation && t.rev <= upto);
            if tag.is_none() {
                return Err(Error::conflict("its tag is newer, or of another incarnation").about(id.object()));
            }
            let strike = self.place.world.strike(self.place.site, "remove", id.object(), cx.call.epoch);
            if strike.landed != Landed::No {
                self.take(&mut objects, id, strike.landed == Landed::Half);
            }
            strike
        };
        self.base.wake(id.object());
        self.place.world.finish(strike, ()).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<K>) -> Result<Option<Seen<K>>> {
        self.place.world.alive().await;
        let mut objects = lock(&self.stand.objects);
        self.sweep(&mut objects);
        let ours = objects.get_mut(&id).filter(|o| o.tag.is_some_and(|t| t.cloud == cx.call.cloud));
        Ok(ours.map(|o| self.seen(id, o)))
    }

    async fn inventory(&self, cx: &Ctx, after: Option<Id<K>>, limit: usize) -> Result<Vec<Found<K>>> {
        self.place.world.alive().await;
        let mut objects = lock(&self.stand.objects);
        self.sweep(&mut objects);
        let listed = objects.iter_mut().filter(|(id, _)| after.is_none_or(|a| **id > a));
        let ours =
            listed.filter_map(|(id, o)| o.tag.filter(|t| t.cloud == cx.call.cloud).map(|t| (*id, t, o)));
        let found = ours.take(limit).map(|(id, tag, object)| Found {
            id,
            tag,
            passport: K::passport(&object.spec),
            seen: Ok(self.seen(id, object)),
        });
        Ok(found.collect())
    }
}
