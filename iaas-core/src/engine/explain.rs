//! Who waits for what. Pure.

use serde::Deserialize;
use serde::Serialize;

use super::state::State;
use super::state::attached_object;
use crate::Id;
use crate::ObjectRef;
use crate::model::*;
use crate::spi::Phase;

/// What stands between an object and what it wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// About what.
    pub object: ObjectRef,
    /// Its state in a word.
    pub state: String,
    /// What it waits for, nearest first.
    pub waits_for: Vec<String>,
    /// Why it does not converge, if so.
    pub trouble: Option<Trouble>,
    /// What was decided for it.
    pub decided: Vec<String>,
}

/// Explains an object; `None` if there is no such object.
pub fn explain(state: &State, object: &ObjectRef) -> Option<Explanation> {
    let brief = state.brief(object)?;
    let mut told = Explanation {
        object: object.clone(),
        state: if brief.absent.is_some() { "deleting" } else { "present" }.to_owned(),
        waits_for: Vec::new(),
        trouble: brief.trouble,
        decided: Vec::new(),
    };
    if let Some(record) = object.typed::<Instance>().and_then(|id| state.get(id)) {
        instance(state, record, &mut told);
    } else if let Some(record) = object.typed::<Attachment>().and_then(|id| state.get(id)) {
        attachment(state, record, &mut told);
    } else if let Some(record) = object.typed::<Volume>().and_then(|id| state.get(id)) {
        volume(state, record, &mut told);
    }
    Some(told)
}

fn instance(state: &State, record: &Record<Instance>, told: &mut Explanation) {
    told.state = format!("{:?}", record.state()).to_lowercase();
    if let Some((host, _)) = record.bind.host {
        told.decided.push(format!("placed on host {host} as placement {}", record.bind.term));
    }
    told.decided.push(format!("start number {}", record.bind.boot));
    let attachments = state.attachments_of(record.meta.id);
    if record.meta.absent.is_some() {
        let what = if record.status.gone { "its attachments to go" } else { "its virtual machine to go" };
        told.waits_for.push(what.to_owned());
        return;
    }
    match record.status.vms.get(&record.bind.term.0) {
        None => {
            for a in &attachments {
                told.waits_for.push(format!(
                    "attachment `{}` of {}",
                    a.meta.name,
                    attached_object(&a.spec.what)
                ));
            }
            told.waits_for.push("the hypervisor to accept it".to_owned());
        }
        Some(vm) => {
            told.waits_for.extend(phase(&vm.phase));
            told.waits_for.extend(vm.is.restart_for.iter().map(|part| format!("a restart, for {part}")));
            if vm.applied < record.meta.effect {
                told.waits_for.push(format!("revision {} to be applied", record.meta.effect));
            }
        }
    }
}

fn attachment(state: &State, record: &Record<Attachment>, told: &mut Explanation) {
    told.decided.push(format!("number {}", record.bind.term));
    if let Some(device) = &record.status.device {
        told.state = format!("{device:?}").to_lowercase();
    }
    if record.meta.absent.is_some() {
        told.waits_for.push("the guest to let go of the device".to_owned());
        return;
    }
    if let Attached::Volume { volume, .. } = record.spec.what {
        let ready = state.get(volume).is_some_and(|v| matches!(v.status.seen, Some((_, Phase::Settled, _))));
        if !ready {
            told.waits_for.push(volume.object().to_string());
        }
    }
    if record.status.device.is_none() {
        told.waits_for.push(record.spec.instance.object().to_string());
    }
}

fn volume(state: &State, record: &Record<Volume>, told: &mut Explanation) {
    if let Some(pool) = record.bind.pool {
        told.decided.push(format!("kept by pool {pool}"));
    }
    match &record.status.seen {
        None => told.waits_for.push("the pool to accept it".to_owned()),
        Some((_, phase_seen, _)) => told.waits_for.extend(phase(phase_seen)),
    }
    if record.meta.absent.is_some()
        && let Some(attachment) = state.attachment_to(&record.meta.id.object())
    {
        told.waits_for.push(format!("{} to go", Id::object(attachment.meta.id)));
    }
}

fn phase(phase: &Phase) -> Option<String> {
    match phase {
        Phase::Settled => None,
        Phase::Working { done, total: Some(total), .. } => Some(format!("work: {done} of {total}")),
        Phase::Working { done, total: None, .. } => Some(format!("work: {done} done")),
        Phase::Blocked(error) => Some(format!("something outside: {error}")),
        Phase::Broken(error) => Some(format!("a newer wish: {error}")),
        Phase::Leaving => Some("it to leave".to_owned()),
    }
}
