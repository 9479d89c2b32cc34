//! The tree: one level of hashes above the other, each complete from the left.

use sha2::Digest as _;
use sha2::Sha256;

use super::Checkpoint;
use super::ConsistencyProof;
use super::InclusionProof;
use crate::Digest;
use crate::Error;
use crate::Result;

/// The tree over the leaves of a log. Pure: no clock, no I/O.
///
/// Appending costs two hashes on average; a root or a proof costs at most two hashes per level. Memory: 64 bytes per
/// leaf.
#[derive(Clone, Debug, Default)]
pub struct AuditLog {
    /// `levels[k][i]` covers the leaves from `i << k` until before `(i + 1) << k`.
    levels: Vec<Vec<Digest>>,
}

impl AuditLog {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a leaf and returns its index.
    pub fn append(&mut self, leaf: &[u8]) -> u64 {
        let index = self.size();
        let mut hash = leaf_hash(leaf);
        for level in 0.. {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            // There is such a level: it was pushed above if need be.
            let Some(row) = self.levels.get_mut(level) else { break };
            row.push(hash);
            let [.., left, right] = row.as_slice() else { break };
            if row.len() % 2 == 1 {
                break;
            }
            hash = node_hash(left, right);
        }
        index
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |row| row.len() as u64)
    }

    /// The root of the whole log.
    pub fn root(&self) -> Digest {
        self.range(0, self.size()).unwrap_or_else(empty_root)
    }

    /// The root that the log had when it had `size` leaves.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if it never had so many.
    pub fn root_at(&self, size: u64) -> Result<Digest> {
        self.had(size)?;
        Ok(self.range(0, size).unwrap_or_else(empty_root))
    }

    /// Says in a text what the log holds now.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for an origin that is empty or has a line break.
    pub fn checkpoint(&self, origin: &str) -> Result<Checkpoint> {
        Checkpoint::new(origin, self.size(), self.root())
    }

    /// Proves that the leaf at `index` is in the log of `size` leaves.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if the log has or had no such size or leaf.
    pub fn inclusion(&self, index: u64, size: u64) -> Result<InclusionProof> {
        self.had(size)?;
        if index >= size {
            return Err(Error::invalid(format!("a log of {size} leaves has no leaf {index}"))
                .remedy("ask for an index below the size"));
        }
        let mut path = Vec::new();
        let (mut first, mut end) = (0, size);
        while end - first > 1 {
            let middle = first + split(end - first);
            let (inside, outside) = if index < middle {
                ((first, middle), (middle, end))
            } else {
                ((middle, end), (first, middle))
            };
            path.extend(self.range(outside.0, outside.1));
            (first, end) = inside;
        }
        path.reverse();
        Ok(InclusionProof { index, size, path })
    }

    /// Proves that the log of `new` leaves begins with that of `old` leaves.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if the log has or had no such sizes.
    pub fn consistency(&self, old: u64, new: u64) -> Result<ConsistencyProof> {
        self.had(new)?;
        if old > new {
            return Err(Error::invalid(format!("a log of {new} leaves cannot begin with {old}"))
                .remedy("give the smaller size first"));
        }
        let mut path = Vec::new();
        if old != 0 {
            self.subproof(old, (0, new), &mut path);
        }
        path.reverse();
        Ok(ConsistencyProof { old, new, path })
    }

    /// RFC 9162 §2.1.4.1, from the root downwards; the path comes out in reverse.
    fn subproof(&self, old: u64, (mut first, mut end): (u64, u64), path: &mut Vec<Digest>) {
        // Whether the part that is left is a whole subtree of the old log that starts at its first leaf.
        let mut from_first = true;
        while old != end {
            let middle = first + split(end - first);
            if old <= middle {
                path.extend(self.range(middle, end));
                end = middle;
            } else {
                path.extend(self.range(first, middle));
                first = middle;
                from_first = false;
            }
        }
        if !from_first {
            path.extend(self.range(first, end));
        }
    }

    /// The root of the leaves from `first` until before `end`; `first` is where a subtree of that size begins. `None`
    /// if there are none.
    fn range(&self, first: u64, end: u64) -> Option<Digest> {
        let (mut first, mut parts) = (first, Vec::new());
        while first < end {
            let level = (end - first).ilog2();
            parts.push(self.node(level, first >> level)?);
            first += 1 << level;
        }
        let mut parts = parts.into_iter().rev();
        let last = parts.next()?;
        Some(parts.fold(last, |right, left| node_hash(&left, &right)))
    }

    fn node(&self, level: u32, index: u64) -> Option<Digest> {
        let row = self.levels.get(usize::try_from(level).ok()?)?;
        row.get(usize::try_from(index).ok()?).copied()
    }

    fn had(&self, size: u64) -> Result<()> {
        if size <= self.size() {
            return Ok(());
        }
        Err(Error::invalid(format!("the log has {} leaves, not {size}", self.size()))
            .remedy("ask for a size that it has reached"))
    }
}

impl<L: AsRef<[u8]>> FromIterator<L> for AuditLog {
    fn from_iter<I: IntoIterator<Item = L>>(leaves: I) -> Self {
        let mut log = Self::new();
        for leaf in leaves {
            log.append(leaf.as_ref());
        }
        log
    }
}

/// The hash of a leaf.
pub fn leaf_hash(leaf: &[u8]) -> Digest {
    // RFC 9162 §2.1.1: SHA-256(0x00 || leaf); the prefix keeps a leaf from passing for a node.
    Digest(Sha256::new().chain_update([0]).chain_update(leaf).finalize().into())
}

/// The hash of a node with two children.
pub(super) fn node_hash(left: &Digest, right: &Digest) -> Digest {
    // RFC 9162 §2.1.1: SHA-256(0x01 || left || right).
    Digest(Sha256::new().chain_update([1]).chain_update(left.0).chain_update(right.0).finalize().into())
}

/// The root of a log without leaves.
pub(super) fn empty_root() -> Digest {
    // RFC 9162 §2.1.1: the hash of an empty string.
    Digest(Sha256::digest([]).into())
}

/// The greatest power of two that is smaller than `n`, which is at least 2.
fn split(n: u64) -> u64 {
    1 << (n - 1).ilog2()
}
