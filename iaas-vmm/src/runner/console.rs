//! The console's scroll-back: the last [`KEPT`] bytes that the VM wrote, in a file that outlives every process.
//!
//! Offsets count from the VM's first byte, over all its boots. Layout: the number of bytes ever written as a little-endian
//! `u64` in the first 4 KiB, then a ring of [`KEPT`] bytes. Bytes are written before the number that covers them, so
//! a killed writer loses at most its last piece.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes that are kept: 1 MiB.
pub const KEPT: u64 = 1 << 20;

/// Writes a console. One process at a time.
#[derive(Debug)]
pub struct ConsoleWriter {
    file: File,
    total: u64,
}

impl ConsoleWriter {
    /// Goes on where the file at `path` ends, making it if it is missing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let total = total(&file)?;
        Ok(Self { file, total })
    }

    /// Appends what the VM wrote.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Of a piece larger than the ring only the end would be left.
        let kept = usize::try_from(KEPT).unwrap_or(usize::MAX);
        let skipped = bytes.len().saturating_sub(kept);
        let mut at = self.total.saturating_add(u64::try_from(skipped).unwrap_or(0));
        let mut rest = bytes.get(skipped..).unwrap_or_default();
        while !rest.is_empty() {
            let place = at % KEPT;
            let room = usize::try_from(KEPT - place).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.file.write_all_at(now, HEAD + place)?;
            at = at.saturating_add(u64::try_from(now.len()).unwrap_or(0));
            rest = later;
        }
        self.file.write_all_at(&at.to_le_bytes(), 0)?;
        self.total = at;
        Ok(())
    }
}

/// Reads a console, also while it is written.
#[derive(Debug)]
pub struct ConsoleReader {
    file: File,
    at: u64,
}

impl ConsoleReader {
    /// Reads from offset `from` on, or from the oldest byte that is kept.
    pub fn open(path: &Path, from: u64) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, at: from })
    }

    /// The offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// The next bytes, at most `most`; empty if there is none yet.
    pub fn read(&mut self, most: usize) -> io::Result<Vec<u8>> {
        loop {
            let end = total(&self.file)?;
            self.at = self.at.max(end.saturating_sub(KEPT));
            if self.at >= end {
                return Ok(Vec::new());
            }
            let place = self.at % KEPT;
            let want = (end - self.at).min(KEPT - place).min(u64::try_from(most).unwrap_or(u64::MAX));
            let mut bytes = vec![0; usize::try_from(want).unwrap_or(0)];
            self.file.read_exact_at(&mut bytes, HEAD + place)?;
            // Overtaken by the writer: these are newer bytes in the place of those that we wanted.
            if total(&self.file)?.saturating_sub(KEPT) <= self.at {
                self.at += want;
                return Ok(bytes);
            }
        }
    }
}

fn total(file: &File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(u64::from_le_bytes(bytes)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        Err(e) => Err(e),
    }
}

/// Where the ring starts.
const HEAD: u64 = 4096;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(path: &Path, from: u64) -> Vec<u8> {
        let mut reader = ConsoleReader::open(path, from).unwrap();
        let mut out = Vec::new();
        loop {
            let bytes = reader.read(70_000).unwrap();
            if bytes.is_empty() {
                return out;
            }
            out.extend(bytes);
        }
    }

    #[test]
    fn a_console_is_read_from_any_offset_over_a_restart_of_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        ConsoleWriter::open(&path).unwrap().append(b"one ").unwrap();
        ConsoleWriter::open(&path).unwrap().append(b"two").unwrap();
        assert_eq!(all(&path, 0), b"one two");
        assert_eq!(all(&path, 4), b"two");
        assert_eq!(all(&path, 7), b"");
        assert_eq!(all(&path, 99), b"");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_ring_holds_the_end_of_what_was_written(pieces in prop::collection::vec(1usize..400_000, 1..8), from in 0u64..3_000_000) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("console");
            let mut writer = ConsoleWriter::open(&path).unwrap();
            let mut model = Vec::new();
            for piece in pieces {
                let bytes: Vec<u8> = (0..piece).map(|i| u8::try_from((model.len() + i) % 251).unwrap()).collect();
                writer.append(&bytes).unwrap();
                model.extend(bytes);
            }
            let oldest = model.len().saturating_sub(usize::try_from(KEPT).unwrap());
            let start = usize::try_from(from).unwrap().clamp(oldest, model.len().max(oldest));
            prop_assert_eq!(all(&path, from), &model[start..]);
        }
    }
}
