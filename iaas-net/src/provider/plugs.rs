//! The plugs of a host.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Provider;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Tag;
use iaas_core::spi::network::Plug;
use iaas_core::spi::network::PlugObserved;
use iaas_core::spi::network::PlugSpec;
use iaas_core::spi::network::Plugs;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;

use super::Alone;
use super::Inner;
use super::blocking;
use super::detached;
use crate::folder::StoredPlug;
use crate::folder::Totals;
use crate::port::opener::Token;
use crate::port::opener::socket_path;

/// The host's side of a [`HostNetwork`](super::HostNetwork).
#[derive(Debug)]
pub(super) struct HostPlugs(pub(super) Arc<Inner>);

impl HostPlugs {
    fn site(&self) -> Site {
        Site::Host(self.0.settings.host)
    }
}

#[async_trait]
impl Provider for HostPlugs {
    async fn hello(&self) -> Result<Hello> {
        let mut hello = self.0.hello(self.site(), KINDS).await?;
        if let Some((incarnation, _, rev)) = &mut hello.newest {
            // The newest revision is that of the tags.
            let plugs = self.0.folder.plugs()?.into_iter().filter_map(|(_, plug)| plug.ok());
            let ours = plugs.filter(|plug| plug.tag.incarnation == *incarnation).map(|plug| plug.tag.rev);
            *rev = ours.chain([*rev]).max().unwrap_or(*rev);
        }
        Ok(hello)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.0.claim(cx, self.site(), KINDS).await?;
        self.hello().await
    }

    async fn changes(&self, _: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(self.0.changes())
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let (inner, cloud) = (self.0.clone(), cx.call.cloud);
        blocking(move || {
            let plugs = inner.folder.plugs()?.into_iter().filter_map(|(id, plug)| Some((id, plug.ok()?)));
            let mut ours: Vec<_> = plugs.filter(|(_, plug)| plug.tag.cloud == cloud).collect();
            ours.sort_by_key(|(_, plug)| plug.spec.port.object());
            let next =
                ours.into_iter().filter(|(_, p)| after.as_ref().is_none_or(|a| p.spec.port.object() > *a));
            next.take(limit).map(|(id, plug)| inner.reading(id, &plug, false)).collect()
        })
        .await
    }
}

#[async_trait]
impl Converge<Plug> for HostPlugs {
    #[tracing::instrument(name = "plug.ensure", skip_all, fields(op = %cx.call.op, plug = %id, port = %spec.port), err)]
    async fn ensure(&self, cx: &Ctx, id: Id<Plug>, rev: Rev, spec: &PlugSpec) -> Result<Seen<Plug>> {
        if spec.queues != 1 {
            return Err(Error::invalid(format!("{} pairs of queues", spec.queues))
                .remedy("use 1: a ring port has one pair")
                .about(id.object()));
        }
        let (inner, call, spec, site) = (self.0.clone(), cx.call.clone(), *spec, self.site());
        let alone = inner.alone().await?;
        detached(async move { inner.plug_in(&call, id, rev, spec, site, alone).await }).await
    }

    #[tracing::instrument(name = "plug.remove", skip_all, fields(op = %cx.call.op, plug = %id), err)]
    async fn remove(&self, cx: &Ctx, id: Id<Plug>, upto: Rev) -> Result<()> {
        let (inner, call, site) = (self.0.clone(), cx.call.clone(), self.site());
        let alone = inner.alone().await?;
        detached(async move { inner.pull_out(&call, id, upto, site, alone).await }).await
    }

    async fn observe(&self, _: &Ctx, id: Id<Plug>) -> Result<Option<Seen<Plug>>> {
        let folder = self.0.folder.clone();
        match blocking(move || folder.plug(id)).await? {
            Some(plug) => self.0.see(id, &plug).await.map(Some),
            None => Ok(None),
        }
    }

    async fn inventory(&self, cx: &Ctx, after: Option<Id<Plug>>, limit: usize) -> Result<Vec<Found<Plug>>> {
        let folder = self.0.folder.clone();
        let plugs = blocking(move || folder.plugs()).await?;
        let mut found = Vec::new();
        for (id, plug) in plugs.into_iter().filter(|(id, _)| after.is_none_or(|after| *id > after)) {
            // Without a tag it is nobody's: it is never listed.
            let Ok(plug) = plug else { continue };
            if found.len() < limit && plug.tag.cloud == cx.call.cloud {
                found.push(Found { id, tag: plug.tag, passport: None, seen: self.0.see(id, &plug).await });
            }
        }
        Ok(found)
    }
}

impl Plugs for HostPlugs {}

impl Inner {
    async fn plug_in(
        self: &Arc<Self>,
        call: &Call,
        id: Id<Plug>,
        rev: Rev,
        spec: PlugSpec,
        site: Site,
        _alone: Alone,
    ) -> Result<Seen<Plug>> {
        let _fenced = self.enter(call, site).await?;
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let this = self.clone();
        let plug = blocking(move || this.write_plug(id, tag, spec)).await?;
        self.keeper.apply().await;
        self.wake(id.object());
        self.see(id, &plug).await
    }

    /// Writes a plug down, after checking it against what is there.
    fn write_plug(&self, id: Id<Plug>, tag: Tag, spec: PlugSpec) -> Result<StoredPlug> {
        let old = self.folder.plug(id)?;
        if let Some(old) = &old {
            own(id, old, tag.cloud)?;
            if old.tag.incarnation == tag.incarnation && tag.rev < old.tag.rev {
                let what = format!("revision {} is older than {}", tag.rev, old.tag.rev);
                return Err(Error::conflict(what).about(id.object()));
            }
            if old.spec.port != spec.port {
                return Err(Error::invalid("a plug cannot change its port")
                    .remedy("make another plug")
                    .about(id.object()));
            }
        }
        for (other, plug) in self.folder.plugs()? {
            if other != id && plug.is_ok_and(|plug| plug.spec.port == spec.port) {
                return Err(Error::conflict(format!("{} {} is plugged in already", "port", spec.port))
                    .remedy("remove its other plug first")
                    .about(other.object()));
            }
        }
        let mut ended = old.as_ref().map(|old| old.ended.clone()).unwrap_or_default();
        if let Some(old) = old.as_ref().filter(|old| old.spec.term != spec.term) {
            ended.push(self.reading(id, old, true)?);
            // The engine has read the older ones long ago.
            let surplus = ended.len().saturating_sub(MOST_ENDED);
            ended.drain(..surplus);
        }
        let plug = StoredPlug { tag, spec, socket: socket_path(&self.settings.runtime, spec.port)?, ended };
        self.folder.set_plug(id, &plug)?;
        self.folder.counters(id, spec.term)?;
        self.folder.remove_counters(id, Some(spec.term))?;
        Ok(plug)
    }

    async fn pull_out(
        self: &Arc<Self>,
        call: &Call,
        id: Id<Plug>,
        upto: Rev,
        site: Site,
        _alone: Alone,
    ) -> Result<()> {
        // Before the fence, which knows only epochs: another incarnation is told that the thing is not its own.
        let folder = self.folder.clone();
        if let Some(old) = blocking(move || folder.plug(id)).await? {
            may_remove(id, &old, call, upto)?;
        }
        let _fenced = self.enter(call, site).await?;
        let (folder, call) = (self.folder.clone(), call.clone());
        let removed = blocking(move || {
            let Some(old) = folder.plug(id)? else { return Ok(false) };
            may_remove(id, &old, &call, upto)?;
            folder.remove_plug(id)?;
            Ok(true)
        })
        .await?;
        if removed {
            self.keeper.apply().await;
            self.wake(id.object());
        }
        Ok(())
    }

    async fn see(&self, id: Id<Plug>, plug: &StoredPlug) -> Result<Seen<Plug>> {
        let program = self.current();
        let PlugSpec { port, term, .. } = plug.spec;
        let form = Token::new(plug.socket.clone(), self.settings.offloads).form()?;
        let target = Target { id: port.uuid(), term, mode: Mode::Write, forms: vec![form], key: None };
        let up = self.keeper.status().await.ok().and_then(|status| status.plugs.get(&id).copied());
        let phase = self.keeper.trouble().map_or(Phase::Settled, Phase::Blocked);
        let is = PlugObserved {
            target: Some(target),
            program: program.port(port).map_or(Rev(0), |_| program.rev()),
            peer_up: up.unwrap_or(false),
        };
        Ok(Seen { applied: plug.tag.rev, phase, at: self.now(), is, final_usage: plug.ended.clone() })
    }

    /// What went through a plug in its term.
    fn reading(&self, id: Id<Plug>, plug: &StoredPlug, fin: bool) -> Result<Reading> {
        let PlugSpec { port, term, .. } = plug.spec;
        let counters = self.folder.counters(id, term)?;
        let Totals { rx_bytes, tx_bytes, rx_packets, tx_packets } = counters.totals();
        let totals = BTreeMap::from([
            ("rx-bytes".to_owned(), rx_bytes.into()),
            ("tx-bytes".to_owned(), tx_bytes.into()),
            ("rx-packets".to_owned(), rx_packets.into()),
            ("tx-packets".to_owned(), tx_packets.into()),
        ]);
        let seq = counters.next_seq();
        Ok(Reading { of: port.object(), term: Term(term.0), life: 1, seq, fin, at: self.now(), totals })
    }
}

/// Refuses to remove what is another's or newer.
fn may_remove(id: Id<Plug>, old: &StoredPlug, call: &Call, upto: Rev) -> Result<()> {
    own(id, old, call.cloud)?;
    if old.tag.incarnation != call.incarnation {
        return Err(Error::conflict("the plug belongs to another life of the store")
            .remedy("ensure it first, to take it over")
            .about(id.object()));
    }
    if old.tag.rev > upto {
        let what = format!("the plug is at revision {}, newer than {upto}", old.tag.rev);
        return Err(Error::conflict(what).about(id.object()));
    }
    Ok(())
}

/// Refuses to touch what another cloud plugged in.
fn own(id: Id<Plug>, plug: &StoredPlug, cloud: Id<iaas_core::id::Cloud>) -> Result<()> {
    if plug.tag.cloud == cloud {
        return Ok(());
    }
    Err(Error::conflict("the plug is another cloud's").about(id.object()))
}

/// What it converges.
const KINDS: &[&str] = &[Plug::NAME];
/// Readings of earlier terms that are kept.
const MOST_ENDED: usize = 16;
