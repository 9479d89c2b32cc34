//! A volume's record: who owns it, how large it is, who may write to it.
//!
//! The file `<id>.meta` holds two slots of fixed width. An update goes to the slot that is not the newest, with a higher
//! number and a checksum, and is then synced: whatever a crash leaves, one slot is whole. It is never replaced by another
//! file, because writers look at it through a descriptor that they hold.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `IAASVOLM` |
//! | 8 | 4 | format |
//! | 12 | 4 | state: 1 making, 2 whole, 3 leaving |
//! | 16 | 8 | number of the update; the higher of the two slots is valid |
//! | 24 | 16 × 4 | volume, pool, cloud, incarnation |
//! | 88 | 8 | revision |
//! | 96 | 8 | size in bytes |
//! | 104 | 8 | term: no writer below it |
//! | 112 | 8 | holder: the term of the last writer that held the lock |
//! | 120 | 4 | length of the passport |
//! | 124 | 68 | zero |
//! | 192 | 32 | SHA-256 of the passport |
//! | 224 | 32 | SHA-256 of bytes 0 to 223 |
//! | 256 | … | the passport |
//!
//! Numbers are little endian. Two bytes beyond the slots are only locked, never written: [`UPDATE`] during an update,
//! [`WRITER`] as long as a process may write the volume.

use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Pool;
use iaas_core::spi::Tag;
use iaas_core::spi::block::PoolVolume;
use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use crate::raw::trouble;
use crate::rawio::RawFile;

/// How far a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its data file is not there yet, or half-made; nobody has seen it.
    Making,
    /// It is there.
    Whole,
    /// It is being removed.
    Leaving,
}

/// A volume's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sidecar {
    pub(crate) state: State,
    pub(crate) seq: u64,
    pub(crate) volume: Id<PoolVolume>,
    pub(crate) pool: Id<Pool>,
    pub(crate) tag: Tag,
    pub(crate) size: u64,
    pub(crate) term: Term,
    pub(crate) holder: Term,
    pub(crate) passport: Bytes,
}

/// What a record's file holds.
#[derive(Debug)]
pub(crate) enum Loaded {
    /// A whole record.
    Good(Sidecar),
    /// The owner is known, the rest is damaged.
    Damaged(Tag),
}

/// The part of a record that decides who may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) state: State,
    pub(crate) term: Term,
}

impl Sidecar {
    /// Reads the newest whole slot.
    ///
    /// # Errors
    /// `Unsupported`: a newer version made it. `Internal`: neither slot can be read.
    pub(crate) fn load(file: &dyn RawFile) -> Result<Loaded> {
        let mut newest: Option<Self> = None;
        let mut owner = None;
        for slot in 0..SLOTS {
            let mut bytes = vec![0; SLOT];
            let count = file.read_at(&mut bytes, slot * SLOT as u64).map_err(|e| trouble("read", &e))?;
            bytes.truncate(count);
            let Some(header) = Header::decode(&bytes)? else { continue };
            owner = Some(header.tag);
            if let Some(found) = header.with_passport(&bytes)
                && newest.as_ref().is_none_or(|n| n.seq < found.seq)
            {
                newest = Some(found);
            }
        }
        match (newest, owner) {
            (Some(sidecar), _) => Ok(Loaded::Good(sidecar)),
            (None, Some(tag)) => Ok(Loaded::Damaged(tag)),
            (None, None) => Err(damaged()),
        }
    }

    /// As [`load`](Self::load), for one who needs all of it.
    pub(crate) fn read(file: &dyn RawFile) -> Result<Self> {
        match Self::load(file)? {
            Loaded::Good(sidecar) => Ok(sidecar),
            Loaded::Damaged(_) => Err(damaged()),
        }
    }

    /// Writes the next update, durably.
    pub(crate) fn write(&mut self, file: &dyn RawFile) -> Result<()> {
        self.seq += 1;
        let at = (self.seq % SLOTS) * SLOT as u64;
        file.write_at(&self.encode(), at).and_then(|()| file.sync()).map_err(|e| trouble("write", &e))
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BODY + self.passport.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(self.state.number().to_le_bytes());
        bytes.extend(self.seq.to_le_bytes());
        for id in [self.volume.uuid(), self.pool.uuid(), self.tag.cloud.uuid(), self.tag.incarnation] {
            bytes.extend(id.as_bytes());
        }
        for number in [self.tag.rev.0, self.size, self.term.0, self.holder.0] {
            bytes.extend(number.to_le_bytes());
        }
        // A passport is at most 16 KiB: specs are checked before they come here.
        bytes.extend(u32::try_from(self.passport.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.resize(192, 0);
        bytes.extend(Sha256::digest(&self.passport));
        bytes.extend(Sha256::digest(&bytes));
        bytes.extend(&self.passport);
        bytes
    }
}

/// Reads who may write: two small reads, for each flush.
///
/// A slot that cannot be read is being written or was left by a crash; the other one is what holds.
pub(crate) fn claim(file: &dyn RawFile) -> Result<Claim> {
    let mut newest: Option<Sidecar> = None;
    for slot in 0..SLOTS {
        let mut bytes = [0; BODY];
        file.read_at(&mut bytes, slot * SLOT as u64).map_err(|e| trouble("read", &e))?;
        if let Some(header) = Header::decode(&bytes)?
            && newest.as_ref().is_none_or(|n| n.seq < header.seq)
        {
            newest = Some(header.0);
        }
    }
    newest.map(|s| Claim { state: s.state, term: s.term }).ok_or_else(damaged)
}

/// Changes a record as the only one who does.
///
/// # Errors
/// Those of `change`; `Unavailable` if another holds the update lock for long.
pub(crate) fn update<T>(
    file: &dyn RawFile,
    change: impl FnOnce(&mut Sidecar) -> Result<(bool, T)>,
) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    while !file.try_lock_byte(UPDATE).map_err(|e| trouble("lock", &e))? {
        if Instant::now() >= until {
            return Err(Error::unavailable("a volume's record is locked by another process")
                .remedy("find the process that hangs while it holds it")
                .outcome_is(Outcome::NotDone));
        }
        std::thread::sleep(PAUSE);
    }
    let result = Sidecar::read(file).and_then(|mut sidecar| {
        let (changed, value) = change(&mut sidecar)?;
        if changed {
            sidecar.write(file)?;
        }
        Ok(value)
    });
    file.unlock_byte(UPDATE).map_err(|e| trouble("unlock", &e))?;
    result
}

impl State {
    fn number(self) -> u32 {
        match self {
            Self::Making => 1,
            Self::Whole => 2,
            Self::Leaving => 3,
        }
    }

    fn from_number(number: u32) -> Option<Self> {
        [Self::Making, Self::Whole, Self::Leaving].into_iter().find(|state| state.number() == number)
    }
}

/// A slot's header: a record without its passport.
struct Header(Sidecar, usize, [u8; 32]);

impl std::ops::Deref for Header {
    type Target = Sidecar;
    fn deref(&self) -> &Sidecar {
        &self.0
    }
}

impl Header {
    /// `None`: this is no whole header.
    ///
    /// # Errors
    /// `Unsupported`: it is one of a newer format.
    fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let mut from = Fields(bytes);
        if from.take::<8>() != Some(*MAGIC) {
            return Ok(None);
        }
        let Some(format) = from.take().map(u32::from_le_bytes) else { return Ok(None) };
        if format > FORMAT {
            return Err(Error::unsupported(format!("the volume's record has format {format}")).remedy(
                format!("use a newer version of this program; this one reads up to format {FORMAT}"),
            ));
        }
        Ok(Self::fields(from, bytes))
    }

    fn fields(mut from: Fields<'_>, bytes: &[u8]) -> Option<Self> {
        let state = State::from_number(u32::from_le_bytes(from.take()?))?;
        let seq = u64::from_le_bytes(from.take()?);
        let mut id = || from.take().map(Uuid::from_bytes);
        let (volume, pool, cloud, incarnation) = (id()?, id()?, id()?, id()?);
        let mut number = || from.take().map(u64::from_le_bytes);
        let (rev, size, term, holder) = (number()?, number()?, number()?, number()?);
        let len = usize::try_from(u32::from_le_bytes(from.take()?)).ok()?;
        let mut tail = Fields(bytes.get(192..)?);
        let passport_sum: [u8; 32] = tail.take()?;
        let sum: [u8; 32] = tail.take()?;
        if Sha256::digest(bytes.get(..224)?).as_slice() != sum {
            return None;
        }
        let sidecar = Sidecar {
            state,
            seq,
            volume: Id::from_uuid(volume),
            pool: Id::from_uuid(pool),
            tag: Tag { cloud: Id::from_uuid(cloud), incarnation, rev: Rev(rev) },
            size,
            term: Term(term),
            holder: Term(holder),
            passport: Bytes::new(),
        };
        Some(Self(sidecar, len, passport_sum))
    }

    fn with_passport(self, bytes: &[u8]) -> Option<Sidecar> {
        let Self(mut sidecar, len, sum) = self;
        let passport = bytes.get(BODY..)?.get(..len)?;
        sidecar.passport = Bytes::copy_from_slice(passport);
        (Sha256::digest(passport).as_slice() == sum).then_some(sidecar)
    }
}

/// Takes fixed-width fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }
}

fn damaged() -> Error {
    Error::internal("the record of a volume is damaged")
        .remedy("restore it, or remove the volume's files by hand")
        .outcome_is(Outcome::NotDone)
}

/// Where the lock of an update is.
pub(crate) const UPDATE: u64 = 1 << 20;
/// Where the lock of the one writer is.
pub(crate) const WRITER: u64 = UPDATE + 1;
/// The most bytes of a passport.
pub(crate) const MAX_PASSPORT: usize = 16 << 10;
/// Bytes of the file.
pub(crate) const LEN: u64 = SLOTS * SLOT as u64;
const MAGIC: &[u8; 8] = b"IAASVOLM";
const FORMAT: u32 = 1;
const SLOTS: u64 = 2;
/// A slot in bytes: header and passport, up to a page.
const SLOT: usize = 20 << 10;
const BODY: usize = 256;
/// How long an update waits for another; each takes about a sync.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use iaas_core::ErrorKind;
    use std::fs::File;

    fn sidecar() -> Sidecar {
        Sidecar {
            state: State::Whole,
            seq: 0,
            volume: Id::from_uuid(Uuid::from_u128(1)),
            pool: Id::from_uuid(Uuid::from_u128(2)),
            tag: Tag {
                cloud: Id::from_uuid(Uuid::from_u128(3)),
                incarnation: Uuid::from_u128(4),
                rev: Rev(5),
            },
            size: 4096,
            term: Term(6),
            holder: Term(6),
            passport: Bytes::from_static(b"name: web"),
        }
    }

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    #[test]
    fn what_was_written_last_is_read() {
        let file = file();
        let mut one = sidecar();
        for term in 6..10 {
            one.term = Term(term);
            one.write(&file).unwrap();
            assert_eq!(Sidecar::read(&file).unwrap(), one);
            assert_eq!(claim(&file).unwrap(), Claim { state: State::Whole, term: Term(term) });
        }
    }

    #[test]
    fn any_bit_turned_in_the_newest_slot_gives_the_one_before_or_an_error_but_never_nonsense() {
        let file = file();
        let mut one = sidecar();
        one.write(&file).unwrap();
        let before = one.clone();
        one.size = 8192;
        one.write(&file).unwrap();
        // The second update is in slot 0.
        let good = one.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            RawFile::write_at(&file, &bad, 0).unwrap();
            match Sidecar::load(&file) {
                // Bits in the zeroes are covered by the checksum as well.
                Ok(Loaded::Good(read)) => assert_eq!(read, before, "bit {bit}"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported, "bit {bit}"),
                Ok(Loaded::Damaged(_)) => panic!("bit {bit}"),
            }
        }
        RawFile::write_at(&file, &good, 0).unwrap();
        assert_eq!(Sidecar::read(&file).unwrap(), one);
    }

    #[test]
    fn a_damaged_passport_leaves_the_owner_known() {
        let file = file();
        let mut one = sidecar();
        one.write(&file).unwrap();
        RawFile::write_at(&file, b"X", SLOT as u64 + 256).unwrap();
        let Ok(Loaded::Damaged(tag)) = Sidecar::load(&file) else { panic!() };
        assert_eq!(tag, one.tag);
        RawFile::set_len(&file, 10).unwrap();
        assert_eq!(Sidecar::load(&file).unwrap_err().kind(), ErrorKind::Internal);
    }

    #[test]
    fn the_format_does_not_change_unnoticed() {
        // Numbers of the layout in the module's documentation.
        let mut one = sidecar();
        one.seq = 1;
        let bytes = one.encode();
        assert_eq!(&bytes[..16], b"IAASVOLM\x01\0\0\0\x02\0\0\0");
        assert_eq!(bytes[16], 1);
        assert_eq!((bytes[39], bytes[55], bytes[71], bytes[87]), (1, 2, 3, 4));
        assert_eq!((bytes[88], bytes[97], bytes[104], bytes[112], bytes[120]), (5, 16, 6, 6, 9));
        assert_eq!(&bytes[256..], b"name: web");
    }
}
