//! What was answered to a request that bore an idempotency token.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::codec;
use crate::Digest;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::model::Operation;
use crate::security::Action;

/// A change that was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Running<T> {
    /// The operation that carries it out.
    pub operation: Id<Operation>,
    /// What the caller gets at once.
    pub out: T,
}

/// The answer kept for a token.
#[derive(Serialize, Deserialize)]
struct Answered {
    request: Digest,
    operation: Id<Operation>,
    out: Bytes,
    /// When it was given; unknown in what older versions wrote.
    #[serde(default)]
    at: Option<Timestamp>,
}

/// What is stored for the answer `out` to `request`.
///
/// # Errors
/// Those of the encoding.
pub fn answer<A: Action>(
    request: &Bytes,
    operation: Id<Operation>,
    out: &A::Out,
    at: Timestamp,
) -> Result<Bytes> {
    let request = fingerprint::<A>(request);
    codec::encode(&Answered { request, operation, out: codec::encode(out)?, at: Some(at) })
}

/// The stored answer, for an equal request.
///
/// # Errors
/// `Conflict` if the request was another one.
pub fn replay<A: Action>(stored: &[u8], request: &Bytes) -> Result<Running<A::Out>> {
    let answered: Answered = codec::decode(stored)?;
    if answered.request != fingerprint::<A>(request) {
        return Err(Error::conflict("this token was used for another request").remedy("use a new token"));
    }
    Ok(Running { operation: answered.operation, out: codec::decode(&answered.out)? })
}

/// How long ago a stored answer was given; without an end if that is not known. `None`: it cannot be read, and is kept.
pub fn age(stored: &[u8], now: Timestamp) -> Option<Duration> {
    let answered: Answered = codec::decode(stored).ok()?;
    Some(
        answered
            .at
            .map_or(Duration::MAX, |at| Duration::try_from(at.duration_until(now)).unwrap_or_default()),
    )
}

fn fingerprint<A: Action>(request: &Bytes) -> Digest {
    let mut bytes = A::NAME.as_bytes().to_vec();
    bytes.push(0);
    bytes.extend_from_slice(request);
    Digest::of(&bytes)
}
