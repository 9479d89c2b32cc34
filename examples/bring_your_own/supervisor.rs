//! A hypervisor: a process supervisor, whose "VM" is a shell that runs a command.
//!
//! A folder per VM has `console`, `pid` (its pid, and a lock that the child holds from birth) and, on a shelf of its own, what each boot came to. The
//! process holds a lock on its console from before it exists until it has ended: that is how a later supervisor finds it.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Digest;
use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::model::Host;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Phase;
use iaas_core::spi::Reading;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::base::FolderShelf;
use iaas_core::spi::base::Look;
use iaas_core::spi::base::Maker;
use iaas_core::spi::base::Shelf;
use iaas_core::spi::base::VmMaker;
use iaas_core::spi::base::stamp;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Right;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmObserved;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::hypervisor::cap;
use nix::sys::signal::Signal;
use nix::sys::signal::killpg;
use nix::unistd::Pid;
use serde::Deserialize;
use serde::Serialize;

/// What the shell does around the guest: a bounded console, its own identity first, the guest's exit code last.
const SHIM: &str = "ulimit -f 8192; echo $$ >pid.new; mv pid.new pid; sh -c \"$1\"; echo $? >exit";
const POLL: Duration = Duration::from_millis(5);

/// Supervises the processes of one host; it remembers nothing that is not in its folder.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) host: Id<Host>,
    pub(crate) folder: PathBuf,
}

/// The newest boot of a VM, kept from before its process starts: that is why no number starts twice.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    boot: Boot,
    since: Stamp,
    /// Asked to stop; by force from this moment (`Stamp::mono_ns`) on.
    stop: Option<u64>,
    ended: Option<(Stamp, End)>,
    /// The last readings of all lives that ended.
    fin: Vec<Reading>,
}

impl Supervisor {
    /// The only "kernel": a shell that runs its command line.
    pub(crate) fn kernel() -> Digest {
        Digest::of(b"/bin/sh")
    }

    pub(crate) fn at(&self, vm: Id<Vm>, file: &str) -> PathBuf {
        self.folder.join(vm.to_string()).join(file)
    }

    fn shelf(&self) -> Result<FolderShelf> {
        FolderShelf::open(self.folder.join("notes"))
    }

    fn note(&self, vm: Id<Vm>) -> Result<Option<Note>> {
        let path = self.folder.join("notes").join(vm.to_string());
        let Ok(bytes) = fs::read(path) else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::internal("an unreadable note").because(&e))
    }

    fn keep(&self, vm: Id<Vm>, note: Option<&Note>) -> Result<()> {
        let bytes = note.map(serde_json::to_vec).transpose();
        let bytes = bytes.map_err(|e| Error::internal("a note cannot be written").because(&e))?;
        self.shelf()?.put(&vm.to_string(), bytes.as_deref())
    }

    /// Whether a process of `vm` lives: it holds the lock that it was born with.
    fn lives(&self, vm: Id<Vm>) -> bool {
        File::open(self.at(vm, "console")).is_ok_and(|file| file.try_lock_shared().is_err())
    }

    pub(crate) fn signal(&self, vm: Id<Vm>, signal: Signal) -> bool {
        let pid = fs::read_to_string(self.at(vm, "pid")).ok().and_then(|text| text.trim().parse().ok());
        self.lives(vm) && pid.is_some_and(|pid| killpg(Pid::from_raw(pid), signal).is_ok())
    }

    /// Ends the process and waits until it is gone. Its first deed is to write its pid, so this finds it.
    async fn kill(&self, vm: Id<Vm>) {
        while self.lives(vm) {
            self.signal(vm, Signal::SIGKILL);
            tokio::time::sleep(POLL).await;
        }
    }

    fn start(&self, vm: Id<Vm>, command: &str) -> std::io::Result<()> {
        let folder = self.at(vm, "");
        for stale in ["pid", "exit"] {
            let _ = fs::remove_file(folder.join(stale));
        }
        let console = File::options().append(true).create(true).open(folder.join("console"))?;
        console.try_lock()?;
        let mut shell = Command::new("sh");
        shell.args(["-c", SHIM, "sh", command]).current_dir(&folder).process_group(0);
        let mut child = shell.stdin(Stdio::null()).stderr(console.try_clone()?).stdout(console).spawn()?;
        std::thread::spawn(move || child.wait()); // So that no zombie stays.
        Ok(())
    }

    /// What has happened since the last look.
    fn settle(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Option<Note>> {
        let Some(mut note) = self.note(vm)? else { return Ok(None) };
        let now = stamp()?;
        let overdue = note.stop.is_some_and(|due| now.mono_ns >= due);
        if note.ended.is_some() || self.lives(vm) && !(overdue && self.signal(vm, Signal::SIGKILL)) {
            return Ok(Some(note));
        }
        let exit = fs::read_to_string(self.at(vm, "exit")).ok();
        let why = match (note.stop, exit.as_deref().map(str::trim)) {
            (Some(_), _) if overdue => End::Forced,
            (Some(_), _) => End::Stopped,
            (None, Some("0")) => End::GuestOff,
            (None, code) => {
                End::Crashed(Error::internal("the process died").detail(format!("exit code {code:?}")))
            }
        };
        note.fin.push(read(vm, spec, &note, now, true));
        note.ended = Some((now, why));
        self.keep(vm, Some(&note))?;
        Ok(Some(note))
    }
}

/// Running time so far. The host's clock is also the sequence: it grows over a restart.
fn read(vm: Id<Vm>, spec: &VmSpec, note: &Note, at: Stamp, fin: bool) -> Reading {
    let ran = u128::from(at.mono_ns.saturating_sub(note.since.mono_ns));
    let totals = BTreeMap::from([("vcpu-ns".to_owned(), ran * u128::from(spec.vcpus))]);
    Reading { of: vm.object(), term: spec.term, life: note.boot.0, seq: at.mono_ns, fin, at, totals }
}

#[async_trait]
impl Maker for Supervisor {
    type Kind = Vm;
    fn product(&self) -> String {
        "supervisor 0.1".into()
    }
    fn site(&self) -> Site {
        Site::Host(self.host)
    }
    fn caps(&self) -> &'static [&'static str] {
        &[cap::ADOPT]
    }
    fn check(&self, old: Option<&VmSpec>, new: &VmSpec) -> Result<()> {
        let command = match &new.origin {
            Origin::Kernel { kernel, initrd: None, cmdline } if *kernel == Self::kernel() => cmdline,
            _ => {
                return Err(
                    Error::unsupported("a process has no such origin").remedy("use the shell as its kernel")
                );
            }
        };
        let printable = command.len() <= 2047 && command.bytes().all(|b| (0x20..0x7f).contains(&b));
        let sizes = (1..=256).contains(&new.vcpus) && new.memory > 0 && new.memory.is_multiple_of(1 << 20);
        if !printable || !sizes || new.passport.len() > 16 << 10 {
            return Err(Error::invalid("the command, the sizes or the passport are beyond the contract"));
        }
        if !new.devices.is_empty() || new.lease.is_some() || matches!(new.run, Run::Paused(_)) {
            return Err(Error::unsupported("a process has no devices, leases or pauses"));
        }
        match (old.map(|old| old.run), new.run) {
            (Some(Run::On(old)), Run::On(new)) if new < old => Err(Error::conflict("an older boot number")),
            _ => Ok(()),
        }
    }
    async fn make(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<()> {
        let failed = |e: std::io::Error| Error::internal("the process cannot be started").because(&e);
        fs::create_dir_all(self.at(vm, "")).map_err(|e| failed(e).outcome_is(Outcome::NotDone))?;
        let note = self.settle(vm, spec)?;
        match (spec.run, note) {
            (Run::On(boot), note) if note.as_ref().is_none_or(|note| note.boot < boot) => {
                if let Some(mut old) = note.clone().filter(|old| old.ended.is_none()) {
                    old.stop = Some(u64::MAX);
                    self.keep(vm, Some(&old))?;
                    self.kill(vm).await;
                    self.settle(vm, spec)?;
                }
                let fin = self.note(vm)?.map(|old| old.fin).unwrap_or_default();
                self.keep(vm, Some(&Note { boot, since: stamp()?, stop: None, ended: None, fin }))?;
                let Origin::Kernel { cmdline, .. } = &spec.origin else { return Ok(()) };
                self.start(vm, cmdline).map_err(failed)
            }
            (Run::Off { grace }, Some(mut note)) if note.ended.is_none() && note.stop.is_none() => {
                let grace = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
                note.stop = Some(stamp()?.mono_ns.saturating_add(grace));
                self.keep(vm, Some(&note))?;
                self.signal(vm, Signal::SIGTERM);
                Ok(())
            }
            _ => Ok(()),
        }
    }
    async fn unmake(&self, vm: Id<Vm>) -> Result<()> {
        self.kill(vm).await;
        self.keep(vm, None)?;
        fs::remove_dir_all(self.at(vm, "")).or_else(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(Error::internal("the folder of a process cannot be removed").because(&e)),
        })
    }
    async fn look(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Look<Vm>> {
        let note = self.settle(vm, spec)?;
        let life = match &note {
            None => Life::Never,
            Some(Note { boot, ended: Some((_, why)), .. }) => Life::Ended { boot: *boot, why: why.clone() },
            Some(Note { boot, .. }) => Life::On(*boot),
        };
        let stopping = note.as_ref().is_some_and(|n| n.stop.is_some() && n.ended.is_none());
        let is = VmObserved {
            life,
            changed: note.as_ref().map(|n| n.ended.as_ref().map_or(n.since, |(at, _)| *at)),
            right: Right::Holds(spec.term),
            devices: BTreeMap::new(),
            accepts: Vec::new(),
            restart_for: Vec::new(),
        };
        let phase =
            if stopping { Phase::Working { done: 0, total: None, poll_in: POLL } } else { Phase::Settled };
        Ok(Look { phase, is, final_usage: note.map(|n| n.fin).unwrap_or_default() })
    }
    async fn reading(&self, vm: Id<Vm>, spec: &VmSpec) -> Result<Option<Reading>> {
        let running = self.settle(vm, spec)?.filter(|note| note.ended.is_none());
        running.map(|note| Ok(read(vm, spec, &note, stamp()?, false))).transpose()
    }
    fn passport(&self, spec: &VmSpec) -> Option<Bytes> {
        Some(spec.passport.clone())
    }
    fn kept(&self, spec: &VmSpec) -> VmSpec {
        VmSpec { metadata: None, ..spec.clone() }
    }
}

#[async_trait]
impl VmMaker for Supervisor {
    async fn console(&self, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        let supervisor = Self { host: self.host, folder: self.folder.clone() };
        Ok(Box::new(Console { supervisor, vm, at: from }))
    }
}

/// A console from an offset on.
struct Console {
    supervisor: Supervisor,
    vm: Id<Vm>,
    at: u64,
}

#[async_trait]
impl ByteStream for Console {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        use std::os::unix::fs::FileExt;
        loop {
            let lives = self.supervisor.lives(self.vm);
            let mut bytes = vec![0; 4096];
            let file = File::open(self.supervisor.at(self.vm, "console"));
            let read = file.and_then(|file| file.read_at(&mut bytes, self.at)).unwrap_or(0);
            if read > 0 {
                self.at += read as u64;
                bytes.truncate(read);
                return Ok(Some(bytes.into()));
            }
            if !lives {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }
    async fn write(&mut self, _: Bytes) -> Result<()> {
        Err(Error::unsupported(format!("a {} of this supervisor reads nothing", Vm::NAME)))
    }
    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
