//! The life of one boot: a loop on one thread that hears QEMU, the child's end, control and the clock.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
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
use serde_json::json;
use uuid::Uuid;

use super::RunnerArgs;
use super::devices;
use super::devices::Attached;
use super::launch;
use super::launch::Running;
use super::record::VmFolder;
use super::record::VmRecord;
use super::usage::Usage;
use crate::files;
use crate::qemu::command;
use crate::qemu::command::PLACES;
use crate::qemu::command::Slot;
use crate::qemu::command::SlotKind;
use crate::qemu::qmp;

/// What the loop hears.
#[derive(Debug)]
pub(super) enum Input {
    Monitor(qmp::Event),
    Exited,
    Ask(Request, Responder),
}

/// One boot of a VM, from its start to its end.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    id: Uuid,
    boot: Boot,
    roles: &'a Roles,
    folder: VmFolder,
    spec: VmSpec,
    devices: BTreeMap<Uuid, Attached>,
    running: Option<Running>,
    record: VmRecord,
    stored: Option<VmRecord>,
    usage: Usage,
    page: CountersPage,
    /// When a guest that was asked to go is killed.
    kill_at: Option<Instant>,
    asked_off: bool,
    forced: bool,
    reason: Option<String>,
    panicked: bool,
}

impl<'a> Machine<'a> {
    /// Takes the boot number: from here on it is used up, whatever happens.
    ///
    /// # Errors
    /// `Conflict`: this number or a later one was started before.
    pub(super) fn claim(args: &RunnerArgs, id: Uuid, roles: &'a Roles) -> Result<Self> {
        let folder = VmFolder::at(&args.folder);
        let spec = args.spec.clone();
        let boot = command::wanted(spec.run).ok_or_else(|| Error::invalid("there is nothing to run"))?;
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
            running: None,
            record,
            stored,
            usage,
            page,
            kill_at: None,
            asked_off: false,
            forced: false,
            reason: None,
            panicked: false,
        })
    }

    /// Runs the boot to its end; the record says how it went.
    pub(super) fn run(
        mut self,
        args: &RunnerArgs,
        fds: BTreeMap<String, OwnedFd>,
        (tell, hear): (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    ) {
        let why = match self.start(args, fds, &tell) {
            Ok(()) => {
                tracing::info!("the VMM was started");
                self.listen(&hear)
            }
            Err(error) => {
                tracing::error!(%error, "the VM could not be started");
                End::Crashed(error.detail(launch::complaints(&self.folder)))
            }
        };
        self.finish(why);
    }

    fn start(
        &mut self,
        args: &RunnerArgs,
        mut fds: BTreeMap<String, OwnedFd>,
        tell: &mpsc::Sender<Input>,
    ) -> Result<()> {
        self.usage.started(files::stamp());
        self.write_usage(false);
        let mut slots = Vec::new();
        let mut ends = Vec::new();
        for (id, device) in self.spec.devices.clone() {
            let (slot, end) = self.open(id, &device, &mut fds)?;
            slots.push(slot);
            ends.push(end);
        }
        let kernel = fds.remove(super::KERNEL_FD);
        let initrd = fds.remove(super::INITRD_FD);
        let boot = launch::Boot { id: self.id, spec: &self.spec, slots, ends, kernel, initrd };
        let running = self.running.insert(launch::spawn(args, boot, &self.folder, tell)?);
        running.greet(tell)?;
        for attached in self.devices.values_mut() {
            attached.state = DeviceState::Present;
        }
        let status = self.command("query-status", &json!({}))?;
        let runs = status.get("running").and_then(serde_json::Value::as_bool) == Some(true);
        self.set_running(runs);
        self.save()
    }

    /// Opens a device and finds it a place.
    fn open(
        &mut self,
        id: Uuid,
        device: &Device,
        fds: &mut BTreeMap<String, OwnedFd>,
    ) -> Result<(Slot, OwnedFd)> {
        let what = devices::slot_kind(device)?;
        let disk = |kind: &SlotKind| matches!(kind, SlotKind::Disk(_));
        let taken = |place: u8| {
            self.devices.values().any(|other| {
                let kind = devices::slot_kind(&other.device);
                other.place == place && kind.is_ok_and(|kind| disk(&kind) == disk(&what))
            })
        };
        let place = (1..=PLACES).find(|place| !taken(*place)).ok_or_else(|| {
            Error::conflict("the VM has no free place for another device").remedy("detach one first")
        })?;
        let grant = devices::grant_of(fds, id);
        let (attached, end) = Attached::open(self.roles, (id, device, place), grant, self.folder.path())
            .map_err(|e| e.detail(format!("attachment {id}")))?;
        self.devices.insert(id, attached);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&end);
        Ok((Slot { id, place, fd, what }, end))
    }

    /// Hears everything until QEMU has exited.
    fn listen(&mut self, hear: &mpsc::Receiver<Input>) -> End {
        let mut next_tick = Instant::now() + TICK;
        loop {
            let until = self.kill_at.map_or(next_tick, |at| at.min(next_tick));
            match hear.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Exited) => return self.why(),
                Ok(Input::Monitor(event)) => self.on_event(event),
                Ok(Input::Ask(request, responder)) => self.on_ask(request, responder),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                // We hold a sender ourselves in `Running`; this end would mean that the process ends.
                Err(mpsc::RecvTimeoutError::Disconnected) => return self.why(),
            }
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
        // QEMU refuses to ask again too early, and forgets that a guest was asked that was still booting.
        leaving.into_iter().for_each(|id| self.unplug(id));
        self.save_or_warn();
    }

    fn on_event(&mut self, event: qmp::Event) {
        match event {
            qmp::Event::Shutdown { reason } => self.reason = Some(reason),
            qmp::Event::GuestPanicked => self.panicked = true,
            qmp::Event::Stop => self.set_running(false),
            qmp::Event::Resume => self.set_running(true),
            qmp::Event::DeviceDeleted(name) => self.unplugged(&name),
            // Without its monitor a QEMU can only be ended.
            qmp::Event::Closed if self.reason.is_none() => self.kill(),
            qmp::Event::Closed => {}
        }
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
            super::DEVICES => files::encode(&self.devices.keys().collect::<Vec<_>>()),
            super::NICS => files::encode(&self.nics()),
            super::USAGE => files::encode(&self.write_usage(false)),
            verb => Err(Error::unsupported(format!("a runner has no verb `{verb}`"))),
        };
        responder.answer(answer);
    }

    fn apply(&mut self, spec: &VmSpec, fds: BTreeMap<String, OwnedFd>) -> Result<()> {
        let Some(boot) = command::wanted(spec.run) else {
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
            self.command("stop", &json!({}))?;
            self.set_running(false);
        } else if !pause && is_paused {
            self.command("cont", &json!({}))?;
            self.set_running(true);
        }
        self.record.seen.right = Right::Holds(spec.term);
        self.change_devices(spec, fds)?;
        self.record.seen.restart_for = self.needs_restart(spec);
        Ok(())
    }

    /// Parts of `spec` that a running machine cannot take.
    fn needs_restart(&self, spec: &VmSpec) -> Vec<String> {
        let fixed = [
            ("vcpus", spec.vcpus != self.spec.vcpus),
            ("memory", spec.memory != self.spec.memory),
            ("origin", spec.origin != self.spec.origin),
        ];
        let fixed = fixed.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned());
        let changed = spec.devices.iter().filter(|(id, device)| {
            self.devices.get(id).is_some_and(|here| !devices::same(&here.device, device))
        });
        fixed.chain(changed.map(|(id, _)| format!("device {id}"))).collect()
    }

    fn change_devices(&mut self, spec: &VmSpec, mut fds: BTreeMap<String, OwnedFd>) -> Result<()> {
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

    /// Brings a device to the running machine.
    fn plug(&mut self, id: Uuid, device: &Device, fds: &mut BTreeMap<String, OwnedFd>) -> Result<()> {
        let (slot, end) = self.open(id, device, fds)?;
        let result = self.plug_into_qemu(&slot, &end);
        match (&result, self.devices.get_mut(&id)) {
            (Ok(()), Some(attached)) => attached.state = DeviceState::Present,
            (Err(_), _) => {
                if let Some(attached) = self.devices.remove(&id) {
                    drop(end);
                    attached.close();
                }
            }
            (Ok(()), None) => {}
        }
        result
    }

    fn plug_into_qemu(&mut self, slot: &Slot, end: &OwnedFd) -> Result<()> {
        let (back, name) = (command::backend_id(slot.id), format!("fd-{}", slot.id.simple()));
        self.running()?.qmp()?.give_fd(&name, end, PATIENCE)?;
        match slot.what {
            SlotKind::Disk(_) => {
                let addr = json!({ "type": "fd", "data": { "str": name } });
                let socket = json!({ "type": "socket", "data": { "addr": addr, "server": false } });
                self.command("chardev-add", &json!({ "id": back, "backend": socket }))?;
            }
            SlotKind::Nic(_) => {
                let local = json!({ "type": "fd", "str": name });
                self.command("netdev_add", &json!({ "type": "dgram", "id": back, "local": local }))?;
            }
        }
        let properties: serde_json::Map<_, _> =
            command::device(slot).into_iter().map(|(k, v)| (k.to_owned(), property(k, v))).collect();
        let added = self.command("device_add", &properties.into());
        if added.is_err() {
            self.forget_backend(slot.id, &slot.what);
        }
        added.map(drop)
    }

    /// Asks the guest to let a device go.
    fn unplug(&mut self, id: Uuid) {
        let asked = self.command("device_del", &json!({ "id": command::device_id(id) }));
        let Some(attached) = self.devices.get_mut(&id) else { return };
        match (asked, &attached.state) {
            (_, DeviceState::Unplugging { .. }) => {}
            (Ok(_), _) => attached.state = DeviceState::Unplugging { since: files::stamp() },
            (Err(error), _) => attached.state = DeviceState::Failed(error),
        }
    }

    /// The guest has let a device go.
    fn unplugged(&mut self, name: &str) {
        let id = self.devices.keys().find(|id| command::device_id(**id) == name).copied();
        let Some((id, attached)) = id.and_then(|id| self.devices.remove_entry(&id)) else { return };
        if let Ok(kind) = devices::slot_kind(&attached.device) {
            self.forget_backend(id, &kind);
        }
        attached.close();
    }

    fn forget_backend(&mut self, id: Uuid, kind: &SlotKind) {
        let verb = if matches!(kind, SlotKind::Disk(_)) { "chardev-remove" } else { "netdev_del" };
        if let Err(error) = self.command(verb, &json!({ "id": command::backend_id(id) })) {
            tracing::warn!(%error, "the back-end of a device stays in the VMM");
        }
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
        if matches!(self.record.seen.life, Life::Paused(_)) && self.command("cont", &json!({})).is_ok() {
            self.set_running(true);
        }
        self.press();
    }

    fn press(&mut self) {
        if let Err(error) = self.command("system_powerdown", &json!({})) {
            tracing::warn!(%error, "the power button could not be pressed");
        }
    }

    fn force(&mut self) {
        self.forced = true;
        self.kill_at = None;
        self.kill();
    }

    fn kill(&mut self) {
        if let Some(running) = &mut self.running {
            running.kill();
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

    /// Why QEMU has exited.
    fn why(&mut self) -> End {
        let status = self.running.as_mut().and_then(Running::reap);
        let reason = self.reason.as_deref();
        match reason {
            _ if self.panicked => End::Crashed(Error::unavailable("the guest's kernel crashed")),
            Some("guest-reset") if !self.asked_off => End::GuestReset,
            Some("guest-shutdown" | "guest-reset") if self.asked_off => End::Stopped,
            Some("guest-shutdown") => End::GuestOff,
            _ if self.forced => End::Forced,
            _ => End::Crashed(self.crash(status)),
        }
    }

    fn crash(&self, status: Option<ExitStatus>) -> Error {
        let status = status.map_or_else(|| "status unknown".to_owned(), |status| status.to_string());
        Error::unavailable("the VMM was killed or crashed")
            .remedy("start the VM again")
            .detail(status)
            .detail(launch::complaints(&self.folder))
    }

    /// Closes everything, then says that the VM has ended: whoever reads that may use its volumes.
    fn finish(mut self, why: End) {
        let at = files::stamp();
        self.usage.ended(at);
        if let Some(mut running) = self.running.take() {
            self.usage.took_cpu(running.cpu_ns());
            running.kill();
            running.reap();
        }
        for (_, attached) in std::mem::take(&mut self.devices) {
            attached.close();
        }
        let last = self.write_usage_at(at, true);
        self.record.close(Some(last));
        self.record.seen.life = Life::Ended { boot: self.boot, why };
        self.record.seen.changed = Some(at);
        self.record.seen.restart_for.clear();
        self.save_or_warn();
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize> {
        self.running()?.type_in(bytes)
    }

    fn nics(&self) -> BTreeMap<Uuid, [u64; 5]> {
        let read = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        let counts =
            self.devices.iter().filter_map(|(id, attached)| Some((*id, attached.pump()?.counters())));
        counts
            .map(|(id, c)| {
                let five = [&c.tx_packets, &c.tx_bytes, &c.rx_packets, &c.rx_bytes, &c.refused];
                (id, five.map(read))
            })
            .collect()
    }

    fn running(&mut self) -> Result<&mut Running> {
        self.running.as_mut().ok_or_else(|| Error::conflict("the VM does not run"))
    }

    fn command(&mut self, name: &str, arguments: &serde_json::Value) -> Result<serde_json::Value> {
        self.running()?.qmp()?.execute(name, arguments, PATIENCE)
    }

    fn write_usage(&mut self, fin: bool) -> Reading {
        if let Some(running) = &self.running {
            self.usage.took_cpu(running.cpu_ns());
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
        self.record.seen.devices = self.devices.iter().map(|(id, here)| (*id, here.state())).collect();
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

/// QEMU wants numbers as numbers in its monitor.
fn property(name: &str, value: String) -> serde_json::Value {
    match (name, value.parse::<u64>()) {
        ("num-queues" | "bootindex", Ok(number)) => number.into(),
        ("disable-legacy", _) => "on".into(),
        _ => value.into(),
    }
}

/// The longest that QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the counters are written.
const TICK: Duration = Duration::from_secs(1);
