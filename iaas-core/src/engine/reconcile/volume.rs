//! A volume: kept by its pool for as long as the record wants it.

use bytes::Bytes;

use super::Next;
use super::SOON;
use super::Work;
use super::hopeless;
use super::pace;
use super::same_phase;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::engine::codec;
use crate::engine::commit::SELF;
use crate::engine::draft::Draft;
use crate::engine::outbox::allocated;
use crate::model::*;
use crate::spi::Phase;
use crate::spi::Seen;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::block::Qos;

pub(super) async fn look(work: &Work, id: Id<Volume>) -> Result<Next> {
    let Some(record) = work.committer.read(|s| s.get(id).cloned()) else { return Ok(Next::Rest) };
    let Some(pool) = record.bind.pool else {
        return Err(Error::internal("a volume without a pool").about(id.object()));
    };
    let provider = work.sites.pool(pool)?;
    if let Some(op) = record.meta.absent {
        return leave(work, &record, provider.as_ref(), op).await;
    }
    let op = work.committer.read(|s| s.open_operations(&id.object()).first().map(|o| o.meta.id));
    let cx = work.caller.ctx(op.unwrap_or(Id::from_uuid(id.uuid())));
    let observed = provider.observe(&cx, id.cast()).await?;
    let must = work.must_ensure(id.uuid(), record.meta.effect, observed.as_ref());
    let seen = match observed.filter(|_| !must) {
        Some(seen) => seen,
        None => match provider.ensure(&cx, id.cast(), record.meta.effect, &wanted(&record)?).await {
            Err(error) if hopeless(&error) && record.status.seen.is_none() => {
                return give_up(work, id, error).await;
            }
            other => other?,
        },
    };
    keep(work, &record, &seen).await?;
    Ok(pace(&seen.phase))
}

fn wanted(record: &Record<Volume>) -> Result<PoolVolumeSpec> {
    Ok(PoolVolumeSpec {
        size: record.spec.size().0,
        from: None,
        qos: Qos::default(),
        key: record.bind.key.clone(),
        passport: passport(record)?,
    })
}

/// What an adopting control plane needs to know of a record.
pub(super) fn passport<R: Resource>(record: &Record<R>) -> Result<Bytes> {
    codec::encode(&(R::NAME, record.meta.id, record.meta.owner, &record.meta.name, &record.spec))
}

async fn keep(work: &Work, record: &Record<Volume>, seen: &Seen<PoolVolume>) -> Result<()> {
    let id = record.meta.id;
    let settled = seen.phase == Phase::Settled;
    let open = settled && work.committer.read(|s| !s.open_operations(&id.object()).is_empty());
    let same = record.status.seen.as_ref().is_some_and(|(rev, phase, is)| {
        *rev == seen.applied
            && same_phase(phase, &seen.phase)
            && is.size == seen.is.size
            && is.writer == seen.is.writer
    });
    if same && !open {
        return Ok(());
    }
    let first = settled && !matches!(&record.status.seen, Some((_, Phase::Settled, _)));
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut now) = draft.find(id).filter(|r| r.meta.absent.is_none()) else { return Ok(()) };
        now.status.seen = Some((seen.applied, seen.phase.clone(), seen.is));
        now.meta.trouble = None;
        if first && let Some(project) = now.meta.owner.project() {
            let event =
                allocated(draft, project, id.object(), "volume-bytes", now.spec.size().0, 1, seen.at.wall);
            draft.meter(&event)?;
        }
        draft.keep(now)?;
        if settled { draft.end_operations(&id.object(), &OperationState::Done) } else { Ok(()) }
    };
    work.committer.commit(SELF, draw).await.map(|_| ())
}

async fn give_up(work: &Work, id: Id<Volume>, error: Error) -> Result<Next> {
    let draw = |draft: &mut Draft<'_>| {
        let mut record = draft.record(id)?;
        record.meta.absent = Some(draft.operation());
        draft.change(record)?;
        draft.end_operations(&id.object(), &OperationState::Failed(error))
    };
    work.committer.commit(SELF, draw).await.map(|_| Next::Rest)
}

async fn leave(
    work: &Work,
    record: &Record<Volume>,
    provider: &dyn crate::spi::block::VolumePool,
    op: Id<Operation>,
) -> Result<Next> {
    let id = record.meta.id;
    if work.committer.read(|s| s.attachment_to(&id.object()).is_some()) {
        return Ok(Next::Rest);
    }
    let cx = work.caller.ctx(op);
    if let Some(seen) = provider.observe(&cx, id.cast()).await? {
        if work.must_remove(id.uuid(), &seen) {
            let asked = provider.remove(&cx, id.cast(), record.meta.effect).await;
            asked.inspect_err(|_| work.forget_asking(id.uuid()))?;
        }
        return Ok(Next::After(SOON));
    }
    work.forget_asking(id.uuid());
    let counted = record.status.seen.is_some();
    let draw = |draft: &mut Draft<'_>| {
        if counted && let Some(project) = record.meta.owner.project() {
            let now = draft.now();
            let event = allocated(draft, project, id.object(), "volume-bytes", 0, 2, now);
            draft.meter(&event)?;
        }
        draft.end_operations(&id.object(), &OperationState::Done)?;
        draft.delete(id);
        Ok(())
    };
    work.committer.commit(SELF, draw).await.map(|_| Next::Rest)
}
