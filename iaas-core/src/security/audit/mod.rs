//! The audit log as a Merkle tree: what is in it can be proved in a few hashes, and so can that nothing was taken out.
//!
//! Leaves are committed with the intent that they record and get their places later; from then on this tree covers
//! them. [`AuditLog`] keeps two hashes per leaf in memory and no leaf: those are in the state store.
//!
//! A root proves nothing to somebody who lets the writer choose it. Keep a [`Checkpoint`] elsewhere, and later ask for
//! [`AuditLog::consistency`] with it: without one, a cut at the end cannot be seen. Checkpoints are not signed yet.
//!
//! # Source
//! RFC 9162 §2.1 (and RFC 6962 §2.1, which has the same tree); C2SP tlog-checkpoint for the text.

mod checkpoint;
mod proof;
mod tree;

pub use checkpoint::Checkpoint;
pub use proof::ConsistencyProof;
pub use proof::InclusionProof;
pub use tree::AuditLog;
pub use tree::leaf_hash;

#[cfg(test)]
mod tests;
