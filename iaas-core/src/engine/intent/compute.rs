//! Instances: placed, charged, and given their devices in one commit; then started, stopped and rebooted by number.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Intent;
use super::Meant;
use super::attach::MOST_DEVICES;
use super::attach::join;
use super::create::charge;
use super::create::owner_present;
use super::fleet::check_cmdline;
use super::net::decide_port;
use super::net::same_owner;
use crate::Boot;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::Result;
use crate::Term;
use crate::engine::draft::Draft;
use crate::id::Pool;
use crate::model::tenancy::limit;
use crate::model::*;
use crate::security::actions::ConsoleInput;
use crate::security::actions::CreateInstance;
use crate::security::actions::Nic;
use crate::security::actions::Reboot;
use crate::security::actions::Start;
use crate::security::actions::Stop;
use crate::spi::hypervisor::Life;
use crate::spi::placement::Candidate;
use crate::spi::placement::Fleet;
use crate::spi::placement::PlaceRequest;

/// How long a guest may take to power off unless the request says otherwise.
const DEFAULT_GRACE: Duration = Duration::from_secs(20);

impl Intent for CreateInstance {
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<Instance>>> {
        let owner = Owner::Project(self.project);
        owner_present(draft, owner)?;
        if self.nics.len() > MOST_DEVICES || self.volumes.len() > MOST_DEVICES {
            return Err(Error::invalid(format!("more than {MOST_DEVICES} interfaces or disks"))
                .remedy("attach the others to the instance once it exists"));
        }
        check_cmdline(&self.spec.cmdline)?;
        let size = draft.present(self.spec.instance_type)?.spec;
        draft.depend(self.spec.instance_type);
        draft.present(self.spec.image)?;
        draft.depend(self.spec.image);
        for key in &self.spec.key_pairs {
            same_owner("key pair", draft.present(*key)?.meta.owner, owner)?;
        }
        let charge = charge(&[
            (limit::INSTANCES, 1),
            (limit::VCPUS, size.vcpus().into()),
            (limit::MEMORY, size.memory().0),
        ]);
        draft.check_quota(owner, &charge)?;
        let host = place(draft, self, &size)?;
        let install = draft.sites().installs.get(&host).copied().unwrap_or_default();
        let id: Id<Instance> = Id::from_uuid(draft.uuid());
        let on = self.spec.power == Power::On;
        let bind = InstanceBind {
            host: Some((host, install)),
            term: Term(1),
            boot: Boot(u64::from(on)),
            leaving: Vec::new(),
            grace: DEFAULT_GRACE,
            charge,
        };
        draft.depend(host);
        draft.create(id, owner, self.name.clone(), self.labels.clone(), self.spec.clone(), bind)?;
        let instance = draft.record(id)?;
        for (index, volume) in self.volumes.iter().enumerate() {
            let what = Attached::Volume { volume: *volume, boot: None, read_only: false };
            attach(draft, &instance, &format!("disk-{index}"), what, false)?;
        }
        for (index, nic) in self.nics.iter().enumerate() {
            let (port, made) = match nic {
                Nic::Port(port) => (*port, false),
                Nic::New(spec) => (new_port(draft, owner, id, index, spec)?, true),
            };
            attach(draft, &instance, &format!("nic-{index}"), Attached::Port(port), made)?;
        }
        draft.plan.steps = vec![
            "bring the kernel and initrd to the host".to_owned(),
            format!("open {} volumes, plug {} ports in", self.volumes.len(), self.nics.len()),
            "start the virtual machine".to_owned(),
        ];
        Ok(Meant { out: id, target: id.object(), open: true })
    }
}

fn attach(
    draft: &mut Draft<'_>,
    instance: &Record<Instance>,
    name: &str,
    what: Attached,
    cascade: bool,
) -> Result<()> {
    let term = join(draft, instance, &what)?;
    let id: Id<Attachment> = Id::from_uuid(draft.uuid());
    let name = device_name(instance.meta.id, name)?;
    let spec = AttachmentSpec { instance: instance.meta.id, what };
    draft.create(id, instance.meta.owner, name, Labels::default(), spec, AttachmentBind { term, cascade })
}

fn new_port(
    draft: &mut Draft<'_>,
    owner: Owner,
    of: Id<Instance>,
    index: usize,
    spec: &PortSpec,
) -> Result<Id<Port>> {
    let id: Id<Port> = Id::from_uuid(draft.uuid());
    let bind = decide_port(draft, id, owner, spec)?;
    let name = device_name(of, &format!("port-{index}"))?;
    draft.create(id, owner, name, Labels::default(), spec.clone(), bind)?;
    Ok(id)
}

/// Unique without knowing the other names: the instance's id is in it.
fn device_name(instance: Id<Instance>, what: &str) -> Result<Name> {
    Name::new(format!("{}-{what}", instance.uuid().simple()))
}

/// Chooses the host.
fn place(draft: &mut Draft<'_>, request: &CreateInstance, size: &InstanceTypeSpec) -> Result<Id<Host>> {
    let mut pools: BTreeSet<Id<Pool>> = BTreeSet::new();
    for volume in &request.volumes {
        pools.extend(draft.present(*volume)?.bind.pool);
    }
    let want = PlaceRequest { vcpus: size.vcpus(), memory: size.memory().0, zone: request.spec.zone, pools };
    let fleet = Fleet { hosts: draft.all::<Host>().iter().filter_map(|h| candidate(draft, h)).collect() };
    let placed = draft.placement().rank(&want, &fleet, 0);
    let refused = placed.refused.iter().map(|(host, why)| format!("not host {host}: {why}"));
    draft.plan.placement = placed.ranked.iter().map(|h| format!("host {h}")).take(1).chain(refused).collect();
    placed.ranked.first().copied().ok_or_else(|| {
        let mut error = Error::new(ErrorKind::NoCapacity, "no host has room for this instance")
            .remedy("choose a smaller instance type, or delete instances");
        for line in &draft.plan.placement {
            error = error.detail(line.clone());
        }
        error
    })
}

/// A host with what it has left; none whose providers this cloud does not have.
fn candidate(draft: &Draft<'_>, host: &Record<Host>) -> Option<Candidate> {
    let pools = draft.sites().reach.get(&host.meta.id)?.clone();
    let (cpus, memory) = draft.state().given(host.meta.id);
    Some(Candidate {
        id: host.meta.id,
        zone: host.spec.zone,
        cordoned: host.spec.cordoned || host.meta.absent.is_some(),
        free_vcpus: u32::try_from(u64::from(host.spec.vcpus).saturating_sub(cpus)).unwrap_or(0),
        free_memory: host.spec.memory.saturating_sub(memory),
        pools,
    })
}

/// Whether the wanted boot has ended, so that starting needs a new number.
fn ended(instance: &Record<Instance>) -> bool {
    let life = instance.status.vms.get(&instance.bind.term.0).map(|vm| &vm.is.life);
    matches!(life, Some(Life::Ended { boot, .. }) if *boot >= instance.bind.boot)
}

/// Sets the next boot on a record that shall run.
pub fn running(instance: &mut Record<Instance>) {
    instance.spec.power = Power::On;
    instance.bind.boot = instance.bind.boot.next();
}

impl Intent for Start {
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<Instance>>> {
        let mut instance = draft.present(self.id)?;
        if instance.spec.power == Power::Off || ended(&instance) {
            running(&mut instance);
            draft.change(instance)?;
        }
        Ok(Meant { out: self.id, target: self.id.object(), open: true })
    }
}

impl Intent for Stop {
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<Instance>>> {
        let mut instance = draft.present(self.id)?;
        instance.spec.power = Power::Off;
        instance.bind.grace = self.grace;
        draft.change(instance)?;
        Ok(Meant { out: self.id, target: self.id.object(), open: true })
    }
}

impl Intent for Reboot {
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<Instance>>> {
        let mut instance = draft.present(self.id)?;
        if instance.spec.power == Power::Off {
            return Err(Error::conflict("the instance is off").about(self.id.object()).remedy("start it"));
        }
        running(&mut instance);
        draft.change(instance)?;
        Ok(Meant { out: self.id, target: self.id.object(), open: true })
    }
}

impl Intent for ConsoleInput {
    // Nothing of the instance changes; what is wanted is the audited commit before the bytes flow.
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Id<Instance>>> {
        draft.present(self.id)?;
        draft.depend(self.id);
        Ok(Meant { out: self.id, target: self.id.object(), open: false })
    }
}
