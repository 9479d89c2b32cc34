//! The control protocol: one request and one answer per turn, many turns per connection.
//!
//! Each message is a CBOR map with field names; unknown fields are ignored, and missing ones have defaults. A request says
//! which versions its sender speaks; the answer says which one was used. Every release speaks its own version and the one
//! before it.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use ciborium::Value;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::NamedFds;
use crate::Error;
use crate::Outcome;
use crate::Result;

/// The oldest and the newest version that a side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Versions(pub(super) u16, pub(super) u16);

impl Versions {
    /// The newest version that both sides speak.
    pub(super) fn agree(self, other: Self) -> Result<u16> {
        let newest = self.1.min(other.1);
        if newest >= self.0.max(other.0) {
            return Ok(newest);
        }
        let (ours, theirs) = (format!("{}–{}", self.0, self.1), format!("{}–{}", other.0, other.1));
        Err(Error::unsupported(format!(
            "no common version of the control protocol: {ours} here, {theirs} there"
        ))
        .remedy("upgrade one release at a time; each speaks its own version and the one before"))
    }
}

/// What this release speaks. The first release has none before it.
pub(super) const SPOKEN: Versions = Versions(1, 1);

/// A request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) v: Versions,
    pub(super) verb: String,
    #[serde(default)]
    pub(super) body: Bytes,
    #[serde(default)]
    pub(super) fds: Vec<String>,
    /// The operation on whose behalf, and its trace: for spans.
    #[serde(default)]
    pub(super) op: Option<Uuid>,
    #[serde(default)]
    pub(super) trace: Option<String>,
    /// The time that remains to the caller, in milliseconds.
    #[serde(default)]
    pub(super) budget_ms: u64,
}

/// An answer: `ok`, or else `err`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) v: u16,
    #[serde(default)]
    pub(super) ok: Option<Bytes>,
    /// An [`Error`]; kept as a value, so that a kind that we do not know does not hide that it is an error.
    #[serde(default)]
    pub(super) err: Option<Value>,
    #[serde(default)]
    pub(super) fds: Vec<String>,
}

impl Answer {
    pub(super) fn ok(v: u16, body: Bytes, fds: Vec<String>) -> Self {
        Self { v, ok: Some(body), err: None, fds }
    }

    pub(super) fn err(v: u16, error: &Error) -> Self {
        let err = Value::serialized(error).unwrap_or_else(|_| Value::Text(error.public().to_owned()));
        Self { v, ok: None, err: Some(err), fds: Vec::new() }
    }

    /// The body and the descriptors, or the role's error.
    pub(super) fn result(self, fds: Vec<OwnedFd>) -> Result<(Bytes, NamedFds)> {
        if let Some(err) = self.err {
            return Err(err.deserialized().unwrap_or_else(|e| {
                Error::unavailable("the role answered with an error of an unknown kind")
                    .detail(format!("{err:?}"))
                    .because(&e)
            }));
        }
        let body = self.ok.ok_or_else(|| Error::unavailable("the role answered with nothing"))?;
        Ok((body, named(self.fds, fds)?))
    }
}

/// What [`IDENTITY_VERB`] answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WhoAmI {
    pub(super) role: String,
    pub(super) id: Uuid,
}

/// A verb that the control server itself answers. Verbs with a slash are kept for this module.
pub(super) const IDENTITY_VERB: &str = "process/identity";

/// Puts names to descriptors.
pub(super) fn named(names: Vec<String>, fds: Vec<OwnedFd>) -> Result<NamedFds> {
    if names.len() != fds.len() {
        let what = format!("{} names for {} descriptors", names.len(), fds.len());
        return Err(Error::invalid("a message does not name its descriptors")
            .detail(what)
            .outcome_is(Outcome::Unknown));
    }
    Ok(names.into_iter().zip(fds).collect())
}

#[cfg(test)]
mod tests {
    use ciborium::cbor;

    use super::*;

    #[test]
    fn neighbours_agree_on_the_newest_common_version_and_strangers_do_not() {
        assert_eq!(Versions(1, 2).agree(Versions(2, 3)).unwrap(), 2);
        assert_eq!(Versions(2, 3).agree(Versions(1, 2)).unwrap(), 2);
        assert_eq!(Versions(1, 2).agree(Versions(1, 2)).unwrap(), 2);
        let error = Versions(1, 2).agree(Versions(3, 4)).unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (crate::ErrorKind::Unsupported, Outcome::NotDone));
    }

    #[test]
    fn an_error_of_an_unknown_kind_is_still_an_error() {
        let value = cbor!({ "kind" => "FromTheFuture", "public" => "no" }).unwrap();
        let answer = Answer { v: 1, ok: None, err: Some(value), fds: Vec::new() };
        let error = answer.result(Vec::new()).unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (crate::ErrorKind::Unavailable, Outcome::Unknown));
        assert!(error.operator()[0].contains("FromTheFuture"), "{error:#}");
        let known = Error::denied("no").remedy("ask");
        assert_eq!(Answer::err(1, &known).result(Vec::new()).unwrap_err(), known);
    }
}
