//! A QEMU child with its sockets: the monitor, the console, and a thread that waits for its end.

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
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::VmSpec;
use nix::sys::socket::MsgFlags;
use nix::sys::wait::Id;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use uuid::Uuid;

use super::RunnerArgs;
use super::console::ConsoleWriter;
use super::machine::Input;
use super::record::VmFolder;
use crate::jail;
use crate::qemu::command;
use crate::qemu::command::Slot;
use crate::qemu::qmp::Qmp;

/// What a QEMU starts with.
#[derive(Debug)]
pub(super) struct Boot<'a> {
    pub(super) id: Uuid,
    pub(super) spec: &'a VmSpec,
    pub(super) slots: Vec<Slot>,
    /// QEMU's ends of the slots' sockets.
    pub(super) ends: Vec<OwnedFd>,
    pub(super) kernel: Option<OwnedFd>,
    pub(super) initrd: Option<OwnedFd>,
}

/// A QEMU that was started.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    monitor: Option<UnixStream>,
    console: UnixStream,
    monitor_ready: Option<Qmp>,
    status: Option<ExitStatus>,
}

/// Starts QEMU. From the main thread only: the child dies with the thread that made it.
pub(super) fn spawn(
    args: &RunnerArgs,
    boot: Boot<'_>,
    folder: &VmFolder,
    tell: &mpsc::Sender<Input>,
) -> Result<Running> {
    let cannot = |e: io::Error| Error::unavailable("the VMM could not be started").because(&e);
    let (monitor, monitor_end) = UnixStream::pair().map_err(cannot)?;
    let (console, console_end) = UnixStream::pair().map_err(cannot)?;
    let machine = command::Machine {
        id: boot.id,
        spec: boot.spec,
        accel: args.accel,
        monitor: monitor_end.as_raw_fd(),
        console: console_end.as_raw_fd(),
        kernel: boot.kernel.as_ref().map(AsRawFd::as_raw_fd),
        initrd: boot.initrd.as_ref().map(AsRawFd::as_raw_fd),
        slots: boot.slots,
    };
    let log = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(folder.vmm_log());
    let mut command = Command::new(&args.qemu);
    command
        .args(command::arguments(&machine))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_err(cannot)?);
    let mut given = vec![OwnedFd::from(monitor_end), OwnedFd::from(console_end)];
    given.extend(boot.ends);
    given.extend(boot.kernel.into_iter().chain(boot.initrd));
    let child = jail::spawn_bound(&mut command, &given).map_err(cannot)?;
    drop(given);
    keep_console(console.try_clone().map_err(cannot)?, folder)?;
    watch(&child, tell.clone())?;
    Ok(Running { child, monitor: Some(monitor), console, monitor_ready: None, status: None })
}

impl Running {
    /// Waits until the monitor works: QEMU has then made all devices.
    pub(super) fn greet(&mut self, tell: &mpsc::Sender<Input>) -> Result<()> {
        let Some(stream) = self.monitor.take() else { return Ok(()) };
        let tell = tell.clone();
        // Nobody hears any more when the runner is about to end.
        let qmp = Qmp::connect(stream, START, move |event| drop(tell.send(Input::Monitor(event))))?;
        self.monitor_ready = Some(qmp);
        Ok(())
    }

    /// The monitor.
    pub(super) fn qmp(&mut self) -> Result<&mut Qmp> {
        self.monitor_ready.as_mut().ok_or_else(|| Error::conflict("the VM is still starting"))
    }

    /// Types into the console; says how many bytes the guest had room for.
    pub(super) fn type_in(&self, bytes: &[u8]) -> Result<usize> {
        match nix::sys::socket::send(
            self.console.as_raw_fd(),
            bytes,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        ) {
            Ok(count) => Ok(count),
            Err(nix::errno::Errno::EAGAIN) => Ok(0),
            Err(e) => Err(Error::unavailable("the console does not work").because(&e)),
        }
    }

    /// Kills QEMU; harmless if it has exited.
    pub(super) fn kill(&mut self) {
        if self.status.is_none()
            && let Err(error) = self.child.kill()
        {
            tracing::warn!(%error, "the VMM could not be killed");
        }
    }

    /// Collects the exit status, waiting for it.
    pub(super) fn reap(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.wait().ok();
        }
        self.status
    }

    /// Processor time of all its threads so far.
    pub(super) fn cpu_ns(&self) -> u64 {
        cpu_ns(self.child.id()).unwrap_or(0)
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
pub(super) fn complaints(folder: &VmFolder) -> String {
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
const COMPLAINTS: u64 = 1024;
