//! The program of a fabric that is one host.

use std::sync::Arc;
use std::sync::PoisonError;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::model::Network;
use iaas_core::model::Port;
use iaas_core::model::SecurityGroup;
use iaas_core::model::Subnet;
use iaas_core::spi::Call;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Hello;
use iaas_core::spi::Provider;
use iaas_core::spi::Reading;
use iaas_core::spi::Site;
use iaas_core::spi::network::NetProgram;
use iaas_core::spi::network::NetUpdate;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Synced;
use iaas_core::spi::network::Trace;

use super::Alone;
use super::Inner;
use super::blocking;
use super::detached;
use crate::Topology;
use crate::folder::StoredProgram;

/// The fabric's side of a [`HostNetwork`](super::HostNetwork).
#[derive(Debug)]
pub(super) struct HostProgram(pub(super) Arc<Inner>);

impl HostProgram {
    fn site(&self) -> Site {
        Site::Fabric(self.0.settings.fabric)
    }
}

#[async_trait]
impl Provider for HostProgram {
    async fn hello(&self) -> Result<Hello> {
        self.0.hello(self.site(), &[]).await
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.0.claim(cx, self.site(), &[]).await
    }

    async fn changes(&self, _: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(self.0.changes())
    }

    /// A fabric counts nothing itself; the ports' bytes are with the plugs.
    async fn usage(&self, _: &Ctx, _: Option<ObjectRef>, _: usize) -> Result<Vec<Reading>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl NetProgram for HostProgram {
    #[tracing::instrument(name = "net.sync", skip_all, fields(op = %cx.call.op, to = %up.to), err)]
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced> {
        let (inner, call, up, site) = (self.0.clone(), cx.call.clone(), up.clone(), self.site());
        let alone = inner.alone().await?;
        detached(async move { inner.sync(&call, up, site, alone).await }).await
    }

    async fn explain(&self, _: &Ctx, query: &PacketQuery) -> Result<Trace> {
        crate::pipeline::explain(&self.0.current(), query)
    }
}

impl Inner {
    async fn sync(self: &Arc<Self>, call: &Call, up: NetUpdate, site: Site, _alone: Alone) -> Result<Synced> {
        let fenced = self.enter(call, site).await?;
        let folder = self.folder.clone();
        let old = blocking(move || folder.program()).await?;
        let (incarnation, to) = (call.incarnation, up.to);
        let Some(topology) = next(old, incarnation, &up)? else { return Ok(Synced::NeedFull) };
        let program = topology.compile(to)?;
        let stored = StoredProgram { incarnation, rev: to, objects: topology.objects().cloned().collect() };
        let folder = self.folder.clone();
        blocking(move || folder.set_program(&stored)).await?;
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(program);
        fenced.saw(to).await?;
        self.keeper.apply().await;
        self.wake(ObjectRef { kind: "fabric".to_owned(), id: self.settings.fabric.uuid() });
        Ok(Synced::At(to))
    }
}

/// The topology after an update; `None` if it does not fit.
fn next(old: Option<StoredProgram>, incarnation: uuid::Uuid, up: &NetUpdate) -> Result<Option<Topology>> {
    if let Some(strange) = up.drop.iter().find(|object| !is_net(object)) {
        return Err(Error::invalid(format!("{strange} is no object of a network's program")));
    }
    // Revisions of another store's life do not compare with ours.
    let old = old.filter(|old| old.incarnation == incarnation);
    let now: Option<Rev> = old.as_ref().map(|old| old.rev);
    if let Some(now) = now.filter(|now| up.to < *now) {
        return Err(Error::conflict(format!("the program is at revision {now}, newer than {}", up.to)));
    }
    match (up.from, old) {
        (None, _) => Topology::new(up.put.iter().cloned()).map(Some),
        (Some(from), Some(old)) if from == old.rev => {
            Ok(Some(Topology::new(old.objects)?.changed(&up.put, &up.drop)))
        }
        (Some(_), _) => Ok(None),
    }
}

fn is_net(object: &ObjectRef) -> bool {
    object.typed::<Network>().is_some()
        || object.typed::<Subnet>().is_some()
        || object.typed::<SecurityGroup>().is_some()
        || object.typed::<Port>().is_some()
}
