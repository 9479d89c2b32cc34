//! Hostile guests and images: each function reads its input as what a guest does, or as what a machine starts with, and
//! does that to the real code over a small memory and back-ends in RAM. What must hold is asserted, beyond not panicking.
//!
//! The programs under `fuzz/` feed them with what a fuzzer thinks up; on every toolchain a test replays `fuzz/corpus/`, so
//! that an input that once broke something keeps it mended. Inputs are read by a [reader](Input) of our own and not by a
//! library, because a corpus is worth something only as long as its bytes mean the same.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a broken invariant is to be loud here")]

mod block;
mod boot;
mod chain;
mod guest;
mod net;
mod pci;
mod rng;
#[cfg(test)]
mod seeds;
mod walk;

pub use block::block;
pub use boot::boot;
pub use chain::chain;
pub use net::net;
pub use pci::pci;
pub use rng::rng;

/// Does to the real code what its input says.
pub type Target = fn(&[u8]);

/// Every target by its name, which is that of its program and of its corpus.
pub const TARGETS: [(&str, Target); 6] =
    [("block", block), ("net", net), ("rng", rng), ("pci", pci), ("boot", boot), ("chain", chain)];

/// Bytes that are read as numbers; beyond their end there are zeroes.
#[derive(Debug)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let front = self.take(N);
        out[..front.len()].copy_from_slice(front);
        out
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn long(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn quad(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    /// Bytes of a register access: 1, 2, 4 or 8 in most cases.
    fn value(&mut self) -> Vec<u8> {
        let width = [1, 2, 4, 8, 4, 2, 1, 3][self.below(8)];
        let mut bytes = self.take(width).to_vec();
        bytes.resize(width, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Each input that was kept, through the same function. The published crate has no corpus: `fuzz/` is a package of its
    /// own.
    fn replay(name: &str) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        if !root.exists() {
            return;
        }
        let target = TARGETS.iter().find(|(known, _)| *known == name).unwrap().1;
        let folder = root.join("corpus").join(name);
        let files: Vec<_> =
            std::fs::read_dir(&folder).into_iter().flatten().map(|f| f.unwrap().path()).collect();
        assert!(!files.is_empty(), "{} has no inputs", folder.display());
        for file in files {
            // The harness shows it when the next line panics.
            println!("{}", file.display());
            target(&std::fs::read(&file).unwrap());
        }
    }

    #[test]
    fn inputs_of_block() {
        replay("block");
    }

    #[test]
    fn inputs_of_net() {
        replay("net");
    }

    #[test]
    fn inputs_of_rng() {
        replay("rng");
    }

    #[test]
    fn inputs_of_pci() {
        replay("pci");
    }

    #[test]
    fn inputs_of_boot() {
        replay("boot");
    }

    #[test]
    fn inputs_of_chain() {
        replay("chain");
    }

    #[test]
    fn every_folder_of_inputs_has_a_target() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for folder in std::fs::read_dir(corpus).into_iter().flatten() {
            let name = folder.unwrap().file_name();
            assert!(TARGETS.iter().any(|(known, _)| name == **known), "nothing reads {name:?}");
        }
    }
}
