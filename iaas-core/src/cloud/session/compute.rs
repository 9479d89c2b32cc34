//! Instances and images.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;

use super::Family;
use super::Session;
use super::family::extends;
use crate::Error;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::Result;
use crate::cloud::Change;
use crate::cloud::Op;
use crate::engine::sites::Caller;
use crate::model::*;
use crate::security::actions;
use crate::security::actions::Create;
use crate::security::actions::CreateInstance;
use crate::security::actions::Nic;
use crate::security::actions::Reboot;
use crate::security::actions::Start;
use crate::security::actions::Stop;
use crate::spi::ByteStream;

/// Virtual machines.
#[derive(Clone, Debug)]
pub struct Instances(Family<Instance>);

extends!(Instances, Instance);

/// What an instance is made of.
#[derive(Clone, Debug)]
pub struct NewInstance {
    /// Its name.
    pub name: String,
    /// Its size.
    pub instance_type: Id<InstanceType>,
    /// What it starts from.
    pub image: Id<Image>,
    /// Added to the image's kernel command line.
    pub cmdline: String,
    /// Its interfaces.
    pub nics: Vec<Nic>,
    /// Its disks.
    pub volumes: Vec<Id<Volume>>,
}

impl Instances {
    /// Makes and starts an instance with its interfaces and disks, in one commit.
    pub fn launch(&self, project: Id<Project>, new: NewInstance) -> Change<CreateInstance> {
        let spec = InstanceSpec {
            instance_type: new.instance_type,
            image: new.image,
            cmdline: new.cmdline,
            key_pairs: Vec::new(),
            zone: None,
            power: Power::On,
        };
        let request = Name::new(new.name).map(|name| CreateInstance {
            project,
            name,
            labels: Labels::default(),
            spec,
            nics: new.nics,
            volumes: new.volumes,
        });
        Change::new(self.session(), request)
    }

    /// Asks for an instance in every detail.
    pub fn request(&self, request: CreateInstance) -> Change<CreateInstance> {
        Change::new(self.session(), Ok(request))
    }

    /// Starts an instance; one that runs goes on running.
    pub fn start(&self, id: Id<Instance>) -> Change<Start> {
        Change::new(self.session(), Ok(Start { id }))
    }

    /// Stops an instance: by its power button, after `grace` by force.
    pub fn stop(&self, id: Id<Instance>, grace: Duration) -> Change<Stop> {
        Change::new(self.session(), Ok(Stop { id, grace }))
    }

    /// Ends the running boot and starts anew.
    pub fn reboot(&self, id: Id<Instance>) -> Change<Reboot> {
        Change::new(self.session(), Ok(Reboot { id }))
    }

    /// Attaches a volume or port.
    pub fn attach(
        &self,
        project: Id<Project>,
        name: &str,
        spec: AttachmentSpec,
    ) -> Change<Create<Attachment>> {
        self.session().attachments().create(project, name, spec)
    }

    /// Reads the console from offset `from`, in bytes since the first output; then what comes.
    ///
    /// # Errors
    /// `NotFound` or `Denied` by the gate; `NotFound` while there is no virtual machine.
    pub async fn console(&self, id: Id<Instance>, from: u64) -> Result<ConsoleOutput> {
        let session = self.session();
        let permit = session.cloud().gate().check(session.principal(), actions::Console { id, from }).await?;
        let request = permit.request();
        stream(session, request.id, request.from).await.map(ConsoleOutput)
    }

    /// Opens the console for typing; that it was opened is in the audit log.
    ///
    /// # Errors
    /// As [`console`](Self::console).
    pub async fn console_input(&self, id: Id<Instance>) -> Result<ConsoleInput> {
        let opened: Op<Id<Instance>> = Change::new(self.session(), Ok(actions::ConsoleInput { id })).await?;
        stream(self.session(), opened.out, u64::MAX).await.map(ConsoleInput)
    }
}

async fn stream(session: &Session, id: Id<Instance>, from: u64) -> Result<Box<dyn ByteStream>> {
    let engine = session.cloud().engine();
    let host = engine.committer().read(|s| s.get(id).and_then(|i| i.bind.host));
    let (host, _) = host.ok_or_else(|| Error::not_found("the instance has no host").about(id.object()))?;
    let work = &engine.driver().work;
    let caller: &Caller = &work.caller;
    work.sites.host(host)?.hypervisor.console(&caller.own(), id.cast(), from).await
}

/// What an instance prints.
pub struct ConsoleOutput(Box<dyn ByteStream>);

impl ConsoleOutput {
    /// The next bytes; `None` when the virtual machine is gone.
    ///
    /// # Errors
    /// Those of the hypervisor.
    pub async fn read(&mut self) -> Result<Option<Bytes>> {
        self.0.read().await
    }
}

impl std::fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleOutput")
    }
}

/// What is typed into an instance.
pub struct ConsoleInput(Box<dyn ByteStream>);

impl ConsoleInput {
    /// Types `bytes`.
    ///
    /// # Errors
    /// Those of the hypervisor.
    pub async fn write(&mut self, bytes: impl Into<Bytes>) -> Result<()> {
        self.0.write(bytes.into()).await
    }
}

impl std::fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConsoleInput")
    }
}

/// What instances start from.
#[derive(Clone, Debug)]
pub struct Images(Family<Image>);

extends!(Images, Image);

impl Images {
    /// Makes an image of a Linux kernel and an initial RAM disk that lie in files.
    ///
    /// # Errors
    /// `Invalid` if a file cannot be read, is empty, or is no kernel for this machine: names it and says what to do.
    pub async fn import(
        &self,
        owner: impl Into<Owner>,
        name: &str,
        kernel: &Path,
        initrd: Option<&Path>,
        cmdline: &str,
    ) -> Result<Op<Id<Image>>> {
        let owner = owner.into();
        let kernel_bytes = read_file(kernel).await?;
        check_kernel(kernel, &kernel_bytes)?;
        let initrd_bytes = match initrd {
            Some(path) => Some(read_file(path).await?),
            None => None,
        };
        let spec = |kernel, initrd| ImageSpec::Kernel { kernel, initrd, cmdline: cmdline.to_owned() };
        let digests = (crate::Digest::of(&kernel_bytes), initrd_bytes.as_deref().map(crate::Digest::of));
        // The permit first: a stranger must not fill the blobs.
        self.create(owner, name, spec(digests.0, digests.1)).dry_run().await?;
        let blobs = &self.session().cloud().engine().driver().work.blobs;
        blobs.put(kernel_bytes).await?;
        if let Some(bytes) = initrd_bytes {
            blobs.put(bytes).await?;
        }
        self.create(owner, name, spec(digests.0, digests.1)).await
    }
}

async fn read_file(path: &Path) -> Result<Bytes> {
    let shown = path.display().to_string();
    let owned = path.to_owned();
    let read = move || {
        std::fs::metadata(&owned)
            .and_then(|m| if m.len() > MOST_BYTES { Ok(None) } else { std::fs::read(&owned).map(Some) })
    };
    let bytes =
        tokio::task::spawn_blocking(read).await.map_err(|e| Error::internal("a read failed").because(&e))?;
    match bytes {
        Ok(Some(bytes)) if bytes.is_empty() => {
            Err(Error::invalid(format!("`{shown}` is empty")).remedy("copy it again from where it came"))
        }
        Ok(Some(bytes)) => Ok(Bytes::from(bytes)),
        Ok(None) => Err(Error::invalid(format!("`{shown}` is larger than 1 GiB"))
            .remedy("use a smaller kernel or initrd")),
        Err(e) => Err(Error::invalid(format!("`{shown}` cannot be read: {}", e.kind()))
            .because(&e)
            .remedy("check the path and its permissions")),
    }
}

/// Refuses what this machine cannot start, before anything is kept.
///
/// # Source
/// Linux boot protocol (`Documentation/arch/x86/boot.rst`): `HdrS` at 0x202, `xloadflags` at 0x236 bit 0: a 64-bit kernel.
/// ELF: magic at 0, class at 4, machine at 18 (62 is x86-64).
fn check_kernel(path: &Path, bytes: &[u8]) -> Result<()> {
    let at = |from: usize, len: usize| bytes.get(from..from + len).unwrap_or_default();
    let bz = at(0x202, 4) == b"HdrS";
    let wide = bytes.get(0x236).is_some_and(|flags| flags & 1 == 1);
    let elf = at(0, 4) == b"\x7fELF";
    let elf64 = at(4, 1) == [2] && at(18, 2) == [62, 0];
    if (bz && wide) || (elf && elf64) {
        return Ok(());
    }
    let what = if bz || elf { "a kernel for another architecture" } else { "not a Linux kernel" };
    Err(Error::invalid(format!("`{}` is {what}", path.display()))
        .remedy("give an x86-64 bzImage or vmlinux, as in `/boot/vmlinuz-*-amd64`"))
}

/// The largest kernel or initrd.
const MOST_BYTES: u64 = 1 << 30;
