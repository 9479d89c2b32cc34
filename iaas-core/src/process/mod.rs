//! How the processes of a host start, outlive us and are found again.
//!
//! A *role* is this same binary run again with a marker in its arguments: the runner of one VM, the switch of a host.
//! A program that uses roles says so in the first line of `main`; [`init`] returns at once in the control process and never
//! in a role.
//!
//! ```no_run
//! use iaas_core::process::{Roles, init};
//!
//! fn main() {
//!     init(&Roles::new());
//!     // … the control process goes on from here.
//! }
//! ```
//!
//! # How a role starts
//! ```text
//! control                                        role
//!   guard of the id, folder, passport (durable)
//!   re-exec; its stdin is a socket ───────────▶  dies with control (PDEATHSIG), checks its parent
//!   hello: args and descriptors ──────────────▶  takes its lock, makes counters, listens
//!                                ◀────────────── ready
//!   (pid, start time, boot) durable in role.cbor
//!   ack ──────────────────────────────────────▶  no longer dies with control
//!                                ◀────────────── detached; then Role::main runs
//! ```
//! So a crash of control at any moment leaves either no process, or one that [`Launcher::adopt`] finds. The lock has two
//! bytes: the second is taken when the role has detached, so that one which is about to die with control is not adopted. A role is named by
//! its [`Identity`] (pid, start time and boot of the host), together with the lock that it holds; never by a pid alone.
//!
//! # Where things are
//! `<state>/roles/<role>/<uuid>/` (0700) holds `lock`, `role.cbor`, `passport`, `log` and `counters` (0600); all but the
//! process survive it. The control socket is `<runtime>/<role>-<uuid without dashes>.sock`: a socket's path has at most
//! 107 bytes, so the runtime folder must be short (`/run/iaas`). [`Launcher::forget`] removes all of it.
//!
//! # What it does not do
//! It does not restart a role (the owner decides), does not jail it (the role does that to itself, with everything it needs
//! passed in as descriptors), does not read the bodies of calls, and does not bound the log: a role must not write a line for
//! each thing that a guest does.

mod child;
mod counters;
mod fence;
mod folder;
mod frame;
mod handle;
mod handshake;
mod identity;
mod launcher;
mod lock;
mod openers;
mod plain;
mod protocol;
mod server;

use std::fmt::Debug;
use std::process::ExitCode;
use std::sync::Arc;

pub use child::RoleStart;
pub use counters::COUNTERS_MAX;
pub use counters::CountersPage;
pub use fence::FenceGuard;
pub use fence::HostFence;
pub use fence::Newest;
pub use folder::RoleFolder;
pub use frame::FDS_MAX;
pub use frame::FRAME_MAX;
pub use handle::RoleHandle;
pub use identity::Identity;
pub use launcher::Adopted;
pub use launcher::Launcher;
pub use launcher::PASSPORT_MAX;
pub use lock::LockState;
pub use lock::RoleLock;
pub use openers::Parcel;
pub use server::ControlServer;
pub use server::Reply;
pub use server::Request;
pub use server::Responder;
pub use server::Stopper;

use crate::spi::dataplane::BlockOpener;
use crate::spi::dataplane::PortOpener;

/// Descriptors with the names by which the receiver knows them.
pub type NamedFds = Vec<(String, std::os::fd::OwnedFd)>;

/// What a binary can be: its roles, and the openers that they may use.
#[derive(Clone, Debug, Default)]
pub struct Roles {
    /// Opens volumes.
    pub block: Vec<Arc<dyn BlockOpener>>,
    /// Opens ports.
    pub port: Vec<Arc<dyn PortOpener>>,
    /// The roles.
    pub mains: Vec<Arc<dyn Role>>,
}

impl Roles {
    /// A binary that has no role.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an opener of volumes; of two with the same scheme and version the first wins.
    #[must_use]
    pub fn with_block(mut self, opener: impl BlockOpener) -> Self {
        self.block.push(Arc::new(opener));
        self
    }

    /// Adds an opener of ports; of two with the same scheme and version the first wins.
    #[must_use]
    pub fn with_port(mut self, opener: impl PortOpener) -> Self {
        self.port.push(Arc::new(opener));
        self
    }

    /// Adds a role; of two with the same name the first wins.
    #[must_use]
    pub fn with_role(mut self, role: impl Role) -> Self {
        self.mains.push(Arc::new(role));
        self
    }
}

/// What a process of its own does.
///
/// # Contract
/// [`main`](Self::main) runs on the main thread of a fresh process in a session of its own, with `/dev/null` as standard
/// input, the role's log as output and error, a cleaned environment, umask 077 and no inherited descriptor. It should serve
/// [`RoleStart::server`] until it ends; the process ends when it returns.
pub trait Role: Debug + Send + Sync + 'static {
    /// The name: 1 to 24 of `a-z`, `0-9` and `-`.
    fn name(&self) -> &'static str;

    /// Runs the role to its end.
    fn main(&self, start: RoleStart, roles: &Roles) -> ExitCode;
}

/// Runs the role that this process was started as, and ends the process with it. Returns at once in the control process.
///
/// Call it first in `main`: before threads, runtimes and open files.
pub fn init(roles: &Roles) {
    child::run_if_role(roles);
}
