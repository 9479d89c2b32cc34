//! Usage on its way to the meter: committed with the change that it is about, delivered at least once, counted once.

use std::sync::Arc;

use super::codec;
use super::commit::Committer;
use super::commit::SELF;
use super::draft::Draft;
use super::queue::Next;
use super::sites::Caller;
use super::sites::Sites;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::*;
use crate::spi::Reading;
use crate::spi::meter::MeterSink;
use crate::spi::meter::Usage;
use crate::spi::meter::UsageEvent;
use crate::spi::meter::UsageKey;

/// The event "from now on, `of` has `quantity` of `meter`". Its key is completed when it is delivered.
pub fn allocated(
    draft: &Draft<'_>,
    project: Id<Project>,
    of: ObjectRef,
    meter: &str,
    quantity: u64,
    order: u64,
    at: jiff::Timestamp,
) -> UsageEvent {
    UsageEvent {
        project,
        key: UsageKey::Commit { incarnation: uuid::Uuid::nil(), rev: Rev(0), index: draft.outbox_index() },
        what: Usage::Allocated { of, meter: meter.to_owned(), quantity, order, at },
    }
}

/// The event of a counter's reading.
pub fn counted(project: Id<Project>, reading: Reading) -> UsageEvent {
    let key = UsageKey::Reading {
        of: reading.of.clone(),
        term: reading.term.0,
        life: reading.life,
        seq: reading.seq,
    };
    UsageEvent { project, key, what: Usage::Counted(reading) }
}

/// Delivers what waits, oldest first.
///
/// # Errors
/// Those of the store and of the meter; what was not delivered stays.
pub async fn deliver(
    committer: &Arc<Committer>,
    meter: &Arc<dyn MeterSink>,
    caller: &Caller,
) -> Result<Next> {
    loop {
        let (entries, _) = committer.store().scan(codec::OUTBOX.as_bytes(), None, 100).await?;
        if entries.is_empty() {
            return Ok(Next::Rest);
        }
        let mut batch = Vec::with_capacity(entries.len());
        for entry in &entries {
            let mut event: UsageEvent = codec::decode(&entry.value)?;
            if let UsageKey::Commit { incarnation, rev, .. } = &mut event.key {
                *incarnation = caller.incarnation;
                *rev = entry.rev;
            }
            batch.push(event);
        }
        meter.append(&batch).await?;
        let clear = |draft: &mut Draft<'_>| {
            entries.iter().for_each(|entry| draft.delete_raw(entry.key.clone()));
            Ok(())
        };
        committer.commit(SELF, clear).await?;
    }
}

/// Reads the counters of all hosts and sends them to the meter: cumulative, so a lost reading costs nothing.
///
/// # Errors
/// Those of the meter. A host that does not answer is skipped; its counters go on counting.
pub async fn read_counters(
    committer: &Arc<Committer>,
    sites: &Sites,
    meter: &Arc<dyn MeterSink>,
    caller: &Caller,
) -> Result<()> {
    for host in sites.hosts.values() {
        let mut after = None;
        loop {
            let page = match host.plugs.usage(&caller.own(), after.clone(), 256).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(host = %host.id, %error, "the host's counters could not be read");
                    break;
                }
            };
            let Some(last) = page.last() else { break };
            after = Some(last.of.clone());
            let owned = |r: &Reading| committer.read(|s| project_of(s, &r.of));
            let batch: Vec<_> = page.into_iter().filter_map(|r| Some(counted(owned(&r)?, r))).collect();
            meter.append(&batch).await?;
        }
    }
    Ok(())
}

/// Whose an object is: a port, or an attachment by whose id a plug goes.
fn project_of(state: &super::state::State, of: &ObjectRef) -> Option<Id<Project>> {
    let port = state.ports.get(&Id::from_uuid(of.id)).map(|p| p.meta.owner);
    let attachment = || state.attachments.get(&Id::from_uuid(of.id)).map(|a| a.meta.owner);
    port.or_else(attachment)?.project()
}
