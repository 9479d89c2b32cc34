//! A host of its own in a temporary folder, with the guest that `cargo xtask setup` made.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Digest;
use iaas_core::Epoch;
use iaas_core::Id;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::process::Roles;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Phase;
use iaas_core::spi::Provider;
use iaas_core::spi::Seen;
use iaas_core::spi::artifact::Artifacts;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use iaas_vmm::HostArtifacts;
use iaas_vmm::HostHypervisor;
use iaas_vmm::HypervisorConfig;
use uuid::Uuid;

use super::disk::PlainFile;
use super::disk::SCHEME;

pub(crate) fn roles() -> Roles {
    Roles::new().with_role(iaas_vmm::runner()).with_block(PlainFile).with_port(super::port::Cable)
}

/// What must be there to run a guest, or why it is not.
pub(crate) fn guest_files() -> Result<(PathBuf, PathBuf), String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let folder = std::env::var_os("IAAS_GUEST_DIR").map_or(workspace, PathBuf::from);
    let (kernel, initrd) = (folder.join("vmlinuz"), folder.join("initrd.cpio.gz"));
    if kernel.is_file() && initrd.is_file() {
        return Ok((kernel, initrd));
    }
    Err(format!(
        "no guest in {}; run `cargo xtask setup`, or name its folder in IAAS_GUEST_DIR",
        folder.display()
    ))
}

pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) hypervisor: HostHypervisor<super::Vmm>,
    pub(crate) cx: Ctx,
    pub(crate) kernel: Digest,
    pub(crate) initrd: Digest,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let (kernel, initrd) = guest_files().expect("checked before");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let cx = context(1);
        let hypervisor = open(dir.path());
        hypervisor.claim(&cx).await.expect("claim");
        let artifacts =
            HostArtifacts::open(&dir.path().join("state"), cx.call.cloud, HOST).expect("artifacts");
        let kernel = upload(&artifacts, &cx, 1, &kernel).await;
        let initrd = upload(&artifacts, &cx, 2, &initrd).await;
        Self { dir, hypervisor, cx, kernel, initrd }
    }

    /// A new provider on the same folder, as after a crash of control.
    pub(crate) async fn reopen(&mut self, epoch: u64) {
        self.cx = context(epoch);
        self.hypervisor = open(self.dir.path());
        self.hypervisor.claim(&self.cx).await.expect("claim");
    }

    pub(crate) fn spec(&self, run: Run) -> VmSpec {
        VmSpec {
            term: Term(1),
            run,
            vcpus: 1,
            memory: 192 << 20,
            origin: Origin::Kernel {
                kernel: self.kernel,
                initrd: Some(self.initrd),
                cmdline: "console=ttyS0 panic=-1 quiet guest.run=shell guest.ip4=10.0.0.2/24".into(),
            },
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Bytes::from_static(b"who am I"),
        }
    }

    pub(crate) async fn ensure(&self, vm: Id<Vm>, rev: u64, spec: &VmSpec) -> Seen<Vm> {
        self.hypervisor.ensure(&self.cx, vm, Rev(rev), spec).await.expect("ensure")
    }

    pub(crate) async fn seen(&self, vm: Id<Vm>) -> Seen<Vm> {
        self.hypervisor.observe(&self.cx, vm).await.expect("observe").expect("the VM is there")
    }

    pub(crate) async fn settled(&self, vm: Id<Vm>) -> Seen<Vm> {
        let mut last = None;
        for _ in 0..PATIENCE {
            let seen = self.seen(vm).await;
            match seen.phase {
                Phase::Settled => return seen,
                _ => last = Some(seen),
            }
            tokio::time::sleep(STEP).await;
        }
        panic!("the VM does not settle: {last:#?}");
    }

    pub(crate) async fn until(&self, vm: Id<Vm>, is: impl Fn(&Seen<Vm>) -> bool) -> Seen<Vm> {
        let mut last = None;
        for _ in 0..PATIENCE {
            let seen = self.seen(vm).await;
            if is(&seen) {
                return seen;
            }
            last = Some(seen);
            tokio::time::sleep(STEP).await;
        }
        panic!("the VM does not come there: {last:#?}");
    }

    /// The first line of the console that starts with `word`, from offset `from` on; and the offset behind what was read.
    pub(crate) async fn line(&self, vm: Id<Vm>, from: u64, word: &str) -> (String, u64) {
        let mut console = self.hypervisor.console(&self.cx, vm, from).await.expect("console");
        let (mut text, mut at) = (String::new(), from);
        let until = Instant::now() + Duration::from_secs(120);
        while Instant::now() < until {
            let next = tokio::time::timeout(Duration::from_secs(60), console.read()).await;
            let Ok(Ok(Some(bytes))) = next else { break };
            at += bytes.len() as u64;
            text.push_str(&String::from_utf8_lossy(&bytes));
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().map(str::trim).find(|line| line.starts_with(word)) {
                return (line.to_owned(), at);
            }
        }
        panic!("`{word}` does not come; the console has:\n{text}\n{:#?}", self.seen(vm).await);
    }

    /// Runs `command` in the guest; gives `RESULT` and its status.
    pub(crate) async fn shell(&self, vm: Id<Vm>, command: &str) -> String {
        self.say(vm, &format!("{command}; echo RESULT $?"), "RESULT").await
    }

    /// Runs `command` in the guest; gives the first line that it prints which starts with `word`.
    pub(crate) async fn say(&self, vm: Id<Vm>, command: &str, word: &str) -> String {
        let mut console = self.hypervisor.console(&self.cx, vm, 0).await.expect("console");
        let mut from = 0;
        while let Ok(Ok(Some(bytes))) = tokio::time::timeout(Duration::from_millis(200), console.read()).await
        {
            from += bytes.len() as u64;
        }
        console.write(Bytes::from(format!("sh {command}\n"))).await.expect("typed");
        self.line(vm, from, word).await.0
    }

    pub(crate) fn qemus(&self) -> Vec<u32> {
        processes(self.dir.path())
    }

    pub(crate) async fn remove(&self, vm: Id<Vm>) {
        self.hypervisor.remove(&self.cx, vm, Rev(u64::MAX)).await.expect("remove");
        assert!(self.hypervisor.observe(&self.cx, vm).await.expect("observe").is_none());
        assert_eq!(self.hypervisor.inventory(&self.cx, None, 10).await.expect("inventory"), Vec::new());
        assert_eq!(self.qemus(), Vec::<u32>::new());
        assert_eq!(names(&self.dir.path().join("state/vms")), Vec::<String>::new());
        assert_eq!(names(&self.dir.path().join("state/roles/runner")), Vec::<String>::new());
        assert_eq!(names(&self.dir.path().join("run")), Vec::<String>::new());
    }
}

/// A test that failed leaves its VMs running, as a killed control does.
impl Drop for Rig {
    fn drop(&mut self) {
        end_all(self.dir.path());
    }
}

/// Kills every runner and QEMU that works below `folder`.
pub(crate) fn end_all(folder: &Path) {
    for pid in processes(folder) {
        let Ok(pid) = i32::try_from(pid) else { continue };
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Processes that have a file or folder below `folder` open, apart from this one: runners and their QEMUs.
fn processes(folder: &Path) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && fds(*pid).values().any(|to| to.starts_with(folder)))
        .collect()
}

/// Where the descriptors of a process lead.
pub(crate) fn fds(pid: u32) -> BTreeMap<u32, PathBuf> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let lead = |entry: std::fs::DirEntry| {
        Some((entry.file_name().to_str()?.parse().ok()?, std::fs::read_link(entry.path()).ok()?))
    };
    entries.filter_map(lead).collect()
}

pub(crate) fn disk(id: u128, path: &Path) -> (Uuid, Device) {
    let token = Bytes::from(path.to_string_lossy().into_owned());
    let form = Form::Opener { scheme: SCHEME.into(), version: 1, token };
    let target =
        Target { id: Uuid::from_u128(id), term: Term(1), mode: Mode::Write, forms: vec![form], key: None };
    (Uuid::from_u128(id + 1000), Device::Disk { target, boot: None })
}

pub(crate) fn on(boot: u64) -> Run {
    Run::On(Boot(boot))
}

fn context(epoch: u64) -> Ctx {
    let call = Call {
        cloud: CLOUD,
        incarnation: Uuid::from_u128(2),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::from_u128(3)),
        trace: None,
        budget: Duration::from_secs(60),
    };
    Ctx { call, cancel: Cancel::new() }
}

pub(crate) fn open(dir: &Path) -> HostHypervisor<super::Vmm> {
    try_open(dir).expect("open")
}

pub(crate) fn try_open(dir: &Path) -> iaas_core::Result<HostHypervisor<super::Vmm>> {
    open_with(dir, super::vmm())
}

pub(crate) fn open_with(dir: &Path, vmm: super::Vmm) -> iaas_core::Result<HostHypervisor<super::Vmm>> {
    HostHypervisor::open(HypervisorConfig {
        state: dir.join("state"),
        runtime: dir.join("run"),
        cloud: CLOUD,
        host: HOST,
        roles: roles(),
        role_binary: None,
        vmm,
    })
}

async fn upload(artifacts: &HostArtifacts, cx: &Ctx, id: u128, file: &Path) -> Digest {
    let bytes = std::fs::read(file).expect("a guest file");
    let digest = Digest::of(&bytes);
    let id = Id::from_uuid(Uuid::from_u128(id));
    artifacts.ensure(cx, id, Rev(1), &digest).await.expect("artifact");
    let mut stream = artifacts.upload(cx, id).await.expect("upload");
    for piece in bytes.chunks(1 << 20) {
        stream.write(Bytes::copy_from_slice(piece)).await.expect("written");
    }
    stream.close().await.expect("checked");
    digest
}

/// The one of which the suite says that it is ours.
const CLOUD: Id<iaas_core::id::Cloud> = Id::from_uuid(Uuid::from_u128(0xa));
pub(crate) const HOST: Id<iaas_core::model::Host> = Id::from_uuid(Uuid::from_u128(4));
const STEP: Duration = Duration::from_millis(20);
/// Steps until a guest that does nothing is given up: two minutes.
const PATIENCE: u32 = 6000;
