//! The messages between control and a starting role, over the role's standard input.

use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

/// The first argument of a process that is a role; then come its name, its id and the pid of its parent.
pub(super) const MARKER: &str = "--iaas-role";

/// Control's first message; the descriptors come with it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HelloRole {
    pub(super) role: String,
    pub(super) id: Uuid,
    pub(super) folder: std::path::PathBuf,
    pub(super) runtime: std::path::PathBuf,
    pub(super) socket: std::path::PathBuf,
    pub(super) args: Bytes,
    pub(super) fds: Vec<String>,
    #[serde(default)]
    pub(super) trace: Option<String>,
}

/// The role's first message: it holds its lock and listens.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) pid: u32,
}

/// Control's second message: the identity is durable.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stored {}

/// The role's second message: it no longer dies with control.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Detached {}
