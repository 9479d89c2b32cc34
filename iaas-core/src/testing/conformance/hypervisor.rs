//! The contract of [`Hypervisor`].

use std::time::Duration;

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::Patience;
use super::calls::fresh;
use super::calls::id;
use super::calls::ours;
use super::calls::put;
use super::calls::reopen;
use super::calls::until;
use super::converge;
use super::demand;
use super::provider;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use crate::Boot;
use crate::Entity;
use crate::Id;
use crate::Rev;
use crate::spi::ByteStream;
use crate::spi::Phase;
use crate::spi::Seen;
use crate::spi::hypervisor::Device;
use crate::spi::hypervisor::DeviceState;
use crate::spi::hypervisor::End;
use crate::spi::hypervisor::Handover;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmImage;
use crate::spi::hypervisor::VmSpec;
use crate::spi::hypervisor::cap;

/// A hypervisor under test. [`ConvergeRig::spec`] gives VMs that are to run, as boot 1.
#[async_trait]
pub trait HypervisorRig: ConvergeRig<Vm> + Rig<Provider = dyn Hypervisor> {
    /// Lets the guest print a line; says whether that is possible.
    async fn guest_prints(&self, _vm: Id<Vm>, _line: &str) -> bool {
        false
    }

    /// Makes the guest ignore its power button; says whether that is possible.
    async fn guest_ignores_button(&self, _vm: Id<Vm>) -> bool {
        false
    }

    /// Kills the process or thread that is the VM, from outside; says whether that is possible.
    async fn kill(&self, vm: Id<Vm>) -> bool;

    /// A device that can be attached to a running VM, if any can.
    async fn device(&self) -> Option<Device> {
        None
    }
}

#[async_trait]
impl<R: HypervisorRig, W: Wrap<dyn Hypervisor>> HypervisorRig for Wrapped<R, W> {
    async fn guest_prints(&self, vm: Id<Vm>, line: &str) -> bool {
        self.inner.guest_prints(vm, line).await
    }
    async fn guest_ignores_button(&self, vm: Id<Vm>) -> bool {
        self.inner.guest_ignores_button(vm).await
    }
    async fn kill(&self, vm: Id<Vm>) -> bool {
        self.inner.kill(vm).await
    }
    async fn device(&self) -> Option<Device> {
        self.inner.device().await
    }
}

/// The checks, in the order of the contracts.
pub fn suite() -> Vec<Check<dyn HypervisorRig>> {
    let mut all = converge::checks::<Vm, dyn HypervisorRig>();
    all.extend(provider::usage_checks::<Vm, dyn HypervisorRig>());
    all.extend([
        Check::<dyn HypervisorRig> {
            clause: "boot-at-most-once",
            run: |rig| Box::pin(boot_at_most_once(rig)),
        },
        Check { clause: "off-stops", run: |rig| Box::pin(off_stops(rig)) },
        Check { clause: "reboot-by-number", run: |rig| Box::pin(reboot_by_number(rig)) },
        Check { clause: "console-scrollback", run: |rig| Box::pin(console_scrollback(rig)) },
        Check { clause: "death-observed", run: |rig| Box::pin(death_observed(rig)) },
        Check { clause: "devices-by-attachment", run: |rig| Box::pin(devices_by_attachment(rig)) },
        Check { clause: "kinds-agree", run: |rig| Box::pin(kinds_agree(rig)) },
        Check { clause: "final-usage-kept", run: |rig| Box::pin(final_usage_kept(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl HypervisorRig) -> Report {
    super::run::<dyn HypervisorRig>("hypervisor", &suite(), rig).await
}

type Rigged<'a> = &'a dyn HypervisorRig;

/// A VM that runs.
async fn running(rig: Rigged<'_>, vms: &dyn Hypervisor) -> Result<(Id<Vm>, VmSpec), String> {
    let (id, mut spec) = (id(), rig.spec(1));
    spec.run = Run::On(Boot(1));
    let seen = put(rig, vms, &ours(1), id, Rev(1), &spec).await?;
    demand!(seen.is.life == Life::On(Boot(1)), "settled as boot 1, but it is {:?}", seen.is.life);
    Ok((id, spec))
}

async fn boot_at_most_once(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let (id, spec) = running(rig, &*vms).await?;
    demand!(rig.kill(id).await, "this rig cannot kill a VM, so nothing was shown");
    until(rig, &*vms, &ours(1), id, "end", ended).await?;
    // A repair of the same boot, also after a restart, starts nothing.
    put(rig, &*vms, &ours(1), id, Rev(1), &spec).await?;
    let vms = reopen(rig, vms).await?;
    let seen = put(rig, &*vms, &ours(1), id, Rev(2), &spec).await?;
    demand!(ended(&seen), "boot 1 had ended and is now {:?}", seen.is.life);
    Ok(())
}

fn ended(seen: &Seen<Vm>) -> bool {
    matches!(seen.is.life, Life::Ended { .. })
}

async fn off_stops(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    for deaf in [false, true] {
        let (id, mut spec) = running(rig, &*vms).await?;
        if deaf && !rig.guest_ignores_button(id).await {
            return Ok(());
        }
        spec.run = Run::Off { grace: if deaf { Duration::from_millis(50) } else { rig.patience() } };
        should("ensure off", vms.ensure(&ours(1), id, Rev(2), &spec).await)?;
        let seen = until(rig, &*vms, &ours(1), id, "stop", ended).await?;
        let forced = matches!(seen.is.life, Life::Ended { why: End::Forced, .. });
        demand!(!deaf || forced, "a guest that ignored its power button ended as {:?}", seen.is.life);
    }
    Ok(())
}

async fn reboot_by_number(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let (id, mut spec) = running(rig, &*vms).await?;
    spec.run = Run::On(Boot(2));
    put(rig, &*vms, &ours(1), id, Rev(2), &spec).await?;
    until(rig, &*vms, &ours(1), id, "run as boot 2", |seen| seen.is.life == Life::On(Boot(2))).await?;
    Ok(())
}

async fn console_scrollback(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let (id, _) = running(rig, &*vms).await?;
    rig.guest_prints(id, "first line\n").await;
    let patience = rig.patience();
    let mut console = should("a console", vms.console(&ours(1), id, 0).await)?;
    let text = read(&mut *console, 8, patience).await?;
    let skip = 3;
    let mut later = should("a console at an offset", vms.console(&ours(1), id, 3).await)?;
    let rest = read(&mut *later, text.len() - skip, patience).await?;
    let same = rest.iter().zip(text.iter().skip(skip)).all(|(a, b)| a == b);
    demand!(same, "from offset {skip} on it reads {:?}, not {:?}", lossy(&rest), lossy(&text[skip..]));
    if rig.guest_prints(id, "a later line\n").await {
        let mut all = text.clone();
        while !lossy(&all).contains("a later line\n") {
            all.extend(read(&mut *console, 1, patience).await?);
        }
    }
    Ok(())
}

/// At least `want` bytes of a console.
async fn read(console: &mut dyn ByteStream, want: usize, within: Duration) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    while text.len() < want {
        let next = tokio::time::timeout(within, console.read()).await;
        let next = next.map_err(|_| format!("the console gave {} bytes of {want}", text.len()))?;
        let bytes = should("reading the console", next)?;
        text.extend(bytes.ok_or_else(|| format!("the console ended after {} bytes", text.len()))?);
    }
    Ok(text)
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

async fn death_observed(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let (id, _) = running(rig, &*vms).await?;
    demand!(rig.kill(id).await, "this rig cannot kill a VM, so nothing was shown");
    let crashed = |seen: &Seen<Vm>| matches!(seen.is.life, Life::Ended { why: End::Crashed(_), .. });
    let patience = Patience::new(rig.patience());
    loop {
        let seen = tokio::time::timeout(rig.patience(), vms.observe(&ours(1), id)).await;
        let seen = should("observe", seen.map_err(|_| "observe of a dead VM hangs".to_owned())?)?;
        let seen = seen.ok_or("a dead VM is not there any more")?;
        if crashed(&seen) {
            return Ok(());
        }
        patience.wait(|| format!("a VM whose VMM was killed is seen as {:?}", seen.is.life)).await?;
    }
}

async fn devices_by_attachment(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let hot = should("hello", vms.hello().await)?.caps.contains(cap::HOTPLUG);
    let (id, mut spec) = running(rig, &*vms).await?;
    let Some(device) = rig.device().await else { return Ok(()) };
    let attachment = uuid::Uuid::now_v7();
    spec.devices.insert(attachment, device);
    put(rig, &*vms, &ours(1), id, Rev(2), &spec).await?;
    if !hot {
        reboot_for(rig, &*vms, (id, Rev(3)), &mut spec, attachment).await?;
    }
    let present = |seen: &Seen<Vm>| seen.is.devices.get(&attachment) == Some(&DeviceState::Present);
    until(rig, &*vms, &ours(1), id, "have its device", present).await?;
    spec.devices.clear();
    put(rig, &*vms, &ours(1), id, Rev(4), &spec).await?;
    if !hot {
        reboot_for(rig, &*vms, (id, Rev(5)), &mut spec, attachment).await?;
    }
    until(rig, &*vms, &ours(1), id, "let its device go", |seen| seen.is.devices.is_empty()).await?;
    Ok(())
}

/// Boots a VM that cannot take or give a device as it runs, and says so.
async fn reboot_for(
    rig: Rigged<'_>,
    vms: &dyn Hypervisor,
    (id, rev): (Id<Vm>, Rev),
    spec: &mut VmSpec,
    attachment: uuid::Uuid,
) -> Verdict {
    let named =
        |seen: &Seen<Vm>| seen.is.restart_for.iter().any(|part| part.contains(&attachment.to_string()));
    until(rig, vms, &ours(1), id, "name the device that waits for a restart", named).await?;
    let (Run::On(boot) | Run::Paused(boot)) = spec.run else { return Ok(()) };
    spec.run = Run::On(Boot(boot.0 + 1));
    let want = Life::On(Boot(boot.0 + 1));
    put(rig, vms, &ours(1), id, rev, spec).await?;
    until(rig, vms, &ours(1), id, "run again", |seen| seen.is.life == want).await?;
    Ok(())
}

async fn kinds_agree(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let kinds = should("hello", vms.hello().await)?.kinds;
    demand!(kinds.contains(Vm::NAME), "hello does not name the kind {}", Vm::NAME);
    let says = [kinds.contains(VmImage::NAME), kinds.contains(Handover::NAME)];
    let has = [vms.images().is_some(), vms.handovers().is_some()];
    demand!(says == has, "hello says {says:?} of images and handovers, and there are {has:?}");
    Ok(())
}

async fn final_usage_kept(rig: Rigged<'_>) -> Verdict {
    let vms = fresh(rig).await?;
    let (id, mut spec) = running(rig, &*vms).await?;
    spec.run = Run::Off { grace: Duration::ZERO };
    should("ensure off", vms.ensure(&ours(1), id, Rev(2), &spec).await)?;
    until(rig, &*vms, &ours(1), id, "stop", |seen| ended(seen) && seen.phase == Phase::Settled).await?;
    let vms = reopen(rig, vms).await?;
    let seen = until(rig, &*vms, &ours(1), id, "stay", |_| true).await?;
    let last: Vec<_> = seen.final_usage.iter().filter(|r| r.fin && r.of == id.object()).collect();
    demand!(last.len() == 1, "one life has ended and there are {} last readings", last.len());
    demand!(last.iter().all(|r| !r.totals.is_empty()), "the last reading is empty");
    Ok(())
}
