//! The network of one host as a provider: [`NetProgram`] for its fabric and [`Plugs`] for the host, over one switch.
//!
//! A wish is accepted when it is on disk; the switch is then told to look. If it is dead it is started again, within
//! milliseconds of its end, and finds the wish. It runs as long as a port is plugged in, also without us, and is adopted when
//! we come back. With switch *and* control dead, packets stop until one is back.

mod keeper;
mod plugs;
mod program;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::id::Cloud;
use iaas_core::id::Fabric;
use iaas_core::model::Host;
use iaas_core::process::FenceGuard;
use iaas_core::process::HostFence;
use iaas_core::spi::Call;
use iaas_core::spi::Ctx;
use iaas_core::spi::Feed;
use iaas_core::spi::Hello;
use iaas_core::spi::Pull;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::network::NetProgram;
use iaas_core::spi::network::Plugs;
use tokio::sync::broadcast;
use tracing::Instrument;
use uuid::Uuid;

use self::keeper::Keeper;
use self::plugs::HostPlugs;
use self::program::HostProgram;
use crate::folder::Folder;
use crate::program::Program;
use crate::switch::Status;

/// Where and how the network of a host is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The host.
    pub host: Id<Host>,
    /// Its fabric, which is this host alone.
    pub fabric: Id<Fabric>,
    /// The host's folder of state: `net/`, `fence/` and `roles/` come into it.
    pub state: PathBuf,
    /// The folder for sockets: a short path, for a socket's has at most 107 bytes.
    pub runtime: PathBuf,
    /// The binary that has the role [`SwitchRole`](crate::SwitchRole); `None`: this one.
    pub role_binary: Option<PathBuf>,
    /// What all ports may leave to each other. Nothing, unless every VM of the host can take it.
    pub offloads: Offloads,
}

/// The network of one host. Cheap to clone; dropping it leaves the switch running.
#[derive(Clone, Debug)]
pub struct HostNetwork(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    folder: Folder,
    install: Uuid,
    boot: Uuid,
    /// Held while program or plugs change, together with a lock of the folder.
    changing: Arc<tokio::sync::Mutex<()>>,
    program: Mutex<Arc<Program>>,
    keeper: Arc<Keeper>,
    changed: broadcast::Sender<ObjectRef>,
}

impl HostNetwork {
    /// Opens the network on what is on disk, and adopts or starts the switch if a port is plugged in. Needs a tokio runtime.
    ///
    /// # Errors
    /// `Unavailable` if the folder cannot be made, read or understood. A switch that cannot be started is no error here: it
    /// is tried again and again, and the plugs say why they are blocked.
    pub async fn open(settings: Settings) -> Result<Self> {
        let folder = Folder::new(settings.state.join("net"));
        let (made, stored) = {
            let folder = folder.clone();
            blocking(move || Ok((folder.make()?, folder.program()?))).await?
        };
        let program = match stored {
            Some(stored) => crate::Topology::new(stored.objects)?.compile(stored.rev)?,
            None => Program::default(),
        };
        let (changed, _) = broadcast::channel(256);
        let keeper = Keeper::new(&settings, folder.clone());
        let network = Self(Arc::new(Inner {
            settings,
            folder,
            install: made,
            boot: boot_id()?,
            changing: Arc::default(),
            program: Mutex::new(Arc::new(program)),
            keeper,
            changed,
        }));
        network.0.keeper.apply().await;
        Ok(network)
    }

    /// The program of the fabric.
    pub fn program(&self) -> Arc<dyn NetProgram> {
        Arc::new(HostProgram(self.0.clone()))
    }

    /// The plugs of the host.
    pub fn plugs(&self) -> Arc<dyn Plugs> {
        Arc::new(HostPlugs(self.0.clone()))
    }

    /// What the switch says about itself.
    ///
    /// # Errors
    /// `Unavailable` if it does not run or does not answer; it does not run while no port is plugged in.
    pub async fn status(&self) -> Result<Status> {
        self.0.keeper.status().await
    }

    /// The process id of the switch, for showing.
    pub async fn switch_pid(&self) -> Option<u32> {
        self.0.keeper.pid().await
    }
}

impl Inner {
    fn now(&self) -> Stamp {
        let mono = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let (seconds, nanos) = (u64::try_from(mono.tv_sec), u64::try_from(mono.tv_nsec));
        // The clock counts from the host's boot, so both are small and positive.
        let mono_ns = seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanos.unwrap_or(0));
        Stamp { wall: jiff::Timestamp::now(), boot_id: self.boot, mono_ns }
    }

    fn current(&self) -> Arc<Program> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wake(&self, object: ObjectRef) {
        // Nobody listening is fine.
        let _ = self.changed.send(object);
    }

    fn fence(&self, cloud: Id<Cloud>, site: Site) -> Result<HostFence> {
        HostFence::open(&self.settings.state, cloud, site)
    }

    /// Lets a changing call in; fenced as long as the guard is held.
    async fn enter(&self, call: &Call, site: Site) -> Result<FenceGuard> {
        self.fence(call.cloud, site)?.enter(call).await
    }

    /// The right to change program and plugs: of this provider, and of all that use the folder, also in other processes.
    ///
    /// It is taken before the work is detached from its caller, so a call whose caller went away has either not begun, or is
    /// waited for by the next one, also by that of a provider that was opened meanwhile.
    async fn alone(&self) -> Result<Alone> {
        let here = self.changing.clone().lock_owned().await;
        let file = self.folder.lock_file()?;
        loop {
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Alone { _file: file, _here: here }),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    tokio::time::sleep(LOCK_PAUSE).await
                }
                Err(e) => return Err(Error::unavailable("the network's folder cannot be locked").because(&e)),
            }
        }
    }

    /// Says who this is at `site`, to the cloud that claimed last.
    async fn hello(&self, site: Site, kinds: &[&str]) -> Result<Hello> {
        let newest = match self.folder.claimed()? {
            Some(cloud) => self.fence(cloud, site)?.newest()?,
            None => None,
        };
        Ok(Hello {
            product: format!("iaas-net {}", env!("CARGO_PKG_VERSION")),
            protocol: (1, 1),
            site,
            install: self.install,
            newest,
            seal_to: None,
            kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
            caps: Default::default(),
        })
    }

    async fn claim(self: &Arc<Self>, cx: &Ctx, site: Site, kinds: &'static [&'static str]) -> Result<Hello> {
        let (this, call) = (self.clone(), cx.call.clone());
        detached(async move {
            this.fence(call.cloud, site)?.claim(&call).await?;
            let (folder, cloud) = (this.folder.clone(), call.cloud);
            blocking(
                move || if folder.claimed()? == Some(cloud) { Ok(()) } else { folder.set_claimed(cloud) },
            )
            .await?;
            this.hello(site, kinds).await
        })
        .await
    }

    fn changes(&self) -> Feed<ObjectRef> {
        Box::new(Changes(self.changed.subscribe()))
    }
}

/// The right to change program and plugs, until it is dropped.
#[derive(Debug)]
struct Alone {
    _file: std::fs::File,
    _here: tokio::sync::OwnedMutexGuard<()>,
}

struct Changes(broadcast::Receiver<ObjectRef>);

#[async_trait]
impl Pull<ObjectRef> for Changes {
    async fn next(&mut self) -> Option<Result<ObjectRef>> {
        loop {
            match self.0.recv().await {
                Ok(object) => return Some(Ok(object)),
                // Lossy by contract.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// Runs `work` to its end, also if the caller stops waiting.
async fn detached<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(work.in_current_span()).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("a change of the network ended abruptly").because(&e)),
    }
}

/// Runs `work` where it may wait for the disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on the network's folder ended abruptly").because(&e)),
    }
}

fn boot_id() -> Result<Uuid> {
    let failed =
        |e: &dyn std::error::Error| Error::unavailable("the host's boot id cannot be read").because(e);
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|e| failed(&e))?;
    Uuid::try_parse(text.trim()).map_err(|e| failed(&e))
}

/// Between two tries to lock the folder; another process has it only for as long as one change takes.
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(2);
