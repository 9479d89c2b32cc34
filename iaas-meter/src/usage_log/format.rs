//! The bytes of the log, both ways, without I/O.
//!
//! A folder holds segments `usage-<number>.log`. A segment is a header and then blocks; a block is what one fsync made
//! durable: a header and then its records. All numbers are little-endian.
//!
//! ```text
//! segment header, 64 bytes   "IAASUSE\n" · format u32 · segment u32 · records before it u64 · chain before it [32] · zero u32 · crc u32
//! block header, 60 bytes     "UBLK" · records u32 · bytes of records u32 · number of the first record u64 · chain after it [32] · zero u32 · crc u32
//! record                     length u32 · crc u32 · CBOR of the event
//! ```
//!
//! The chain after a record is `SHA-256(chain before it ‖ CBOR of the event)`; before the first it is 32 zero bytes. A
//! crc is CRC-32 (IEEE 802.3) over the bytes before it in its header, for a record over its length and its CBOR.

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::meter::UsageEvent;
use sha2::Digest as _;
use sha2::Sha256;

/// The value that stands for the whole log up to a record.
pub(crate) type Chain = [u8; 32];

/// What a segment begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) segment: u32,
    pub(crate) records_before: u64,
    pub(crate) chain_before: Chain,
}

/// Why a segment's header is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadSegment {
    /// It is not a usage log at all.
    Foreign,
    /// It was written by a newer version of this crate.
    Newer(u32),
    /// Its bytes changed.
    Damaged,
}

/// What a block begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    pub(crate) records: u32,
    pub(crate) bytes: u32,
    pub(crate) first: u64,
    pub(crate) chain_after: Chain,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; SEGMENT_HEADER] {
        let mut out = Bytes::<SEGMENT_HEADER>::default();
        out.put(SEGMENT_MAGIC);
        out.put(&FORMAT.to_le_bytes());
        out.put(&self.segment.to_le_bytes());
        out.put(&self.records_before.to_le_bytes());
        out.put(&self.chain_before);
        out.seal()
    }

    pub(crate) fn decode(raw: &[u8; SEGMENT_HEADER]) -> Result<Self, BadSegment> {
        let mut rest = Rest(raw);
        if rest.take::<8>() != *SEGMENT_MAGIC {
            return Err(BadSegment::Foreign);
        }
        // The format comes first: a newer one may seal its header in another way.
        let format = rest.u32();
        if format > FORMAT {
            return Err(BadSegment::Newer(format));
        }
        let header = Self { segment: rest.u32(), records_before: rest.u64(), chain_before: rest.take() };
        sealed(raw).then_some(header).ok_or(BadSegment::Damaged)
    }
}

impl BlockHeader {
    pub(crate) fn encode(&self) -> [u8; BLOCK_HEADER] {
        let mut out = Bytes::<BLOCK_HEADER>::default();
        out.put(BLOCK_MAGIC);
        out.put(&self.records.to_le_bytes());
        out.put(&self.bytes.to_le_bytes());
        out.put(&self.first.to_le_bytes());
        out.put(&self.chain_after);
        out.seal()
    }

    /// `None` if the bytes are no whole block header.
    pub(crate) fn decode(raw: &[u8; BLOCK_HEADER]) -> Option<Self> {
        let mut rest = Rest(raw);
        let magic = rest.take::<4>();
        let header =
            Self { records: rest.u32(), bytes: rest.u32(), first: rest.u64(), chain_after: rest.take() };
        (magic == *BLOCK_MAGIC && sealed(raw)).then_some(header)
    }
}

/// The CBOR of an event.
///
/// # Errors
/// [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid) if it is longer than [`MAX_RECORD`].
pub(crate) fn encode_event(event: &UsageEvent) -> Result<Vec<u8>> {
    let mut cbor = Vec::with_capacity(256);
    ciborium::into_writer(event, &mut cbor)
        .map_err(|e| Error::internal("a usage event cannot be written").because(&e))?;
    if cbor.len() > MAX_RECORD {
        return Err(Error::invalid(format!("a usage event has {} bytes", cbor.len()))
            .remedy(format!("use shorter names or fewer counters; at most {MAX_RECORD} bytes fit")));
    }
    Ok(cbor)
}

/// The event in `cbor`; `None` if it is none.
pub(crate) fn decode_event(cbor: &[u8]) -> Option<UsageEvent> {
    ciborium::de::from_reader_with_recursion_limit(cbor, 16).ok()
}

/// Adds the record of `cbor` to a block's body.
pub(crate) fn push_record(body: &mut Vec<u8>, cbor: &[u8]) {
    // `encode_event` bounds the length far below `u32::MAX`.
    let length = u32::try_from(cbor.len()).unwrap_or(u32::MAX).to_le_bytes();
    body.extend_from_slice(&length);
    body.extend_from_slice(&record_crc(length, cbor).to_le_bytes());
    body.extend_from_slice(cbor);
}

/// The CBOR of the record that `raw` begins with, if it is whole and its crc holds.
pub(crate) fn first_record(raw: &[u8]) -> Option<&[u8]> {
    let (length, rest) = raw.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let size = usize::try_from(u32::from_le_bytes(*length)).ok().filter(|n| *n <= MAX_RECORD)?;
    let cbor = rest.get(..size)?;
    (record_crc(*length, cbor) == u32::from_le_bytes(*crc)).then_some(cbor)
}

/// The chain after a record.
pub(crate) fn link(before: &Chain, cbor: &[u8]) -> Chain {
    Sha256::new().chain_update(before).chain_update(cbor).finalize().into()
}

fn record_crc(length: [u8; 4], cbor: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length);
    crc.update(cbor);
    crc.finalize()
}

/// Whether the last four bytes are the crc of those before.
fn sealed(raw: &[u8]) -> bool {
    raw.split_last_chunk::<4>().is_some_and(|(body, crc)| crc32fast::hash(body) == u32::from_le_bytes(*crc))
}

/// A header that is being filled from the front.
struct Bytes<const N: usize> {
    raw: [u8; N],
    at: usize,
}

impl<const N: usize> Default for Bytes<N> {
    fn default() -> Self {
        Self { raw: [0; N], at: 0 }
    }
}

impl<const N: usize> Bytes<N> {
    fn put(&mut self, bytes: &[u8]) {
        // Each header's fields are shorter than the header: the constants below say so.
        if let Some(room) = self.raw.get_mut(self.at..self.at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
        self.at += bytes.len();
    }

    fn seal(mut self) -> [u8; N] {
        if let Some((body, crc)) = self.raw.split_last_chunk_mut::<4>() {
            *crc = crc32fast::hash(body).to_le_bytes();
        }
        self.raw
    }
}

/// A header that is being read from the front. Beyond its end it reads zeros.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((first, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *first
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// The format that this version writes, and the newest that it reads.
pub(crate) const FORMAT: u32 = 1;
/// Bytes of a segment's header.
pub(crate) const SEGMENT_HEADER: usize = 64;
/// Bytes of a block's header.
pub(crate) const BLOCK_HEADER: usize = 60;
/// Bytes before a record's CBOR.
pub(crate) const RECORD_HEADER: usize = 8;
/// The most bytes of one event's CBOR.
pub(crate) const MAX_RECORD: usize = 64 << 10;
/// The most bytes of a block's records.
pub(crate) const MAX_BLOCK: usize = 16 << 20;
/// The first bytes of a block.
pub(crate) const BLOCK_MAGIC: &[u8; 4] = b"UBLK";

const SEGMENT_MAGIC: &[u8; 8] = b"IAASUSE\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back_and_every_changed_byte_is_noticed() {
        let segment = SegmentHeader { segment: 7, records_before: 1 << 40, chain_before: [3; 32] };
        let block = BlockHeader { records: 2, bytes: 99, first: 1 << 40, chain_after: [5; 32] };
        assert_eq!(SegmentHeader::decode(&segment.encode()), Ok(segment));
        assert_eq!(BlockHeader::decode(&block.encode()), Some(block));
        for at in 0..SEGMENT_HEADER {
            let mut raw = segment.encode();
            raw[at] ^= 1;
            assert!(SegmentHeader::decode(&raw).is_err(), "byte {at}");
        }
        for at in 0..BLOCK_HEADER {
            let mut raw = block.encode();
            raw[at] ^= 1;
            assert_eq!(BlockHeader::decode(&raw), None, "byte {at}");
        }
    }

    #[test]
    fn a_record_is_read_whole_or_not_at_all() {
        let mut body = Vec::new();
        push_record(&mut body, b"first");
        let end = body.len();
        push_record(&mut body, b"second");
        assert_eq!(first_record(&body), Some(&b"first"[..]));
        assert_eq!(first_record(&body[end..]), Some(&b"second"[..]));
        for short in 0..end {
            assert_eq!(first_record(&body[..short]), None);
        }
        for at in 0..end {
            let mut bad = body.clone();
            bad[at] ^= 1;
            assert_eq!(first_record(&bad), None, "byte {at}");
        }
    }
}
