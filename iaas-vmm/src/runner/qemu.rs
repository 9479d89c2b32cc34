//! A guest in a QEMU under the runner: the child with its monitor and console, and what serves its disks and NICs to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::End;
use nix::sys::socket::MsgFlags;
use nix::sys::wait::Id;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use serde_json::Value;
use serde_json::json;
use uuid::Uuid;

use super::console::ConsoleWriter;
use super::devices::Attached;
use super::devices::serial;
use super::guest::Guest;
use super::guest::HotPlug;
use super::guest::Input;
use super::guest::Start;
use super::nic::NicCounters;
use super::pump::Pump;
use super::record::VmFolder;
use crate::jail;
use crate::qemu::command;
use crate::qemu::command::Accel;
use crate::qemu::command::PLACES;
use crate::qemu::command::Slot;
use crate::qemu::command::SlotKind;
use crate::qemu::qmp;
use crate::qemu::qmp::Qmp;
use crate::virtio::vhost_user::DiskServer;

/// A QEMU that was started.
#[derive(Debug)]
pub(super) struct Qemu {
    child: Child,
    status: Option<ExitStatus>,
    monitor: Option<Qmp>,
    console: UnixStream,
    served: BTreeMap<Uuid, Served>,
    story: Arc<Story>,
    folder: VmFolder,
}

/// A device that QEMU has, and what serves it.
#[derive(Debug)]
struct Served {
    place: u8,
    front: Front,
}

#[derive(Debug)]
enum Front {
    Disk(DiskServer),
    Nic(Pump),
}

/// What QEMU has told about its end.
#[derive(Debug, Default)]
struct Story {
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    reason: Option<String>,
    panicked: bool,
    /// It tells nothing any more.
    closed: bool,
}

impl Story {
    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qemu {
    /// Starts QEMU and waits until it has made all its devices. From the main thread only: the child dies with the thread
    /// that made it.
    pub(super) fn start(
        binary: &Path,
        accel: Accel,
        start: Start<'_>,
        devices: &mut BTreeMap<Uuid, Attached>,
    ) -> Result<Self> {
        let (mut served, mut slots, mut ends) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (id, attached) in devices {
            let (slot, one, end) = serve(&served, *id, attached, start.folder.path())?;
            served.insert(*id, one);
            slots.push(slot);
            ends.push(end);
        }
        let cannot = |e: io::Error| Error::unavailable("the VMM could not be started").because(&e);
        let (monitor, monitor_end) = UnixStream::pair().map_err(cannot)?;
        let (console, console_end) = UnixStream::pair().map_err(cannot)?;
        let machine = command::Machine {
            id: start.id,
            spec: start.spec,
            accel,
            monitor: monitor_end.as_raw_fd(),
            console: console_end.as_raw_fd(),
            kernel: start.kernel.as_ref().map(AsRawFd::as_raw_fd),
            initrd: start.initrd.as_ref().map(AsRawFd::as_raw_fd),
            slots,
        };
        let folder = start.folder.clone();
        let log =
            OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(folder.vmm_log());
        let mut command = Command::new(binary);
        command
            .args(command::arguments(&machine))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.map_err(cannot)?);
        let mut given = vec![OwnedFd::from(monitor_end), OwnedFd::from(console_end)];
        given.extend(ends);
        given.extend(start.kernel.into_iter().chain(start.initrd));
        let child = jail::spawn_bound(&mut command, &given).map_err(cannot)?;
        drop(given);
        let story = Arc::default();
        // From here on an error ends the child.
        let mut qemu = Self { child, status: None, monitor: None, console, served, story, folder };
        let told = qemu.begin(monitor, start.tell);
        told.map_err(|e| e.detail(complaints(&qemu.folder)))?;
        Ok(qemu)
    }

    fn begin(&mut self, monitor: UnixStream, tell: &mpsc::Sender<Input>) -> Result<()> {
        let console = self.console.try_clone();
        let console = console.map_err(|e| Error::unavailable("a socket could not be shared").because(&e))?;
        keep_console(console, &self.folder)?;
        watch(&self.child, tell.clone())?;
        let (story, tell) = (self.story.clone(), tell.clone());
        self.monitor = Some(Qmp::connect(monitor, START, move |event| hear(event, &story, &tell))?);
        Ok(())
    }

    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        self.qmp()?.execute(name, arguments, PATIENCE)
    }

    fn qmp(&mut self) -> Result<&mut Qmp> {
        self.monitor.as_mut().ok_or_else(|| Error::conflict("the VM is still starting"))
    }

    fn add(&mut self, slot: &Slot, end: &OwnedFd) -> Result<()> {
        let (back, name) = (command::backend_id(slot.id), format!("fd-{}", slot.id.simple()));
        self.qmp()?.give_fd(&name, end, PATIENCE)?;
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
            self.forget_backend(slot.id, matches!(slot.what, SlotKind::Disk(_)));
        }
        added.map(drop)
    }

    fn forget_backend(&mut self, id: Uuid, is_disk: bool) {
        let verb = if is_disk { "chardev-remove" } else { "netdev_del" };
        if let Err(error) = self.command(verb, &json!({ "id": command::backend_id(id) })) {
            tracing::warn!(%error, "the back-end of a device stays in the VMM");
        }
    }

    /// Why it has exited.
    fn why(&self, forced: bool) -> End {
        let told = self.story.lock();
        match told.reason.as_deref() {
            _ if told.panicked => End::Crashed(Error::unavailable("the guest's kernel crashed")),
            Some("guest-reset") => End::GuestReset,
            Some("guest-shutdown") => End::GuestOff,
            _ if forced => End::Forced,
            _ => End::Crashed(self.crash()),
        }
    }

    fn crash(&self) -> Error {
        let status = self.status.map_or_else(|| "status unknown".to_owned(), |status| status.to_string());
        Error::unavailable("the VMM was killed or crashed")
            .remedy("start the VM again")
            .detail(status)
            .detail(complaints(&self.folder))
    }

    /// Kills it, and collects the exit status.
    fn reap(&mut self) {
        if self.status.is_some() {
            return;
        }
        if let Err(error) = self.child.kill() {
            tracing::warn!(%error, "the VMM could not be killed");
        }
        self.status = self.child.wait().ok();
        // What it told last is still in its monitor.
        if self.monitor.is_some() {
            let told = self.story.lock();
            let all = self.story.changed.wait_timeout_while(told, LAST_WORDS, |told| !told.closed);
            drop(all);
        }
    }
}

impl Guest for Qemu {
    fn is_running(&mut self) -> Result<bool> {
        let status = self.command("query-status", &json!({}))?;
        Ok(status.get("running").and_then(Value::as_bool) == Some(true))
    }

    fn pause(&mut self) -> Result<()> {
        self.command("stop", &json!({})).map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        self.command("cont", &json!({})).map(drop)
    }

    fn press(&mut self) -> Result<()> {
        self.command("system_powerdown", &json!({})).map(drop)
    }

    fn kill(&mut self) {
        if self.status.is_none()
            && let Err(error) = self.child.kill()
        {
            tracing::warn!(%error, "the VMM could not be killed");
        }
    }

    fn hot_plug(&mut self) -> Option<&mut dyn HotPlug> {
        Some(self)
    }

    fn fault(&self, id: Uuid) -> Option<String> {
        match &self.served.get(&id)?.front {
            Front::Disk(server) => server.fault().map(|fault| fault.to_string()),
            Front::Nic(_) => None,
        }
    }

    fn nics(&self) -> Vec<(Uuid, &NicCounters)> {
        let mut nics = Vec::new();
        for (id, served) in &self.served {
            if let Front::Nic(pump) = &served.front {
                nics.push((*id, pump.counters()));
            }
        }
        nics
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match nix::sys::socket::send(self.console.as_raw_fd(), bytes, flags) {
            Ok(count) => Ok(count),
            Err(nix::errno::Errno::EAGAIN) => Ok(0),
            Err(e) => Err(Error::unavailable("the console does not work").because(&e)),
        }
    }

    fn cpu_ns(&self) -> u64 {
        cpu_ns(self.child.id()).unwrap_or(0)
    }

    fn finish(&mut self, forced: bool) -> End {
        self.reap();
        self.served.clear();
        self.why(forced)
    }
}

impl HotPlug for Qemu {
    fn plug(&mut self, id: Uuid, attached: &mut Attached) -> Result<()> {
        let (slot, served, end) = serve(&self.served, id, attached, self.folder.path())?;
        self.add(&slot, &end)?;
        self.served.insert(id, served);
        Ok(())
    }

    fn unplug(&mut self, id: Uuid) -> Result<()> {
        self.command("device_del", &json!({ "id": command::device_id(id) })).map(drop)
    }

    fn forget(&mut self, id: Uuid) {
        let Some(served) = self.served.remove(&id) else { return };
        self.forget_backend(id, matches!(served.front, Front::Disk(_)));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.reap();
    }
}

/// Serves a device for QEMU: its slot, what serves it, and QEMU's end of it.
fn serve(
    served: &BTreeMap<Uuid, Served>,
    id: Uuid,
    attached: &mut Attached,
    scratch: &Path,
) -> Result<(Slot, Served, OwnedFd)> {
    let is_disk = matches!(attached.device, Device::Disk { .. });
    let taken = |place: u8| {
        served.values().any(|one| one.place == place && matches!(one.front, Front::Disk(_)) == is_disk)
    };
    let place = (1..=PLACES).find(|place| !taken(*place)).ok_or_else(|| {
        Error::conflict("the VM has no free place for another device").remedy("detach one first")
    })?;
    let (what, front, end) = match attached.device {
        Device::Nic { mac, .. } => {
            let (pump, end) = Pump::start(attached.take_port()?)?;
            (SlotKind::Nic(mac), Front::Nic(pump), end)
        }
        Device::Disk { boot, .. } => {
            let (server, end) = DiskServer::start(attached.volume()?, &serial(id), scratch)?;
            (SlotKind::Disk(boot), Front::Disk(server), end)
        }
        _ => return Err(Error::internal("a device that is neither a disk nor a NIC was opened")),
    };
    Ok((Slot { id, place, fd: end.as_raw_fd(), what }, Served { place, front }, end))
}

/// Takes an event on the monitor's thread. Nobody hears what is told any more when the runner is about to end.
fn hear(event: qmp::Event, story: &Story, tell: &mpsc::Sender<Input>) {
    let input = match event {
        qmp::Event::Stop => Some(Input::Runs(false)),
        qmp::Event::Resume => Some(Input::Runs(true)),
        qmp::Event::DeviceDeleted(name) => command::attachment(&name).map(Input::Unplugged),
        qmp::Event::Shutdown { reason } => {
            story.lock().reason = Some(reason);
            None
        }
        qmp::Event::GuestPanicked => {
            story.lock().panicked = true;
            None
        }
        qmp::Event::Closed => {
            let mut told = story.lock();
            told.closed = true;
            story.changed.notify_all();
            // Without its monitor a QEMU can only be ended.
            told.reason.is_none().then_some(Input::Lost)
        }
    };
    if let Some(input) = input {
        let _ = tell.send(input);
    }
}

/// QEMU wants numbers as numbers in its monitor.
fn property(name: &str, value: String) -> Value {
    match (name, value.parse::<u64>()) {
        ("num-queues" | "bootindex", Ok(number)) => number.into(),
        ("disable-legacy", _) => "on".into(),
        _ => value.into(),
    }
}

/// User and system time from `/proc/PID/stat`, fields 14 and 15 in ticks of 10 ms.
fn cpu_ns(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system).saturating_mul(10_000_000))
}

/// Moves what the VM writes into the scroll-back until QEMU closes the console.
fn keep_console(mut from: UnixStream, folder: &VmFolder) -> Result<()> {
    let path = folder.console();
    let cannot = |e: io::Error| crate::files::cannot("opened", &path, &e);
    let mut to = ConsoleWriter::open(&path).map_err(cannot)?;
    let copy = move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            // A full disk must not stop the guest: what cannot be kept is lost.
            if let Err(error) = to.append(bytes.get(..count).unwrap_or_default()) {
                tracing::warn!(%error, "a piece of the console was lost");
            }
        }
    };
    let thread = std::thread::Builder::new().name("console".into()).spawn(copy);
    thread.map(drop).map_err(cannot)
}

/// Tells the loop when QEMU has exited; the loop collects the status, so the pid stays its own until then.
fn watch(child: &Child, tell: mpsc::Sender<Input>) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let wait = move || {
        while let Err(nix::errno::Errno::EINTR) =
            nix::sys::wait::waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        {}
        // Nobody hears any more when the runner is about to end.
        let _ = tell.send(Input::Exited);
    };
    let thread = std::thread::Builder::new().name("wait".into()).spawn(wait);
    thread.map(drop).map_err(|e| Error::unavailable("the VMM could not be watched").because(&e))
}

/// The end of what QEMU wrote to its log.
fn complaints(folder: &VmFolder) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(folder.vmm_log())?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(COMPLAINTS)))?;
        let mut bytes = Vec::new();
        file.take(COMPLAINTS).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    format!("the VMM's log ends with: {}", read().unwrap_or_default())
}

/// How long QEMU may take to make its devices: with a large memory and a busy host some seconds.
const START: Duration = Duration::from_secs(60);
/// The longest that QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what an ended QEMU has told may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(5);
const COMPLAINTS: u64 = 1024;
