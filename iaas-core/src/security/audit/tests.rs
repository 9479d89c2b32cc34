//! The published answers for eight leaves, and every proof for every log of up to 64.

use proptest::prelude::*;

use super::tree::empty_root;
use super::*;
use crate::Digest;
use crate::ErrorKind;

/// The leaves of Certificate Transparency's reference tests.
const LEAVES: [&[u8]; 8] = [
    b"",
    b"\x00",
    b"\x10",
    b"\x20\x21",
    b"\x30\x31",
    b"\x40\x41\x42\x43",
    b"\x50\x51\x52\x53\x54\x55\x56\x57",
    b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
];

/// Their roots, from no leaf to all eight.
const ROOTS: [&str; 9] = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];

fn eight() -> AuditLog {
    LEAVES.iter().collect()
}

fn digests(hex: &[&str]) -> Vec<Digest> {
    hex.iter().map(|h| h.parse().unwrap()).collect()
}

fn leaf(n: u64) -> Vec<u8> {
    n.to_be_bytes().to_vec()
}

fn log_of(size: u64) -> AuditLog {
    (0..size).map(leaf).collect()
}

#[test]
fn the_roots_are_the_published_ones() {
    let mut log = AuditLog::new();
    for (size, root) in ROOTS.iter().enumerate() {
        assert_eq!(log.root().to_string(), *root, "{size} leaves");
        assert_eq!(eight().root_at(size as u64).unwrap(), log.root());
        if let Some(leaf) = LEAVES.get(size) {
            assert_eq!(log.append(leaf), size as u64);
        }
    }
}

#[test]
fn the_proofs_are_the_published_ones() {
    let log = eight();
    let path = [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ];
    assert_eq!(log.inclusion(0, 8).unwrap().path, digests(&path));
    assert_eq!(log.consistency(1, 8).unwrap().path, digests(&path));
    let six_to_eight = [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ];
    assert_eq!(log.consistency(6, 8).unwrap().path, digests(&six_to_eight));
    let two_to_five = [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ];
    assert_eq!(log.consistency(2, 5).unwrap().path, digests(&two_to_five));
}

#[test]
fn every_leaf_of_every_log_is_proved_and_no_other() {
    let log = log_of(64);
    for size in 1..=64 {
        let root = log.root_at(size).unwrap();
        for index in 0..size {
            let proof = log.inclusion(index, size).unwrap();
            proof.verify(&leaf(index), &root).unwrap();
            assert!(proof.verify(&leaf(index + 1), &root).is_err());
            let elsewhere = InclusionProof { index: (index + 1) % size, ..proof.clone() };
            assert!(size == 1 || elsewhere.verify(&leaf(index), &root).is_err());
            let beyond = InclusionProof { index: index + size, ..proof };
            assert!(beyond.verify(&leaf(index), &root).is_err());
        }
    }
}

#[test]
fn a_proof_for_another_size_is_too_short_or_too_long() {
    let log = log_of(4);
    let of_two = InclusionProof { size: 4, ..log.inclusion(0, 2).unwrap() };
    assert!(of_two.verify(&leaf(0), &log.root_at(2).unwrap()).is_err());
    let of_four = InclusionProof { size: 2, ..log.inclusion(0, 4).unwrap() };
    assert!(of_four.verify(&leaf(0), &log.root()).is_err());
    // The path goes on where the tree that it claims has ended.
    let beyond = InclusionProof { index: 0, size: 2, ..log.inclusion(2, 4).unwrap() };
    assert!(beyond.verify(&leaf(2), &log.root()).is_err());
    let from_three = ConsistencyProof { new: 8, ..log.consistency(3, 4).unwrap() };
    assert!(from_three.verify(&log.root_at(3).unwrap(), &log.root()).is_err());
}

#[test]
fn every_log_begins_with_every_earlier_one() {
    let log = log_of(64);
    for new in 0..=64 {
        let new_root = log.root_at(new).unwrap();
        for old in 0..=new {
            let old_root = log.root_at(old).unwrap();
            let proof = log.consistency(old, new).unwrap();
            proof.verify(&old_root, &new_root).unwrap();
            let other = leaf_hash(b"other");
            assert!(proof.verify(&other, &new_root).is_err(), "{old} of {new}");
            assert!(old == 0 || proof.verify(&old_root, &other).is_err(), "{old} of {new}");
        }
    }
}

#[test]
fn sizes_and_indexes_that_never_were_are_refused() {
    let log = log_of(3);
    assert!(log.root_at(4).is_err());
    assert!(log.inclusion(3, 3).is_err());
    assert!(log.inclusion(0, 4).is_err());
    assert!(log.consistency(3, 2).is_err());
    assert!(log.consistency(1, 4).is_err());
    let empty = InclusionProof { index: 0, size: 0, path: Vec::new() };
    assert!(empty.verify(b"", &empty_root()).is_err());
}

#[test]
fn a_checkpoint_reads_back_and_notices_a_changed_or_shorter_log() {
    let log = log_of(5);
    let checkpoint = log.checkpoint("cloud.example/audit").unwrap();
    let text = checkpoint.to_string();
    assert_eq!(text.lines().take(2).collect::<Vec<_>>(), ["cloud.example/audit", "5"]);
    assert_eq!(text.parse::<Checkpoint>().unwrap(), checkpoint);
    checkpoint.verify(&log_of(5)).unwrap();
    checkpoint.verify(&log_of(9)).unwrap();
    assert_eq!(checkpoint.verify(&log_of(4)).unwrap_err().kind(), ErrorKind::Conflict);
    let mut changed: Vec<_> = (0..9).map(leaf).collect();
    changed[4] = b"nothing happened".to_vec();
    assert_eq!(checkpoint.verify(&changed.iter().collect()).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(log.checkpoint("two\nlines").is_err());
    for bad in ["", "o\n5\n", "o\n05\nAAAA\n", "o\n+5\nAAAA\n", "o\n5\nAAAA\n", text.trim_end()] {
        assert!(bad.parse::<Checkpoint>().is_err(), "{bad:?}");
    }
    for (good, bad) in [("5\n", "05\n"), ("5\n", "+5\n"), ("=\n", "=\nmore\n"), ("=\n", "\n")] {
        let changed = text.replacen(good, bad, 1);
        assert!(changed != text && changed.parse::<Checkpoint>().is_err(), "{changed:?}");
    }
}

proptest! {
    #[test]
    fn a_proof_with_any_byte_changed_proves_nothing(
        new in 1u64..=64, old in 1u64..=64, at: prop::sample::Index, bit in 0u8..8, more: bool,
    ) {
        let old = (old - 1) % new + 1;
        let log = log_of(new);
        let (old_root, new_root) = (log.root_at(old).unwrap(), log.root());
        let change = |path: &mut Vec<Digest>| {
            if more || path.is_empty() {
                path.push(Digest([7; 32]));
            } else {
                let byte = at.index(path.len() * 32);
                path[byte / 32].0[byte % 32] ^= 1 << bit;
            }
        };
        let mut inclusion = log.inclusion(old - 1, new).unwrap();
        change(&mut inclusion.path);
        prop_assert!(inclusion.verify(&leaf(old - 1), &new_root).is_err());
        let mut consistency = log.consistency(old, new).unwrap();
        change(&mut consistency.path);
        prop_assert!(consistency.verify(&old_root, &new_root).is_err());
    }

    #[test]
    fn no_proof_makes_the_verifier_panic(
        index: u64, size: u64, old: u64, new: u64, path in proptest::collection::vec(any::<[u8; 32]>(), 0..80),
    ) {
        let path: Vec<Digest> = path.into_iter().map(Digest).collect();
        let root = Digest([1; 32]);
        let inclusion = InclusionProof { index, size, path: path.clone() };
        prop_assert!(inclusion.verify(b"", &root).is_err());
        let _ = ConsistencyProof { old, new, path }.verify(&root, &root);
    }
}
