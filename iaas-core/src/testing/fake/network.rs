//! The fake network of a fabric, and the fake plugs of a host.

use std::any::Any;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;

use super::base::Base;
use super::base::Fence;
use super::base::provider_by_base;
use super::frame_port::Line;
use super::opener;
use super::program::Program;
use super::program::is_net;
use super::program::name;
use super::site::FakeKind;
use super::site::FakeSite;
use super::site::Look;
use super::site::Place;
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
use crate::id::Fabric;
use crate::model::Host;
use crate::model::Port;
use crate::spi::Ctx;
use crate::spi::Reading;
use crate::spi::Site;
use crate::spi::network::NetObject;
use crate::spi::network::NetProgram;
use crate::spi::network::NetUpdate;
use crate::spi::network::PacketQuery;
use crate::spi::network::Plug;
use crate::spi::network::PlugObserved;
use crate::spi::network::PlugSpec;
use crate::spi::network::Plugs;
use crate::spi::network::Synced;
use crate::spi::network::Trace;
use crate::spi::target::Mode;
use crate::spi::target::Target;

const NAME: &str = "network";
/// The most flows that are remembered.
const MAX_FLOWS: usize = 1 << 16;

/// The program of one fabric, in a [`World`].
#[derive(Debug)]
pub struct FakeNetwork {
    base: Base,
    stand: Arc<NetStand>,
}

/// What stands of a network.
#[derive(Debug)]
pub(super) struct NetStand {
    fence: Arc<Fence>,
    net: Mutex<Net>,
}

#[derive(Debug, Default)]
struct Net {
    objects: BTreeMap<ObjectRef, NetObject>,
    program: Option<Program>,
    flows: BTreeSet<Flow>,
}

/// A flow, as its first packet was sent: from, to, protocol and ports.
type Flow = (Id<Port>, Id<Port>, u8, u16, u16);

impl FakeNetwork {
    /// Opens the network of `fabric`.
    pub fn open(world: &World, fabric: Id<Fabric>) -> Self {
        let site = Site::Fabric(fabric);
        let make = || NetStand { fence: Arc::new(Fence::new(world)), net: Mutex::default() };
        let stand = world.stand(site, NAME, make);
        Self { base: Base::new(world, site, NAME, stand.fence.clone()), stand }
    }

    /// The objects of the program, in order of their names.
    pub fn objects(&self) -> Vec<NetObject> {
        lock(&self.stand.net).objects.values().cloned().collect()
    }

    /// The program's revision; zero if there is none.
    pub fn rev(&self) -> Rev {
        lock(&self.stand.net).program.as_ref().map_or(Rev(0), |p| p.rev)
    }
}

provider_by_base!(FakeNetwork);

#[async_trait]
impl NetProgram for FakeNetwork {
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced> {
        let _inside = self.base.enter(cx).await?;
        let strike = {
            let mut net = lock(&self.stand.net);
            let Some(next) = net.next(up)? else { return Ok(Synced::NeedFull) };
            let program = Program::new(up.to, next.values())?;
            let fabric = ObjectRef { kind: "fabric".into(), id: site_id(self.base.site) };
            let strike = self.base.world.strike(self.base.site, "sync", fabric, cx.call.epoch);
            // A program is taken whole or not at all, so half an effect is none.
            if strike.landed == Landed::Whole {
                *net = Net { objects: next, program: Some(program), flows: BTreeSet::new() };
                self.base.fence.applied(&cx.call, up.to);
            }
            strike
        };
        self.base.world.finish(strike, Synced::At(up.to)).await
    }

    async fn explain(&self, _: &Ctx, query: &PacketQuery) -> Result<Trace> {
        self.base.world.alive().await;
        let net = lock(&self.stand.net);
        let program = net
            .program
            .as_ref()
            .ok_or_else(|| Error::not_found("the fabric has no program yet").remedy("sync one first"))?;
        program.explain(query, false)
    }
}

impl Net {
    /// The objects after an update; `None` if it does not fit.
    fn next(&self, up: &NetUpdate) -> Result<Option<BTreeMap<ObjectRef, NetObject>>> {
        let now = self.program.as_ref().map(|p| p.rev);
        if let Some(now) = now.filter(|now| up.to < *now) {
            return Err(Error::conflict(format!("the program is at revision {now}, newer than {}", up.to)));
        }
        let mut next = match up.from {
            None => BTreeMap::new(),
            Some(from) if Some(from) == now => self.objects.clone(),
            Some(_) => return Ok(None),
        };
        next.retain(|object, _| !up.drop.contains(object));
        if let Some(strange) = up.drop.iter().find(|object| !is_net(object)) {
            return Err(Error::invalid(format!("{strange} is no object of a network program")));
        }
        for object in &up.put {
            let twice = next.insert(name(object), object.clone()).is_some();
            if twice && up.from.is_none() {
                return Err(Error::invalid("the update puts an object twice").about(name(object)));
            }
        }
        Ok(Some(next))
    }
}

impl NetStand {
    /// Does something with the program, if there is one.
    pub(super) fn with<T>(&self, act: impl FnOnce(&Program) -> T) -> Option<T> {
        lock(&self.net).program.as_ref().map(act)
    }

    /// Decides about a real packet and remembers its flow.
    pub(super) fn forward(&self, query: &PacketQuery) -> Option<Trace> {
        let mut net = lock(&self.net);
        let program = net.program.as_ref()?;
        let to = program.port(query.from).and_then(|p| program.network_of(p));
        let to = to.and_then(|network| program.holder(network, query.dst)).map(|(to, _)| to);
        let back = to.map(|to| (to, query.from, query.protocol, query.dst_port, query.src_port));
        let reply = back.is_some_and(|back| net.flows.contains(&back));
        let trace = program.explain(query, reply).ok()?;
        if let (crate::spi::network::Verdict::Delivered(to), false) = (trace.verdict, reply)
            && net.flows.len() < MAX_FLOWS
        {
            net.flows.insert((query.from, to, query.protocol, query.src_port, query.dst_port));
        }
        Some(trace)
    }
}

impl Standing for NetStand {
    fn things(&self) -> Vec<Thing> {
        // A program is a state of the fabric, not a thing that could be left behind.
        Vec::new()
    }
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// The network that stands on a fabric.
pub(super) fn net(world: &World, fabric: Option<Site>) -> Option<Arc<NetStand>> {
    world.standing(fabric?, NAME)
}

fn site_id(site: Site) -> uuid::Uuid {
    match site {
        Site::Host(id) => id.uuid(),
        Site::Pool(id) => id.uuid(),
        Site::Fabric(id) => id.uuid(),
    }
}

/// The plugs of one host, in a [`World`].
pub type FakePlugs = FakeSite<Plug>;

impl FakeSite<Plug> {
    /// Opens the plugs of `host`, which is on `fabric`.
    pub fn open(world: &World, host: Id<Host>, fabric: Id<Fabric>) -> Self {
        Self::stand(world, Site::Host(host), "plugs", Some(Site::Fabric(fabric)), &[])
    }
}

impl FakeKind for Plug {
    type Body = Arc<Line>;

    fn check(_: &Place, old: Option<&PlugSpec>, spec: &PlugSpec) -> Result<()> {
        if !(1..=256).contains(&spec.queues) {
            return Err(Error::invalid(format!("{} pairs of queues", spec.queues)).remedy("use 1 to 256"));
        }
        if old.is_some_and(|old| old.port != spec.port) {
            return Err(Error::invalid("a plug cannot change its port").remedy("make another plug"));
        }
        Ok(())
    }

    fn apply(place: &Place, _: Id<Self>, body: Option<Arc<Line>>, spec: &PlugSpec) -> Arc<Line> {
        body.filter(|line| line.term == spec.term)
            .unwrap_or_else(|| Arc::new(Line::new(spec.port, spec.term, spec.queues, place.beside)))
    }

    fn look(place: &Place, _: Id<Self>, spec: &PlugSpec, line: &mut Arc<Line>) -> Look<Self> {
        let program = net(&place.world, place.beside)
            .and_then(|net| net.with(|p| p.port(spec.port).map_or(Rev(0), |_| p.rev)));
        let target = Target {
            id: spec.port.uuid(),
            term: spec.term,
            mode: Mode::Write,
            forms: vec![opener::form(&[spec.port.uuid()])],
            key: None,
        };
        Look::settled(PlugObserved {
            target: Some(target),
            program: program.unwrap_or(Rev(0)),
            peer_up: line.is_open(),
        })
    }

    fn gone(_: &Place, _: Id<Self>, line: &mut Arc<Line>) {
        line.cut();
    }

    fn reading(place: &Place, _: Id<Self>, spec: &PlugSpec, line: &mut Arc<Line>) -> Option<Reading> {
        let (seq, totals) = line.count();
        Some(Reading {
            of: spec.port.object(),
            term: spec.term,
            life: 1,
            seq,
            fin: false,
            at: place.world.stamp(),
            totals,
        })
    }
}

impl Plugs for FakeSite<Plug> {}
