//! Where a corpus begins: what real drivers and kernels do, written as inputs. `cargo test -p iaas-vmm -- --ignored
//! write_seeds` puts them into `fuzz/corpus/`.

use std::path::Path;

/// An input, written step by step.
struct Script(Vec<u8>);

impl Script {
    fn new(head: &[u8]) -> Self {
        Self(head.to_vec())
    }

    fn then(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// By the book, every feature, `1 << size` descriptors.
    fn start(self, size: u8) -> Self {
        self.then(&[0, 0, size])
    }

    fn settle(self) -> Self {
        self.then(&[8])
    }

    fn reset(self) -> Self {
        self.then(&[15, 0])
    }

    /// A disk's request of that kind at a sector, with one stretch of data.
    fn disk(self, kind: u8, sector: u8, how: u8, data: Option<(u16, u16)>) -> Self {
        let script = self.then(&[2, kind, sector, how]);
        match data {
            Some((at, len)) => script.then(&[1]).word(at).word(len),
            None => script.then(&[0]),
        }
    }

    fn word(self, word: u16) -> Self {
        self.then(&word.to_le_bytes())
    }
}

fn disks() -> Vec<Vec<u8>> {
    let all = |head: &[u8], how: u8| {
        let script = Script::new(head).start(5);
        let script = script.disk(WRITE, 8, how, Some((0x1000, 0x1000))).disk(FLUSH, 0, how, None).settle();
        let script =
            script.disk(READ, 8, how, Some((0x2000, 0x2000))).disk(IDENTIFY, 0, how, Some((0x100, 0x1000)));
        let script = script.then(&[2, DISCARD, 16, how, 16, 8]).then(&[2, ZERO, 16, how | 1, 24, 8]).settle();
        script.reset().start(1).disk(READ, 0, how, Some((0x800, 0x1000))).settle().0
    };
    let slow = Script::new(&[0x80, 3]).start(4).disk(READ, 0, 0, Some((0x1000, 0x2000)));
    let slow = slow.disk(WRITE, 16, 0, Some((0x801, 0x1000))).settle().then(&[10, 3, 1]).settle();
    let slow = slow.then(&[10, 1, 1]).then(&[10, 3, 0]).settle().reset();
    vec![all(&[0, 31], 0), all(&[0, 31], INDIRECT), all(&[0x81, 2], 0), all(&[0x67, 0], INDIRECT), slow.0]
}

fn nics() -> Vec<Vec<u8>> {
    let mut script = Script::new(&[0]).start(4);
    for n in 0..4 {
        // Room for a frame, directly and by a table.
        script = script.then(&[2, n & 1 << 1, 1]).word(0x1000 + u16::from(n) * 0x800).word(0x600);
    }
    script =
        script.settle().then(&[10, 2]).then(&[1, 0, 0, 0, 0, 0, 14, 0, 6, 0, 1, 0]).word(0x60).then(&[0x11]);
    script = script.settle().then(&[3, 1, 1]).word(0x3000).word(0x40).settle();
    script = script
        .then(&[10, 0, 1])
        .then(&[3, 3, 1])
        .word(0x3000)
        .word(0x40)
        .then(&[3, 1, 1])
        .word(0x3100)
        .word(0x80);
    let script = script.settle().then(&[10, 1]).settle().reset();
    let plain = Script::new(&[1]).start(3).then(&[3, 1, 1]).word(0x3000).word(0x40).settle();
    vec![script.0, plain.0]
}

fn sources() -> Vec<Vec<u8>> {
    let script = Script::new(&[]).start(3);
    let script =
        script.then(&[2, 1]).word(0x1000).word(0x40).then(&[0]).then(&[2, 2]).word(0x1100).word(0x100);
    let script = script.word(0x1400).word(0x20).then(&[1]).settle().reset().start(0).settle();
    vec![script.0]
}

/// A start by the book, and what Linux reads and writes of the registers before and after it.
fn buses() -> Vec<Vec<u8>> {
    let ask = Script::new(&[0]).then(&[0xff; 8]);
    let ask =
        ask.then(&[8, 0x10, 2]).then(&[0xff; 4]).then(&[8, 0x10, 2]).then(&0xc000_0000u32.to_le_bytes());
    let ask = ask.then(&[8, 4, 1, 6, 0]).then(&[11, 2, 0, 0, 0, 0, 0x10, 8, 4, 1]);
    let ask = ask.then(&[0, 0, 0, 1, 0, 3]).then(&[5]).word(8).then(&[2, 1, 0, 0, 0]);
    let start = ask.then(&[15]).then(&[0xff; 4]).then(&[0; 4]).then(&[3, 0, 1]).then(&[0, 2]);
    let vectors = start
        .then(&[5])
        .word(0x4000)
        .then(&[2, 0, 0, 0xe0, 0xfe])
        .then(&[5])
        .word(0x400c)
        .then(&[2, 0, 0, 0, 0]);
    let run = vectors
        .then(&[14, 0x13, 12, 12])
        .then(&[14, 0x0f, 12])
        .then(&[1, 0])
        .then(&[2, 20, 0, 0])
        .then(&[12]);
    // The window by way of configuration space: the status.
    let by_access =
        Script::new(&[1]).then(&[0xff; 8]).then(&[8, 0x98, 2, 20, 0, 0, 0]).then(&[8, 0x9c, 2, 1, 0, 0, 0]);
    vec![run.0, by_access.then(&[8, 0xa0, 0, 1]).0]
}

/// Images with just what a loader looks at.
fn images() -> Vec<Vec<u8>> {
    let mut linux = vec![0; 0x400 + 0x600];
    linux[0x1f1] = 1;
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    linux[0x211] = 1;
    linux[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    linux[0x236] = 1;
    linux[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
    linux[0x260..0x264].copy_from_slice(&0x2_0000u32.to_le_bytes());
    let note = [
        &4u32.to_le_bytes()[..],
        &4u32.to_le_bytes(),
        &18u32.to_le_bytes(),
        b"Xen\0",
        &0x10_0000u32.to_le_bytes(),
    ];
    let header = |kind: u32, offset: u64, len: u64| {
        let longs = [offset, 0x10_0000, 0x10_0000, len, len, 4];
        [&kind.to_le_bytes()[..], &[5, 0, 0, 0], &longs.map(u64::to_le_bytes).concat()].concat()
    };
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend([0x10_0000u64, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(header(1, 196, 16));
    elf.extend(header(4, 176, 20));
    elf.extend(note.concat());
    elf.extend([0xf4; 16]);
    // On the command line; and begun where nothing of it is.
    let (mut low, mut lost) = (elf.clone(), elf.clone());
    low[64 + 24..64 + 32].copy_from_slice(&0x2_0000u64.to_le_bytes());
    low[64 + 40..64 + 48].copy_from_slice(&0xf_0000u64.to_le_bytes());
    lost[192..196].copy_from_slice(&0x10u32.to_le_bytes());
    let with = |head: &[u8], image: &[u8]| [head, image].concat();
    vec![
        with(&[0, 2, 20, 0, 0, 0], &linux),
        with(&[2, 5, 0, 0, 0, 9], &linux),
        with(&[0, 2, 20, 0, 0, 0], &elf),
        with(&[2, 0, 9, 0, 100, 0], &elf),
        with(&[0, 2, 20, 0, 0, 0], &low),
        with(&[0, 2, 20, 0, 0, 0], &lost),
        with(&[1, 0, 0, 0, 0x10, 0, 0, 0, 0, 0], &[0xf4; 8]),
    ]
}

fn chains() -> Vec<Vec<u8>> {
    // 16 places, a table at 0x1000, rings at 0x1400 and 0x1800; a header, data and a status.
    let script = Script::new(&[4, 2]).word(0xd000).word(0xd400).word(0xd800).then(&[0, 3]);
    let script = script.then(&[0, 1]).word(0x800).word(16).then(&[0]);
    let script = script.then(&[1, 1]).word(0x1000).word(0x1000).then(&[2]);
    let script = script.then(&[2, 0]).word(0x900).word(1).then(&[2]);
    let script = script.then(&[1, 0]).then(&[1]).word(0x800).then(&[16]).then(&[0; 16]).then(&[0, 7]);
    // The index of the ring is the last of the memory; its places lie beyond.
    let edge = Script::new(&[4, 2]).word(0xd000).word(0xe0fc).word(0xd800).then(&[0, 0, 1, 0, 0, 0, 7]);
    vec![script.0, edge.0]
}

/// Not a test: writes what a corpus begins with.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let all = [
        ("block", disks()),
        ("net", nics()),
        ("rng", sources()),
        ("pci", buses()),
        ("boot", images()),
        ("chain", chains()),
    ];
    for (target, inputs) in all {
        std::fs::create_dir_all(corpus.join(target)).unwrap();
        for (n, input) in inputs.into_iter().enumerate() {
            std::fs::write(corpus.join(target).join(format!("seed-{n}")), input).unwrap();
        }
    }
}

/// Kinds of a disk's requests, as places in the target's table.
const READ: u8 = 0;
const WRITE: u8 = 1;
const FLUSH: u8 = 2;
const IDENTIFY: u8 = 3;
const DISCARD: u8 = 4;
const ZERO: u8 = 5;
/// By a table of their own.
const INDIRECT: u8 = 1;
