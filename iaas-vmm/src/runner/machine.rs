//! The life of one boot: a loop on one thread that hears the guest, its end, control and the clock.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Boot;
use iaas_core::Error;
use iaas_core::Result;
use iaas_core::process::CountersPage;
use iaas_core::process::Request;
use iaas_core::process::Responder;
use iaas_core::process::Roles;
use iaas_core::spi::Reading;
use iaas_core::spi::Stamp;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Right;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::VmSpec;
use uuid::Uuid;

use super::RunnerArgs;
use super::devices;
use super::devices::Attached;
use super::guest;
use super::guest::Guest;
use super::guest::HotPlug;
use super::guest::Input;
use super::guest::Start;
use super::record::VmFolder;
use super::record::VmRecord;
use super::usage::Usage;
use super::wanted;
use crate::files;

/// One boot of a VM, from its start to its end.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    id: Uuid,
    boot: Boot,
    roles: &'a Roles,
    folder: VmFolder,
    spec: VmSpec,
    devices: BTreeMap<Uuid, Attached>,
    guest: Option<Box<dyn Guest>>,
    record: VmRecord,
    stored: Option<VmRecord>,
    usage: Usage,
    page: CountersPage,
    /// When a guest that was asked to go is killed.
    kill_at: Option<Instant>,
    asked_off: bool,
    forced: bool,
}

impl<'a> Machine<'a> {
    /// Takes the boot number: from here on it is used up, whatever happens.
    ///
    /// # Errors
    /// `Conflict`: this number or a later one was started before.
    pub(super) fn claim(args: &RunnerArgs, id: Uuid, roles: &'a Roles) -> Result<Self> {
        let folder = VmFolder::at(&args.folder);
        let spec = args.spec.clone();
        let boot = wanted(spec.run).ok_or_else(|| Error::invalid("there is nothing to run"))?;
        let record = folder.load()?.unwrap_or_else(|| VmRecord::never(spec.term));
        if record.boot().is_some_and(|before| before >= boot) {
            return Err(Error::conflict(format!("boot {boot} of this VM was started before"))
                .remedy("start it with the next boot number"));
        }
        let mut record = record.after_death(folder.reading()?);
        record.seen.life = Life::Booting(boot);
        record.seen.changed = Some(files::stamp());
        record.seen.right = Right::Holds(spec.term);
        record.seen.accepts = devices::accepts(roles);
        record.seen.restart_for.clear();
        record.seen.devices.clear();
        let usage = Usage::new(id, (spec.term, boot), (spec.vcpus, spec.memory));
        let page = CountersPage::create(&folder.counters())?;
        folder.store(&record)?;
        let stored = Some(record.clone());
        Ok(Self {
            id,
            boot,
            roles,
            folder,
            spec,
            devices: BTreeMap::new(),
            guest: None,
            record,
            stored,
            usage,
            page,
            kill_at: None,
            asked_off: false,
            forced: false,
        })
    }

    /// Runs the boot to its end; the record says how it went.
    pub(super) fn run(
        mut self,
        args: &RunnerArgs,
        fds: BTreeMap<String, OwnedFd>,
        (tell, hear): (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    ) {
        let failed = match self.start(args, fds, &tell) {
            Ok(()) => {
                tracing::info!("the guest was started");
                self.listen(&hear);
                None
            }
            Err(error) => {
                tracing::error!(%error, "the VM could not be started");
                Some(End::Crashed(error))
            }
        };
        self.finish(failed);
    }

    fn start(
        &mut self,
        args: &RunnerArgs,
        mut fds: BTreeMap<String, OwnedFd>,
        tell: &mpsc::Sender<Input>,
    ) -> Result<()> {
        self.usage.started(files::stamp());
        self.write_usage(false);
        for (id, device) in self.spec.devices.clone() {
            let attached = self.open(id, &device, &mut fds)?;
            self.devices.insert(id, attached);
        }
        let start = Start {
            id: self.id,
            spec: &self.spec,
            kernel: fds.remove(super::KERNEL_FD),
            initrd: fds.remove(super::INITRD_FD),
            folder: &self.folder,
            tell,
        };
        let guest = self.guest.insert(guest::start(args, start, &mut self.devices)?);
        let runs = guest.is_running()?;
        for attached in self.devices.values_mut() {
            attached.state = DeviceState::Present;
        }
        self.set_running(runs);
        self.save()
    }

    fn open(&self, id: Uuid, device: &Device, fds: &mut BTreeMap<String, OwnedFd>) -> Result<Attached> {
        let grant = devices::grant_of(fds, id);
        Attached::open(self.roles, device, grant, self.folder.path())
            .map_err(|e| e.detail(format!("attachment {id}")))
    }

    /// Hears everything until the guest has ended.
    fn listen(&mut self, hear: &mpsc::Receiver<Input>) {
        let mut next_tick = Instant::now() + TICK;
        loop {
            let until = self.kill_at.map_or(next_tick, |at| at.min(next_tick));
            match hear.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Exited) => return,
                Ok(Input::Runs(runs)) => self.set_running(runs),
                Ok(Input::Unplugged(id)) => self.unplugged(id),
                Ok(Input::Lost) => self.kill(),
                Ok(Input::Ask(request, responder)) => self.on_ask(request, responder),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                // The threads of the guest hold senders; this end would mean that the process ends.
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            self.save_or_warn();
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.force();
            }
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + TICK;
                self.tick();
            }
        }
    }

    fn tick(&mut self) {
        self.write_usage(false);
        if self.kill_at.is_some() {
            // A guest that was still booting has missed the first press.
            self.press();
        }
        let waiting = |here: &Attached| matches!(here.state, DeviceState::Unplugging { .. });
        let leaving: Vec<Uuid> =
            self.devices.iter().filter(|(_, here)| waiting(here)).map(|(id, _)| *id).collect();
        // A guest that was still booting has missed it, too; and some refuse to be asked again too early.
        leaving.into_iter().for_each(|id| self.unplug(id));
        self.save_or_warn();
    }

    fn on_ask(&mut self, request: Request, responder: Responder) {
        let answer = match request.verb.as_str() {
            super::APPLY => files::decode::<VmSpec>(&request.body).and_then(|spec| {
                let fds = request.fds.into_iter().collect();
                self.apply(&spec, fds)?;
                self.save()?;
                Ok(bytes::Bytes::new())
            }),
            super::CONSOLE_WRITE => self.type_in(&request.body).and_then(|count| files::encode(&count)),
            super::NEEDS => {
                files::decode::<VmSpec>(&request.body).and_then(|spec| files::encode(&self.needs(&spec)))
            }
            super::NICS => files::encode(&self.nics()),
            super::USAGE => files::encode(&self.write_usage(false)),
            verb => Err(Error::unsupported(format!("a runner has no verb `{verb}`"))),
        };
        responder.answer(answer);
    }

    fn apply(&mut self, spec: &VmSpec, fds: BTreeMap<String, OwnedFd>) -> Result<()> {
        let Some(boot) = wanted(spec.run) else {
            let Run::Off { grace } = spec.run else { return Ok(()) };
            self.power_off(grace);
            return Ok(());
        };
        if boot != self.boot {
            return Err(Error::conflict(format!("this runner runs boot {}", self.boot)));
        }
        let pause = matches!(spec.run, Run::Paused(_));
        let is_paused = matches!(self.record.seen.life, Life::Paused(_));
        if pause && !is_paused {
            self.guest()?.pause()?;
            self.set_running(false);
        } else if !pause && is_paused {
            self.guest()?.resume()?;
            self.set_running(true);
        }
        self.record.seen.right = Right::Holds(spec.term);
        self.change_devices(spec, fds)?;
        self.record.seen.restart_for = self.needs_restart(spec);
        Ok(())
    }

    /// Parts of `spec` that the running guest does not have and cannot take, or has and cannot give.
    fn needs_restart(&mut self, spec: &VmSpec) -> Vec<String> {
        let fixed = [
            ("vcpus", spec.vcpus != self.spec.vcpus),
            ("memory", spec.memory != self.spec.memory),
            ("origin", spec.origin != self.spec.origin),
        ];
        let fixed = fixed.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned());
        let moves = self.hot_plug().is_ok();
        let differs = |id: &&Uuid| match (self.devices.get(id), spec.devices.get(id)) {
            (Some(here), Some(device)) => !devices::same(&here.device, device),
            _ => !moves,
        };
        let ids: BTreeSet<&Uuid> = self.devices.keys().chain(spec.devices.keys()).collect();
        fixed.chain(ids.into_iter().filter(differs).map(|id| format!("device {id}"))).collect()
    }

    /// Devices of `spec` that must come with what they need before [`apply`](Self::apply) can plug them in.
    fn needs(&mut self, spec: &VmSpec) -> Vec<Uuid> {
        if self.hot_plug().is_err() {
            return Vec::new();
        }
        spec.devices.keys().filter(|id| !self.devices.contains_key(id)).copied().collect()
    }

    fn change_devices(&mut self, spec: &VmSpec, mut fds: BTreeMap<String, OwnedFd>) -> Result<()> {
        if self.hot_plug().is_err() {
            return Ok(());
        }
        let gone: Vec<Uuid> =
            self.devices.keys().filter(|id| !spec.devices.contains_key(id)).copied().collect();
        for id in gone {
            self.unplug(id);
        }
        let come: Vec<(Uuid, Device)> = spec
            .devices
            .iter()
            .filter(|(id, _)| !self.devices.contains_key(id))
            .map(|(id, device)| (*id, device.clone()))
            .collect();
        come.into_iter().try_for_each(|(id, device)| self.plug(id, &device, &mut fds))
    }

    /// Brings a device to the running guest.
    fn plug(&mut self, id: Uuid, device: &Device, fds: &mut BTreeMap<String, OwnedFd>) -> Result<()> {
        let mut attached = self.open(id, device, fds)?;
        match self.hot_plug().and_then(|guest| guest.plug(id, &mut attached)) {
            Ok(()) => {
                attached.state = DeviceState::Present;
                self.devices.insert(id, attached);
                Ok(())
            }
            Err(error) => {
                attached.close();
                Err(error)
            }
        }
    }

    /// Asks the guest to let a device go.
    fn unplug(&mut self, id: Uuid) {
        let asked = self.hot_plug().and_then(|guest| guest.unplug(id));
        let Some(attached) = self.devices.get_mut(&id) else { return };
        match (asked, &attached.state) {
            (_, DeviceState::Unplugging { .. }) => {}
            (Ok(()), _) => attached.state = DeviceState::Unplugging { since: files::stamp() },
            (Err(error), _) => attached.state = DeviceState::Failed(error),
        }
    }

    /// The guest has let a device go.
    fn unplugged(&mut self, id: Uuid) {
        let Some(attached) = self.devices.remove(&id) else { return };
        if let Ok(guest) = self.hot_plug() {
            guest.forget(id);
        }
        attached.close();
    }

    fn hot_plug(&mut self) -> Result<&mut dyn HotPlug> {
        let guest = self.guest()?.hot_plug();
        guest.ok_or_else(|| Error::unsupported("the guest takes and gives no devices while it runs"))
    }

    /// Presses the power button, and kills after `grace`.
    fn power_off(&mut self, grace: Duration) {
        let at = Instant::now() + grace;
        self.asked_off = true;
        self.kill_at = Some(self.kill_at.map_or(at, |before| before.min(at)));
        if grace.is_zero() {
            self.force();
            return;
        }
        // A paused guest feels no button.
        if matches!(self.record.seen.life, Life::Paused(_)) {
            match self.guest().and_then(|guest| guest.resume()) {
                Ok(()) => self.set_running(true),
                Err(error) => tracing::warn!(%error, "a paused guest could not be started to be stopped"),
            }
        }
        self.press();
    }

    fn press(&mut self) {
        if let Err(error) = self.guest().and_then(|guest| guest.press()) {
            tracing::warn!(%error, "the power button could not be pressed");
        }
    }

    fn force(&mut self) {
        self.forced = true;
        self.kill_at = None;
        self.kill();
    }

    fn kill(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.kill();
        }
    }

    fn set_running(&mut self, runs: bool) {
        let life = if runs { Life::On(self.boot) } else { Life::Paused(self.boot) };
        if self.record.seen.life == life {
            return;
        }
        let at = files::stamp();
        if runs {
            self.usage.running(at);
        } else {
            self.usage.paused(at);
        }
        self.record.seen.life = life;
        self.record.seen.changed = Some(at);
    }

    /// Closes everything, then says that the VM has ended: whoever reads that may use its volumes.
    fn finish(mut self, failed: Option<End>) {
        let at = files::stamp();
        self.usage.ended(at);
        let mut why = failed;
        if let Some(mut guest) = self.guest.take() {
            self.usage.took_cpu(guest.cpu_ns());
            let end = guest.finish(self.forced);
            why.get_or_insert(match end {
                // It did what it was asked to.
                End::GuestOff | End::GuestReset if self.asked_off => End::Stopped,
                end => end,
            });
            // Before the volumes: it may still hold their queues.
            drop(guest);
        }
        for (_, attached) in std::mem::take(&mut self.devices) {
            attached.close();
        }
        let last = self.write_usage_at(at, true);
        self.record.close(Some(last));
        let why =
            why.unwrap_or_else(|| End::Crashed(Error::internal("a guest ended that was never started")));
        self.record.seen.life = Life::Ended { boot: self.boot, why };
        self.record.seen.changed = Some(at);
        self.record.seen.restart_for.clear();
        self.save_or_warn();
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize> {
        self.guest()?.type_in(bytes)
    }

    fn nics(&self) -> BTreeMap<Uuid, [u64; 5]> {
        let read = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        let counts = self.guest.iter().flat_map(|guest| guest.nics());
        counts
            .map(|(id, c)| {
                let five = [&c.tx_packets, &c.tx_bytes, &c.rx_packets, &c.rx_bytes, &c.refused];
                (id, five.map(read))
            })
            .collect()
    }

    fn guest(&mut self) -> Result<&mut dyn Guest> {
        match &mut self.guest {
            Some(guest) => Ok(guest.as_mut()),
            None => Err(Error::conflict("the VM does not run")),
        }
    }

    /// How a device is: a disk whose driver broke the protocol has failed.
    fn state_of(&self, id: Uuid, attached: &Attached) -> DeviceState {
        match self.guest.as_ref().and_then(|guest| guest.fault(id)) {
            Some(fault) => DeviceState::Failed(
                Error::conflict("the guest's driver broke the device's protocol").detail(fault),
            ),
            None => attached.state.clone(),
        }
    }

    fn write_usage(&mut self, fin: bool) -> Reading {
        if let Some(guest) = &self.guest {
            self.usage.took_cpu(guest.cpu_ns());
        }
        self.write_usage_at(files::stamp(), fin)
    }

    fn write_usage_at(&mut self, at: Stamp, fin: bool) -> Reading {
        let reading = self.usage.reading(at, fin);
        let written = files::encode(&reading).and_then(|bytes| self.page.write(&bytes));
        if let Err(error) = written {
            tracing::error!(%error, "the counters could not be written");
        }
        reading
    }

    /// Writes the record if it differs from what was written last.
    fn save(&mut self) -> Result<()> {
        self.record.seen.devices =
            self.devices.iter().map(|(id, here)| (*id, self.state_of(*id, here))).collect();
        if self.stored.as_ref() == Some(&self.record) {
            return Ok(());
        }
        self.folder.store(&self.record)?;
        self.stored = Some(self.record.clone());
        Ok(())
    }

    fn save_or_warn(&mut self) {
        if let Err(error) = self.save() {
            tracing::error!(%error, "what the VM does could not be written down");
        }
    }
}

/// How often the counters are written.
const TICK: Duration = Duration::from_secs(1);
