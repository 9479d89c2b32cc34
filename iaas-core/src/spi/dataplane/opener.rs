//! Two-stage opening: prepare in the host's unjailed process, open inside the role that uses it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;

use super::BlockDevice;
use super::FramePort;
use crate::Result;
use crate::spi::target::Target;

/// What stage one hands to stage two: descriptors, folders and needs. Never the network.
#[derive(Debug, Default)]
pub struct Grant {
    /// Open files by a name that the opener chose.
    pub fds: BTreeMap<String, OwnedFd>,
    /// Folders, and whether they may be written.
    pub dirs: Vec<(OwnedFd, bool)>,
    /// What the jail must allow.
    pub needs: Needs,
}

/// What an opener needs of the jail around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Needs {
    /// io_uring.
    pub io_uring: bool,
    /// Threads of its own.
    pub threads: u16,
    /// Bytes of memory.
    pub memory: u64,
    /// Locked memory.
    pub locks: bool,
}

/// Where an opener runs.
#[derive(Clone, Debug, Default)]
pub struct Env {
    /// A folder for sockets and scratch files of this role, if it has one.
    pub runtime: Option<PathBuf>,
}

/// A data key in the clear, in the one process that may hold it: zeroed when dropped.
pub struct Key(Vec<u8>);

impl Key {
    /// Takes the key's bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The key's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // `black_box` keeps the compiler from leaving out a store that nothing reads.
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}

impl Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Opens volumes of one scheme.
pub trait BlockOpener: Debug + Send + Sync + 'static {
    /// The scheme and version of the tokens that it knows.
    fn scheme(&self) -> (&'static str, u16);

    /// Stage one, in the process of the provider on the host: opens files, checks rights.
    fn prepare(&self, target: &Target) -> Result<Grant>;

    /// Stage two, in the role. A `Write` target is claimed with its term before this returns.
    fn open(
        &self,
        target: &Target,
        grant: Grant,
        key: Option<Key>,
        env: &Env,
    ) -> Result<Box<dyn BlockDevice>>;
}

/// Opens ports of one scheme.
pub trait PortOpener: Debug + Send + Sync + 'static {
    /// The scheme and version of the tokens that it knows.
    fn scheme(&self) -> (&'static str, u16);

    /// Stage one, in the process of the provider on the host.
    fn prepare(&self, target: &Target) -> Result<Grant>;

    /// Stage two, in the role: one port per queue pair.
    fn open(&self, target: &Target, grant: Grant, env: &Env) -> Result<Vec<Box<dyn FramePort>>>;
}
