//! The vhost-user transport: serves one [`Block`] device to a VMM in another process.
//!
//! The front-end gets a connected socket and nothing else. It shares the guest's memory (which must be a shared memfd) and
//! its rings; this process does the I/O. Reconnecting and in-flight tracking are left out: a front-end that goes away has
//! ended its VM.
//!
//! A runner makes the connection itself ([`DiskServer::start`]). A program that serves a volume to a front-end of its own
//! choice listens, and takes what connects ([`DiskServer::accept`]):
//!
//! ```no_run
//! use iaas_vmm::virtio::vhost_user::DiskServer;
//! # fn serve(volume: &dyn iaas_core::spi::dataplane::BlockDevice) -> Result<(), Box<dyn std::error::Error>> {
//! let listener = std::os::unix::net::UnixListener::bind("/run/cloud/data.sock")?;
//! DiskServer::accept(volume, "data", listener)?.wait();
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::dataplane::BlockDevice;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::VhostUserDaemon;
use vhost_user_backend::VringMutex;
use vhost_user_backend::VringT;
use vm_memory::GuestAddressSpace;
use vm_memory::GuestMemoryAtomic;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::EventConsumer;
use vmm_sys_util::event::EventFlag;
use vmm_sys_util::event::EventNotifier;
use vmm_sys_util::event::new_event_consumer_and_notifier;

use super::block::Block;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A disk that is served to a front-end. Dropping it ends the connection and waits for the volume's operations.
pub struct DiskServer {
    daemon: VhostUserDaemon<Arc<Disk>>,
    disk: Arc<Disk>,
}

impl DiskServer {
    /// Serves `volume` and gives the front-end's end of the connection.
    ///
    /// `scratch` is a folder where a socket may stand for a moment: the transport only accepts connections. `serial` is
    /// what the guest reads as the disk's serial number, at most 20 bytes.
    ///
    /// # Errors
    /// `Unavailable`: no thread or socket can be made. Those of [`BlockDevice::open_queue`].
    pub fn start(volume: &dyn BlockDevice, serial: &str, scratch: &Path) -> Result<(Self, OwnedFd)> {
        let (listener, theirs) = connection(scratch).map_err(|e| cannot_serve(&e.to_string()))?;
        Ok((Self::accept(volume, serial, listener)?, theirs.into()))
    }

    /// Waits for a front-end that connects to `listener`, which must block, and serves `volume` to it alone.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn accept(volume: &dyn BlockDevice, serial: &str, listener: UnixListener) -> Result<Self> {
        let disk = Arc::new(Disk::new(Block::new(volume, serial, QUEUE_SIZE)?)?);
        let memory = Memory::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("vhost-user".into(), disk.clone(), memory)
            .map_err(|e| cannot_serve(&e.to_string()))?;
        disk.listen_to_volume(&daemon).map_err(|e| cannot_serve(&e.to_string()))?;
        daemon.start(&mut Listener::from(listener)).map_err(|e| cannot_serve(&e.to_string()))?;
        Ok(Self { daemon, disk })
    }

    /// Waits until the front-end has gone and the volume has given everything back.
    pub fn wait(mut self) {
        self.join();
    }

    /// Why the device no longer works, if so: its driver broke the protocol.
    pub fn fault(&self) -> Option<String> {
        self.disk.lock().block.failed().map(ToString::to_string)
    }

    fn join(&mut self) {
        if let Err(error) = self.daemon.wait() {
            tracing::debug!(%error, "a vhost-user connection ended");
        }
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.daemon.request_shutdown();
        self.join();
        self.disk.drain();
    }
}

impl fmt::Debug for DiskServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskServer").field("fault", &self.fault()).finish_non_exhaustive()
    }
}

/// A listener with one connection waiting, and that connection's other end.
fn connection(scratch: &Path) -> io::Result<(UnixListener, UnixStream)> {
    // Named by the folder's descriptor, because a socket's path has at most 107 bytes.
    let folder = std::fs::File::open(scratch)?;
    let name = format!("v{}.sock", uuid::Uuid::new_v4().simple());
    let short = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    let listener = UnixListener::bind(&short)?;
    let theirs = UnixStream::connect(&short);
    std::fs::remove_file(&short)?;
    Ok((listener, theirs?))
}

/// What the transport's threads share.
struct Disk {
    state: Mutex<State>,
    again: (EventConsumer, EventNotifier),
}

struct State {
    block: Block,
    memory: Memory,
    /// The ring, once it has been used.
    ring: Option<VringMutex>,
    reported: bool,
}

impl Disk {
    fn new(block: Block) -> Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let again = new_event_consumer_and_notifier(flags).map_err(|e| cannot_serve(&e.to_string()))?;
        let memory = Memory::new(GuestMemoryMmap::new());
        let state = State { block, memory, ring: None, reported: false };
        Ok(Self { state: Mutex::new(state), again })
    }

    /// A thread that panicked has left the device between two requests at worst; the VM is this process's only one.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen_to_volume(&self, daemon: &VhostUserDaemon<Arc<Self>>) -> io::Result<()> {
        let volume = self.lock().block.event_fd().as_raw_fd();
        for handler in daemon.get_epoll_handlers() {
            handler.register_listener(volume, EventSet::IN, u64::from(VOLUME_EVENT))?;
            handler.register_listener(self.again.0.as_raw_fd(), EventSet::IN, u64::from(AGAIN_EVENT))?;
        }
        Ok(())
    }

    fn serve(&self, ring: &VringMutex) {
        let mut state = self.lock();
        let State { block, memory, ring: known, reported } = &mut *state;
        known.get_or_insert_with(|| ring.clone());
        let memory = memory.memory().into_inner();
        let mut vring = ring.get_mut();
        match block.serve(vring.get_queue_mut(), &memory) {
            Ok(turn) => {
                if turn.notify
                    && let Err(error) = vring.signal_used_queue()
                {
                    tracing::warn!(%error, "the guest could not be interrupted");
                }
                if turn.again
                    && let Err(error) = self.again.1.notify()
                {
                    tracing::warn!(%error, "a disk's queue stands until the next kick");
                }
            }
            Err(fault) if !*reported => {
                *reported = true;
                tracing::warn!(%fault, "a disk stopped until its driver resets it");
            }
            Err(_) => {}
        }
    }

    /// Waits until the volume has given everything back, and forgets the driver.
    fn drain(&self) {
        loop {
            let ring = self.lock().ring.clone();
            let Some(ring) = ring else { return };
            self.serve(&ring);
            let mut state = self.lock();
            let waits = if state.block.failed().is_some() {
                state.block.outstanding() > 0
            } else {
                state.block.in_flight() > 0
            };
            if !waits {
                state.block.reset();
                state.reported = false;
                state.ring = None;
                return;
            }
            let volume = state.block.event_fd().try_clone_to_owned();
            drop(state);
            if let Ok(volume) = volume {
                let mut fds = [PollFd::new(volume.as_fd(), PollFlags::POLLIN)];
                // The limit only bounds the wait for an event that another thread has taken.
                let _ = nix::poll::poll(&mut fds, PollTimeout::from(50u8));
            }
        }
    }
}

impl VhostUserBackend for Disk {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        self.lock().block.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.lock().block.set_acked(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // Memory in slots lets a front-end add and take away one region without naming all others again.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.drain();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.lock().block.config();
        let (Ok(offset), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else {
            return Vec::new();
        };
        // Front-ends newer than us ask for fields that we do not have: those read as zeroes.
        (offset..offset.saturating_add(size.min(256))).map(|at| space.get(at).copied().unwrap_or(0)).collect()
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.lock().memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        self.drain();
        Ok(())
    }

    fn handle_event(&self, event: u16, _: EventSet, rings: &[VringMutex], _: usize) -> io::Result<()> {
        if event == AGAIN_EVENT {
            // Another event may have served the ring meanwhile; then there is nothing to take.
            let _ = self.again.0.consume();
        }
        if let Some(ring) = rings.first() {
            self.serve(ring);
        }
        Ok(())
    }
}

fn cannot_serve(why: &str) -> Error {
    Error::unavailable("a disk cannot be served to the VMM").detail(why)
}

/// Descriptors of the ring, and operations that the volume's queue holds.
const QUEUE_SIZE: u16 = 256;
/// Events beside the one queue (0) and the transport's own (1).
const VOLUME_EVENT: u16 = 2;
const AGAIN_EVENT: u16 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::block::tests::Memory as MemoryDisk;

    #[test]
    fn a_front_end_that_goes_away_ends_the_server() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(1 << 20);
        let (server, front_end) = DiskServer::start(&disk, "x", scratch.path()).unwrap();
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
        assert_eq!(server.fault(), None);
        drop(front_end);
        drop(server);
    }

    #[test]
    fn a_server_ends_under_a_front_end_that_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(1 << 20);
        let (server, _front_end) = DiskServer::start(&disk, "x", scratch.path()).unwrap();
        drop(server);
    }
}
