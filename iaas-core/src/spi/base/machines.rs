//! A hypervisor around [`Machines`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;

use super::fence::stamp;
use super::maker::Look;
use super::maker::Maker;
use super::maker::check_passport;
use super::maker::failed;
use super::notes;
use super::notes::Notes;
use super::provider;
use super::provider::Base;
use super::provider::blocking;
use crate::Boot;
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

/// How virtual machines are started, stopped and looked at.
///
/// A VM is known by its folder. It exists from before the VM is started until it is removed; put there whatever finds the
/// VM again, for your program may be killed and started again under running VMs. Removing the folder is not your task.
///
/// The base refuses devices, pauses and leases, so you see no spec with them.
pub trait Machines: Debug + Send + Sync + 'static {
    /// Your product's name and version.
    fn name(&self) -> &str;

    /// Refuses what you can never run, say an origin that is not yours. Bounds of sizes are checked already.
    fn check(&self, spec: &VmSpec) -> Result<()>;

    /// Starts the VM and returns without waiting for its guest. What the guest prints goes to `console`, which appends.
    ///
    /// It must be found by [`look`](Self::look) from its first moment, or not live past a crash of yours in the midst of this
    /// call. Never called for a VM that is on, nor twice for one boot.
    fn start(&self, folder: &Path, spec: &VmSpec, console: File) -> io::Result<()>;

    /// Presses the power button of a VM that is on, and returns. Whatever it does not heed is killed later.
    fn stop(&self, folder: &Path) -> io::Result<()>;

    /// Ends a VM that is on by force, and need not wait until it has ended.
    fn kill(&self, folder: &Path) -> io::Result<()>;

    /// Looks whether the VM is on, by what is there and not by what you remember. `Off` if it never was.
    fn look(&self, folder: &Path) -> io::Result<Power>;
}

/// What [`Machines::look`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Power {
    /// It runs.
    On,
    /// It does not, and has ended in good order if it was on.
    Off,
    /// It has ended badly: why, in words for the operator.
    Died(String),
}

/// Opens a hypervisor on `home`, a folder of its own: `<home>/<id>` is that of a VM, and `<home>/notes` the base's.
///
/// # Errors
/// `Conflict` if another one has the folder open and does not end within ten seconds; `Internal` if it cannot be used.
pub async fn hypervisor(
    host: Id<Host>,
    home: impl Into<PathBuf>,
    machines: Arc<dyn Machines>,
) -> Result<Arc<dyn Hypervisor>> {
    let home = home.into();
    let base = provider::open(home.join("notes"), move |notes| Vms {
        host,
        home,
        machines,
        notes: Arc::clone(notes),
    });
    Ok(Arc::new(base.await?))
}

#[derive(Debug)]
struct Vms {
    host: Id<Host>,
    home: PathBuf,
    machines: Arc<dyn Machines>,
    notes: Arc<Notes>,
}

/// The newest boot of a VM, kept from before it is started: that is why no number starts twice.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Started {
    boot: Boot,
    since: Stamp,
    /// Asked to stop; by force from this moment (`Stamp::mono_ns`) on.
    stop: Option<u64>,
    forced: bool,
    ended: Option<(Stamp, End)>,
    /// The last readings of all lives that ended.
    fin: Vec<Reading>,
}

impl Vms {
    fn folder(&self, vm: Id<Vm>) -> PathBuf {
        self.home.join(vm.to_string())
    }

    fn started(&self, vm: Id<Vm>) -> Result<Option<Started>> {
        self.notes.get(&key(vm))
    }

    fn keep(&self, vm: Id<Vm>, started: &Started) -> Result<()> {
        self.notes.put(&key(vm), Some(started))
    }

    fn power(&self, vm: Id<Vm>) -> Result<Power> {
        let folder = self.folder(vm);
        if !folder.exists() {
            return Ok(Power::Off);
        }
        self.machines.look(&folder).map_err(|e| failed("looking at the VM", &e))
    }

    /// Ends the VM and waits until it is gone.
    fn kill(&self, vm: Id<Vm>) -> Result<()> {
        let until = Instant::now() + LONGEST_DEATH;
        while self.power(vm)? == Power::On {
            if Instant::now() >= until {
                return Err(Error::unavailable("the VM was killed and does not end")
                    .remedy("look at its process on the host"));
            }
            self.machines.kill(&self.folder(vm)).map_err(|e| failed("killing the VM", &e))?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn start(&self, vm: Id<Vm>, spec: &VmSpec, started: Started) -> Result<()> {
        let folder = self.folder(vm);
        let console = open_console(&folder).map_err(|e| failed("opening the console", &e))?;
        self.keep(vm, &started)?;
        self.machines.start(&folder, spec, console).map_err(|e| failed("starting the VM", &e))
    }

    /// What has happened since the last look.
    fn settle(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Option<Started>> {
        let Some(mut started) = self.started(vm)?.filter(|s| s.ended.is_none()) else {
            return self.started(vm);
        };
        let now = stamp()?;
        let power = self.power(vm)?;
        if power == Power::On {
            if started.stop.is_some_and(|due| now.mono_ns >= due) {
                started.forced = true;
                self.keep(vm, &started)?;
                self.machines.kill(&self.folder(vm)).map_err(|e| failed("killing the VM", &e))?;
            }
            return Ok(Some(started));
        }
        let why = match (started.stop, power) {
            (Some(_), _) if started.forced => End::Forced,
            (Some(_), _) => End::Stopped,
            (None, Power::Died(why)) => End::Crashed(Error::internal("the VM has died").detail(why)),
            (None, _) => End::GuestOff,
        };
        started.fin.push(read(vm, spec, &started, now, true));
        started.ended = Some((now, why));
        self.keep(vm, &started)?;
        Ok(Some(started))
    }
}

fn key(vm: Id<Vm>) -> String {
    format!("boot-{}", vm.uuid())
}

/// Running time so far. The host's clock is also the sequence: it grows over a restart.
fn read(vm: Id<Vm>, spec: &VmSpec, started: &Started, at: Stamp, fin: bool) -> Reading {
    // A VM that did not survive a restart of its host: how long it ran is in the readings that were taken.
    let ran = if started.since.boot_id == at.boot_id { at.mono_ns } else { 0 };
    let ran = u128::from(ran.saturating_sub(started.since.mono_ns));
    let totals = BTreeMap::from([("vcpu-ns".to_owned(), ran * u128::from(spec.vcpus))]);
    Reading { of: vm.object(), term: spec.term, life: started.boot.0, seq: at.mono_ns, fin, at, totals }
}

fn open_console(folder: &Path) -> io::Result<File> {
    notes::make_folder(folder)?;
    File::options().append(true).create(true).mode(0o600).open(folder.join(CONSOLE))
}

impl Maker for Vms {
    type Kind = Vm;

    fn product(&self) -> String {
        self.machines.name().to_owned()
    }

    fn site(&self) -> Site {
        Site::Host(self.host)
    }

    fn caps(&self) -> &'static [&'static str] {
        &[cap::ADOPT]
    }

    fn check(&self, vm: Id<Vm>, _: Option<&VmSpec>, spec: &VmSpec) -> Result<()> {
        check_spec(spec)?;
        self.machines.check(spec)?;
        match (self.started(vm)?, spec.run) {
            (Some(old), Run::On(boot)) if boot < old.boot => {
                Err(Error::conflict(format!("boot {boot} is older than {}", old.boot)))
            }
            _ => Ok(()),
        }
    }

    fn make(&self, vm: Id<Vm>, spec: &VmSpec, _: bool) -> Result<()> {
        let folder = self.folder(vm);
        open_console(&folder).map_err(|e| failed("making the VM's folder", &e))?;
        let old = self.settle(vm, spec)?;
        match (spec.run, old) {
            (Run::On(boot), old) if old.as_ref().is_none_or(|old| old.boot < boot) => {
                if let Some(mut old) = old.filter(|old| old.ended.is_none()) {
                    old.stop = Some(u64::MAX);
                    self.keep(vm, &old)?;
                    self.kill(vm)?;
                    self.settle(vm, spec)?;
                }
                let fin = self.started(vm)?.map(|old| old.fin).unwrap_or_default();
                let since = stamp()?;
                self.start(vm, spec, Started { boot, since, stop: None, forced: false, ended: None, fin })
            }
            (Run::Off { grace }, Some(mut old)) if old.ended.is_none() && old.stop.is_none() => {
                let grace = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
                old.stop = Some(stamp()?.mono_ns.saturating_add(grace));
                self.keep(vm, &old)?;
                self.machines.stop(&folder).map_err(|e| failed("stopping the VM", &e))
            }
            _ => Ok(()),
        }
    }

    fn unmake(&self, vm: Id<Vm>) -> Result<()> {
        self.kill(vm)?;
        fs::remove_dir_all(self.folder(vm))
            .or_else(notes::if_gone)
            .map_err(|e| failed("removing the VM's folder", &e))?;
        self.notes.put(&key(vm), None::<&Started>)
    }

    fn look(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Look<Vm>> {
        let started = self.settle(vm, spec)?;
        let life = match &started {
            None => Life::Never,
            Some(Started { boot, ended: Some((_, why)), .. }) => {
                Life::Ended { boot: *boot, why: why.clone() }
            }
            Some(Started { boot, .. }) => Life::On(*boot),
        };
        let stopping = started.as_ref().is_some_and(|s| s.stop.is_some() && s.ended.is_none());
        let is = VmObserved {
            life,
            changed: started.as_ref().map(|s| s.ended.as_ref().map_or(s.since, |(at, _)| *at)),
            right: Right::Holds(spec.term),
            devices: BTreeMap::new(),
            accepts: Vec::new(),
            restart_for: Vec::new(),
        };
        let phase = match stopping {
            true => Phase::Working { done: 0, total: None, poll_in: POLL },
            false => Phase::Settled,
        };
        Ok(Look { phase, is, final_usage: started.map(|s| s.fin).unwrap_or_default() })
    }

    fn reading(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Option<Reading>> {
        let running = self.settle(vm, spec)?.filter(|s| s.ended.is_none());
        running.map(|s| Ok(read(vm, spec, &s, stamp()?, false))).transpose()
    }

    fn passport(&self, spec: &VmSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }

    fn kept(&self, spec: &VmSpec) -> VmSpec {
        VmSpec { metadata: None, ..spec.clone() }
    }
}

/// Refuses what the contract forbids, and what no machines of this base do.
fn check_spec(spec: &VmSpec) -> Result<()> {
    if !(1..=256).contains(&spec.vcpus) {
        return Err(Error::invalid(format!("a VM of {} vCPUs", spec.vcpus)).remedy("use 1 to 256"));
    }
    if spec.memory == 0 || !spec.memory.is_multiple_of(1 << 20) {
        return Err(Error::invalid(format!("a VM of {} bytes of memory", spec.memory))
            .remedy("use a multiple of 1 MiB"));
    }
    if let Origin::Kernel { cmdline, .. } = &spec.origin
        && (cmdline.len() > 2047 || !cmdline.bytes().all(|byte| (0x20..0x7f).contains(&byte)))
    {
        return Err(Error::invalid("the command line is too long or not printable ASCII")
            .remedy("use at most 2047 bytes of printable ASCII"));
    }
    check_passport(&spec.passport)?;
    if !spec.devices.is_empty() || spec.lease.is_some() || matches!(spec.run, Run::Paused(_)) {
        return Err(Error::unsupported("this hypervisor has no devices, leases or pauses")
            .remedy("leave them out, or use another host"));
    }
    Ok(())
}

#[async_trait]
impl Hypervisor for Base<Vms> {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        None
    }

    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        None
    }

    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.own(cx, vm)?;
        let (machines, folder) = (Arc::clone(&self.maker().machines), self.maker().folder(vm));
        Ok(Box::new(Console { machines, folder, at: from }))
    }
}

/// A console from an offset on, until the VM has ended.
struct Console {
    machines: Arc<dyn Machines>,
    folder: PathBuf,
    at: u64,
}

#[async_trait]
impl ByteStream for Console {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        loop {
            let (machines, folder, at) = (Arc::clone(&self.machines), self.folder.clone(), self.at);
            let (bytes, over) = blocking(move || piece(&*machines, &folder, at)).await?;
            if !bytes.is_empty() {
                self.at += bytes.len() as u64;
                return Ok(Some(bytes));
            }
            if over {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn write(&mut self, _: Bytes) -> Result<()> {
        Err(Error::unsupported("the consoles of this hypervisor are only read"))
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The bytes that are there from `at` on, and whether none can come behind them.
fn piece(machines: &dyn Machines, folder: &Path, at: u64) -> Result<(Bytes, bool)> {
    let file = match File::open(folder.join(CONSOLE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Bytes::new(), true)),
        opened => opened.map_err(|e| failed("opening the console", &e))?,
    };
    // Asked before the bytes are read: what came before the end is not missed.
    let over = machines.look(folder).map_err(|e| failed("looking at the VM", &e))? != Power::On;
    let mut bytes = vec![0; 4096];
    let count = file.read_at(&mut bytes, at).map_err(|e| failed("reading the console", &e))?;
    bytes.truncate(count);
    Ok((bytes.into(), over))
}

const CONSOLE: &str = "console";
/// Between two looks at a VM that is to end, or at a console.
const POLL: Duration = Duration::from_millis(10);
/// How long a process may take to end after it was killed: one in the kernel's uninterruptible sleep takes longest.
const LONGEST_DEATH: Duration = Duration::from_secs(30);
