//! The hypervisor of one host: accepts specs durably and lets runners meet them, on KVM or in QEMU.
//!
//! `<state>/vms/<uuid>/` holds all that is known of a VM: what was accepted (written here), what its runner sees, its
//! console and its counters. Looking reads files and asks the kernel whether the runner lives; it never waits for a runner.
//! One step per call moves a VM towards its spec; what takes longer (a reboot waits for the old boot's end, a failing start
//! is tried again) goes on in a task that ends when the spec is met, replaced, or fenced off.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Entity;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::id::Cloud;
use iaas_core::model::Host;
use iaas_core::process::Adopted;
use iaas_core::process::HostFence;
use iaas_core::process::Launcher;
use iaas_core::process::RoleHandle;
use iaas_core::process::Roles;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Provider;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Tag;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::Handover;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmImage;
use iaas_core::spi::hypervisor::VmSpec;
use serde::Deserialize;
use serde::Serialize;
use tracing::Instrument;
use uuid::Uuid;

use crate::artifacts::ArtifactFolder;
use crate::check;
use crate::feed::ChangeFeed;
use crate::feed::ConsoleStream;
use crate::files;
use crate::runner;
use crate::runner::RunnerArgs;
use crate::runner::devices;
use crate::runner::record::VmFolder;
use crate::runner::record::VmRecord;
use crate::runner::wanted;
use crate::vmm::Vmm;

/// What a [`HostHypervisor`] works with.
#[derive(Clone, Debug)]
pub struct HypervisorConfig<V> {
    /// The state folder of the host, shared with its other providers.
    pub state: PathBuf,
    /// The folder for sockets; its path must be short.
    pub runtime: PathBuf,
    /// The cloud whose newest epoch `hello` tells; calls of others are served too.
    pub cloud: Id<Cloud>,
    /// The host.
    pub host: Id<Host>,
    /// The openers of this program; the same that its roles have.
    pub roles: Roles,
    /// The binary that has the role `runner`; `None` for this program itself.
    pub role_binary: Option<PathBuf>,
    /// What runs new guests. Those that run stay on what they were started on.
    pub vmm: V,
}

/// A [`Hypervisor`] whose VMs each have a runner, a process of their own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HostHypervisor<V> {
    inner: Arc<Inner<V>>,
}

/// A [`HostHypervisor`] whose guests run on machines of our own.
#[cfg(feature = "kvm")]
pub type KvmHypervisor = HostHypervisor<crate::vmm::Kvm>;

/// A [`HostHypervisor`] whose guests run in QEMU.
#[cfg(feature = "qemu")]
pub type QemuHypervisor = HostHypervisor<crate::vmm::Qemu>;

#[derive(Debug)]
struct Inner<V> {
    config: HypervisorConfig<V>,
    install: Uuid,
    vms: PathBuf,
    launcher: Launcher,
    artifacts: ArtifactFolder,
    /// One call at a time per VM.
    locks: Mutex<BTreeMap<Uuid, Arc<tokio::sync::Mutex<()>>>>,
    /// VMs that a task moves on, with what it last failed at.
    moving: Mutex<BTreeMap<Uuid, Option<Error>>>,
}

/// What the hypervisor accepted for a VM. The tag is readable even where the spec is not.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Accepted {
    version: u16,
    tag: Tag,
    leaving: bool,
    passport: Bytes,
    /// The spec as CBOR, without secrets.
    spec: Bytes,
}

impl Accepted {
    fn spec(&self) -> Result<VmSpec> {
        files::decode(&self.spec)
    }
}

/// Where a step has come to.
enum Step {
    Done,
    /// The next step is due when this runner has ended.
    After(RoleHandle),
}

impl<V: Vmm> HostHypervisor<V> {
    /// Opens the hypervisor of a host, which may have VMs from before.
    ///
    /// Blocks for some file accesses and for what the VMM looks at, mostly the self-test of KVM (milliseconds).
    ///
    /// # Errors
    /// `Unavailable`: the state folder cannot be used, or this machine cannot run guests in this way.
    pub fn open(config: HypervisorConfig<V>) -> Result<Self> {
        let config = HypervisorConfig { vmm: config.vmm.ready()?, ..config };
        let vms = config.state.join("vms");
        files::make_folder(&vms)?;
        let inner = Inner {
            install: files::install(&config.state)?,
            launcher: Launcher::new(&config.state, &config.runtime, config.role_binary.clone()),
            artifacts: ArtifactFolder::at(&config.state),
            vms,
            config,
            locks: Mutex::default(),
            moving: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What runs new guests.
    pub fn vmm(&self) -> &V {
        &self.inner.config.vmm
    }

    /// The running runner of `vm`, if there is one.
    pub async fn runner(&self, vm: Id<Vm>) -> Result<Option<RoleHandle>> {
        match self.inner.launcher.find(runner::ROLE, vm.uuid()).await? {
            Some((_, Adopted::Alive(handle))) => Ok(Some(handle)),
            _ => Ok(None),
        }
    }

    /// The folder of `vm`.
    pub fn folder(&self, vm: Id<Vm>) -> VmFolder {
        self.inner.folder(vm.uuid())
    }
}

impl<V: Vmm> Inner<V> {
    fn folder(&self, id: Uuid) -> VmFolder {
        VmFolder::at(self.vms.join(id.to_string()))
    }

    fn fence(&self, cloud: Id<Cloud>) -> Result<HostFence> {
        HostFence::open(&self.config.state, cloud, Site::Host(self.config.host))
    }

    fn lock_of(&self, id: Uuid) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        // Locks that nobody holds or waits for are forgotten, so the map stays as small as what is going on.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(id).or_default().clone()
    }

    fn ids(&self) -> Result<Vec<Uuid>> {
        let entries = std::fs::read_dir(&self.vms).map_err(|e| files::cannot("read", &self.vms, &e))?;
        let mut ids: Vec<Uuid> =
            entries.filter_map(|entry| Uuid::try_parse(entry.ok()?.file_name().to_str()?).ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn accepted(&self, id: Uuid) -> Result<Option<Accepted>> {
        files::load(&self.folder(id).accepted())
    }

    /// Stores what is accepted. The folder of a new VM appears with it, so there is none without a tag.
    fn accept(&self, id: Uuid, accepted: &Accepted) -> Result<()> {
        let folder = self.folder(id);
        if folder.path().exists() {
            return files::store(&folder.accepted(), accepted);
        }
        let fresh = VmFolder::at(self.vms.join(format!("{NEW}{id}")));
        files::gone(std::fs::remove_dir_all(fresh.path()), fresh.path())?;
        files::make_folder(fresh.path())?;
        files::store(&fresh.accepted(), accepted)?;
        std::fs::rename(fresh.path(), folder.path()).map_err(|e| files::cannot("made", folder.path(), &e))?;
        files::sync_folder(&self.vms)
    }

    /// The newest revision that stands in a tag of `incarnation`.
    fn newest_rev(&self, cloud: Id<Cloud>, incarnation: Uuid) -> Result<Rev> {
        let mut newest = Rev(0);
        for id in self.ids()? {
            let tag = self.accepted(id)?.map(|accepted| accepted.tag);
            let ours = tag.filter(|tag| tag.cloud == cloud && tag.incarnation == incarnation);
            newest = newest.max(ours.map_or(Rev(0), |tag| tag.rev));
        }
        Ok(newest)
    }

    fn hello(&self, cloud: Id<Cloud>) -> Result<Hello> {
        let newest = match self.fence(cloud)?.newest()? {
            Some((incarnation, epoch, rev)) => {
                Some((incarnation, epoch, rev.max(self.newest_rev(cloud, incarnation)?)))
            }
            None => None,
        };
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        Ok(Hello {
            product: format!("iaas-vmm {} {}", V::NAME, env!("CARGO_PKG_VERSION")),
            protocol: (1, 1),
            site: Site::Host(self.config.host),
            install: self.install,
            newest,
            seal_to: None,
            kinds: set(&[Vm::NAME]),
            caps: set(V::CAPS),
        })
    }

    /// Refuses what may not become of a VM, before anything has an effect.
    fn may_ensure(&self, call: &Call, id: Uuid, rev: Rev, spec: &VmSpec) -> Result<()> {
        let accepted = self.accepted(id)?;
        if let Some(accepted) = &accepted {
            own(accepted, call)?;
            if accepted.leaving {
                return Err(Error::conflict("the VM is being removed").remedy("wait until it is gone"));
            }
            if accepted.tag.incarnation == call.incarnation && rev < accepted.tag.rev {
                return Err(Error::conflict(format!(
                    "revision {rev} is older than {}, which was accepted",
                    accepted.tag.rev
                )));
            }
        }
        check::spec(spec)?;
        self.config.vmm.check(spec)?;
        devices::check(&self.config.roles, spec.devices.values())?;
        let before = self.folder(id).load()?.and_then(|record| record.boot());
        let before = before.max(accepted.and_then(|a| a.spec().ok()).and_then(|spec| wanted(spec.run)));
        if wanted(spec.run).zip(before).is_some_and(|(want, before)| want < before) {
            return Err(Error::conflict("a boot number below the last one").remedy("use a higher number"));
        }
        if let Origin::Kernel { kernel, initrd, .. } = &spec.origin {
            check::kernel(&self.artifacts.open(*kernel)?)?;
            initrd.map(|initrd| self.artifacts.open(initrd)).transpose()?;
        }
        Ok(())
    }

    async fn ensure(self: &Arc<Self>, call: &Call, id: Id<Vm>, rev: Rev, spec: &VmSpec) -> Result<Seen<Vm>> {
        let fence = self.fence(call.cloud)?;
        let _effect = fence.enter(call).await?;
        let lock = self.lock_of(id.uuid());
        let _one = lock.lock().await;
        self.may_ensure(call, id.uuid(), rev, spec).map_err(|e| e.about(id.object()))?;
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let stored = VmSpec { metadata: None, passport: Bytes::new(), ..spec.clone() };
        let accepted = Accepted {
            version: 1,
            tag,
            leaving: false,
            passport: spec.passport.clone(),
            spec: files::encode(&stored)?,
        };
        self.accept(id.uuid(), &accepted)?;
        let step = self.step(call, id.uuid()).await;
        if !matches!(step, Ok(Step::Done)) {
            self.keep_moving(call.clone(), id.uuid(), step);
        }
        let seen = self.look(id.uuid()).await?;
        let (_, seen) =
            seen.ok_or_else(|| Error::unavailable("the VM's folder vanished").about(id.object()))?;
        Ok(seen)
    }

    async fn remove(&self, call: &Call, id: Id<Vm>, upto: Rev) -> Result<()> {
        // Before the fence too: a copy of the store is told about the tag, not about its epoch.
        self.may_remove(call, id, upto)?;
        let fence = self.fence(call.cloud)?;
        let _effect = fence.enter(call).await?;
        let lock = self.lock_of(id.uuid());
        let _one = lock.lock().await;
        if let Some(mut accepted) = self.may_remove(call, id, upto)? {
            accepted.leaving = true;
            self.accept(id.uuid(), &accepted)?;
        }
        self.clear(call, id.uuid()).await.map_err(|e| e.outcome_is(Outcome::Unknown))
    }

    fn may_remove(&self, call: &Call, id: Id<Vm>, upto: Rev) -> Result<Option<Accepted>> {
        let Some(accepted) = self.accepted(id.uuid())? else { return Ok(None) };
        own(&accepted, call).map_err(|e| e.about(id.object()))?;
        if accepted.tag.incarnation != call.incarnation || accepted.tag.rev > upto {
            return Err(Error::conflict("the VM was changed by somebody who knows more")
                .remedy("look at it again")
                .about(id.object()));
        }
        Ok(Some(accepted))
    }

    /// Looks at a VM; what is there of it, and whether its runner lives.
    async fn look(&self, id: Uuid) -> Result<Option<(Accepted, Seen<Vm>)>> {
        let Some(accepted) = self.accepted(id)? else { return Ok(None) };
        let role = self.launcher.find(runner::ROLE, id).await?;
        // Read after the runner was looked at: a dead one writes no more.
        let alive = !matches!(role, None | Some((_, Adopted::Dead(_))));
        let record = self.record(id, alive)?;
        let spec = accepted.spec()?;
        let seen = Seen {
            applied: accepted.tag.rev,
            phase: self.phase(id, &accepted, spec.run, &record),
            at: files::stamp(),
            is: record.seen,
            final_usage: record.readings,
        };
        Ok(Some((accepted, seen)))
    }

    fn record(&self, id: Uuid, alive: bool) -> Result<VmRecord> {
        let folder = self.folder(id);
        let term = || self.accepted(id).ok().flatten().and_then(|a| a.spec().ok()).map(|spec| spec.term);
        let record = match folder.load()? {
            Some(record) => record,
            None => VmRecord::never(term().unwrap_or_default()),
        };
        if alive { Ok(record) } else { Ok(record.after_death(folder.reading()?)) }
    }

    /// What a running VM has used: now, or when its runner last wrote it down if that is busy. The last reading of an ended
    /// boot stands in what is observed, until the VM is removed.
    async fn reading(&self, id: Uuid) -> Result<Option<Reading>> {
        let Some((_, Adopted::Alive(runner))) = self.launcher.find(runner::ROLE, id).await? else {
            return Ok(None);
        };
        let fresh = runner.call(runner::USAGE, Bytes::new(), Vec::new(), COUNT).await;
        match fresh.and_then(|bytes| files::decode(&bytes)) {
            Ok(reading) => Ok(Some(reading)),
            Err(_) => Ok(self.folder(id).reading()?.filter(|reading| !reading.fin)),
        }
    }

    fn phase(&self, id: Uuid, accepted: &Accepted, run: Run, record: &VmRecord) -> Phase {
        if accepted.leaving {
            return Phase::Leaving;
        }
        let trouble = self.moving.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned().flatten();
        if let Some(trouble) = trouble {
            return Phase::Blocked(trouble);
        }
        let waits =
            |state: &DeviceState| matches!(state, DeviceState::Plugging | DeviceState::Unplugging { .. });
        let steady = !record.seen.devices.values().any(waits);
        let met = match (run, &record.seen.life) {
            (Run::Off { .. }, Life::Never | Life::Ended { .. }) => true,
            (Run::On(want) | Run::Paused(want), Life::Ended { boot, .. }) => want == *boot,
            (Run::On(want), Life::On(boot)) | (Run::Paused(want), Life::Paused(boot)) => {
                want == *boot && steady
            }
            _ => false,
        };
        if met { Phase::Settled } else { Phase::Working { done: 0, total: None, poll_in: POLL } }
    }

    /// Does what can be done now to bring a VM to what was accepted. Under the lock of the VM.
    async fn step(&self, call: &Call, id: Uuid) -> Result<Step> {
        let Some(accepted) = self.accepted(id)?.filter(|accepted| !accepted.leaving) else {
            return Ok(Step::Done);
        };
        let spec = accepted.spec()?;
        match self.launcher.find(runner::ROLE, id).await? {
            Some((passport, Adopted::Alive(handle))) => {
                let boot: Boot = files::decode(&passport)?;
                self.steer(call, &handle.on_behalf(call), boot, &spec).await
            }
            Some((_, Adopted::Unclear(error))) => Err(error),
            Some((_, Adopted::Dead(_))) => {
                if self.is_due(id, &spec)? {
                    self.launcher.forget(runner::ROLE, id).await?;
                    self.start(call, id, spec).await?;
                }
                Ok(Step::Done)
            }
            None => {
                if self.is_due(id, &spec)? {
                    self.start(call, id, spec).await?;
                }
                Ok(Step::Done)
            }
        }
    }

    /// Whether the boot that `spec` wants was never started.
    fn is_due(&self, id: Uuid, spec: &VmSpec) -> Result<bool> {
        let before = self.folder(id).load()?.and_then(|record| record.boot());
        Ok(wanted(spec.run).is_some_and(|want| before.is_none_or(|before| before < want)))
    }

    /// Tells a living runner what is wanted.
    async fn steer(&self, call: &Call, handle: &RoleHandle, boot: Boot, spec: &VmSpec) -> Result<Step> {
        let reboots = wanted(spec.run).is_some_and(|want| want > boot);
        let mut told = spec.clone();
        let mut fds = Vec::new();
        if reboots {
            told.run = Run::Off { grace: REBOOT_GRACE };
        } else {
            // Only the runner itself knows: what it wrote down may be older than what it was started with, and to prepare a
            // device that it has would take the device's socket away from it.
            let needs = handle.call(runner::NEEDS, files::encode(&told)?, Vec::new(), patience(call)).await;
            let needs: BTreeSet<Uuid> = match needs {
                Ok(needs) => files::decode(&needs)?,
                Err(_) if !handle.is_alive()? => return Ok(Step::After(handle.clone())),
                Err(error) => return Err(error),
            };
            let come = spec.devices.iter().filter(|(id, _)| needs.contains(id));
            fds = devices::prepare(&self.config.roles, come)?;
        }
        let sent = handle.call(runner::APPLY, files::encode(&told)?, fds, patience(call)).await;
        match sent {
            Ok(_) => Ok(if reboots { Step::After(handle.clone()) } else { Step::Done }),
            // It ended meanwhile: what that means is seen in the next step.
            Err(_) if !handle.is_alive()? => Ok(Step::After(handle.clone())),
            Err(error) => Err(error),
        }
    }

    /// Starts a runner for the boot that `spec` wants. The runner itself takes the boot number, durably, before QEMU runs.
    async fn start(&self, call: &Call, id: Uuid, spec: VmSpec) -> Result<()> {
        let Some(boot) = wanted(spec.run) else { return Ok(()) };
        let mut fds = devices::prepare(&self.config.roles, &spec.devices)?;
        if let Origin::Kernel { kernel, initrd, .. } = &spec.origin {
            fds.push((runner::KERNEL_FD.to_owned(), self.artifacts.open(*kernel)?.into()));
            if let Some(initrd) = initrd {
                fds.push((runner::INITRD_FD.to_owned(), self.artifacts.open(*initrd)?.into()));
            }
        }
        let on = self.config.vmm.runs_on()?;
        let folder =
            std::path::absolute(self.folder(id).path()).map_err(|e| files::cannot("named", &self.vms, &e))?;
        let args = files::encode(&RunnerArgs { folder, spec, on })?;
        let passport = files::encode(&boot)?;
        let started = self.launcher.spawn_traced(runner::ROLE, id, passport, args, fds, call.trace.clone());
        started.await.map(drop)
    }

    /// Goes on with a VM until its spec is met.
    fn keep_moving(self: &Arc<Self>, call: Call, id: Uuid, first: Result<Step>) {
        {
            let mut moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
            let trouble = first.as_ref().err().cloned();
            if moving.insert(id, trouble).is_some() {
                return;
            }
        }
        let this = self.clone();
        tokio::spawn(async move {
            let mut last = first;
            loop {
                match last {
                    Ok(Step::Done) => break,
                    Ok(Step::After(old)) => drop(old.exited().await),
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
                // A newer leader goes on with it in its own way.
                let Ok(fence) = this.fence(call.cloud) else { break };
                let Ok(_effect) = fence.enter(&call).await else { break };
                let lock = this.lock_of(id);
                let _one = lock.lock().await;
                last = this.step(&call, id).await;
                let mut moving = this.moving.lock().unwrap_or_else(PoisonError::into_inner);
                moving.insert(id, last.as_ref().err().cloned());
            }
            this.moving.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
    }

    /// Removes what is left of a VM. Under the lock of the VM.
    async fn clear(&self, call: &Call, id: Uuid) -> Result<()> {
        if let Some((_, Adopted::Alive(handle))) = self.launcher.find(runner::ROLE, id).await?
            && let Some(accepted) = self.accepted(id)?
        {
            // Politely first, so that volumes are given back; by force whatever comes of it.
            let mut spec = accepted.spec()?;
            spec.run = Run::Off { grace: Duration::ZERO };
            let told = handle.call(runner::APPLY, files::encode(&spec)?, Vec::new(), LAST_WORDS).await;
            if told.is_ok() {
                let _ = tokio::time::timeout(LAST_WORDS.min(patience(call)), handle.exited()).await;
            }
        }
        self.launcher.forget(runner::ROLE, id).await?;
        self.delete(id)
    }

    /// The accepted file goes last, so that what a crash leaves still says whose it was.
    fn delete(&self, id: Uuid) -> Result<()> {
        let folder = self.folder(id);
        let entries = match std::fs::read_dir(folder.path()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(files::cannot("read", folder.path(), &e)),
        };
        for entry in entries.flatten().filter(|entry| entry.path() != folder.accepted()) {
            files::gone(std::fs::remove_file(entry.path()), &entry.path())?;
        }
        files::gone(std::fs::remove_file(folder.accepted()), &folder.accepted())?;
        files::gone(std::fs::remove_dir(folder.path()), folder.path())?;
        files::sync_folder(&self.vms)
    }

    /// Removes folders that a crash left between a name and its content, and goes on with what a crash interrupted.
    async fn resume(self: &Arc<Self>, call: &Call) -> Result<()> {
        let entries = std::fs::read_dir(&self.vms).map_err(|e| files::cannot("read", &self.vms, &e))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(NEW) {
                files::gone(std::fs::remove_dir_all(entry.path()), &entry.path())?;
            }
        }
        for id in self.ids()? {
            match self.look(id).await {
                Ok(Some((accepted, seen))) if accepted.tag.cloud == call.cloud => {
                    if matches!(seen.phase, Phase::Working { .. }) {
                        self.keep_moving(
                            call.clone(),
                            id,
                            Err(Error::unavailable("the VM is looked at again")),
                        );
                    }
                }
                // Without a tag it holds nothing: `remove_dir` only takes it if it is empty.
                Ok(None) => drop(std::fs::remove_dir(self.folder(id).path())),
                // Seen by `inventory`, and no reason not to lead.
                Ok(Some(_)) | Err(_) => {}
            }
        }
        Ok(())
    }
}

#[async_trait]
impl<V: Vmm> Provider for HostHypervisor<V> {
    async fn hello(&self) -> Result<Hello> {
        self.inner.hello(self.inner.config.cloud)
    }

    async fn claim(&self, cx: &Ctx) -> Result<Hello> {
        self.inner.fence(cx.call.cloud)?.claim(&cx.call).await?;
        self.inner.resume(&cx.call).await?;
        self.inner.hello(cx.call.cloud)
    }

    async fn changes(&self, _cx: &Ctx) -> Result<Feed<ObjectRef>> {
        Ok(Box::new(ChangeFeed::new(self.inner.vms.clone(), self.inner.launcher.clone())))
    }

    async fn usage(&self, cx: &Ctx, after: Option<ObjectRef>, limit: usize) -> Result<Vec<Reading>> {
        let mut readings = Vec::new();
        for id in self.inner.ids()? {
            let of = Id::<Vm>::from_uuid(id).object();
            let ours = self.inner.accepted(id)?.is_some_and(|a| a.tag.cloud == cx.call.cloud);
            if !ours || after.as_ref().is_some_and(|after| of <= *after) || readings.len() >= limit {
                continue;
            }
            readings.extend(self.inner.reading(id).await?);
        }
        Ok(readings)
    }
}

#[async_trait]
impl<V: Vmm> Converge<Vm> for HostHypervisor<V> {
    #[tracing::instrument(name = "vm.ensure", skip_all, fields(op = %cx.call.op, vm = %id))]
    async fn ensure(&self, cx: &Ctx, id: Id<Vm>, rev: Rev, spec: &VmSpec) -> Result<Seen<Vm>> {
        let (inner, call, spec) = (self.inner.clone(), cx.call.clone(), spec.clone());
        to_its_end(async move { inner.ensure(&call, id, rev, &spec).await }).await
    }

    #[tracing::instrument(name = "vm.remove", skip_all, fields(op = %cx.call.op, vm = %id))]
    async fn remove(&self, cx: &Ctx, id: Id<Vm>, upto: Rev) -> Result<()> {
        let (inner, call) = (self.inner.clone(), cx.call.clone());
        to_its_end(async move { inner.remove(&call, id, upto).await }).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<Vm>) -> Result<Option<Seen<Vm>>> {
        let seen = self.inner.look(id.uuid()).await?;
        Ok(seen.filter(|(accepted, _)| accepted.tag.cloud == cx.call.cloud).map(|(_, seen)| seen))
    }

    async fn inventory(&self, cx: &Ctx, after: Option<Id<Vm>>, limit: usize) -> Result<Vec<Found<Vm>>> {
        let mut found = Vec::new();
        for id in self.inner.ids()?.into_iter().map(Id::<Vm>::from_uuid) {
            if found.len() >= limit || after.is_some_and(|after| id <= after) {
                continue;
            }
            let Some(accepted) = self.inner.accepted(id.uuid())? else { continue };
            if accepted.tag.cloud != cx.call.cloud {
                continue;
            }
            let seen = match self.inner.look(id.uuid()).await {
                Ok(Some((_, seen))) => Ok(seen),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            found.push(Found { id, tag: accepted.tag, passport: Some(accepted.passport), seen });
        }
        Ok(found)
    }
}

#[async_trait]
impl<V: Vmm> Hypervisor for HostHypervisor<V> {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        None
    }

    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        None
    }

    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        if self.observe(cx, vm).await?.is_none() {
            return Err(Error::not_found("there is no VM with this id on the host").about(vm.object()));
        }
        Ok(Box::new(ConsoleStream::new(vm, self.inner.folder(vm.uuid()), self.inner.launcher.clone(), from)))
    }
}

/// Runs `work` to its end even if the caller stops waiting: it loses only the answer.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(work.in_current_span()).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on a VM ended abruptly").because(&e)),
    }
}

fn own(accepted: &Accepted, call: &Call) -> Result<()> {
    if accepted.tag.cloud == call.cloud {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Conflict, "this id is taken by something that is not ours"))
}

/// How long a runner may take to answer: what the caller has left, within reason.
fn patience(call: &Call) -> Duration {
    call.budget.clamp(Duration::from_millis(100), Duration::from_secs(60))
}

/// Before the id in the name of a folder that is being made.
const NEW: &str = ".new-";
/// When to look again at a VM that is on its way.
const POLL: Duration = Duration::from_millis(50);
/// How long a guest may take to go down when it is booted again.
const REBOOT_GRACE: Duration = Duration::from_secs(5);
/// How long a runner that is removed may take to give its volumes back.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long a runner may take to read its counters.
const COUNT: Duration = Duration::from_secs(2);
/// When a step that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
