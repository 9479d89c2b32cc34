//! An attachment: the way by which an instance's host opens a volume or plugs a port in.
//!
//! Up: volume or program first, then access or plug, then the device. Down: the same in reverse, each step after the one
//! before was seen gone.

use super::Next;
use super::SOON;
use super::Work;
use super::pace;
use uuid::Uuid;

use crate::Entity;
use crate::Error;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::engine::commit::SELF;
use crate::engine::draft::Draft;
use crate::engine::outbox::counted;
use crate::engine::state::State;
use crate::model::*;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Reading;
use crate::spi::block::AccessSpec;
use crate::spi::host::HostProviders;
use crate::spi::hypervisor::DeviceState;
use crate::spi::network::PlugSpec;
use crate::spi::target::Mode;

pub(super) async fn look(work: &Work, id: Id<Attachment>) -> Result<Next> {
    let Some(view) = work.committer.read(|state| View::of(state, id)) else { return Ok(Next::Rest) };
    let op = work.committer.read(|s| s.open_operations(&id.object()).first().map(|o| o.meta.id));
    let cx = work.caller.ctx(view.record.meta.absent.or(op).unwrap_or(Id::from_uuid(id.uuid())));
    let host = work.sites.host(view.host)?;
    if view.record.meta.absent.is_some() {
        return if view.device_gone { leave(work, &cx, host, &view).await } else { Ok(Next::Rest) };
    }
    let next = match view.record.spec.what {
        Attached::Volume { volume, read_only, .. } => open(work, &cx, host, &view, volume, read_only).await?,
        Attached::Port(port) => plug_in(work, &cx, host, &view, port).await?,
    };
    note(work, &view).await?;
    Ok(next)
}

/// What the state says of an attachment.
struct View {
    record: Record<Attachment>,
    host: Id<Host>,
    instance_effect: Rev,
    /// The device is not in the VM, or there is no VM.
    device_gone: bool,
    device: Option<DeviceState>,
    /// The VM follows the newest wish.
    applied: bool,
}

impl View {
    fn of(state: &State, id: Id<Attachment>) -> Option<Self> {
        let record = (**state.get(id)?).clone();
        let instance = state.get(record.spec.instance)?;
        let (host, _) = instance.bind.host?;
        let vm = instance.status.vms.get(&instance.bind.term.0);
        let device = vm.and_then(|vm| vm.is.devices.get(&id.uuid()).cloned());
        let applied = vm.is_some_and(|vm| vm.applied >= instance.meta.effect);
        // A VM that was never observed may exist all the same: only what was seen counts.
        let gone = if instance.meta.absent.is_some() {
            instance.status.gone
        } else {
            vm.is_some() && device.is_none() && applied
        };
        Some(Self { record, host, instance_effect: instance.meta.effect, device_gone: gone, device, applied })
    }
}

async fn open(
    work: &Work,
    cx: &Ctx,
    host: &HostProviders,
    view: &View,
    volume: Id<Volume>,
    read_only: bool,
) -> Result<Next> {
    let ready = work.committer.read(|s| {
        let record = s.get(volume)?;
        matches!(&record.status.seen, Some((_, Phase::Settled, _))).then_some(record.bind.pool).flatten()
    });
    let Some(pool) = ready else { return Ok(Next::Rest) };
    let access = host.access.get(&pool).ok_or_else(|| {
        Error::unavailable("the host does not reach the pool")
            .about(pool.object())
            .remedy("open the cloud with it")
    })?;
    let mode = if read_only { Mode::Read } else { Mode::Write };
    let spec = AccessSpec { pool, volume: volume.cast(), term: view.record.bind.term, mode };
    let (id, effect) = (view.record.meta.id, view.record.meta.effect);
    let observed = access.observe(cx, id.cast()).await?;
    let must = work.must_ensure(id.uuid(), effect, observed.as_ref());
    let seen = match observed.filter(|_| !must) {
        Some(seen) => seen,
        None => access.ensure(cx, id.cast(), effect, &spec).await?,
    };
    if let (Phase::Settled, Some(target)) = (&seen.phase, &seen.is.target) {
        work.remember(view.record.meta.id, target.clone());
    }
    Ok(pace(&seen.phase))
}

async fn plug_in(work: &Work, cx: &Ctx, host: &HostProviders, view: &View, port: Id<Port>) -> Result<Next> {
    let Some(port_effect) = work.committer.read(|s| s.get(port).map(|p| p.meta.effect)) else {
        return Ok(Next::Rest);
    };
    let spec = PlugSpec { port, term: view.record.bind.term, queues: 1 };
    let (id, effect) = (view.record.meta.id, view.record.meta.effect);
    let observed = host.plugs.observe(cx, id.cast()).await?;
    let must = work.must_ensure(id.uuid(), effect, observed.as_ref());
    let seen = match observed.filter(|_| !must) {
        Some(seen) => seen,
        None => host.plugs.ensure(cx, id.cast(), effect, &spec).await?,
    };
    // A port that the program does not know yet would drop the guest's first frames.
    if seen.is.program < port_effect {
        work.forget_asking(host.fabric.uuid());
        work.committer.wake(host.fabric.object());
        return Ok(Next::After(2 * SOON));
    }
    if let (Phase::Settled, Some(target)) = (&seen.phase, &seen.is.target) {
        work.remember(view.record.meta.id, target.clone());
    }
    note_port(work, port, &seen.is).await?;
    Ok(pace(&seen.phase))
}

async fn note_port(work: &Work, port: Id<Port>, is: &crate::spi::network::PlugObserved) -> Result<()> {
    let up = work.committer.read(|s| s.get(port).map(|p| p.status.up));
    if up.is_none_or(|up| up == is.peer_up) {
        return Ok(());
    }
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(port) else { return Ok(()) };
        record.status = PortStatus { program: is.program, up: is.peer_up };
        draft.keep(record)
    };
    work.committer.commit(SELF, draw).await.map(|_| ())
}

/// Keeps what the hypervisor says of the device, and ends the operation once it is there or will be at the next start.
async fn note(work: &Work, view: &View) -> Result<()> {
    let id = view.record.meta.id;
    let open = work.committer.read(|s| !s.open_operations(&id.object()).is_empty());
    let done = open && view.applied && matches!(view.device, None | Some(DeviceState::Present));
    if view.device == view.record.status.device && !done {
        return Ok(());
    }
    let draw = |draft: &mut Draft<'_>| {
        let Some(mut record) = draft.find(id) else { return Ok(()) };
        record.status.device = view.device.clone();
        draft.keep(record)?;
        if done { draft.end_operations(&id.object(), &OperationState::Done) } else { Ok(()) }
    };
    work.committer.commit(SELF, draw).await.map(|_| ())
}

async fn leave(work: &Work, cx: &Ctx, host: &HostProviders, view: &View) -> Result<Next> {
    let record = &view.record;
    let id = record.meta.id;
    let left = match record.spec.what {
        Attached::Volume { volume, .. } => {
            let pool = work.committer.read(|s| s.get(volume).and_then(|v| v.bind.pool));
            match pool.and_then(|pool| host.access.get(&pool)) {
                Some(access) => {
                    let seen = access.observe(cx, id.cast()).await?;
                    if seen.as_ref().is_some_and(|seen| work.must_remove(id.uuid(), seen)) {
                        let asked = access.remove(cx, id.cast(), record.meta.effect).await;
                        asked.inspect_err(|_| work.forget_asking(id.uuid()))?;
                    }
                    seen.is_some()
                }
                None => false,
            }
        }
        Attached::Port(port) => {
            let seen = host.plugs.observe(cx, id.cast()).await?;
            if let Some(seen) = seen.as_ref().filter(|seen| work.must_remove(id.uuid(), seen)) {
                // The last reading must be safe before the counters go.
                let mut readings = last_reading(cx, host, port).await?;
                readings.extend(seen.final_usage.iter().cloned());
                keep_readings(work, record, &readings).await?;
                let asked = host.plugs.remove(cx, id.cast(), record.meta.effect).await;
                asked.inspect_err(|_| work.forget_asking(id.uuid()))?;
            }
            seen.is_some()
        }
    };
    tracing::debug!(attachment = %id, left, effect = %view.instance_effect, "leaving");
    if left {
        return Ok(Next::After(SOON));
    }
    work.forget(id);
    let draw = |draft: &mut Draft<'_>| {
        draft.end_operations(&id.object(), &OperationState::Done)?;
        draft.delete(id);
        if record.bind.cascade
            && let Attached::Port(port) = record.spec.what
            && draft.find(port).is_some()
        {
            draft.delete(port);
        }
        Ok(())
    };
    work.committer.commit(SELF, draw).await.map(|_| Next::Rest)
}

/// What a port has counted until now.
async fn last_reading(cx: &Ctx, host: &HostProviders, port: Id<Port>) -> Result<Vec<Reading>> {
    // Pages come in the order of objects, after the one that is named.
    let before = ObjectRef {
        kind: Port::NAME.to_owned(),
        id: Uuid::from_u128(port.uuid().as_u128().saturating_sub(1)),
    };
    let page = host.plugs.usage(cx, Some(before), 1).await?;
    Ok(page.into_iter().filter(|reading| reading.of == port.object()).collect())
}

/// Sends the last readings of a port on their way to the meter.
async fn keep_readings(work: &Work, record: &Record<Attachment>, readings: &[Reading]) -> Result<()> {
    let Some(project) = record.meta.owner.project().filter(|_| !readings.is_empty()) else { return Ok(()) };
    let draw =
        |draft: &mut Draft<'_>| readings.iter().try_for_each(|r| draft.meter(&counted(project, r.clone())));
    work.committer.commit(SELF, draw).await.map(|_| ())
}
