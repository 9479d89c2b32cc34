//! The complete VM of an instance: resolved from records and targets. Pure.

use std::collections::BTreeMap;

use bytes::Bytes;
use uuid::Uuid;

use crate::Boot;
use crate::Digest;
use crate::Id;
use crate::Mac;
use crate::engine::state::State;
use crate::model::*;
use crate::spi::hypervisor::Device;
use crate::spi::hypervisor::Origin;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::VmSpec;
use crate::spi::target::Target;

/// What an instance is made of, as far as records say it.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) record: Record<Instance>,
    size: InstanceTypeSpec,
    image: ImageSpec,
    slots: Vec<Slot>,
}

/// A place for a device.
#[derive(Clone, Debug)]
struct Slot {
    attachment: Id<Attachment>,
    what: Attached,
    mac: Option<Mac>,
}

impl View {
    pub(super) fn of(state: &State, id: Id<Instance>) -> Option<Self> {
        let record = (**state.get(id)?).clone();
        let size = state.get(record.spec.instance_type)?.spec.clone();
        let image = state.get(record.spec.image)?.spec.clone();
        let present = |a: &std::sync::Arc<Record<Attachment>>| a.meta.absent.is_none();
        let slot = |a: &std::sync::Arc<Record<Attachment>>| Slot {
            attachment: a.meta.id,
            what: a.spec.what,
            mac: match a.spec.what {
                Attached::Port(port) => state.get(port).and_then(|p| p.bind.mac),
                Attached::Volume { .. } => None,
            },
        };
        let slots = state.attachments_of(id).iter().filter(|a| present(a)).map(slot).collect();
        Some(Self { record, size, image, slots })
    }

    pub(super) fn size(&self) -> &InstanceTypeSpec {
        &self.size
    }

    /// The kernel and initrd that the host must have.
    pub(super) fn artifacts(&self) -> Vec<Digest> {
        let ImageSpec::Kernel { kernel, initrd, .. } = &self.image;
        std::iter::once(*kernel).chain(*initrd).collect()
    }

    /// The attachments without a target: the VM waits for them.
    pub(super) fn missing(&self, target: impl Fn(Id<Attachment>) -> Option<Target>) -> Vec<Id<Attachment>> {
        self.slots.iter().map(|s| s.attachment).filter(|id| target(*id).is_none()).collect()
    }

    /// The VM, with those devices that can be opened.
    pub(super) fn spec(
        &self,
        run: Run,
        passport: Bytes,
        target: impl Fn(Id<Attachment>) -> Option<Target>,
    ) -> VmSpec {
        let ImageSpec::Kernel { kernel, initrd, cmdline } = &self.image;
        let cmdline = format!("{cmdline} {}", self.record.spec.cmdline).trim().to_owned();
        let devices: BTreeMap<Uuid, Device> = self
            .slots
            .iter()
            .filter_map(|s| Some((s.attachment.uuid(), s.device(target(s.attachment)?))))
            .collect();
        VmSpec {
            term: self.record.bind.term,
            run,
            vcpus: self.size.vcpus(),
            memory: self.size.memory().0,
            origin: Origin::Kernel { kernel: *kernel, initrd: *initrd, cmdline },
            devices,
            lease: None,
            metadata: None,
            passport,
        }
    }

    /// Whether the VM shall run, by the record.
    pub(super) fn run(&self) -> Run {
        match self.record.spec.power {
            Power::On => Run::On(self.record.bind.boot),
            Power::Off => Run::Off { grace: self.record.bind.grace },
        }
    }

    /// The start that is wanted.
    pub(super) fn boot(&self) -> Boot {
        self.record.bind.boot
    }
}

impl Slot {
    fn device(&self, target: Target) -> Device {
        match self.what {
            Attached::Volume { boot, .. } => Device::Disk { target, boot },
            Attached::Port(_) => Device::Nic { target, mac: self.mac.unwrap_or(Mac([2, 0, 0, 0, 0, 0])) },
        }
    }
}
