//! Frames and what stands in them.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;

use super::Part;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::id::Fabric;
use crate::id::Pool;
use crate::model::Host;
use crate::spi::Call;

/// The most bytes of a frame: 16 MiB, room for the whole program of a large fabric.
pub const FRAME_MAX: usize = 16 << 20;

/// From the caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Up {
    Hello { protocol: (u16, u16) },
    Ask(Box<Ask>),
    Cancel { id: u64 },
}

/// One call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) id: u64,
    pub(super) part: Part,
    /// The kind of object, for the four verbs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<String>,
    pub(super) verb: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) call: Option<Call>,
    pub(super) args: Bytes,
    /// Since protocol 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) note: Option<String>,
}

/// From the side of the providers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Down {
    Welcome { protocol: u16, card: Card },
    Refused { error: Error },
    Reply { id: u64, body: Result<Bytes> },
}

/// What stands behind a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Card {
    #[serde(default)]
    pub(super) host: Option<HostCard>,
    #[serde(default)]
    pub(super) pools: BTreeMap<Id<Pool>, PoolCard>,
    #[serde(default)]
    pub(super) fabrics: Vec<Id<Fabric>>,
    #[serde(default)]
    pub(super) meter: bool,
}

/// A host's providers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostCard {
    pub(super) id: Id<Host>,
    pub(super) fabric: Id<Fabric>,
    pub(super) access: Vec<Id<Pool>>,
    #[serde(default)]
    pub(super) power: bool,
    #[serde(default)]
    pub(super) images: bool,
    #[serde(default)]
    pub(super) handovers: bool,
}

/// A pool's capabilities that are objects of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolCard {
    #[serde(default)]
    pub(super) snapshots: bool,
    #[serde(default)]
    pub(super) jobs: bool,
}

/// The encoding of every value that crosses or is stored: CBOR maps with field names.
///
/// # Errors
/// `Internal` if a value of ours cannot be encoded.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(|e| {
        Error::internal("a value could not be encoded").detail(e.to_string()).outcome_is(Outcome::NotDone)
    })?;
    Ok(bytes)
}

/// Reads what [`encode`] wrote, in this version, the one before or the next.
///
/// # Errors
/// `Unsupported` if it has parts that are not understood.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    ciborium::from_reader(bytes).map_err(|e| {
        Error::unsupported("the other side sent something that is not understood here")
            .remedy("upgrade the older side")
            .detail(e.to_string())
    })
}

/// Reads a frame; `None` at the end of the connection.
pub(super) async fn read<T: DeserializeOwned>(from: &mut OwnedReadHalf) -> io::Result<Option<T>> {
    let len = match from.read_u32().await {
        Ok(len) => len,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    };
    if usize::try_from(len).is_ok_and(|len| len > FRAME_MAX) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    // Grows with what arrives, not with what was announced.
    let mut bytes = Vec::new();
    let got = from.take(len.into()).read_to_end(&mut bytes).await?;
    if u32::try_from(got) != Ok(len) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    decode(&bytes).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{e:#}")))
}

/// Makes a frame's bytes, with its length.
pub(super) fn frame<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let body = encode(value)?;
    let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= FRAME_MAX).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, format!("a message of {} bytes is too large", body.len()))
            .remedy("send less at once: a frame has at most 16 MiB")
    })?;
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Writes the frames of a queue until it is closed or the connection is lost.
pub(super) async fn write_all(mut to: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
    // The peer sees the end even while the other half is still read.
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As `tests/golden.rs`, for the frames themselves.
    fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
        let file = format!("{}/tests/golden/{name}.cbor", env!("CARGO_MANIFEST_DIR"));
        let bytes = encode(value).unwrap();
        if std::env::var_os("GOLDEN").is_some_and(|v| v == "write") {
            std::fs::write(&file, &bytes).unwrap();
        }
        assert_eq!(std::fs::read(&file).unwrap(), bytes, "{name} is encoded differently now");
        assert_eq!(&decode::<T>(&bytes).unwrap(), value);
    }

    #[test]
    fn frames_are_encoded_as_they_were() {
        let id = |n| uuid::Uuid::from_u128(n);
        let ask = Ask {
            id: 1,
            part: Part::Access(Id::from_uuid(id(2))),
            kind: Some("access".into()),
            verb: "observe".into(),
            call: None,
            args: Bytes::from_static(b"args"),
            note: None,
        };
        let ups = vec![Up::Hello { protocol: (1, 1) }, Up::Ask(Box::new(ask)), Up::Cancel { id: 1 }];
        golden("frames-up", &ups);
        let host = HostCard {
            id: Id::from_uuid(id(3)),
            fabric: Id::from_uuid(id(4)),
            access: vec![Id::from_uuid(id(2))],
            power: true,
            images: false,
            handovers: false,
        };
        let card = Card { host: Some(host), ..Card::default() };
        let downs = vec![
            Down::Welcome { protocol: 1, card },
            Down::Refused { error: Error::unsupported("too old") },
            Down::Reply { id: 1, body: Ok(Bytes::from_static(b"body")) },
            Down::Reply { id: 2, body: Err(Error::not_found("nothing")) },
        ];
        golden("frames-down", &downs);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = decode::<Up>(&bytes);
            let _ = decode::<Down>(&bytes);
        }
    }
}
