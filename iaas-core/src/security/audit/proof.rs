//! Proofs, and how to check them without the log.

use serde::Deserialize;
use serde::Serialize;

use super::tree::leaf_hash;
use super::tree::node_hash;
use crate::Digest;
use crate::Error;
use crate::Result;

/// That a leaf is in a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InclusionProof {
    /// The leaf's index.
    pub index: u64,
    /// The number of leaves of the log.
    pub size: u64,
    /// The hashes beside the way from the leaf to the root.
    pub path: Vec<Digest>,
}

/// That a log begins with an earlier one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsistencyProof {
    /// The number of leaves of the earlier log.
    pub old: u64,
    /// The number of leaves of the later one.
    pub new: u64,
    /// The hashes from which both roots follow.
    pub path: Vec<Digest>,
}

impl InclusionProof {
    /// Checks that `leaf` is at the proof's index in the log with `root`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if it is not proved.
    ///
    /// # Source
    /// RFC 9162 §2.1.3.2.
    pub fn verify(&self, leaf: &[u8], root: &Digest) -> Result<()> {
        let bad = || Error::invalid(format!("it is not proved that leaf {} is in the log", self.index));
        let last = self.size.checked_sub(1).filter(|last| self.index <= *last).ok_or_else(bad)?;
        let mut way = Way { node: self.index, last };
        let mut hash = leaf_hash(leaf);
        for beside in &self.path {
            hash = match way.up().ok_or_else(bad)? {
                Side::Left => node_hash(beside, &hash),
                Side::Right => node_hash(&hash, beside),
            };
        }
        if way.last == 0 && hash == *root { Ok(()) } else { Err(bad()) }
    }
}

impl ConsistencyProof {
    /// Checks that the log with `new_root` begins with the one with `old_root`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if it is not proved.
    ///
    /// # Source
    /// RFC 9162 §2.1.4.2.
    pub fn verify(&self, old_root: &Digest, new_root: &Digest) -> Result<()> {
        if self.proves(old_root, new_root).unwrap_or(false) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "it is not proved that the log of {} leaves begins with that of {}",
            self.new, self.old
        )))
    }

    fn proves(&self, old_root: &Digest, new_root: &Digest) -> Option<bool> {
        if self.old == self.new || self.old == 0 {
            // Every log begins with the empty one, whose root is known.
            let old = if self.old == 0 { super::tree::empty_root() } else { *new_root };
            return Some(self.path.is_empty() && *old_root == old);
        }
        let last = self.new.checked_sub(1).filter(|last| self.old <= *last)?;
        let mut way = Way { node: self.old - 1, last };
        while way.node & 1 == 1 {
            way.half();
        }
        // A whole subtree on the left is the old log itself, and its root need not be sent.
        let (first, rest) = match self.path.split_first() {
            _ if self.old.is_power_of_two() => (old_root, self.path.as_slice()),
            split => split?,
        };
        let (mut old, mut new) = (*first, *first);
        for beside in rest {
            match way.up()? {
                Side::Left => {
                    old = node_hash(beside, &old);
                    new = node_hash(beside, &new);
                }
                Side::Right => new = node_hash(&new, beside),
            }
        }
        Some(way.last == 0 && old == *old_root && new == *new_root)
    }
}

/// The way from a node to the root: its index, and that of the last node of its level.
struct Way {
    node: u64,
    last: u64,
}

/// On which side of the way a hash is.
enum Side {
    Left,
    Right,
}

impl Way {
    /// Goes up to where a hash is beside the way; `None` at the root.
    fn up(&mut self) -> Option<Side> {
        if self.last == 0 {
            return None;
        }
        let side = if self.node & 1 == 1 || self.node == self.last { Side::Left } else { Side::Right };
        if matches!(side, Side::Left) {
            // A last node without a sibling goes up as it is.
            while self.node & 1 == 0 && self.node != 0 {
                self.half();
            }
        }
        self.half();
        Some(side)
    }

    fn half(&mut self) {
        self.node >>= 1;
        self.last >>= 1;
    }
}
