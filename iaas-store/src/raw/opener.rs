//! Opens raw volumes in two stages: files in the host's process, the device in the process that uses it.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Needs;
use iaas_core::spi::dataplane::opener::Key;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use nix::libc;
use nix::sys::inotify::AddWatchFlags;
use nix::sys::inotify::InitFlags;
use nix::sys::inotify::Inotify;

use super::claim::Writer;
use super::device::BLOCK;
use super::device::IoEngine;
use super::device::RawDevice;
use super::psync::THREADS;
use super::sidecar::Sidecar;
use super::sidecar::State;
use super::token::SCHEME;
use super::token::Token;
use super::token::data_name;
use super::token::meta_name;
use super::trouble;
use crate::sys;
use crate::sys::Job;
use crate::sys::Vectors;
use crate::sys::Verb;

/// The opener of scheme `raw-file`.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawOpener {
    engine: IoEngine,
}

impl RawOpener {
    /// Chooses how operations reach the file.
    #[must_use]
    pub fn with_engine(mut self, engine: IoEngine) -> Self {
        self.engine = engine;
        self
    }
}

impl BlockOpener for RawOpener {
    fn scheme(&self) -> (&'static str, u16) {
        SCHEME
    }

    fn prepare(&self, target: &Target) -> Result<Grant> {
        let token = Token::of(target)?;
        let meta = token.folder.join(meta_name(token.volume));
        let data = token.folder.join(data_name(token.volume));
        let record = open(&meta, true, 0).map_err(|e| missing(target, &e))?;
        let sidecar = Sidecar::read(&record)?;
        if (sidecar.volume, sidecar.pool) != (token.volume, token.pool) {
            return Err(Error::conflict("the record is that of another volume").about(token.volume.object()));
        }
        let data = open_data(&data, target.mode != Mode::Read).map_err(|e| missing(target, &e))?;
        let mut grant = Grant::default();
        grant.fds.insert(DATA.into(), data.into());
        grant.fds.insert(META.into(), record.into());
        match watch(&meta) {
            Ok(news) => drop(grant.fds.insert(NEWS.into(), news)),
            // The record is then looked at now and then.
            Err(error) => tracing::debug!(%error, "no inotify for a volume's record"),
        }
        let uring = self.engine != IoEngine::Threads && sys::has_uring();
        let threads = if uring { 1 } else { 1 + THREADS };
        grant.needs = Needs { io_uring: uring, threads, memory: MEMORY, locks: true };
        Ok(grant)
    }

    fn open(
        &self,
        target: &Target,
        mut grant: Grant,
        key: Option<Key>,
        _: &Env,
    ) -> Result<Box<dyn BlockDevice>> {
        if key.is_some() {
            return Err(Error::unsupported("a raw file is not encrypted").remedy("use a pool that encrypts"));
        }
        let token = Token::of(target)?;
        let mut take = |name: &str| grant.fds.remove(name);
        let (Some(data), Some(record)) = (take(DATA), take(META)) else {
            return Err(Error::invalid("the grant of a raw file lacks its descriptors")
                .remedy("pass on what `prepare` gave"));
        };
        let record = File::from(record);
        if Sidecar::read(&record)?.state != State::Whole {
            return Err(Error::not_found("the volume is going, or half-made").about(token.volume.object()));
        }
        let writer = Writer::new(record, token.volume, take(NEWS));
        let device = RawDevice::new(data.into(), writer, target.mode == Mode::Read, self.engine)?;
        if target.mode == Mode::Write {
            device.claim(target.term)?;
        }
        Ok(Box::new(device))
    }
}

/// Opens the data file for direct I/O, if 512 bytes can be moved to where 512 divides the address; else through the page
/// cache.
fn open_data(path: &Path, write: bool) -> io::Result<File> {
    if let Ok(file) = open(path, write, libc::O_DIRECT)
        && moves_blocks(&file)
    {
        return Ok(file);
    }
    open(path, write, 0)
}

fn moves_blocks(file: &File) -> bool {
    let block = BLOCK as usize;
    // Buffers of ours are aligned to a page, so the second block of this one is aligned to a block and no more.
    let job = Job {
        verb: Verb::Read,
        at: u64::from(BLOCK),
        len: u64::from(BLOCK),
        buffers: Some(IoBuffers::zeroed(2 * block)),
        skip: block,
    };
    job.run(file, &mut Vectors::default()).is_ok_and(|count| count == block)
}

fn open(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(flags | libc::O_NOFOLLOW).open(path)
}

fn watch(path: &Path) -> nix::Result<OwnedFd> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DELETE_SELF;
    inotify.add_watch(path, what)?;
    Ok(inotify.into())
}

fn missing(target: &Target, error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        return Error::not_found(format!("the volume {} is not in the pool", target.id)).because(error);
    }
    trouble("open", error)
}

const DATA: &str = "data";
const META: &str = "meta";
const NEWS: &str = "news";
/// About what a queue uses at most.
const MEMORY: u64 = 24 << 20;
