//! The fake hypervisor: VMs that boot, print, use time and end, without a guest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::artifacts;
use super::console::Console;
use super::console::Reader;
use super::opener::FakeOpener;
use super::site::FakeKind;
use super::site::FakeSite;
use super::site::Look;
use super::site::Place;
use super::world::World;
use crate::Boot;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::model::Host;
use crate::spi::ByteStream;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::Phase;
use crate::spi::Reading;
use crate::spi::Site;
use crate::spi::Stamp;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::BlockOpener;
use crate::spi::dataplane::Env;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::PortOpener;
use crate::spi::hypervisor::Device;
use crate::spi::hypervisor::DeviceState;
use crate::spi::hypervisor::End;
use crate::spi::hypervisor::Handover;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::Origin;
use crate::spi::hypervisor::Right;
use crate::spi::hypervisor::Run;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmImage;
use crate::spi::hypervisor::VmObserved;
use crate::spi::hypervisor::VmSpec;
use crate::spi::hypervisor::cap;
use crate::spi::target::Target;

/// The largest passport, in bytes.
pub(super) const MAX_PASSPORT: usize = 16 << 10;
/// The longest kernel command line, in bytes.
const MAX_CMDLINE: usize = 2047;
/// When to look again at a VM that is on its way.
const POLL: Duration = Duration::from_millis(10);

/// A hypervisor whose VMs exist only in a [`World`].
///
/// A guest prints its kernel's name and `GUEST-READY` when it has booted, which takes the world's settling time.
pub type FakeHypervisor = FakeSite<Vm>;

impl FakeSite<Vm> {
    /// Opens the hypervisor of `host`, which may have VMs from before.
    pub fn open(world: &World, host: Id<Host>) -> Self {
        Self::stand(world, Site::Host(host), "hypervisor", None, &[cap::HOTPLUG, cap::PAUSE, cap::ADOPT])
    }

    /// Lets the guest of `vm` print.
    pub fn guest_prints(&self, vm: Id<Vm>, text: &str) {
        self.touch(vm, |_, _, body| body.console.print(text.as_bytes()));
    }

    /// Lets the guest of `vm` power off.
    pub fn guest_powers_off(&self, vm: Id<Vm>) {
        self.touch(vm, |place, spec, body| body.end(place, vm, spec, End::GuestOff));
    }

    /// Makes the guest of `vm` ignore its power button.
    pub fn guest_ignores_button(&self, vm: Id<Vm>) {
        self.touch(vm, |_, _, body| body.deaf = true);
    }

    /// Kills the VMM of `vm`.
    pub fn kill(&self, vm: Id<Vm>) {
        let why = End::Crashed(Error::internal("the VMM was killed"));
        self.touch(vm, |place, spec, body| body.end(place, vm, spec, why));
    }

    /// How often `vm` was started.
    pub fn starts(&self, vm: Id<Vm>) -> u64 {
        self.touch(vm, |_, _, body| body.starts).unwrap_or(0)
    }
}

/// A VM in the world.
#[derive(Debug)]
pub struct VmBody {
    life: Life,
    changed: Option<Stamp>,
    wish: Run,
    starts: u64,
    deaf: bool,
    /// The world's time at which a boot is over, or force is used.
    due: Duration,
    meter: Meter,
    ended: Vec<Reading>,
    console: Arc<Console>,
    open: BTreeMap<Uuid, Opened>,
}

#[derive(Debug)]
enum Opened {
    Disk(Target, #[expect(dead_code, reason = "held open like a guest's")] Box<dyn BlockDevice>),
    Nic(Target, #[expect(dead_code, reason = "held open like a guest's")] Vec<Box<dyn FramePort>>),
    Failed(Error),
}

/// Cumulative use of one life.
#[derive(Debug, Default)]
struct Meter {
    seq: u64,
    /// Since when it runs.
    since: Option<Duration>,
    ran: Duration,
}

impl Default for VmBody {
    fn default() -> Self {
        Self {
            life: Life::Never,
            changed: None,
            wish: Run::Off { grace: Duration::ZERO },
            starts: 0,
            deaf: false,
            due: Duration::ZERO,
            meter: Meter::default(),
            ended: Vec::new(),
            console: Arc::default(),
            open: BTreeMap::new(),
        }
    }
}

impl FakeKind for Vm {
    type Body = VmBody;

    fn check(place: &Place, old: Option<&VmSpec>, spec: &VmSpec) -> Result<()> {
        check_numbers(spec)?;
        if spec.lease.is_some() {
            return Err(Error::unsupported("this hypervisor keeps no leases").remedy("leave `lease` out"));
        }
        if old.is_some_and(|old| boot_of(spec.run) < boot_of(old.run) && boot_of(spec.run).is_some()) {
            return Err(Error::conflict("a boot number below the last one").remedy("use a higher number"));
        }
        check_origin(place, &spec.origin)
    }

    fn apply(place: &Place, id: Id<Self>, body: Option<VmBody>, spec: &VmSpec) -> VmBody {
        let mut body = body.unwrap_or_default();
        if body.wish != spec.run {
            body.wish = spec.run;
            body.due = now(place) + place.world.settle();
            if let Run::Off { grace } = spec.run {
                body.due = now(place) + grace;
            }
        }
        body.plug(place, spec);
        body.steer(place, id, spec);
        body
    }

    fn look(place: &Place, id: Id<Self>, spec: &VmSpec, body: &mut VmBody) -> Look<Self> {
        body.steer(place, id, spec);
        let is = VmObserved {
            life: body.life.clone(),
            changed: body.changed,
            right: Right::Holds(spec.term),
            devices: body.open.iter().map(|(id, o)| (*id, o.state())).collect(),
            accepts: vec![("fake".to_owned(), 1)],
            restart_for: Vec::new(),
        };
        Look { phase: body.phase(place), is, final_usage: body.ended.clone() }
    }

    fn gone(place: &Place, id: Id<Self>, body: &mut VmBody) {
        body.open.clear();
        body.console.close();
        body.life = Life::Never;
        let _ = (place, id);
    }

    fn reading(place: &Place, id: Id<Self>, spec: &VmSpec, body: &mut VmBody) -> Option<Reading> {
        body.steer(place, id, spec);
        (body.starts > 0 && !matches!(body.life, Life::Ended { .. }))
            .then(|| body.read(place, id, spec, false))
    }

    fn passport(spec: &VmSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }
}

impl VmBody {
    /// Does what the clock and the wish ask for.
    fn steer(&mut self, place: &Place, id: Id<Vm>, spec: &VmSpec) {
        match spec.run {
            Run::On(boot) | Run::Paused(boot) => {
                self.start(place, id, spec, boot);
                self.arrive(place, spec);
            }
            Run::Off { .. } => self.stop(place, id, spec),
        }
    }

    fn start(&mut self, place: &Place, id: Id<Vm>, spec: &VmSpec, boot: Boot) {
        let last = boot_in(&self.life);
        if last.is_some_and(|last| last >= boot) {
            return;
        }
        if last.is_some() {
            self.end(place, id, spec, End::Stopped);
        }
        self.starts += 1;
        self.meter = Meter::default();
        self.turn(place, Life::Booting(boot));
    }

    /// From booting to on, and between on and paused.
    fn arrive(&mut self, place: &Place, spec: &VmSpec) {
        let now = now(place);
        match (&self.life, spec.run) {
            (Life::Booting(boot), _) if now >= self.due => {
                let boot = *boot;
                self.console.print(
                    format!("Linux version 0.0.0-fake\nboot {boot} of {}\nGUEST-READY\n", spec.term)
                        .as_bytes(),
                );
                self.turn(place, Life::On(boot));
                self.meter.since = Some(now);
                self.arrive(place, spec);
            }
            (Life::On(boot), Run::Paused(_)) => {
                self.turn(place, Life::Paused(*boot));
                self.meter.stop(now);
            }
            (Life::Paused(boot), Run::On(_)) => {
                self.turn(place, Life::On(*boot));
                self.meter.since = Some(now);
            }
            _ => {}
        }
    }

    fn stop(&mut self, place: &Place, id: Id<Vm>, spec: &VmSpec) {
        if matches!(self.life, Life::Never | Life::Ended { .. }) {
            return;
        }
        if !self.deaf {
            self.end(place, id, spec, End::Stopped);
        } else if now(place) >= self.due {
            self.end(place, id, spec, End::Forced);
        }
    }

    /// Ends the life that runs, if one does.
    fn end(&mut self, place: &Place, id: Id<Vm>, spec: &VmSpec, why: End) {
        let (Life::Booting(boot) | Life::On(boot) | Life::Paused(boot)) = self.life else { return };
        self.meter.stop(now(place));
        let last = self.read(place, id, spec, true);
        self.ended.push(last);
        self.turn(place, Life::Ended { boot, why });
    }

    fn read(&mut self, place: &Place, id: Id<Vm>, spec: &VmSpec, fin: bool) -> Reading {
        self.meter.seq += 1;
        let ran = self.meter.total(now(place)).as_nanos();
        let totals = BTreeMap::from([
            ("vcpu-ns".to_owned(), ran * u128::from(spec.vcpus)),
            ("memory-byte-ns".to_owned(), ran * u128::from(spec.memory)),
        ]);
        Reading {
            of: id.object(),
            term: spec.term,
            life: self.starts,
            seq: self.meter.seq,
            fin,
            at: place.world.stamp(),
            totals,
        }
    }

    fn turn(&mut self, place: &Place, life: Life) {
        self.life = life;
        self.changed = Some(place.world.stamp());
    }

    /// Opens what is new in the spec and drops what left it.
    fn plug(&mut self, place: &Place, spec: &VmSpec) {
        self.open.retain(|id, open| spec.devices.get(id).is_some_and(|d| open.serves(d)));
        for (id, device) in &spec.devices {
            self.open.entry(*id).or_insert_with(|| Opened::new(place, device));
        }
    }

    fn phase(&self, place: &Place) -> Phase {
        let settled = match (self.wish, &self.life) {
            (_, Life::Ended { .. }) | (Run::Off { .. }, Life::Never) => true,
            (Run::On(want), Life::On(boot)) | (Run::Paused(want), Life::Paused(boot)) => want == *boot,
            _ => false,
        };
        if settled {
            return Phase::Settled;
        }
        let left = self.due.saturating_sub(now(place));
        Phase::Working { done: 0, total: None, poll_in: left.max(POLL) }
    }
}

impl Meter {
    fn stop(&mut self, now: Duration) {
        self.ran = self.total(now);
        self.since = None;
    }

    fn total(&self, now: Duration) -> Duration {
        self.ran + self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }
}

impl Opened {
    fn new(place: &Place, device: &Device) -> Self {
        let opener = FakeOpener::new(&place.world);
        let open = match device {
            Device::Disk { target, .. } => BlockOpener::prepare(&opener, target)
                .and_then(|grant| BlockOpener::open(&opener, target, grant, None, &Env::default()))
                .map(|open| Self::Disk(target.clone(), open)),
            Device::Nic { target, .. } => PortOpener::prepare(&opener, target)
                .and_then(|grant| PortOpener::open(&opener, target, grant, &Env::default()))
                .map(|open| Self::Nic(target.clone(), open)),
            Device::Share { .. } => Err(Error::unsupported("this hypervisor shares no folders")),
            Device::HostDevice { .. } => Err(Error::unsupported("this hypervisor passes no devices through")),
        };
        open.unwrap_or_else(Self::Failed)
    }

    /// Whether it is the device that the spec names. One that failed is tried again by a repair.
    fn serves(&self, device: &Device) -> bool {
        match (self, device) {
            (Self::Disk(old, _), Device::Disk { target, .. })
            | (Self::Nic(old, _), Device::Nic { target, .. }) => old.same(target),
            _ => false,
        }
    }

    fn state(&self) -> DeviceState {
        match self {
            Self::Failed(error) => DeviceState::Failed(error.clone()),
            Self::Disk(_, _) | Self::Nic(_, _) => DeviceState::Present,
        }
    }
}

fn check_numbers(spec: &VmSpec) -> Result<()> {
    if !(1..=256).contains(&spec.vcpus) {
        return Err(Error::invalid(format!("{} vCPUs", spec.vcpus)).remedy("use 1 to 256"));
    }
    if spec.memory == 0 || !spec.memory.is_multiple_of(1 << 20) {
        return Err(Error::invalid(format!("{} bytes of memory", spec.memory)).remedy("use whole MiB"));
    }
    if spec.passport.len() > MAX_PASSPORT {
        return Err(Error::invalid("the passport is too large").remedy("use at most 16 KiB"));
    }
    Ok(())
}

fn check_origin(place: &Place, origin: &Origin) -> Result<()> {
    match origin {
        Origin::Kernel { kernel, initrd, cmdline } => {
            if cmdline.len() > MAX_CMDLINE || !cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)) {
                return Err(Error::invalid("the kernel command line is too long or not printable ASCII")
                    .remedy("use at most 2047 bytes of printable ASCII"));
            }
            artifacts::need(place, *kernel)?;
            initrd.map_or(Ok(()), |initrd| artifacts::need(place, initrd))
        }
        Origin::Firmware(digest) => artifacts::need(place, *digest),
        Origin::Disk => Ok(()),
        Origin::Image { .. } => Err(Error::unsupported("this hypervisor has no checkpoints")),
        Origin::Incoming { .. } => Err(Error::unsupported("this hypervisor takes no migrations")),
    }
}

fn boot_of(run: Run) -> Option<Boot> {
    match run {
        Run::On(boot) | Run::Paused(boot) => Some(boot),
        Run::Off { .. } => None,
    }
}

fn boot_in(life: &Life) -> Option<Boot> {
    match life {
        Life::Never => None,
        Life::Booting(boot) | Life::On(boot) | Life::Paused(boot) | Life::Ended { boot, .. } => Some(*boot),
    }
}

fn now(place: &Place) -> Duration {
    place.world.clock().monotonic()
}

#[async_trait]
impl Hypervisor for FakeSite<Vm> {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        None
    }

    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        None
    }

    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.observe(cx, vm).await?.ok_or_else(|| {
            Error::not_found(format!("there is no {} with this id", Vm::NAME)).about(vm.object())
        })?;
        let console = self.touch(vm, |_, _, body| body.console.clone()).unwrap_or_default();
        let (stand, place) = (self.stand.clone(), self.place.clone());
        let look = move || {
            stand.touch(vm, |spec, body| body.steer(&place, vm, spec));
        };
        Ok(Box::new(Reader { world: self.place.world.clone(), console, at: from, look }))
    }
}
