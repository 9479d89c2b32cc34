//! How records lie in the store: keys, and CBOR maps with field names.
//!
//! | key | value |
//! |---|---|
//! | `cloud` | [`CloudRecord`](super::adopt::CloudRecord) |
//! | `r/<noun>/<uuid>` | a record |
//! | `t/<principal>/<token>` | the answer to a request with that token |
//! | `l/<uuid>` | an audit leaf that has no place in the log yet |
//! | `a/<index>` | an audit leaf in its place |
//! | `o/<uuid>` | usage on its way to the meter |

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::Error;
use crate::Result;

/// The prefix of all records.
pub const RECORDS: &str = "r/";
/// The prefix of audit leaves without a place.
pub const LEAVES: &str = "l/";
/// The prefix of the audit log.
pub const AUDIT: &str = "a/";
/// The prefix of the outbox.
pub const OUTBOX: &str = "o/";

/// The key of a record.
pub fn record_key(noun: &str, id: Uuid) -> Bytes {
    Bytes::from(format!("{RECORDS}{noun}/{id}"))
}

/// The noun and id of a record's key.
pub fn parse_record_key(key: &[u8]) -> Option<(&str, Uuid)> {
    let text = std::str::from_utf8(key).ok()?.strip_prefix(RECORDS)?;
    let (noun, id) = text.split_once('/')?;
    Some((noun, Uuid::parse_str(id).ok()?))
}

/// Before every key of a token.
pub const TOKENS: &str = "t/";

/// The key of an idempotency token.
pub fn token_key(principal: &str, token: &str) -> Bytes {
    Bytes::from(format!("{TOKENS}{}:{principal}/{token}", principal.len()))
}

/// The key of the audit leaf at `index`; in byte order of the index.
pub fn audit_key(index: u64) -> Bytes {
    Bytes::from(format!("{AUDIT}{index:020}"))
}

/// Writes a value as CBOR.
///
/// # Errors
/// `Internal` if the value has no CBOR form, which is a defect of its type.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes> {
    let mut out = Vec::with_capacity(256);
    ciborium::into_writer(value, &mut out)
        .map_err(|e| Error::internal("a value could not be encoded").because(&e))?;
    Ok(Bytes::from(out))
}

/// Reads a value; fields that it does not know are ignored.
///
/// # Errors
/// `Unsupported` if the bytes are not such a value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    ciborium::from_reader(bytes).map_err(|e| {
        Error::unsupported("a stored value could not be read")
            .remedy("open the store with the version of this program that wrote it")
            .because(&e)
    })
}
