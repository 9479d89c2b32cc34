//! An instance: one VM on the host that was chosen, with what is attached, in the wanted boot.

use std::time::Duration;

use super::Next;
use super::RESYNC;
use super::SOON;
use super::Work;
use super::hopeless;
use super::pace;
use super::same_phase;
use super::vm_spec::View;
use super::volume::passport;
use crate::Digest;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::engine::commit::SELF;
use crate::engine::draft::Draft;
use crate::engine::intent::running;
use crate::engine::outbox::allocated;
use crate::engine::outbox::counted;
use crate::engine::sites::artifact_id;
use crate::model::compute::VmStatus;
use crate::model::*;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Seen;
use crate::spi::host::HostProviders;
use crate::spi::hypervisor::End;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::Vm;

pub(super) async fn look(work: &Work, id: Id<Instance>) -> Result<Next> {
    let Some(view) = work.committer.read(|state| View::of(state, id)) else { return Ok(Next::Rest) };
    let Some((host, _)) = view.record.bind.host else {
        return Err(Error::internal("an instance without a host").about(id.object()));
    };
    let host = work.sites.host(host)?;
    let op = work.committer.read(|s| s.open_operations(&id.object()).first().map(|o| o.meta.id));
    let cx = work.caller.ctx(view.record.meta.absent.or(op).unwrap_or(Id::from_uuid(id.uuid())));
    if view.record.meta.absent.is_some() {
        return leave(work, &cx, host, &view).await;
    }
    let observed = host.hypervisor.observe(&cx, id.cast()).await?;
    // What ended by itself is not broken: nothing to repair until a new boot is wanted.
    let over = observed.as_ref().is_some_and(|seen| over(&view, seen));
    let must = !over && work.must_ensure(id.uuid(), view.record.meta.effect, observed.as_ref());
    let seen = match observed.filter(|_| !must) {
        Some(seen) => seen,
        None => match bring_up(work, &cx, host, &view).await? {
            Some(seen) => seen,
            None => return Ok(Next::Rest),
        },
    };
    note(work, &view, &seen).await?;
    follow(work, &view, &seen).await
}

/// Whether the boot that is wanted was had, and has ended.
fn over(view: &View, seen: &Seen<Vm>) -> bool {
    seen.applied >= view.record.meta.effect
        && matches!(seen.phase, Phase::Broken(_))
        && matches!(seen.is.life, Life::Ended { boot, .. } if boot == view.boot())
}

/// Brings what the VM needs to the host, then the VM. `None`: something else must come first and will wake us.
async fn bring_up(work: &Work, cx: &Ctx, host: &HostProviders, view: &View) -> Result<Option<Seen<Vm>>> {
    let id = view.record.meta.id;
    for digest in view.artifacts() {
        match bring_artifact(work, cx, host, view, digest).await {
            Err(error) if hopeless(&error) && never_ran(view) => return give_up(work, id, error).await,
            other => other?,
        }
    }
    if !view.missing(|a| work.target(a)).is_empty() {
        return Ok(None);
    }
    let spec = view.spec(view.run(), passport(&view.record)?, |a| work.target(a));
    match host.hypervisor.ensure(cx, id.cast(), view.record.meta.effect, &spec).await {
        Err(error) if hopeless(&error) && never_ran(view) => give_up(work, id, error).await,
        Err(error) => Err(error),
        Ok(seen) => match &seen.phase {
            Phase::Broken(error) if hopeless(error) && never_ran(view) && !lived(&seen) => {
                give_up(work, id, error.clone()).await
            }
            _ => Ok(Some(seen)),
        },
    }
}

fn lived(seen: &Seen<Vm>) -> bool {
    matches!(seen.is.life, Life::On(_) | Life::Paused(_))
}

fn never_ran(view: &View) -> bool {
    view.record.status.vms.values().all(|vm| matches!(vm.is.life, Life::Never | Life::Booting(_)))
        && view.boot().0 <= 1
}

async fn bring_artifact(
    work: &Work,
    cx: &Ctx,
    host: &HostProviders,
    view: &View,
    digest: Digest,
) -> Result<()> {
    let id = artifact_id(digest);
    let rev = view.record.meta.effect;
    let there = |seen: &Option<Seen<crate::spi::artifact::Artifact>>| {
        seen.as_ref().is_some_and(|seen| seen.phase == Phase::Settled)
    };
    let seen = host.artifacts.observe(cx, id).await?;
    if there(&seen) {
        return Ok(());
    }
    let rev = seen.map_or(rev, |seen| seen.applied.max(rev));
    if host.artifacts.ensure(cx, id, rev, &digest).await?.phase == Phase::Settled {
        return Ok(());
    }
    let mut bytes = work.blobs.open(digest).await.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::invalid("the image's kernel or initrd is not in this cloud")
            .remedy("import the image again")
            .detail(error.to_string()),
        _ => error,
    })?;
    let mut upload = host.artifacts.upload(cx, id).await?;
    while let Some(piece) = bytes.next().await {
        upload.write(piece?).await?;
    }
    upload.close().await
}

/// The create cannot succeed: what it made goes the way that everything goes.
async fn give_up(work: &Work, id: Id<Instance>, error: Error) -> Result<Option<Seen<Vm>>> {
    let draw = |draft: &mut Draft<'_>| {
        let mut record = draft.record(id)?;
        let op = draft.operation();
        record.meta.absent = Some(op);
        draft.change(record)?;
        for attachment in draft.state().attachments_of(id) {
            let mut attachment = (*attachment).clone();
            attachment.meta.absent = attachment.meta.absent.or(Some(op));
            draft.change(attachment)?;
        }
        draft.end_operations(&id.object(), &OperationState::Failed(error))
    };
    work.committer.commit(SELF, draw).await.map(|_| None)
}

/// Keeps what was seen, and bills what began or ended.
async fn note(work: &Work, view: &View, seen: &Seen<Vm>) -> Result<()> {
    let id = view.record.meta.id;
    let term = view.record.bind.term.0;
    let status = VmStatus { applied: seen.applied, phase: seen.phase.clone(), is: seen.is.clone() };
    let old = view.record.status.vms.get(&term);
    let same = old.is_some_and(|old| {
        old.applied == status.applied && old.is == status.is && same_phase(&old.phase, &status.phase)
    });
    let reached = reached(view, seen);
    let open = reached && work.committer.read(|s| !s.open_operations(&id.object()).is_empty());
    if same && !open && view.record.meta.trouble.is_none() {
        return Ok(());
    }
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(id).filter(|r| r.meta.effect == view.record.meta.effect) else {
            return Ok(());
        };
        bill(draft, view, &record, seen)?;
        record.status.vms.insert(term, status.clone());
        record.meta.trouble = None;
        draft.keep(record)?;
        if reached { draft.end_operations(&id.object(), &OperationState::Done) } else { Ok(()) }
    };
    work.committer.commit(SELF, draw).await.map(|_| ())
}

/// Whether the newest wish is fulfilled.
fn reached(view: &View, seen: &Seen<Vm>) -> bool {
    let ran = |boot| boot == view.boot();
    seen.applied >= view.record.meta.effect
        && match (view.record.spec.power, &seen.is.life) {
            (Power::On, Life::On(boot)) => ran(*boot),
            // It ran and ended by itself: what was asked for has happened.
            (Power::On, Life::Ended { boot, why: End::GuestOff | End::Stopped | End::Forced }) => ran(*boot),
            (Power::Off, Life::Never | Life::Ended { .. }) => true,
            _ => false,
        }
}

/// Usage begins and ends at the moments that the host stamped, not when we looked.
fn bill(draft: &mut Draft<'_>, view: &View, record: &Record<Instance>, seen: &Seen<Vm>) -> Result<()> {
    let Some(project) = record.meta.owner.project() else { return Ok(()) };
    let was = record.status.vms.get(&record.bind.term.0).and_then(|vm| metered(&vm.is.life));
    let now = metered(&seen.is.life);
    if was != now {
        let at = seen.is.changed.unwrap_or(seen.at).wall;
        let (amount, order) = match (now, was) {
            (Some(boot), _) => (1, 2 * boot),
            (None, Some(boot)) => (0, 2 * boot + 1),
            (None, None) => return Ok(()),
        };
        let id = record.meta.id.object();
        let vcpus = amount * u64::from(view.size().vcpus());
        let memory = amount * view.size().memory().0;
        let event = allocated(draft, project, id.clone(), "vcpu", vcpus, order, at);
        draft.meter(&event)?;
        let event = allocated(draft, project, id, "memory-bytes", memory, order, at);
        draft.meter(&event)?;
    }
    seen.final_usage.iter().try_for_each(|reading| draft.meter(&counted(project, reading.clone())))
}

/// The boot that is being paid for.
fn metered(life: &Life) -> Option<u64> {
    match life {
        Life::On(boot) | Life::Paused(boot) => Some(boot.0),
        Life::Never | Life::Booting(_) | Life::Ended { .. } => None,
    }
}

/// What follows from what was seen: a boot that ended without our wish starts anew.
async fn follow(work: &Work, view: &View, seen: &Seen<Vm>) -> Result<Next> {
    let Life::Ended { boot, why } = &seen.is.life else { return Ok(pace(&seen.phase)) };
    let again = matches!(why, End::GuestReset | End::Crashed(_));
    if view.record.spec.power != Power::On || *boot != view.boot() || !again {
        return Ok(Next::Check(RESYNC));
    }
    let since = seen.is.changed.unwrap_or(seen.at).wall.duration_until(work.committer.clock().now());
    let wait = restart_delay(boot.0).saturating_sub(Duration::try_from(since).unwrap_or_default());
    if !wait.is_zero() {
        return Ok(Next::After(wait));
    }
    let id = view.record.meta.id;
    let why = format!("{why:?}");
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(id).filter(|r| r.bind.boot == *boot && r.spec.power == Power::On)
        else {
            return Ok(());
        };
        running(&mut record);
        draft.change(record)?;
        draft.operate("instance.restart", id.object(), true)?;
        draft.audit("instance.restart", &id.object(), why.clone().into())
    };
    work.committer.commit(SELF, draw).await.map(|_| Next::After(SOON))
}

/// A guest that crashes at once is started less and less often: 0.1 s to about a minute.
fn restart_delay(boots: u64) -> Duration {
    Duration::from_millis(100) * (1u32 << boots.saturating_sub(1).min(9))
}

/// Off, then the last readings, then removal, then the attachments, then the record: each after the one before was seen.
async fn leave(work: &Work, cx: &Ctx, host: &HostProviders, view: &View) -> Result<Next> {
    let id = view.record.meta.id;
    let Some(seen) = host.hypervisor.observe(cx, id.cast()).await? else { return gone(work, view).await };
    let over = matches!(seen.is.life, Life::Never | Life::Ended { .. });
    if over || matches!(seen.phase, Phase::Leaving) {
        if work.must_remove(id.uuid(), &seen) {
            note_end(work, view, &seen).await?;
            let upto = view.record.meta.effect.max(seen.applied);
            let asked = host.hypervisor.remove(cx, id.cast(), upto).await;
            asked.inspect_err(|_| work.forget_asking(id.uuid()))?;
        }
        return Ok(Next::After(SOON));
    }
    if seen.applied < view.record.meta.effect {
        let run = Run::Off { grace: view.record.bind.grace.min(LEAVING_GRACE) };
        let spec = view.spec(run, passport(&view.record)?, |a| work.target(a));
        host.hypervisor.ensure(cx, id.cast(), view.record.meta.effect, &spec).await?;
    }
    Ok(Next::After(2 * SOON))
}

/// The last usage is safe before the VM's counters go.
async fn note_end(work: &Work, view: &View, seen: &Seen<Vm>) -> Result<()> {
    let id = view.record.meta.id;
    let term = view.record.bind.term.0;
    let known = view.record.status.vms.get(&term).is_some_and(|vm| vm.is.life == seen.is.life);
    if known && seen.final_usage.is_empty() {
        return Ok(());
    }
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(id) else { return Ok(()) };
        // Also where the end is known: readings that are sent again count once, and those that never were must not be lost.
        bill(draft, view, &record, seen)?;
        let status = VmStatus { applied: seen.applied, phase: seen.phase.clone(), is: seen.is.clone() };
        record.status.vms.insert(term, status);
        draft.keep(record)
    };
    work.committer.commit(SELF, draw).await.map(|_| ())
}

/// The VM is gone; the record follows once its attachments are.
async fn gone(work: &Work, view: &View) -> Result<Next> {
    let id = view.record.meta.id;
    work.forget_asking(id.uuid());
    let attached = work.committer.read(|s| s.attachments_of(id).len());
    if attached > 0 && view.record.status.gone {
        return Ok(Next::Rest);
    }
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(id) else { return Ok(()) };
        let lost = Seen::<Vm> {
            applied: record.meta.effect,
            phase: Phase::Leaving,
            at: stamp(draft.now()),
            is: crate::spi::hypervisor::VmObserved {
                life: Life::Never,
                changed: None,
                right: crate::spi::hypervisor::Right::Refused(record.bind.term),
                devices: std::collections::BTreeMap::default(),
                accepts: Vec::new(),
                restart_for: Vec::new(),
            },
            final_usage: Vec::new(),
        };
        // If it vanished while it was being paid for, payment ends now: the host can no longer say when.
        bill(draft, view, &record, &lost)?;
        if attached == 0 {
            draft.end_operations(&id.object(), &OperationState::Done)?;
            draft.delete(id);
            return Ok(());
        }
        record.status.vms.clear();
        record.status.gone = true;
        draft.keep(record)
    };
    work.committer.commit(SELF, draw).await.map(|_| Next::Rest)
}

fn stamp(wall: jiff::Timestamp) -> crate::spi::Stamp {
    crate::spi::Stamp { wall, boot_id: uuid::Uuid::nil(), mono_ns: 0 }
}

/// How long a guest that is being deleted may take to power off.
const LEAVING_GRACE: Duration = Duration::from_secs(5);
