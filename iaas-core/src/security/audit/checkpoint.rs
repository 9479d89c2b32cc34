//! What a log held at a moment, as a text to keep elsewhere.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::AuditLog;
use crate::Digest;
use crate::Error;
use crate::Result;

/// The origin, size and root of a log: three lines, each ended by a line feed.
///
/// # Source
/// C2SP tlog-checkpoint, the note without its signatures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    origin: String,
    size: u64,
    root: Digest,
}

impl Checkpoint {
    /// A checkpoint of the log `origin`, a name that is unique among logs, such as the cloud's id.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for an origin that is empty, longer than 255 bytes or has a
    /// control character.
    pub fn new(origin: &str, size: u64, root: Digest) -> Result<Self> {
        if origin.is_empty() || origin.len() > 255 || origin.chars().any(char::is_control) {
            return Err(Error::invalid("the origin of a checkpoint is one line of 1 to 255 bytes"));
        }
        Ok(Self { origin: origin.to_owned(), size, root })
    }

    /// The name of the log.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The root over them.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// Checks that `log` still begins with what this checkpoint covers.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) if leaves were changed or taken out since.
    pub fn verify(&self, log: &AuditLog) -> Result<()> {
        let changed = |what: String| {
            Error::conflict(what)
                .remedy("keep both for an investigation; the log was changed behind the cloud's back")
        };
        if log.size() < self.size {
            return Err(changed(format!("the audit log had {} leaves and has {}", self.size, log.size())));
        }
        if log.root_at(self.size)? != self.root {
            return Err(changed(format!("the first {} leaves of the audit log were changed", self.size)));
        }
        Ok(())
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\n{}", self.origin, self.size, STANDARD.encode(self.root.0))
    }
}

impl FromStr for Checkpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::invalid("this is not a checkpoint")
                .remedy("give its three lines as they were written: origin, size, root in Base64")
        };
        let mut lines = text.strip_suffix('\n').ok_or_else(bad)?.split('\n');
        let (origin, size, root) = (lines.next(), lines.next(), lines.next());
        let (Some(origin), Some(size), Some(root), None) = (origin, size, root, lines.next()) else {
            return Err(bad());
        };
        // One way to write a number: no sign, no zero before it.
        let number = size.parse::<u64>().ok().filter(|n| n.to_string() == size).ok_or_else(bad)?;
        let root = STANDARD.decode(root).ok().and_then(|r| r.try_into().ok()).ok_or_else(bad)?;
        Self::new(origin, number, Digest(root))
    }
}
