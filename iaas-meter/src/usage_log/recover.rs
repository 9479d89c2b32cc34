//! What happens at open: lock the folder, read every byte, set a torn tail aside, refuse damage.

use std::collections::HashMap;
use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::TryLockError;
use std::io;
use std::io::BufReader;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use iaas_core::Digest;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::Project;

use super::Damage;
use super::Head;
use super::Opening;
use super::Place;
use super::Torn;
use super::dedup::Seen;
use super::format::BLOCK_HEADER;
use super::format::BLOCK_MAGIC;
use super::format::BadSegment;
use super::format::BlockHeader;
use super::format::Chain;
use super::format::FORMAT;
use super::format::MAX_BLOCK;
use super::format::RECORD_HEADER;
use super::format::SEGMENT_HEADER;
use super::format::SegmentHeader;
use super::format::decode_event;
use super::format::first_record;
use super::format::link;
use super::segment_path;
use super::write::End;
use super::write::open_segment;

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) opening: Opening,
    pub(super) projects: HashMap<Id<Project>, Vec<Place>>,
    pub(super) seen: Seen,
    pub(super) end: End,
}

/// Makes the folder if it is missing, and takes the lock that keeps a second writer out.
pub(super) fn lock(folder: &Path) -> Result<File> {
    let shown = folder.display();
    private_folder(folder)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(folder.join(LOCK))
        .map_err(|e| unreadable(folder, &e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::conflict("the usage log is open in another place")
            .remedy("close it there first")
            .detail(format!("{shown}"))),
        Err(TryLockError::Error(e)) => Err(unreadable(folder, &e)),
    }
}

/// Reads the log and makes it ready to be continued.
pub(super) fn recover(folder: &Path) -> Result<Found> {
    let _ = fs::remove_file(folder.join("usage.making"));
    let mut walk = Walk::new(folder);
    walk.all().map_err(|flaw| flaw.into_error(folder))?;
    if let Some(torn) = &mut walk.torn {
        torn.kept = Some(set_aside(folder, torn).map_err(|e| unreadable(folder, &e))?);
        tracing::warn!(
            segment = torn.segment,
            offset = torn.offset,
            bytes = torn.bytes,
            "a torn tail was set aside"
        );
    }
    let file = match walk.segments {
        0 => None,
        n => Some(open_segment(folder, n).map_err(|e| unreadable(folder, &e))?),
    };
    let opening = walk.opening();
    let end =
        End { file, segment: walk.segments, length: walk.good, records: walk.records, chain: walk.chain };
    Ok(Found { opening, projects: walk.projects, seen: walk.seen, end })
}

/// Reads the log and changes nothing.
pub(super) fn verify(folder: &Path) -> Result<Result<Opening, Damage>> {
    let mut walk = Walk::new(folder);
    match walk.all() {
        Ok(()) => Ok(Ok(walk.opening())),
        Err(Flaw::Damage(damage)) => Ok(Err(damage)),
        Err(flaw) => Err(flaw.into_error(folder)),
    }
}

/// A reader of a whole log.
#[derive(Debug)]
struct Walk<'a> {
    folder: &'a Path,
    segments: u32,
    records: u64,
    chain: Chain,
    /// The bytes of the last segment that make sense.
    good: u64,
    torn: Option<Torn>,
    projects: HashMap<Id<Project>, Vec<Place>>,
    seen: Seen,
}

/// Why a log cannot be read.
#[derive(Debug)]
enum Flaw {
    Io(io::Error),
    Damage(Damage),
    Refused(Error),
}

impl<'a> Walk<'a> {
    fn new(folder: &'a Path) -> Self {
        Self {
            folder,
            segments: 0,
            records: 0,
            chain: Chain::default(),
            good: 0,
            torn: None,
            projects: HashMap::new(),
            seen: Seen::default(),
        }
    }

    fn all(&mut self) -> Result<(), Flaw> {
        let count = self.count()?;
        for segment in 1..=count {
            self.segments = segment;
            self.segment(segment == count)?;
        }
        Ok(())
    }

    /// How many segments there are: numbered from 1 without a gap.
    fn count(&self) -> Result<u32, Flaw> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(self.folder)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|n| n.strip_prefix("usage-")?.strip_suffix(".log"));
            numbers.extend(number.and_then(|n| n.parse::<u32>().ok()));
        }
        numbers.sort_unstable();
        for (expected, number) in (1..).zip(&numbers) {
            if expected != *number {
                return Err(Flaw::damage(expected, 0, "the segment is missing"));
            }
        }
        Ok(numbers.last().copied().unwrap_or(0))
    }

    fn segment(&mut self, last: bool) -> Result<(), Flaw> {
        let file = File::open(segment_path(self.folder, self.segments))?;
        let length = file.metadata()?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        self.header(&mut file, length)?;
        self.good = SEGMENT_HEADER as u64;
        while self.good < length {
            match self.block(&mut file, length)? {
                Ok(()) => {}
                Err(why) if last && self.is_tail(&mut file, length)? => {
                    tracing::debug!(why, "the log ends in a torn block");
                    let (segment, offset) = (self.segments, self.good);
                    self.torn = Some(Torn { segment, offset, bytes: length - offset, kept: None });
                    return Ok(());
                }
                Err(why) => return Err(Flaw::damage(self.segments, self.good, why)),
            }
        }
        Ok(())
    }

    fn header(&self, file: &mut impl Read, length: u64) -> Result<(), Flaw> {
        let mut raw = [0; SEGMENT_HEADER];
        if length < SEGMENT_HEADER as u64 {
            return Err(Flaw::damage(self.segments, 0, "the segment is shorter than its header"));
        }
        file.read_exact(&mut raw)?;
        let expected =
            SegmentHeader { segment: self.segments, records_before: self.records, chain_before: self.chain };
        match SegmentHeader::decode(&raw) {
            Ok(header) if header == expected => Ok(()),
            Ok(_) => Err(Flaw::damage(self.segments, 0, "the segment does not continue the one before it")),
            Err(BadSegment::Damaged) => Err(Flaw::damage(self.segments, 0, "its header has changed")),
            Err(BadSegment::Foreign) => Err(Flaw::Refused(
                Error::invalid(format!("segment {} is not a usage log", self.segments))
                    .remedy("give the meter a folder of its own"),
            )),
            Err(BadSegment::Newer(format)) => Err(Flaw::Refused(
                Error::unsupported(format!(
                    "the usage log has format {format}; this version reads up to {FORMAT}"
                ))
                .remedy("use the version that wrote it, or a newer one"),
            )),
        }
    }

    /// Reads the block at `self.good`. The inner error says what is wrong with it.
    fn block(&mut self, file: &mut impl Read, length: u64) -> Result<Result<(), &'static str>, Flaw> {
        let room = length - self.good;
        if room < BLOCK_HEADER as u64 {
            return Ok(Err("it is shorter than a block's header"));
        }
        let mut raw = [0; BLOCK_HEADER];
        file.read_exact(&mut raw)?;
        let Some(header) = BlockHeader::decode(&raw) else { return Ok(Err("a block's header has changed")) };
        let bytes = usize::try_from(header.bytes).unwrap_or(usize::MAX);
        if bytes > MAX_BLOCK {
            return Ok(Err("a block is longer than any that we write"));
        }
        if room - (BLOCK_HEADER as u64) < u64::from(header.bytes) {
            return Ok(Err("it is shorter than the block"));
        }
        let mut body = vec![0; bytes];
        file.read_exact(&mut body)?;
        Ok(self.body(&header, &body))
    }

    fn body(&mut self, header: &BlockHeader, body: &[u8]) -> Result<(), &'static str> {
        if header.first != self.records {
            return Err("the block is not the next one");
        }
        let (mut rest, mut chain, mut events) = (body, self.chain, Vec::new());
        while !rest.is_empty() {
            let cbor = first_record(rest).ok_or("a record has changed")?;
            let event = decode_event(cbor).ok_or("a record is not a usage event")?;
            let offset = self.good + (BLOCK_HEADER + body.len() - rest.len()) as u64;
            events.push((event, place(self.segments, offset, cbor.len()).ok_or("the segment is too long")?));
            chain = link(&chain, cbor);
            rest = rest.get(RECORD_HEADER + cbor.len()..).unwrap_or_default();
        }
        if events.len() as u64 != u64::from(header.records) || chain != header.chain_after {
            return Err("the hash chain is broken");
        }
        for (event, place) in events {
            self.seen.insert(&event.key);
            self.projects.entry(event.project).or_default().push(place);
        }
        self.records += u64::from(header.records);
        self.chain = chain;
        self.good += (BLOCK_HEADER + body.len()) as u64;
        Ok(())
    }

    /// Whether a bad block at `self.good` can be the one that was being written at a crash: nothing was written after
    /// it, since the next block begins only when it is durable.
    fn is_tail(&self, file: &mut (impl Read + Seek), length: u64) -> Result<bool, Flaw> {
        let room = length - self.good;
        if room > (BLOCK_HEADER + MAX_BLOCK) as u64 {
            return Ok(false);
        }
        file.seek(SeekFrom::Start(self.good))?;
        let mut rest = Vec::new();
        file.take(room).read_to_end(&mut rest)?;
        let header = rest.first_chunk().and_then(BlockHeader::decode);
        if let Some(header) = header {
            return Ok(rest.len() as u64 <= BLOCK_HEADER as u64 + u64::from(header.bytes));
        }
        let later = |raw: &[u8]| {
            let header = raw.first_chunk().filter(|r: &&[u8; BLOCK_HEADER]| r.starts_with(BLOCK_MAGIC));
            header.and_then(BlockHeader::decode).is_some_and(|h| h.first > self.records)
        };
        Ok(!rest.windows(BLOCK_HEADER).any(later))
    }

    fn opening(&self) -> Opening {
        let head = Head { records: self.records, chain: Digest(self.chain) };
        Opening { head, segments: self.segments, torn: self.torn.clone() }
    }
}

impl Flaw {
    fn damage(segment: u32, offset: u64, why: &str) -> Self {
        Self::Damage(Damage { segment, offset, why: why.to_owned() })
    }

    fn into_error(self, folder: &Path) -> Error {
        match self {
            Self::Io(e) => unreadable(folder, &e),
            Self::Damage(damage) => Error::from(damage).detail(folder.display().to_string()),
            Self::Refused(error) => error.detail(folder.display().to_string()),
        }
    }
}

impl From<io::Error> for Flaw {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn place(segment: u32, offset: u64, length: usize) -> Option<Place> {
    Some(Place { segment, offset: u32::try_from(offset).ok()?, length: u32::try_from(length).ok()? })
}

/// Copies a torn tail to a file of its own, then cuts it off. Either may be cut short by another crash: the next open
/// does it again.
fn set_aside(folder: &Path, torn: &Torn) -> io::Result<PathBuf> {
    let kept = folder.join(format!("torn-{:010}-{}.bin", torn.segment, torn.offset));
    let mut source = OpenOptions::new().read(true).write(true).open(segment_path(folder, torn.segment))?;
    let mut copy = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&kept)?;
    source.seek(SeekFrom::Start(torn.offset))?;
    io::copy(&mut source, &mut copy)?;
    copy.flush()?;
    copy.sync_all()?;
    File::open(folder)?.sync_all()?;
    source.set_len(torn.offset)?;
    source.sync_all()?;
    Ok(kept)
}

/// Makes the folder for our eyes only. One that others can read is narrowed if it is ours or empty, else refused: a
/// program that names a shared folder by mistake must not lock others out of it.
fn private_folder(folder: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|e| unreadable(folder, &e))?;
    let io = |e: &io::Error| unreadable(folder, e);
    let mode = fs::metadata(folder).map_err(|e| io(&e))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let empty = fs::read_dir(folder).map_err(|e| io(&e))?.next().is_none();
    if !empty && !folder.join(LOCK).exists() {
        return Err(Error::invalid("the usage log's folder is open to others and holds other files")
            .remedy("name a folder that does not exist yet")
            .detail(folder.display().to_string()));
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(|e| io(&e))
}

fn unreadable(folder: &Path, why: &io::Error) -> Error {
    Error::unavailable("the usage log's folder cannot be used")
        .outcome_is(iaas_core::Outcome::NotDone)
        .remedy("check that its path exists, is writable and has room")
        .because(why)
        .detail(folder.display().to_string())
}

const LOCK: &str = "usage.lock";
