//! What is spoiled of one kind's specs and observations.

use std::any::Any;

use super::Spoil;
use super::Spoiled;
use crate::Boot;
use crate::Rev;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Seen;
use crate::spi::block::Access;
use crate::spi::block::PoolVolume;
use crate::spi::block::PoolVolumeSpec;
use crate::spi::hypervisor::End;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmSpec;
use crate::spi::network::Plug;
use crate::spi::target::Mode;
use crate::spi::target::Target;

/// Far above every boot number of a check.
const SECRET_BOOT: u64 = 1_000_000;

impl<P: ?Sized> Spoiled<P> {
    /// The spec that is really wanted.
    pub(super) fn respec<K: Kind>(&self, spec: &K::Spec, old: Option<&Seen<K>>) -> K::Spec {
        let mut spec = spec.clone();
        if let Some(vm) = (&mut spec as &mut dyn Any).downcast_mut::<VmSpec>() {
            let old = old.and_then(|old| (old as &dyn Any).downcast_ref::<Seen<Vm>>());
            self.respec_vm(vm, old);
        }
        spec
    }

    fn respec_vm(&self, spec: &mut VmSpec, old: Option<&Seen<Vm>>) {
        let ended = old.and_then(|old| match old.is.life {
            Life::Ended { boot, .. } => Some(boot),
            _ => None,
        });
        spec.run = match (self.spoil, spec.run) {
            (Spoil::IgnoresOff, Run::Off { .. }) => Run::On(Boot(1)),
            (Spoil::IgnoresReboot, Run::On(_)) => Run::On(Boot(1)),
            (Spoil::RestartsDead, Run::On(boot)) if ended == Some(boot) => {
                Run::On(Boot(boot.0 + SECRET_BOOT))
            }
            (_, run) => run,
        };
    }

    /// What is said of what is seen.
    pub(super) fn reseen<K: Kind>(&self, seen: &mut Seen<K>) {
        if self.is(Spoil::DropsFinal) {
            seen.final_usage.clear();
        }
        let phase = seen.phase.clone();
        if let Some(vm) = (seen as &mut dyn Any).downcast_mut::<Seen<Vm>>() {
            self.reseen_vm(vm);
        } else if let Some(access) = (seen as &mut dyn Any).downcast_mut::<Seen<Access>>() {
            self.retarget(&mut access.is.target);
            if self.is(Spoil::OpensNothing) && matches!(phase, Phase::Blocked(_)) {
                access.phase = Phase::Settled;
                access.is.target = Some(nowhere());
            }
        } else if let Some(plug) = (seen as &mut dyn Any).downcast_mut::<Seen<Plug>>() {
            self.retarget(&mut plug.is.target);
            if self.is(Spoil::KnowsStranger) {
                plug.is.program = plug.is.program.max(Rev(1));
            }
        }
    }

    fn reseen_vm(&self, seen: &mut Seen<Vm>) {
        match (self.spoil, &seen.is.life) {
            (Spoil::RestartsDead, Life::On(boot)) if boot.0 > SECRET_BOOT => {
                seen.is.life = Life::On(Boot(boot.0 - SECRET_BOOT));
            }
            (Spoil::HidesDeath, Life::Ended { boot, why: End::Crashed(_) }) => seen.is.life = Life::On(*boot),
            (Spoil::KeepsDevices, _) => {
                let mut notes = self.notes();
                notes.devices.extend(seen.is.devices.clone());
                seen.is.devices = notes.devices.clone();
            }
            _ => {}
        }
    }

    fn retarget(&self, target: &mut Option<Target>) {
        if let (Spoil::TermOff, Some(target)) = (self.spoil, target) {
            target.term = target.term.next();
        }
    }
}

/// Whether a volume is to become larger.
pub(super) fn grows<K: Kind>(old: &Seen<K>, spec: &K::Spec) -> bool {
    let old = (old as &dyn Any).downcast_ref::<Seen<PoolVolume>>();
    let new = (spec as &dyn Any).downcast_ref::<PoolVolumeSpec>();
    old.zip(new).is_some_and(|(old, new)| new.size > old.is.size)
}

fn nowhere() -> Target {
    Target { id: uuid::Uuid::nil(), term: crate::Term(1), mode: Mode::Read, forms: Vec::new(), key: None }
}
