//! Bills and explanations.

use jiff::Timestamp;

use super::Session;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::engine::explain::Explanation;
use crate::engine::explain::explain;
use crate::engine::outbox;
use crate::model::*;
use crate::security::actions;
use crate::security::gate::not_found;
use crate::spi::meter::Bill;
use crate::spi::network::PacketQuery;
use crate::spi::network::Trace;

impl Session {
    /// The bill of `project` from `from` until before `to`, by the newest price book that began before `to`.
    ///
    /// Counted usage counts by readings up to `to`, which are taken every ten seconds and when something ends.
    ///
    /// # Errors
    /// `Conflict` if no price book holds; those of the gate and of the meter.
    pub async fn bill(&self, project: Id<Project>, from: Timestamp, to: Timestamp) -> Result<Bill> {
        self.bill_until(project, from, Some(to)).await
    }

    /// The bill of `project` from `from` until this moment, for which all counters are read.
    ///
    /// # Errors
    /// As [`bill`](Self::bill).
    pub async fn bill_so_far(&self, project: Id<Project>, from: Timestamp) -> Result<Bill> {
        self.bill_until(project, from, None).await
    }

    async fn bill_until(&self, project: Id<Project>, from: Timestamp, to: Option<Timestamp>) -> Result<Bill> {
        let clock = self.cloud().engine().committer().clock();
        let until_now = to.is_none();
        let request = actions::ReadBill { project, from, to: to.unwrap_or_else(|| clock.now()) };
        let permit = self.cloud().gate().check(self.principal(), request).await?;
        let actions::ReadBill { project, from, to } = *permit.request();
        let engine = self.cloud().engine();
        let work = &engine.driver().work;
        outbox::read_counters(engine.committer(), &work.sites, engine.meter(), &work.caller).await?;
        outbox::deliver(engine.committer(), engine.meter(), &work.caller).await?;
        let to = if until_now { clock.now() } else { to };
        let book = engine.committer().read(|s| {
            let holds = s.price_books.values().filter(|b| b.spec.from < to);
            holds.max_by_key(|b| (b.spec.from, b.meta.id)).cloned()
        });
        let book = book.ok_or_else(|| {
            Error::conflict("no price book holds at the end of the period")
                .remedy("make one that begins earlier")
        })?;
        engine.meter().bill(project, from, to, book.meta.id, &book.spec).await
    }

    /// Who waits for what.
    ///
    /// # Errors
    /// Those of the gate.
    pub async fn explain(&self, object: ObjectRef) -> Result<Explanation> {
        let permit = self.cloud().gate().check(self.principal(), actions::Explain { object }).await?;
        let object = &permit.request().object;
        let told = self.cloud().engine().committer().read(|s| explain(s, object));
        told.ok_or_else(|| not_found(object))
    }

    /// What the network does with a packet, stage by stage.
    ///
    /// # Errors
    /// Those of the gate and of the network; `Unavailable` if the cloud has no fabric.
    pub async fn explain_packet(&self, packet: PacketQuery) -> Result<Trace> {
        let request = actions::ExplainPacket { packet };
        let permit = self.cloud().gate().check(self.principal(), request).await?;
        let packet = &permit.request().packet;
        let work = &self.cloud().engine().driver().work;
        let fabric = work.committer.read(|s| {
            let attachment = s.attachment_to(&packet.from.object())?;
            s.get(attachment.spec.instance)?.bind.host
        });
        let of_host = fabric.and_then(|(host, _)| work.sites.hosts.get(&host)).map(|h| h.fabric);
        let fabric = of_host.or_else(|| work.sites.fabrics.keys().next().copied());
        let program = fabric.and_then(|id| work.sites.fabrics.get(&id)).ok_or_else(|| {
            Error::unavailable("this cloud has no network fabric")
                .remedy("give one to the builder of the cloud")
        })?;
        program.explain(&work.caller.own(), packet).await
    }
}
