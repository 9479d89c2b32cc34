//! What a caller listens to: changes of VMs, and consoles. Both look at files, so they need no runner.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::process::Adopted;
use iaas_core::process::Launcher;
use iaas_core::process::LockState;
use iaas_core::process::RoleHandle;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Pull;
use iaas_core::spi::hypervisor::Vm;
use uuid::Uuid;

use crate::files;
use crate::runner;
use crate::runner::console::ConsoleReader;
use crate::runner::record::VmFolder;

/// Names VMs whose files or runner have changed.
#[derive(Debug)]
pub(crate) struct ChangeFeed {
    vms: PathBuf,
    launcher: Launcher,
    known: Option<BTreeMap<Uuid, Look>>,
    changed: VecDeque<Uuid>,
}

/// What is compared: when the files were written, and whether a runner holds its lock.
type Look = (Option<SystemTime>, Option<SystemTime>, Option<LockState>);

impl ChangeFeed {
    pub(crate) fn new(vms: PathBuf, launcher: Launcher) -> Self {
        Self { vms, launcher, known: None, changed: VecDeque::new() }
    }

    fn look(&self) -> Result<BTreeMap<Uuid, Look>> {
        let entries = std::fs::read_dir(&self.vms).map_err(|e| files::cannot("read", &self.vms, &e))?;
        let ids = entries.filter_map(|entry| Uuid::try_parse(entry.ok()?.file_name().to_str()?).ok());
        Ok(ids.map(|id| (id, self.look_at(id))).collect())
    }

    fn look_at(&self, id: Uuid) -> Look {
        let folder = VmFolder::at(self.vms.join(id.to_string()));
        let written = |path: PathBuf| std::fs::metadata(path).and_then(|data| data.modified()).ok();
        let lives = self.launcher.folder(runner::ROLE, id).and_then(|role| role.lock_state()).ok();
        (written(folder.accepted()), written(folder.record()), lives)
    }
}

#[async_trait]
impl Pull<ObjectRef> for ChangeFeed {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        loop {
            if let Some(id) = self.changed.pop_front() {
                return Some(Ok(Id::<Vm>::from_uuid(id).object()));
            }
            let now = match self.look() {
                Ok(now) => now,
                Err(error) => return Some(Err(error)),
            };
            if let Some(before) = self.known.replace(now.clone()) {
                let differs = |id: &&Uuid| before.get(*id) != now.get(*id);
                let ids: std::collections::BTreeSet<&Uuid> = before.keys().chain(now.keys()).collect();
                self.changed.extend(ids.into_iter().filter(differs));
            }
            if self.changed.is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

/// A VM's console: what is kept, then what comes, until the VM has ended.
#[derive(Debug)]
pub(crate) struct ConsoleStream {
    vm: Id<Vm>,
    folder: VmFolder,
    launcher: Launcher,
    from: u64,
    reader: Option<ConsoleReader>,
}

impl ConsoleStream {
    pub(crate) fn new(vm: Id<Vm>, folder: VmFolder, launcher: Launcher, from: u64) -> Self {
        Self { vm, folder, launcher, from, reader: None }
    }

    /// The next bytes; empty if there are none yet.
    fn piece(&mut self) -> Result<Vec<u8>> {
        let path = self.folder.console();
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => match ConsoleReader::open(&path, self.from) {
                Ok(reader) => self.reader.insert(reader),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(e) => return Err(files::cannot("read", &path, &e)),
            },
        };
        reader.read(PIECE).map_err(|e| files::cannot("read", &path, &e))
    }

    /// Whether nothing can come any more: the VM is gone, or has ended and its runner too.
    async fn is_over(&self) -> Result<bool> {
        if !self.folder.path().exists() {
            return Ok(true);
        }
        if self.folder.load()?.is_none() {
            return Ok(false);
        }
        Ok(self.runner().await?.is_none())
    }

    async fn runner(&self) -> Result<Option<RoleHandle>> {
        match self.launcher.find(runner::ROLE, self.vm.uuid()).await? {
            Some((_, Adopted::Alive(handle))) => Ok(Some(handle)),
            Some((_, Adopted::Unclear(error))) => Err(error),
            Some((_, Adopted::Dead(_))) | None => Ok(None),
        }
    }
}

#[async_trait]
impl ByteStream for ConsoleStream {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        loop {
            // Asked before the bytes are read: what came before the end is not missed.
            let over = self.is_over().await?;
            let bytes = self.piece()?;
            if !bytes.is_empty() {
                return Ok(Some(bytes.into()));
            }
            if over {
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let runner = self.runner().await?;
        let runner = runner.ok_or_else(|| Error::conflict("the VM does not run").about(self.vm.object()))?;
        let mut rest = bytes;
        for _ in 0..TYPE_TRIES {
            let taken = runner.call(runner::CONSOLE_WRITE, rest.clone(), Vec::new(), TYPE).await?;
            let taken: usize = files::decode(&taken)?;
            rest = rest.slice(taken.min(rest.len())..);
            if rest.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(Error::timeout("the guest does not read its console").about(self.vm.object()))
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

/// How often files are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of one piece of a console.
const PIECE: usize = 64 << 10;
/// How long the runner may take to pass on what was typed, and how often the guest is given time to read it.
const TYPE: Duration = Duration::from_secs(5);
const TYPE_TRIES: u32 = 100;
