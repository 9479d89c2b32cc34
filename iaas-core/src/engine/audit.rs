//! Audit leaves: one per intent, in the commit that makes it, and their way into the log.

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::codec;
use crate::Digest;
use crate::Id;
use crate::ObjectRef;
use crate::Result;
use crate::id::Cloud;
use crate::model::Operation;
use crate::spi::state_store::Check;
use crate::spi::state_store::Entry;
use crate::spi::state_store::Write;

/// An entry of the audit log: who asked for what, when. The request itself enters by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// When.
    pub at: Timestamp,
    /// Who.
    pub by: String,
    /// Which action.
    pub action: String,
    /// On what.
    pub object: ObjectRef,
    /// Which operation carried it out.
    pub operation: Id<Operation>,
    /// The SHA-256 of the request's CBOR form.
    pub request: Digest,
}

/// Gives committed leaves their places from `next` on: in the order of their commits, and of their keys within one.
///
/// At most 60 leaves, so that the commit stays within every store's limits.
pub fn sequence(mut waiting: Vec<Entry>, next: u64) -> (Vec<Bytes>, Vec<Check>, Vec<Write>) {
    waiting.sort_by(|a, b| (a.rev, &a.key).cmp(&(b.rev, &b.key)));
    waiting.truncate(60);
    let mut leaves = Vec::new();
    let mut checks = Vec::new();
    let mut writes = Vec::new();
    for (index, entry) in (next..).zip(waiting) {
        let place = codec::audit_key(index);
        checks.push(Check::Absent(place.clone()));
        checks.push(Check::At(entry.key.clone(), entry.rev));
        writes.push(Write::Put(place, entry.value.clone()));
        writes.push(Write::Delete(entry.key));
        leaves.push(entry.value);
    }
    (leaves, checks, writes)
}

/// The name of a cloud's log.
pub fn origin(cloud: Id<Cloud>) -> String {
    format!("iaas-audit/{cloud}")
}

/// Reads a leaf.
///
/// # Errors
/// `Unsupported` if it is not one.
pub fn read(bytes: &[u8]) -> Result<Leaf> {
    codec::decode(bytes)
}
