//! A disk that loses power: what was not synced survives as any subset, and writes are torn at 512 bytes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use super::RawFile;
use super::RawFolder;

/// A folder on a simulated disk. Each change is a step; after the last one that is granted the power is out.
#[derive(Clone, Debug)]
pub(crate) struct SimFolder(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// What happened to names since the last sync of the folder.
    moves: Vec<Move>,
    files: Vec<Inode>,
    steps: u64,
    limit: Option<u64>,
    /// Bytes that fit on the disk.
    room: Option<usize>,
}

#[derive(Clone, Debug)]
enum Move {
    Set(String, usize),
    Unset(String),
    Rename(String, String, usize),
}

#[derive(Clone, Debug, Default)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Len(usize),
}

impl SimFolder {
    /// An empty disk; the power goes after `limit` steps.
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Self(Arc::new(Mutex::new(Disk { limit, ..Disk::default() })))
    }

    /// Steps that were taken.
    pub(crate) fn steps(&self) -> u64 {
        self.lock().steps
    }

    pub(crate) fn set_room(&self, bytes: Option<usize>) {
        self.lock().room = bytes;
    }

    /// The disk after the power comes back; `seed` chooses what survived.
    pub(crate) fn after_power_cut(&self, seed: u64) -> Self {
        let disk = self.lock();
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut names = disk.durable_names.clone();
        for change in disk.moves.iter().filter(|_| dice.yes()) {
            change.apply(&mut names);
        }
        let files: Vec<Inode> = disk.files.iter().map(|file| file.survive(&mut dice)).collect();
        let after = Disk { names: names.clone(), durable_names: names, files, ..Disk::default() };
        Self(Arc::new(Mutex::new(after)))
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `change`, as the last thing if the power goes: then its caller does not hear of it.
    fn step<T>(&self, change: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        let mut disk = self.lock();
        if disk.limit.is_some_and(|limit| disk.steps > limit) {
            return Err(io::Error::other("the power is out"));
        }
        disk.steps += 1;
        let done = change(&mut disk)?;
        if disk.limit.is_some_and(|limit| disk.steps > limit) {
            return Err(io::Error::other("the power is out"));
        }
        Ok(done)
    }
}

impl Move {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Set(name, file) => drop(names.insert(name.clone(), *file)),
            Self::Unset(name) => drop(names.remove(name)),
            Self::Rename(from, to, file) => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
        }
    }
}

impl Inode {
    fn survive(&self, dice: &mut Dice) -> Self {
        let mut bytes = self.durable.clone();
        for change in &self.changes {
            match change {
                Change::Len(len) => {
                    if dice.yes() {
                        bytes.resize(*len, 0);
                    }
                }
                Change::Write(at, written) => {
                    for (sector, part) in written.chunks(512).enumerate() {
                        if dice.yes() {
                            put(&mut bytes, at + sector * 512, part);
                        }
                    }
                }
            }
        }
        Self { bytes: bytes.clone(), durable: bytes, changes: Vec::new() }
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, part: &[u8]) {
    if bytes.len() < at + part.len() {
        bytes.resize(at + part.len(), 0);
    }
    bytes[at..at + part.len()].copy_from_slice(part);
}

impl RawFolder for SimFolder {
    fn open(&self, name: &str) -> io::Result<Arc<dyn RawFile>> {
        let file = self.lock().names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { folder: self.clone(), file }))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn RawFile>> {
        let file = self.step(|disk| {
            if disk.names.contains_key(name) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            disk.files.push(Inode::default());
            let made = Move::Set(name.to_owned(), disk.files.len() - 1);
            made.apply(&mut disk.names);
            disk.moves.push(made);
            Ok(disk.files.len() - 1)
        })?;
        Ok(Arc::new(SimFile { folder: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step(|disk| {
            let file = disk.names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
            let moved = Move::Rename(from.to_owned(), to.to_owned(), file);
            moved.apply(&mut disk.names);
            disk.moves.push(moved);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.step(|disk| {
            disk.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
            disk.moves.push(Move::Unset(name.to_owned()));
            Ok(())
        })
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        self.step(|disk| {
            disk.durable_names = disk.names.clone();
            disk.moves.clear();
            Ok(())
        })
    }
}

#[derive(Debug)]
struct SimFile {
    folder: SimFolder,
    file: usize,
}

impl RawFile for SimFile {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        let disk = self.folder.lock();
        let rest = disk.files[self.file].bytes.get(at as usize..).unwrap_or_default();
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.folder.step(|disk| {
            let used: usize = disk.files.iter().map(|file| file.bytes.len()).sum();
            let file = &mut disk.files[self.file];
            let more = (at as usize + bytes.len()).saturating_sub(file.bytes.len());
            if disk.room.is_some_and(|room| used + more > room) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            put(&mut file.bytes, at as usize, bytes);
            file.changes.push(Change::Write(at as usize, bytes.to_vec()));
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.folder.lock().files[self.file].bytes.len() as u64)
    }

    fn used(&self) -> io::Result<u64> {
        self.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.folder.step(|disk| {
            let file = &mut disk.files[self.file];
            file.bytes.resize(len as usize, 0);
            file.changes.push(Change::Len(len as usize));
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.folder.step(|disk| {
            let file = &mut disk.files[self.file];
            file.durable = file.bytes.clone();
            file.changes.clear();
            Ok(())
        })
    }

    // One process: nobody is in the way.
    fn try_lock_byte(&self, _: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn unlock_byte(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// xorshift64: the same for the same seed.
struct Dice(u64);

impl Dice {
    fn yes(&mut self) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 32 & 1 == 1
    }
}
