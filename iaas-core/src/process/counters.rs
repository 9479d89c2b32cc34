//! A page of counters that survives the process that writes it.
//!
//! Two slots, written in turn with one `pwrite` each, every slot with a sequence number and a checksum: whoever reads sees
//! the newest whole one. Slot layout (little endian): sequence `u64`, length `u32`, zero `u32`, the first 16 bytes of the
//! SHA-256 of (sequence, length, content), content. The page cache keeps it when the process is killed; it is not synced, so
//! a power cut may lose the last writes.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

use bytes::Bytes;
use sha2::Digest as _;
use sha2::Sha256;

use super::plain::open_plain;
use crate::Error;
use crate::Result;

/// The most bytes that a counters page holds.
pub const COUNTERS_MAX: usize = 2048;

/// A page of counters in a file of its own. One process writes it; any may read.
#[derive(Debug)]
pub struct CountersPage {
    file: File,
    last: Mutex<u64>,
}

impl CountersPage {
    /// Opens the page at `path` for writing, making it if it is missing. Sequence numbers go on where they ended.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        Self::with(file.map_err(|e| cannot(path, &e))?).map_err(|e| cannot(path, &e))
    }

    /// Opens the page at `path` for reading.
    ///
    /// # Errors
    /// `NotFound`: there is none.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_plain(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::not_found("there is no page of counters").because(&e),
            _ => cannot(path, &e),
        })?;
        Self::with(file).map_err(|e| cannot(path, &e))
    }

    fn with(file: File) -> io::Result<Self> {
        let page = Self { file, last: Mutex::new(0) };
        let last = page.newest()?.map_or(0, |(seq, _)| seq);
        Ok(Self { last: Mutex::new(last), ..page })
    }

    /// Replaces the content and returns its sequence number, which starts at 1. A reader, or whoever comes after a crash of
    /// this process, sees the old content or the new one.
    ///
    /// # Errors
    /// `Invalid`: more than [`COUNTERS_MAX`] bytes.
    pub fn write(&self, content: &[u8]) -> Result<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = last.saturating_add(1);
        let slot = encode(seq, content)?;
        self.file
            .write_all_at(&slot, place(seq))
            .map_err(|e| Error::unavailable("the counters could not be written").because(&e))?;
        *last = seq;
        Ok(seq)
    }

    /// The newest content and its sequence number; `None` if nothing whole was ever written.
    pub fn read(&self) -> Result<Option<(u64, Bytes)>> {
        self.newest().map_err(|e| Error::unavailable("the counters could not be read").because(&e))
    }

    fn newest(&self) -> io::Result<Option<(u64, Bytes)>> {
        let mut seen = None;
        for _ in 0..READ_TRIES {
            seen = (self.slot(0)?).into_iter().chain(self.slot(1)?).max_by_key(|(seq, _)| *seq);
            if seen.is_some() || self.file.metadata()?.len() == 0 {
                break;
            }
            // Both slots were half-written: the writer overtook this reader. It cannot do so for ever.
        }
        Ok(seen)
    }

    fn slot(&self, number: u64) -> io::Result<Option<(u64, Bytes)>> {
        let mut raw = vec![0; HEAD + COUNTERS_MAX];
        let mut filled = 0;
        while let Some(rest) = raw.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, number * SLOT + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        raw.truncate(filled);
        Ok(decode(&raw).filter(|(seq, _)| seq % 2 == number))
    }
}

fn place(seq: u64) -> u64 {
    (seq % 2) * SLOT
}

fn encode(seq: u64, content: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(content.len()).ok().filter(|_| content.len() <= COUNTERS_MAX);
    let len = len.ok_or_else(|| {
        Error::invalid(format!("{} bytes of counters; a page holds {COUNTERS_MAX}", content.len()))
    })?;
    let mut slot = Vec::with_capacity(HEAD + content.len());
    slot.extend_from_slice(&seq.to_le_bytes());
    slot.extend_from_slice(&len.to_le_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(&checksum(seq, len, content));
    slot.extend_from_slice(content);
    Ok(slot)
}

fn decode(raw: &[u8]) -> Option<(u64, Bytes)> {
    let (seq, raw) = raw.split_first_chunk::<8>()?;
    let (len, raw) = raw.split_first_chunk::<4>()?;
    let (_, raw) = raw.split_first_chunk::<4>()?;
    let (sum, raw) = raw.split_first_chunk::<16>()?;
    let (seq, len) = (u64::from_le_bytes(*seq), u32::from_le_bytes(*len));
    let content = raw.get(..usize::try_from(len).ok()?)?;
    (*sum == checksum(seq, len, content)).then(|| (seq, Bytes::copy_from_slice(content)))
}

fn checksum(seq: u64, len: u32, content: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(seq.to_le_bytes());
    hash.update(len.to_le_bytes());
    hash.update(content);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hash.finalize()[..16]);
    sum
}

fn cannot(path: &Path, e: &io::Error) -> Error {
    Error::unavailable("a page of counters could not be opened").detail(path.display().to_string()).because(e)
}

/// Bytes before the content of a slot.
const HEAD: usize = 32;
/// Each slot starts at a page of its own.
const SLOT: u64 = 4096;
/// How often a reader that was overtaken tries again.
const READ_TRIES: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_content_is_read_and_numbers_go_on_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("counters");
        assert_eq!(CountersPage::open(&path).unwrap_err().kind(), crate::ErrorKind::NotFound);
        let page = CountersPage::create(&path).unwrap();
        assert_eq!(page.read().unwrap(), None);
        assert_eq!(page.write(b"one").unwrap(), 1);
        assert_eq!(page.write(b"two").unwrap(), 2);
        let reader = CountersPage::open(&path).unwrap();
        assert_eq!(reader.read().unwrap(), Some((2, Bytes::from_static(b"two"))));
        let again = CountersPage::create(&path).unwrap();
        assert_eq!(again.write(&[7; COUNTERS_MAX]).unwrap(), 3);
        assert_eq!(reader.read().unwrap(), Some((3, Bytes::from(vec![7; COUNTERS_MAX]))));
        assert!(again.write(&[7; COUNTERS_MAX + 1]).is_err());
    }

    #[test]
    fn a_torn_write_shows_the_content_before_it_wherever_it_tears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("counters");
        let page = CountersPage::create(&path).unwrap();
        page.write(b"first, longer").unwrap();
        page.write(b"second").unwrap();
        let before = std::fs::read(&path).unwrap();
        let third = encode(3, b"third").unwrap();
        for torn in 0..third.len() {
            let mut image = before.clone();
            let at = usize::try_from(place(3)).unwrap();
            image[at..at + torn].copy_from_slice(&third[..torn]);
            std::fs::write(&path, &image).unwrap();
            let seen = CountersPage::open(&path).unwrap().read().unwrap();
            assert_eq!(seen, Some((2, Bytes::from_static(b"second"))), "torn after {torn} bytes");
        }
    }
}
