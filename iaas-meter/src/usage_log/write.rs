//! The one thread that writes, and how it shares fsyncs.

use std::fmt::Debug;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;

use iaas_core::Digest;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::model::Project;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use iaas_core::spi::meter::UsageKey;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::Head;
use super::Index;
use super::Options;
use super::Place;
use super::dedup::Seen;
use super::format;
use super::format::BLOCK_HEADER;
use super::format::BlockHeader;
use super::format::Chain;
use super::format::MAX_BLOCK;
use super::format::RECORD_HEADER;
use super::format::SEGMENT_HEADER;
use super::format::SegmentHeader;
use super::segment_path;

/// One call of `append`, encoded by the caller so that the writer only copies, hashes and syncs.
#[derive(Debug)]
pub(super) struct Job {
    entries: Vec<Entry>,
    bytes: usize,
    reply: oneshot::Sender<Result<()>>,
}

#[derive(Debug)]
struct Entry {
    key: UsageKey,
    project: Id<Project>,
    cbor: Vec<u8>,
}

/// Where the log ends.
#[derive(Debug)]
pub(super) struct End {
    /// The open last segment; `None` if there is no segment yet.
    pub(super) file: Option<File>,
    pub(super) segment: u32,
    /// The bytes of that segment that are durable.
    pub(super) length: u64,
    pub(super) records: u64,
    pub(super) chain: Chain,
}

/// What the writer asks of a disk; a test's disk fails when it is told to.
pub(super) trait Disk: Debug + Send {
    fn append(&mut self, file: &File, bytes: &[u8]) -> io::Result<()>;
    fn sync(&mut self, file: &File) -> io::Result<()>;
    fn cut(&mut self, file: &File, length: u64) -> io::Result<()>;
}

/// The system's files.
#[derive(Debug)]
pub(super) struct SystemDisk;

/// The state of the thread.
#[derive(Debug)]
pub(super) struct Writer {
    folder: PathBuf,
    options: Options,
    disk: Box<dyn Disk>,
    end: End,
    seen: Seen,
    index: Arc<RwLock<Index>>,
    /// Set when the file may hold more than we know: only a reopen can tell.
    broken: Option<Error>,
    /// Held until the thread ends.
    _lock: File,
}

/// A block in the making.
#[derive(Debug, Default)]
struct Group {
    body: Vec<u8>,
    chain: Chain,
    fresh: Vec<(UsageKey, Id<Project>, usize)>,
}

impl Job {
    pub(super) fn new(batch: &[UsageEvent], reply: oneshot::Sender<Result<()>>) -> Result<Self> {
        let entries = batch.iter().map(Entry::new).collect::<Result<Vec<_>>>()?;
        let bytes = entries.iter().map(|e| RECORD_HEADER + e.cbor.len()).sum();
        if bytes > MAX_BLOCK / 2 {
            return Err(Error::invalid(format!("a batch of {bytes} bytes of usage"))
                .remedy(format!("append it in parts of at most {} bytes", MAX_BLOCK / 2)));
        }
        Ok(Self { entries, bytes, reply })
    }
}

impl Entry {
    fn new(event: &UsageEvent) -> Result<Self> {
        let (of, meters) = match &event.what {
            Usage::Allocated { of, meter, .. } => (of, vec![meter]),
            Usage::Counted(reading) => (&reading.of, reading.totals.keys().collect()),
        };
        let good = |name: &str| !name.is_empty() && name.len() <= 64 && !name.chars().any(char::is_control);
        if meters.len() > 64 || !good(&of.kind) || !meters.iter().all(|m| good(m)) {
            return Err(Error::invalid("a usage event with a wrong meter or kind")
                .about(of.clone())
                .remedy("use at most 64 meters, each a name of 1 to 64 bytes"));
        }
        Ok(Self { key: event.key.clone(), project: event.project, cbor: format::encode_event(event)? })
    }
}

impl Writer {
    pub(super) fn new(
        folder: &Path,
        options: Options,
        disk: Box<dyn Disk>,
        lock: File,
        end: End,
        seen: Seen,
        index: Arc<RwLock<Index>>,
    ) -> Self {
        Self { folder: folder.to_owned(), options, disk, end, seen, index, broken: None, _lock: lock }
    }

    /// Takes jobs until their senders are gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut bytes = first.bytes;
            let mut jobs = vec![first];
            // Each job has at most half a block, so the group fits in one.
            while bytes <= MAX_BLOCK / 2 {
                let Ok(next) = queue.try_recv() else { break };
                bytes += next.bytes;
                jobs.push(next);
            }
            self.commit(jobs);
        }
    }

    fn commit(&mut self, jobs: Vec<Job>) {
        let (entries, replies): (Vec<_>, Vec<_>) = jobs.into_iter().map(|j| (j.entries, j.reply)).unzip();
        let answer = self.keep(entries.into_iter().flatten());
        if let Err(error) = &answer {
            tracing::warn!(%error, "usage was not kept");
        }
        for reply in replies {
            // A caller that went away does not need its answer.
            let _ = reply.send(answer.clone());
        }
    }

    fn keep(&mut self, entries: impl Iterator<Item = Entry>) -> Result<()> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let group = self.group(entries);
        if group.fresh.is_empty() {
            return Ok(());
        }
        let written = self.write(&group);
        if written.is_err() {
            group.fresh.iter().for_each(|(key, ..)| self.seen.remove(key));
        }
        written
    }

    /// Frames what is new.
    fn group(&mut self, entries: impl Iterator<Item = Entry>) -> Group {
        let mut group = Group { chain: self.end.chain, ..Group::default() };
        for entry in entries {
            if !self.seen.insert(&entry.key) {
                continue;
            }
            group.fresh.push((entry.key, entry.project, entry.cbor.len()));
            group.chain = format::link(&group.chain, &entry.cbor);
            format::push_record(&mut group.body, &entry.cbor);
        }
        group
    }

    /// Makes `group` durable and shows it to readers.
    fn write(&mut self, group: &Group) -> Result<()> {
        let header = BlockHeader {
            records: narrow(group.fresh.len()),
            bytes: narrow(group.body.len()),
            first: self.end.records,
            chain_after: group.chain,
        };
        let block = [&header.encode()[..], &group.body].concat();
        self.roll(block.len())?;
        self.append(&block)?;
        let mut offset = narrow_file(self.end.length) + narrow(BLOCK_HEADER);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for (_, project, length) in &group.fresh {
            let place = Place { segment: self.end.segment, offset, length: narrow(*length) };
            index.projects.entry(*project).or_default().push(place);
            offset += narrow(RECORD_HEADER + length);
        }
        self.end.length += block.len() as u64;
        self.end.records += u64::from(header.records);
        self.end.chain = group.chain;
        index.head = Head { records: self.end.records, chain: Digest(self.end.chain) };
        Ok(())
    }

    fn append(&mut self, block: &[u8]) -> Result<()> {
        let Some(file) = &self.end.file else {
            return Err(Error::internal("the usage log has no open segment"));
        };
        if let Err(e) = self.disk.append(file, block) {
            // Part of the block may be there. It is ours to take back as long as the disk obeys.
            let cut = self.disk.cut(file, self.end.length).and_then(|()| self.disk.sync(file));
            let outcome = if cut.is_ok() { Outcome::NotDone } else { Outcome::Unknown };
            let error = failed("the usage log cannot be written", &e).outcome_is(outcome);
            if cut.is_err() {
                self.broken = Some(error.clone().remedy("open it again: what was kept is found then"));
            }
            return Err(error);
        }
        if let Err(e) = self.disk.sync(file) {
            // After a failed fsync the kernel may have dropped the pages: a second one that succeeds proves nothing.
            let error = failed("the usage log cannot be made durable", &e)
                .outcome_is(Outcome::Unknown)
                .remedy("open it again: what was kept is found then");
            self.broken = Some(error.clone());
            return Err(error);
        }
        Ok(())
    }

    /// Starts the next segment if `more` bytes do not fit in this one.
    fn roll(&mut self, more: usize) -> Result<()> {
        let full = self.end.length > SEGMENT_HEADER as u64
            && self.end.length + more as u64 > u64::from(self.options.segment_bytes);
        if self.end.file.is_some() && !full {
            return Ok(());
        }
        let segment = self.end.segment.checked_add(1).ok_or_else(|| Error::internal("too many segments"))?;
        let header =
            SegmentHeader { segment, records_before: self.end.records, chain_before: self.end.chain };
        let file = new_segment(&self.folder, &header).map_err(|e| {
            failed("a segment of the usage log cannot be made", &e).outcome_is(Outcome::NotDone)
        })?;
        self.end.file = Some(file);
        self.end.segment = segment;
        self.end.length = SEGMENT_HEADER as u64;
        Ok(())
    }
}

/// Makes a segment that is there with its whole header, or not at all.
fn new_segment(folder: &Path, header: &SegmentHeader) -> io::Result<File> {
    let making = folder.join("usage.making");
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&making)?;
    file.write_all(&header.encode())?;
    file.sync_all()?;
    std::fs::rename(&making, segment_path(folder, header.segment))?;
    File::open(folder)?.sync_all()?;
    open_segment(folder, header.segment)
}

/// Opens a segment to append to it.
pub(super) fn open_segment(folder: &Path, segment: u32) -> io::Result<File> {
    OpenOptions::new().append(true).open(segment_path(folder, segment))
}

impl Disk for SystemDisk {
    fn append(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }
    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()
    }
    fn cut(&mut self, file: &File, length: u64) -> io::Result<()> {
        file.set_len(length)
    }
}

fn failed(what: &str, why: &io::Error) -> Error {
    let kind = match why.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoCapacity,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, what).remedy("make room on its disk or repair it").because(why)
}

/// Blocks have at most 16 MiB and segments at most about 1 GiB: their lengths fit.
fn narrow(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn narrow_file(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
