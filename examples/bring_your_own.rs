//! Parts of your own: an authorizer, a storage and a hypervisor, each proven by the public suite of its contract.
//!
//! Written from the documentation of `iaas_core::spi` alone; its `base` keeps the contracts of the latter two.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use iaas_core::security::rbac::Rbac;
use iaas_core::spi::authorizer::{Ask, Authorizer, Decision, PolicyUpdate};
use iaas_core::spi::base::{Disk, Disks, Machines, Power};
use iaas_core::spi::block::{PoolVolume, PoolVolumeSpec};
use iaas_core::spi::hypervisor::{Origin, VmSpec};
use iaas_core::spi::network::Synced;
use iaas_core::testing::conformance::{Report, authorizer, hypervisor, own, volume_access, volume_pool};
use iaas_core::{Digest, Error, Id, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Roles decide, and one rule of the house: only who is on call may delete what holds data.
#[derive(Debug, Default)]
struct House(Rbac);

#[async_trait]
impl Authorizer for House {
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced> {
        self.0.load(up).await
    }

    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>> {
        let mut decisions = self.0.decide(ask).await?;
        if ask.who.groups.iter().any(|group| group == "on-call") {
            return Ok(decisions);
        }
        for ((action, _), decision) in ask.queries.iter().zip(&mut decisions) {
            if decision.allowed && action == "volume.delete" {
                *decision = Decision { allowed: false, because: "only on-call deletes data".into() };
            }
        }
        Ok(decisions)
    }
}

/// A storage whose disks are bytes in RAM.
#[derive(Debug, Default)]
struct Ram(Mutex<BTreeMap<Id<PoolVolume>, Arc<RamDisk>>>);

#[derive(Debug, Default)]
struct RamDisk(Mutex<Vec<u8>>);

impl Disks for Ram {
    fn name(&self) -> &'static str {
        "ram"
    }

    fn check(&self, spec: &PoolVolumeSpec) -> Result<()> {
        if spec.size > 64 << 20 {
            return Err(Error::invalid("RAM is precious").remedy("use at most 64 MiB"));
        }
        Ok(())
    }

    fn make(&self, id: Id<PoolVolume>, size: u64) -> io::Result<()> {
        let mut all = lock(&self.0);
        let disk = all.entry(id).or_default();
        lock(&disk.0).resize(usize::try_from(size).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn remove(&self, id: Id<PoolVolume>) -> io::Result<()> {
        lock(&self.0).remove(&id);
        Ok(())
    }

    fn open(&self, id: Id<PoolVolume>) -> io::Result<Arc<dyn Disk>> {
        Ok(lock(&self.0).get(&id).cloned().ok_or(io::ErrorKind::NotFound)?)
    }
}

impl RamDisk {
    fn part(&self, at: u64, len: usize, act: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let at = usize::try_from(at).map_err(io::Error::other)?;
        let mut bytes = lock(&self.0);
        act(bytes.get_mut(at..at.saturating_add(len)).ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }
}

impl Disk for RamDisk {
    fn size(&self) -> u64 {
        lock(&self.0).len() as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.part(at, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.part(at, from.len(), |bytes| bytes.copy_from_slice(from))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A hypervisor whose machines are shells that run a command. A shell holds a lock on its console for as long as it lives,
/// and waits for a word on its stdin: should we die before `pid` is written, it ends.
#[derive(Debug)]
struct Supervisor;

const SHELL: &str = "read -r go && { ulimit -f 8192; sh -c \"$1\"; echo $? >exit; }";

impl Supervisor {
    fn kernel() -> Digest {
        Digest::of(b"/bin/sh")
    }

    fn signal(&self, vm: &Path, signal: Signal) -> io::Result<()> {
        let pid = std::fs::read_to_string(vm.join("pid"))?.parse().map_err(io::Error::other)?;
        Ok(killpg(Pid::from_raw(pid), signal)?)
    }
}

impl Machines for Supervisor {
    fn name(&self) -> &str {
        "supervisor 0.1"
    }

    fn check(&self, spec: &VmSpec) -> Result<()> {
        match &spec.origin {
            Origin::Kernel { kernel, initrd: None, .. } if *kernel == Self::kernel() => Ok(()),
            _ => Err(Error::unsupported("it only runs a shell").remedy("use the shell as its kernel")),
        }
    }

    fn start(&self, vm: &Path, spec: &VmSpec, console: File) -> io::Result<()> {
        let Origin::Kernel { cmdline, .. } = &spec.origin else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let _ = std::fs::remove_file(vm.join("exit")); // That of an older boot, if there was one.
        console.lock()?;
        let mut shell = Command::new("sh");
        shell.args(["-c", SHELL, "sh", cmdline]).current_dir(vm).process_group(0).stdin(Stdio::piped());
        let mut child = shell.stderr(console.try_clone()?).stdout(console).spawn()?;
        std::fs::write(vm.join("pid"), child.id().to_string())?;
        let told = child.stdin.take().map_or(Ok(()), |mut stdin| io::Write::write_all(&mut stdin, b"go\n"));
        std::thread::spawn(move || child.wait()); // So that no zombie stays.
        told
    }

    fn stop(&self, vm: &Path) -> io::Result<()> {
        self.signal(vm, Signal::SIGTERM)
    }

    fn kill(&self, vm: &Path) -> io::Result<()> {
        self.signal(vm, Signal::SIGKILL)
    }

    fn look(&self, vm: &Path) -> io::Result<Power> {
        if File::open(vm.join("console"))?.try_lock_shared().is_err() {
            return Ok(Power::On);
        }
        match std::fs::read_to_string(vm.join("exit")) {
            Ok(code) if code.trim() == "0" => Ok(Power::Off),
            code => Ok(Power::Died(format!("exit code {code:?}"))),
        }
    }
}

#[tokio::main]
async fn main() {
    let (size, cmdline) = (256 << 10, "echo the guest is up; exec sleep 600".to_owned());
    let origin = Origin::Kernel { kernel: Supervisor::kernel(), initrd: None, cmdline };
    let vm = VmSpec::new(1, 1 << 20, origin);
    show(&authorizer::run(&House::default).await);
    show(&volume_pool::run(&own::pool(Ram::default, size)).await);
    show(&volume_access::run(&own::access(Ram::default, size)).await);
    show(&hypervisor::run(&own::hypervisor(|| Supervisor, vm)).await);
    println!("OK");
}

/// Prints what came of each clause, and ends the program if one is broken.
fn show(report: &Report) {
    println!("{report:#}");
    report.assert_clean();
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
