//! The methods that are a trait's own, spoiled, and the wraps.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::Spoil;
use super::Spoiled;
use super::Spoiler;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::Term;
use crate::spi::ByteStream;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Stamp;
use crate::spi::artifact::Artifact;
use crate::spi::artifact::Artifacts;
use crate::spi::block::Fenced;
use crate::spi::block::PoolVolume;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumeJob;
use crate::spi::block::VolumePool;
use crate::spi::block::VolumeSnapshot;
use crate::spi::host::HostFacts;
use crate::spi::host::HostInventory;
use crate::spi::hypervisor::Handover;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmImage;
use crate::spi::network::NetProgram;
use crate::spi::network::NetUpdate;
use crate::spi::network::PacketQuery;
use crate::spi::network::Plugs;
use crate::spi::network::Synced;
use crate::spi::network::Trace;
use crate::spi::network::Verdict;
use crate::testing::conformance::rig::Wrap;

macro_rules! wraps {
    ($($provider:ident),+) => {$(
        #[async_trait]
        impl Wrap<dyn $provider> for Spoiler {
            async fn wrap(&self, inner: Arc<dyn $provider>, reopened: bool) -> Result<Arc<dyn $provider>> {
                Ok(Arc::new(self.around(inner, reopened)))
            }
        }
    )+};
}
wraps!(Hypervisor, Artifacts, VolumePool, VolumeAccess, NetProgram, Plugs, HostInventory);

#[async_trait]
impl Hypervisor for Spoiled<dyn Hypervisor> {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        self.inner.images()
    }
    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        self.inner.handovers()
    }
    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        let from = if self.is(Spoil::ConsoleFromStart) { 0 } else { from };
        self.inner.console(cx, vm, from).await
    }
}

#[async_trait]
impl Artifacts for Spoiled<dyn Artifacts> {
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>> {
        if self.is(Spoil::OneUpload) && !self.notes().uploads.insert(id.uuid()) {
            return Err(Error::conflict("an upload of this artifact has begun"));
        }
        let inner = self.inner.upload(cx, id).await?;
        Ok(Box::new(Gullible { inner, is: self.is(Spoil::AcceptsAnyBytes) }))
    }
}

/// An upload that may take any bytes.
struct Gullible {
    inner: Box<dyn ByteStream>,
    is: bool,
}

#[async_trait]
impl ByteStream for Gullible {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        self.inner.read().await
    }
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.inner.write(bytes).await
    }
    async fn close(&mut self) -> Result<()> {
        match self.inner.close().await {
            Err(e) if self.is && e.kind() == ErrorKind::Invalid => Ok(()),
            ended => ended,
        }
    }
}

#[async_trait]
impl VolumePool for Spoiled<dyn VolumePool> {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        self.inner.snapshots()
    }
    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        self.inner.jobs()
    }
    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        let cx = self.enter(cx)?;
        if self.is(Spoil::FenceLies) {
            return Ok(Fenced::Done(below));
        }
        self.inner.fence(&cx, volume, below).await
    }
}

impl VolumeAccess for Spoiled<dyn VolumeAccess> {}
impl Plugs for Spoiled<dyn Plugs> {}

#[async_trait]
impl NetProgram for Spoiled<dyn NetProgram> {
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced> {
        let cx = self.enter(cx)?;
        self.hub.learn(&up.put);
        let mut up = up.clone();
        match self.spoil {
            Spoil::SyncsInParts => {
                let empty = NetUpdate { put: Vec::new(), ..up.clone() };
                self.inner.sync(&cx, &empty).await?;
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            }
            Spoil::SyncMerges => up.put = self.merged(up.put),
            Spoil::SyncForces => up.from = None,
            _ => {}
        }
        match self.inner.sync(&cx, &up).await {
            Err(e) if self.is(Spoil::AcceptsBad) && e.kind() == ErrorKind::Invalid => Ok(Synced::At(up.to)),
            ended => ended,
        }
    }

    async fn explain(&self, cx: &Ctx, query: &PacketQuery) -> Result<Trace> {
        if self.is(Spoil::ForgetsProgram) && self.reopened {
            return Err(Error::not_found("there is no program"));
        }
        let mut trace = self.inner.explain(cx, query).await?;
        if self.is(Spoil::ExplainFlips) && matches!(trace.verdict, Verdict::Delivered(_)) {
            trace.verdict = Verdict::Dropped;
        }
        Ok(trace)
    }
}

impl Spoiled<dyn NetProgram> {
    /// What was put before and is not put again, too.
    fn merged(&self, put: Vec<crate::spi::network::NetObject>) -> Vec<crate::spi::network::NetObject> {
        let mut notes = self.notes();
        let mut all = put;
        all.extend(notes.objects.iter().filter(|o| !all.contains(o)).cloned().collect::<Vec<_>>());
        notes.objects = all.clone();
        all
    }
}

#[async_trait]
impl HostInventory for Spoiled<dyn HostInventory> {
    async fn facts(&self, cx: &Ctx) -> Result<HostFacts> {
        let mut facts = self.inner.facts(cx).await?;
        if let (Spoil::ZeroFacts, Some(cpu)) = (self.spoil, &mut facts.cpu) {
            cpu.sockets = cpu.sockets.or(Some(0));
        }
        Ok(facts)
    }

    async fn lease(&self, cx: &Ctx, ttl: Duration) -> Result<Stamp> {
        let cx = self.enter(cx)?;
        let stamp = self.inner.lease(&cx, ttl).await?;
        let first = *self.notes().lease.get_or_insert(stamp);
        Ok(if self.is(Spoil::OldLease) { first } else { stamp })
    }
}
