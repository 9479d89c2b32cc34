//! A vhost-user-blk service that runs beside the front-end that measures it.

use std::io;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::thread::JoinHandle;

use iaas_core::spi::dataplane::BlockDevice;
use iaas_vmm::virtio::vhost_user::DiskServer;

/// A service for one front-end. Dropping it ends it; the front-end must be gone before.
#[derive(Debug)]
pub enum Service {
    /// A process, which is killed.
    Process(Child),
    /// A thread of this process, and where it listens.
    Thread(Option<JoinHandle<()>>, PathBuf),
}

impl Service {
    /// Starts a program that listens at a socket which it was told.
    ///
    /// # Errors
    /// Those of `exec`.
    pub fn process(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self::Process)
    }

    /// Serves `device` at `socket` as a runner does, in a thread of this process.
    ///
    /// # Errors
    /// Those of `bind`.
    pub fn thread(device: Box<dyn BlockDevice>, socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let thread = std::thread::spawn(move || {
            if let Ok(server) = DiskServer::accept(device.as_ref(), "bench", listener) {
                server.wait();
            }
        });
        Ok(Self::Thread(Some(thread), socket.to_owned()))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        match self {
            Self::Process(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Self::Thread(thread, socket) => {
                // One that nobody has connected to still waits for that.
                drop(UnixStream::connect(socket));
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}
