//! What the network of one host keeps on disk: the program, the plugs and their counters.
//!
//! The provider writes program and plugs, durably and each as a whole; the switch only reads them, whenever it is told to and
//! when it starts. So it makes no difference when it dies, and a wish that was accepted while it was dead is there when it
//! comes back. The counters are a page of memory in a file, written by the switch, that survives it.
//!
//! ```text
//! <folder>/install          a UUID: changes when this folder is made anew
//! <folder>/claimed          the cloud that claimed last
//! <folder>/lock             locked while something changes
//! <folder>/program          revision and objects
//! <folder>/plugs/<uuid>     tag, spec and socket of a plug
//! <folder>/counters/<uuid>.<term>  what went through it in that term
//! ```

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Cloud;
use iaas_core::spi::Reading;
use iaas_core::spi::Tag;
use iaas_core::spi::network::NetObject;
use iaas_core::spi::network::Plug;
use iaas_core::spi::network::PlugSpec;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::sys::Mapping;

/// The folder of one host's network.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf);

/// The program as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredProgram {
    /// The store whose revision it is; revisions of two do not compare.
    pub(crate) incarnation: Uuid,
    pub(crate) rev: Rev,
    pub(crate) objects: Vec<NetObject>,
}

/// A plug as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredPlug {
    pub(crate) tag: Tag,
    pub(crate) spec: PlugSpec,
    /// Where its runner listens.
    pub(crate) socket: PathBuf,
    /// The last readings of its earlier terms, newest last.
    #[serde(default)]
    pub(crate) ended: Vec<Reading>,
}

impl Folder {
    /// Names the folder; [`make`](Self::make) makes it.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes what is missing, and answers the installation's id.
    pub(crate) fn make(&self) -> Result<Uuid> {
        for folder in [self.0.clone(), self.plugs_dir(), self.counters_dir()] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
            made.map_err(|e| cannot("made", &folder, &e))?;
        }
        self.lock_file()?;
        let path = self.0.join("install");
        if let Some(install) = load(&path)? {
            return Ok(install);
        }
        let install = Uuid::now_v7();
        store(&path, &install)?;
        Ok(install)
    }

    /// The file that who changes the folder locks.
    pub(crate) fn lock_file(&self) -> Result<File> {
        let path = self.0.join("lock");
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
        file.map_err(|e| cannot("opened", &path, &e))
    }

    pub(crate) fn claimed(&self) -> Result<Option<Id<Cloud>>> {
        load(&self.0.join("claimed"))
    }

    pub(crate) fn set_claimed(&self, cloud: Id<Cloud>) -> Result<()> {
        store(&self.0.join("claimed"), &cloud)
    }

    pub(crate) fn program(&self) -> Result<Option<StoredProgram>> {
        load(&self.0.join("program"))
    }

    pub(crate) fn set_program(&self, program: &StoredProgram) -> Result<()> {
        store(&self.0.join("program"), program)
    }

    /// The plugs in order of id. One that cannot be read is listed with its error.
    pub(crate) fn plugs(&self) -> Result<Vec<(Id<Plug>, Result<StoredPlug>)>> {
        let dir = self.plugs_dir();
        let names = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            names => names.map_err(|e| cannot("listed", &dir, &e))?,
        };
        let mut found = Vec::new();
        for name in names {
            let name = name.map_err(|e| cannot("listed", &dir, &e))?.file_name();
            // What a torn write left behind has another name.
            let Some(id) = name.to_str().and_then(|n| Uuid::try_parse(n).ok()).map(Id::from_uuid) else {
                continue;
            };
            // One that went meanwhile is not there.
            found.extend(self.plug(id).transpose().map(|plug| (id, plug)));
        }
        found.sort_by_key(|(id, _)| *id);
        Ok(found)
    }

    pub(crate) fn plug(&self, id: Id<Plug>) -> Result<Option<StoredPlug>> {
        load(&self.plugs_dir().join(id.to_string()))
    }

    pub(crate) fn set_plug(&self, id: Id<Plug>, plug: &StoredPlug) -> Result<()> {
        store(&self.plugs_dir().join(id.to_string()), plug)
    }

    /// Removes a plug and all that belongs to it; the plug itself last, so that nothing is left without it.
    pub(crate) fn remove_plug(&self, id: Id<Plug>) -> Result<()> {
        if let Ok(Some(plug)) = self.plug(id) {
            remove(&plug.socket)?;
        }
        self.remove_counters(id, None)?;
        remove(&self.plugs_dir().join(id.to_string()))?;
        sync_dir(&self.plugs_dir())
    }

    /// The counters of a plug in a term; made with zeros if they are missing.
    pub(crate) fn counters(&self, id: Id<Plug>, term: Term) -> Result<Counters> {
        let path = self.counters_dir().join(format!("{id}.{term}"));
        let open = || -> io::Result<Mapping> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            // Never shorter afterwards: nobody else writes here, and removing it does not cut it.
            if file.metadata()?.len() < COUNTERS as u64 {
                file.set_len(COUNTERS as u64)?;
            }
            Mapping::new(&file, COUNTERS)
        };
        Ok(Counters(open().map_err(|e| cannot("opened", &path, &e))?))
    }

    /// Removes the counters of a plug, but for those of the term `keep`.
    pub(crate) fn remove_counters(&self, id: Id<Plug>, keep: Option<Term>) -> Result<()> {
        let dir = self.counters_dir();
        let (prefix, keep) = (format!("{id}."), keep.map(|term| format!("{id}.{term}")));
        let names = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            names => names.map_err(|e| cannot("listed", &dir, &e))?,
        };
        for name in names {
            let name = name.map_err(|e| cannot("listed", &dir, &e))?.file_name();
            let name = name.to_str().unwrap_or_default();
            if name.starts_with(&prefix) && keep.as_deref() != Some(name) {
                remove(&dir.join(name))?;
            }
        }
        Ok(())
    }

    fn plugs_dir(&self) -> PathBuf {
        self.0.join("plugs")
    }

    fn counters_dir(&self) -> PathBuf {
        self.0.join("counters")
    }
}

/// What went through a plug, as its guest counts it. Shared memory of the switch, which counts, and the provider, which reads.
#[derive(Debug)]
pub(crate) struct Counters(Mapping);

/// Totals of one direction or the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
}

impl Counters {
    pub(crate) fn totals(&self) -> Totals {
        let at = |n: usize| self.0.load(n * 8);
        Totals { rx_bytes: at(1), tx_bytes: at(2), rx_packets: at(3), tx_packets: at(4) }
    }

    pub(crate) fn set(&self, totals: Totals) {
        let Totals { rx_bytes, tx_bytes, rx_packets, tx_packets } = totals;
        for (n, value) in [rx_bytes, tx_bytes, rx_packets, tx_packets].into_iter().enumerate() {
            self.0.store((n + 1) * 8, value);
        }
    }

    /// A number for a reading: greater than every one before, also over restarts.
    pub(crate) fn next_seq(&self) -> u64 {
        self.0.add(0, 1) + 1
    }
}

/// Bytes of a file of counters.
const COUNTERS: usize = 4096;
/// The most bytes of a stored thing that are read: a program of a million rules has about 100 MiB.
const MOST: u64 = 1 << 30;

fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| cannot("opened", path, &e))?,
    };
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(|e| cannot("read", path, &e))?;
    let value = ciborium::from_reader(bytes.as_slice()).map_err(|e| {
        Error::unavailable("a file of the network's state cannot be understood")
            .detail(path.display().to_string())
            .remedy("it may be of a newer release; else remove it, and the control plane writes it again")
            .because(&e)
    })?;
    Ok(Some(value))
}

/// Replaces the file: after a crash there is the old content or the new one. A failure leaves no draft.
fn store<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes)
        .map_err(|e| Error::internal("the network's state could not be encoded").because(&e))?;
    let fresh = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    let written = write().inspect_err(|_| drop(fs::remove_file(&fresh)));
    written.map_err(|e| cannot("written", path, &e))?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| cannot("synced", path, &e))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot("removed", path, &e)),
        _ => Ok(()),
    }
}

fn cannot(what: &str, path: &Path, e: &io::Error) -> Error {
    let error = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::unavailable("this host's disk is full").remedy("free space below the state folder")
        }
        _ => Error::unavailable(format!("a file of the network's state could not be {what}"))
            .remedy("check the disk and the rights to the state folder"),
    };
    error.detail(path.display().to_string()).because(e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::numbered;

    #[test]
    fn counters_survive_whoever_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("net"));
        folder.make().unwrap();
        let id = numbered(7);
        let counters = folder.counters(id, Term(1)).unwrap();
        let totals = Totals { rx_bytes: 1, tx_bytes: 2, rx_packets: 3, tx_packets: 4 };
        counters.set(totals);
        assert_eq!((counters.next_seq(), counters.next_seq()), (1, 2));
        drop(counters);
        let again = folder.counters(id, Term(1)).unwrap();
        assert_eq!((again.totals(), again.next_seq()), (totals, 3));
        assert_eq!(
            folder.counters(id, Term(2)).unwrap().totals(),
            Totals::default(),
            "each term counts for itself"
        );
        folder.remove_counters(id, Some(Term(1))).unwrap();
        let left: Vec<_> =
            fs::read_dir(dir.path().join("net/counters")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [format!("{id}.1").as_str()]);
    }

    #[test]
    fn what_cannot_be_understood_is_named_and_not_taken_for_absent() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("net"));
        let install = folder.make().unwrap();
        assert_eq!(folder.make().unwrap(), install);
        assert_eq!(folder.program().unwrap(), None);
        fs::write(dir.path().join("net/program"), b"garbage").unwrap();
        let error = folder.program().unwrap_err();
        assert!(format!("{error:#}").contains("net/program"), "{error:#}");
        fs::write(dir.path().join(format!("net/plugs/{}", Uuid::nil())), b"\xff").unwrap();
        fs::write(dir.path().join("net/plugs/torn.new"), b"").unwrap();
        let plugs = folder.plugs().unwrap();
        assert!(plugs.len() == 1 && plugs[0].1.is_err());
    }
}
