//! How a disk or port of one provider reaches the process of another: a value with an opaque token per form.

use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::contract::Sealed;
use crate::Term;

/// Something to open in the process that uses it.
///
/// Its identity is `(id, term, mode)`; the forms' bytes may change freely.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The volume or port.
    pub id: Uuid,
    /// The writer's claim or the placement.
    pub term: Term,
    /// What may be done with it.
    pub mode: Mode,
    /// Ways to open it, best first; the user takes the first that it knows.
    pub forms: Vec<Form>,
    /// The sealed data key, if it is encrypted.
    #[serde(default)]
    pub key: Option<Sealed>,
}

impl Target {
    /// Whether `other` is the same thing, however it is opened.
    pub fn same(&self, other: &Self) -> bool {
        (self.id, self.term, self.mode) == (other.id, other.term, other.mode)
    }
}

/// What may be done with a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Read only.
    Read,
    /// Read and write, as the only writer.
    Write,
    /// Open for the side of a migration that does not run yet.
    Standby,
}

/// A way to open a target.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// By the opener of that scheme and version, in our process.
    Opener {
        /// Names the opener.
        scheme: String,
        /// The version of the token.
        version: u16,
        /// Only the opener reads it.
        token: Bytes,
    },
    /// A raw image file.
    RawFile(String),
    /// A block device.
    BlockNode(String),
    /// The socket of a vhost-user back-end.
    VhostUser(String),
    /// A TAP interface.
    Tap(String),
    /// A VFIO device.
    Vfio(String),
}
