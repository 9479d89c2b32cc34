//! The cloud of this machine: every part a reference implementation, all state in one folder.
//!
//! ```text
//! <state>/store/       records (redb)          <state>/volumes/   raw files with sidecars
//! <state>/blobs/       kernels and initrds     <state>/host/      roles, fences, artifacts
//! <state>/usage/       the usage log           <runtime>/         sockets: /run/iaas-… or $XDG_RUNTIME_DIR/iaas-…
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use iaas_core::Cloud;
use iaas_core::Digest;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::cloud::FolderBlobs;
use iaas_core::cloud::Session;
use iaas_core::model::*;
use iaas_core::process;
use iaas_core::process::CountersPage;
use iaas_core::process::Launcher;
use iaas_core::process::Roles;
use iaas_core::security::rbac::Rbac;
use iaas_core::spi::Reading;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::host::HostProviders;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::meter::Bill;
use iaas_core::store::RedbStore;
use iaas_meter::Meter;
use iaas_net::HostNetwork;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use iaas_vmm::Capability;
use iaas_vmm::HostArtifacts;
use iaas_vmm::HypervisorConfig;
use iaas_vmm::KvmHypervisor;
use iaas_vmm::MachineInventory;
use iaas_vmm::QemuHypervisor;
use iaas_vmm::vmm::Kvm;
use iaas_vmm::vmm::Qemu;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use uuid::Uuid;

use crate::guest::number;

/// What this binary can be besides the control process, and how it opens volumes and ports.
pub fn roles() -> Roles {
    Roles::new()
        .with_role(iaas_vmm::runner())
        .with_role(iaas_net::SwitchRole)
        .with_block(iaas_store::opener())
        .with_port(iaas_net::RingOpener)
}

/// The first line of `main`. What the SDK tells goes to standard error, as far as `RUST_LOG` asks for it.
pub fn init() {
    process::init(&roles());
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    }
}

/// A cloud with what a program needs to know of its machine.
#[derive(Debug)]
pub struct Machine {
    /// The cloud.
    pub cloud: Cloud,
    /// Which hypervisor it uses, and why.
    pub why: String,
    state: PathBuf,
    runtime: PathBuf,
    ours: bool,
}

/// Opens the cloud in `state`, or makes it.
///
/// # Errors
/// Those of the parts; `Conflict` if another process has the cloud open.
pub async fn open(state: &Path) -> Result<Machine> {
    open_as(state, None).await
}

/// As [`open`]; the roles are started from `binary`, whose `main` begins with [`init`], instead of from this one.
///
/// # Errors
/// As [`open`].
pub async fn open_as(state: &Path, binary: Option<PathBuf>) -> Result<Machine> {
    let state = private_folder(state)?;
    let runtime = std::path::absolute(runtime_folder(&state)).map_err(io)?;
    // Before it is made: one whose path leaves no room for a socket's name is of no use.
    Launcher::new(&state, &runtime, None).folder("runner", Uuid::nil())?;
    let runtime = private_folder(&runtime)?;
    let opened = compose(state, runtime.clone(), binary).await;
    if opened.is_err() {
        // Only an empty one goes.
        let _ = std::fs::remove_dir(&runtime);
    }
    opened
}

async fn compose(state: PathBuf, runtime: PathBuf, binary: Option<PathBuf>) -> Result<Machine> {
    let store = Arc::new(RedbStore::open(state.join("store").join("cloud.redb"))?);
    let ids = Ids::of(&state)?;
    let host_state = private_folder(&state.join("host"))?;
    let (hypervisor, why, ours) = hypervisor(&host_state, &runtime, &ids, binary.clone())?;
    let volumes = state.join("volumes");
    let pool = RawPool::open(&volumes, &host_state, ids.cloud, ids.pool)?;
    let access = RawAccess::open(&volumes, &host_state, ids.cloud, ids.host, ids.pool)?;
    let network = HostNetwork::open(iaas_net::Settings {
        host: ids.host,
        fabric: ids.fabric,
        state: host_state.clone(),
        runtime: runtime.clone(),
        role_binary: binary.clone(),
        offloads: Offloads::default(),
    })
    .await?;
    let host = HostProviders {
        id: ids.host,
        inventory: Arc::new(MachineInventory::open(&host_state, ids.cloud, ids.host)?),
        artifacts: Arc::new(HostArtifacts::open(&host_state, ids.cloud, ids.host)?),
        hypervisor,
        access: BTreeMap::from([(ids.pool, Arc::new(access) as _)]),
        plugs: network.plugs(),
        fabric: ids.fabric,
        power: None,
    };
    let cloud = Cloud::builder()
        .store(store)
        .pool(ids.pool, Arc::new(pool))
        .id(ids.cloud)
        .fabric(ids.fabric, network.program())
        .host(host)
        .authorizer(Arc::new(Rbac::new()))
        .meter(Arc::new(Meter::open(state.join("usage"))?))
        .blobs(Arc::new(FolderBlobs::open(state.join("blobs"))?))
        .open()
        .await?;
    Ok(Machine { cloud, why, state, runtime, ours })
}

/// The best hypervisor of this machine; which one it is, and why; and whether it needs nothing but us.
fn hypervisor(
    state: &Path,
    runtime: &Path,
    ids: &Ids,
    role_binary: Option<PathBuf>,
) -> Result<(Arc<dyn Hypervisor>, String, bool)> {
    fn config<V>(
        vmm: V,
        (state, runtime, ids): (&Path, &Path, &Ids),
        role_binary: Option<PathBuf>,
    ) -> HypervisorConfig<V> {
        let (state, runtime) = (state.to_owned(), runtime.to_owned());
        HypervisorConfig {
            state,
            runtime,
            cloud: ids.cloud,
            host: ids.host,
            roles: roles(),
            role_binary,
            vmm,
        }
    }
    let place = (state, runtime, ids);
    match iaas_vmm::probe() {
        Capability::Hardware => {
            let ours = KvmHypervisor::open(config(Kvm, place, role_binary))?;
            Ok((
                Arc::new(ours),
                format!("a machine of our own in each runner; {}", Capability::Hardware),
                true,
            ))
        }
        kvm => {
            let qemu = QemuHypervisor::open(config(Qemu::default(), place, role_binary))?;
            let remedy = kvm.remedy().map(|remedy| format!("; {remedy}")).unwrap_or_default();
            let accel = qemu.vmm().accel.map_or_else(String::new, |accel| format!("{accel:?}"));
            Ok((Arc::new(qemu), format!("QEMU with {accel}; {kvm}{remedy}"), false))
        }
    }
}

impl Machine {
    /// Whether this machine has the program that runs guests.
    ///
    /// # Errors
    /// `Unavailable`: QEMU is needed and missing; says what to install.
    pub fn can_boot(&self) -> Result<()> {
        if self.ours { Ok(()) } else { iaas_vmm::qemu::find().map(drop) }
    }

    /// Lets what is under way come to rest, and gives the lead back; the state folder stays.
    ///
    /// # Errors
    /// Those of the store and of the processes.
    pub async fn close(self) -> Result<()> {
        if !self.cloud.settled(LAST_WORK).await {
            tracing::warn!("closed while work was under way: the next start goes on with it");
        }
        self.cloud.close().await?;
        // Only an empty one goes: sockets in it belong to what still runs.
        let _ = std::fs::remove_dir(&self.runtime);
        Ok(())
    }

    /// What `e2fsck -fn`, a judge that is not ours, says of the raw file of a volume that nobody has open.
    ///
    /// # Errors
    /// `Invalid` with its answer if the file system is not clean; `Unavailable` if it cannot be run.
    pub fn check_volume(&self, volume: Id<Volume>) -> Result<String> {
        let file = self.state.join("volumes").join(format!("{volume}.raw"));
        let done = Command::new("e2fsck")
            .arg("-fn")
            .arg(&file)
            .output()
            .map_err(|e| io(e).remedy("install e2fsprogs: `cargo xtask setup`"))?;
        let answer = String::from_utf8_lossy(&done.stdout);
        let last = answer.lines().last().unwrap_or("no answer").trim().to_owned();
        if done.status.success() {
            Ok(last)
        } else {
            Err(Error::invalid(format!("e2fsck: {last}")).detail(answer))
        }
    }
}

/// The arguments of `quickstart`.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// The kernel of the guests.
    pub kernel: PathBuf,
    /// Their initial RAM disk.
    pub initrd: PathBuf,
    /// Where all state is.
    pub state: PathBuf,
    /// Print JSON.
    pub json: bool,
    /// Leave the guests running.
    pub keep: bool,
    /// The story may be killed at any moment and started again.
    pub chaos: bool,
    /// This is the control process.
    pub control: bool,
}

impl Arguments {
    /// Reads the command line, or ends the process with what is wrong.
    pub fn parse() -> Self {
        Self::read(lexopt::Parser::from_env()).unwrap_or_else(|error| {
            eprintln!("{error}\n{USAGE}");
            std::process::exit(2)
        })
    }

    fn read(mut parser: lexopt::Parser) -> std::result::Result<Self, lexopt::Error> {
        use lexopt::prelude::Long;
        use lexopt::prelude::ValueExt;
        let target = target_folder();
        let guest = std::env::var_os("IAAS_GUEST_DIR").map_or_else(|| target.join("guest"), PathBuf::from);
        let mut read = Self {
            kernel: guest.join("vmlinuz"),
            initrd: guest.join("initrd.cpio.gz"),
            state: target.join("quickstart"),
            json: false,
            keep: false,
            chaos: false,
            control: false,
        };
        while let Some(argument) = parser.next()? {
            match argument {
                Long("kernel") => read.kernel = parser.value()?.parse()?,
                Long("initrd") => read.initrd = parser.value()?.parse()?,
                Long("state") => read.state = parser.value()?.parse()?,
                Long("json") => read.json = true,
                Long("keep") => read.keep = true,
                Long("chaos") => read.chaos = true,
                Long("control") => read.control = true,
                // The story is the same before and after a crash.
                Long("settle") => {}
                Long("help") => {
                    println!("{USAGE}");
                    std::process::exit(0)
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(read)
    }
}

const USAGE: &str = "usage: quickstart [--kernel FILE] [--initrd FILE] [--state FOLDER] [--json] [--keep]
Boots two guests in a cloud of its own, kills the control plane under them, and leaves nothing behind.";

/// Where cargo builds; the guest that `cargo xtask setup` makes is there too.
fn target_folder() -> PathBuf {
    let built = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    built.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"))
}

/// Ids that the parts need before the store is open: drawn once per state folder.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Ids {
    cloud: Id<iaas_core::id::Cloud>,
    host: Id<Host>,
    pool: Id<iaas_core::id::Pool>,
    fabric: Id<iaas_core::id::Fabric>,
}

/// Gives a state folder that is new the ids 1 to 4, so that two runs leave files of the same names.
///
/// # Errors
/// `Unavailable` if the folder cannot be written.
pub fn fix_ids(state: &Path) -> Result<()> {
    fn id<K>(number: u128) -> Id<K> {
        Id::from_uuid(Uuid::from_u128(number))
    }
    let state = private_folder(state)?;
    if state.join("ids.json").exists() {
        return Ok(());
    }
    Ids { cloud: id(1), host: id(2), pool: id(3), fabric: id(4) }.keep(&state).map(|_| ())
}

impl Ids {
    fn of(state: &Path) -> Result<Self> {
        let file = state.join("ids.json");
        if let Ok(bytes) = std::fs::read(&file) {
            return serde_json::from_slice(&bytes).map_err(|e| {
                Error::invalid(format!("`{}` is damaged", file.display()))
                    .because(&e)
                    .remedy("restore it from a copy")
            });
        }
        fn id<K>() -> Id<K> {
            Id::from_uuid(Uuid::now_v7())
        }
        Self { cloud: id(), host: id(), pool: id(), fabric: id() }.keep(state)
    }

    fn keep(self, state: &Path) -> Result<Self> {
        let text = serde_json::to_vec_pretty(&self).map_err(|e| Error::internal("ids").because(&e))?;
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        let (draft, file) = (state.join("ids.json.new"), state.join("ids.json"));
        let private =
            || std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft);
        private()
            .and_then(|mut new| new.write_all(&text))
            .and_then(|()| std::fs::rename(&draft, &file))
            .inspect_err(|_| drop(std::fs::remove_file(&draft)))
            .map_err(|e| {
                io(e).detail(file.display().to_string()).remedy("free space below the state folder")
            })?;
        Ok(self)
    }
}

/// A short path, because that of a socket has at most 107 bytes; another one for each state folder.
fn runtime_folder(state: &Path) -> PathBuf {
    if let Some(folder) = std::env::var_os("IAAS_RUNTIME_DIR") {
        return PathBuf::from(folder);
    }
    let mark = Digest::of(state.as_os_str().as_encoded_bytes()).to_string();
    let base = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) => PathBuf::from(folder),
        None if nix::unistd::geteuid().is_root() => PathBuf::from("/run"),
        None => std::env::temp_dir(),
    };
    base.join(format!("iaas-{}", &mark[..12]))
}

/// Makes a folder that only we can enter, and its absolute path.
fn private_folder(folder: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io)?;
    folder.canonicalize().map_err(io)
}

/// A short list of prices.
///
/// # Errors
/// None in fact: the texts are constants.
pub fn prices() -> Result<PriceBookSpec> {
    let price = |amount: &str, unit| Ok::<_, Error>(Price { amount: amount.parse()?, unit });
    let prices = BTreeMap::from([
        ("vcpu".to_owned(), price("0.02", Unit::Hour)?),
        ("memory-bytes".to_owned(), price("0.005", Unit::GibHour)?),
        ("volume-bytes".to_owned(), price("0.0001", Unit::GibHour)?),
        ("tx-bytes".to_owned(), price("0.01", Unit::Gib)?),
        ("rx-bytes".to_owned(), price("0.01", Unit::Gib)?),
    ]);
    Ok(PriceBookSpec { currency: "EUR".to_owned(), from: jiff::Timestamp::UNIX_EPOCH, prices })
}

/// Deletes what a project still has, in the order in which things use each other.
///
/// # Errors
/// Those of the deletions.
pub async fn delete_all(me: &Session, project: Id<Project>) -> Result<()> {
    macro_rules! each {
        ($($family:ident),+) => {$(
            for record in me.$family().list(project, None, 1000).await? {
                // What an earlier deletion has just taken away is gone all the same.
                let gone = match me.$family().delete(record.meta.id).await {
                    Ok(deletion) => deletion.wait().await.map(|_| ()),
                    Err(error) => Err(error),
                };
                if let Err(error) = gone
                    && error.kind() != ErrorKind::NotFound
                {
                    return Err(error);
                }
            }
        )+};
    }
    each!(instances, attachments, volumes, ports, subnets);
    // Groups name each other: first no rules, then no groups.
    for record in me.security_groups().list(project, None, 1000).await? {
        me.security_groups().replace(record.meta.id, SecurityGroupSpec::default()).await?;
    }
    each!(security_groups, networks, images, key_pairs);
    Ok(())
}

/// Removes every tenant, size and price of the cloud, in whatever state it is.
///
/// # Errors
/// Those of the deletions.
pub async fn remove_all(me: &Session) -> Result<()> {
    for organization in me.organizations().list(Owner::Cloud, None, 1000).await? {
        for project in me.projects().list(organization.meta.id, None, 1000).await? {
            delete_all(me, project.meta.id).await?;
            me.projects().delete(project.meta.id).await?;
        }
        me.organizations().delete(organization.meta.id).await?;
    }
    for size in me.instance_types().list(Owner::Cloud, None, 1000).await? {
        me.instance_types().delete(size.meta.id).await?;
    }
    for book in me.price_books().list(Owner::Cloud, None, 1000).await? {
        me.price_books().delete(book.meta.id).await?;
    }
    Ok(())
}

/// Compares the bytes that a port is billed for with what the guest's kernel counted just before and just after.
///
/// # Errors
/// `Internal` if the bill lies outside.
pub fn check_bytes(bill: &Bill, port: Id<Port>, before: &str, after: &str) -> Result<String> {
    let mut told = Vec::new();
    for (meter, key) in [("rx-bytes", "rx"), ("tx-bytes", "tx")] {
        let line = bill.lines.iter().find(|l| l.resource.id == port.uuid() && l.meter == meter);
        let gib: f64 = line.and_then(|l| l.quantity.parse().ok()).unwrap_or(0.0);
        let billed = gib * f64::from(1 << 30);
        let (low, high) = (number(before, key).unwrap_or(f64::MAX), number(after, key).unwrap_or(0.0));
        told.push(format!("{meter} {billed:.0}, the guest counted {low:.0} to {high:.0}"));
        // The quantity may be rounded at its ninth decimal: half a byte.
        ensure(billed >= low - 1.0 && billed <= high + 1.0, || told.join("; "))?;
    }
    Ok(told.join("; "))
}

/// Seconds of vCPU time in the page that the runner of an instance writes.
///
/// # Errors
/// `NotFound` if it runs nowhere here, `Internal` if the page says nothing that can be read.
pub fn ran(state: &Path, instance: Id<Instance>) -> Result<f64> {
    let unreadable = |what: String| Error::internal(what).about(instance.object());
    let page = CountersPage::open(&state.join("host/vms").join(instance.to_string()).join("usage"))?;
    let (_, bytes) =
        page.read()?.ok_or_else(|| unreadable("its runner has counted nothing yet".to_owned()))?;
    let reading: Reading = ciborium::from_reader(bytes.as_ref()).map_err(|e| unreadable(e.to_string()))?;
    let ns = reading.totals.get("vcpu-ns").ok_or_else(|| unreadable("no vCPU time in it".to_owned()))?;
    Ok(Duration::from_nanos(u64::try_from(*ns).unwrap_or(u64::MAX)).as_secs_f64())
}

/// What [`ran`] gives once the runner has written its page again, which it does each second: all that had run until now.
///
/// # Errors
/// As [`ran`]; `Unavailable` if nothing is written.
pub async fn ran_until_now(state: &Path, instance: Id<Instance>) -> Result<f64> {
    let last = ran(state, instance)?;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let next = ran(state, instance)?;
        if next > last {
            return Ok(next);
        }
    }
    Err(Error::unavailable("its runner has counted nothing for ten seconds").about(instance.object()))
}

/// Compares the vCPU time that an instance is billed for with what its runner had counted just before and just after.
///
/// # Errors
/// `Internal` if the bill is more than a second outside.
pub fn check_vcpu(bill: &Bill, instance: Id<Instance>, before: f64, after: f64) -> Result<String> {
    let line = bill.lines.iter().find(|l| l.resource.id == instance.uuid() && l.meter == "vcpu");
    let hours: f64 = line.and_then(|l| l.quantity.parse().ok()).unwrap_or(f64::NAN);
    let billed = hours * 3600.0;
    let told = format!("{billed:.2} s billed, its runner counted {before:.2} to {after:.2} s");
    // The bill counts from the event of a start to that of an end, which are seen a little later than they happen.
    ensure(billed >= before - 1.0 && billed <= after + 1.0, || told.clone())?;
    Ok(told)
}

/// How long a cloud that is closed may go on with what is under way.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Fails with `what` unless `holds`.
///
/// # Errors
/// `Internal` with what was seen instead.
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(what())) }
}

/// Kills a process with SIGKILL.
///
/// # Errors
/// `Unavailable` if it cannot be.
pub fn kill(pid: Pid) -> Result<()> {
    nix::sys::signal::kill(pid, Signal::SIGKILL).map_err(|e| io(e.into()))
}

/// An error of the operating system, for people.
pub fn io(error: std::io::Error) -> Error {
    Error::unavailable("the machine refused").because(&error).detail(error.to_string())
}
