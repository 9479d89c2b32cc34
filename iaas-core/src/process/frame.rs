//! Frames on a unix stream socket: a length, that many bytes of CBOR, and descriptors beside them.
//!
//! Layout: length as a big-endian `u32`, then the body. Descriptors go as `SCM_RIGHTS` with bytes of their own frame; the
//! reader never reads past the end of a frame, so they cannot land in the wrong one. [`Reader`] and [`Writer`] do one system
//! call per step and keep what they have, so the same code serves blocking sockets, a poll loop and tokio.

use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::ReturnFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;
use crate::Result;

/// The most bytes of a frame: 1 MiB.
pub const FRAME_MAX: usize = 1 << 20;

/// The most descriptors of a frame.
pub const FDS_MAX: usize = 512;

/// What one frame carries.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// One step of a [`Reader`].
#[derive(Debug)]
pub(super) enum Step {
    /// Bytes came, but not yet all.
    More,
    Frame(Frame),
    /// The peer closed between two frames.
    End,
}

/// Puts frames together from what arrives.
#[derive(Debug, Default)]
pub(super) struct Reader {
    buf: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// One `recvmsg`. `WouldBlock` means that nothing is there; any other error ends the connection.
    pub(super) fn step(&mut self, from: BorrowedFd<'_>) -> io::Result<Step> {
        let missing = self.missing()?;
        let got = self.receive(from, missing.min(CHUNK))?;
        if got == 0 {
            return if self.buf.is_empty() {
                Ok(Step::End)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        }
        if self.buf.len() < LEN || self.missing()? > 0 {
            return Ok(Step::More);
        }
        let body = self.buf.split_off(LEN);
        self.buf.clear();
        Ok(Step::Frame(Frame { body, fds: std::mem::take(&mut self.fds) }))
    }

    /// How many bytes the header, or else the frame, still wants.
    fn missing(&self) -> io::Result<usize> {
        let Some(head) = self.buf.first_chunk::<LEN>() else { return Ok(LEN - self.buf.len()) };
        let len = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
        if len > FRAME_MAX {
            return Err(io::Error::other(format!("a frame of {len} bytes; the limit is {FRAME_MAX}")));
        }
        Ok((LEN + len).saturating_sub(self.buf.len()))
    }

    fn receive(&mut self, from: BorrowedFd<'_>, want: usize) -> io::Result<usize> {
        let at = self.buf.len();
        self.buf.resize(at + want, 0);
        let result = receive_into(from, self.buf.get_mut(at..).unwrap_or_default(), &mut self.fds);
        self.buf.truncate(at + result.as_ref().copied().unwrap_or(0));
        if self.fds.len() > FDS_MAX {
            return Err(io::Error::other(format!("a frame with more than {FDS_MAX} descriptors")));
        }
        result
    }
}

fn receive_into(from: BorrowedFd<'_>, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut *into)], &mut control, flags)
    })?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            fds.extend(sent);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("descriptors were lost: this process has no room for more open files"));
    }
    Ok(got.bytes)
}

/// Sends one frame, however many steps the socket takes.
#[derive(Debug)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    at: usize,
    fds: VecDeque<OwnedFd>,
}

impl Writer {
    /// # Errors
    /// `Invalid` above [`FRAME_MAX`] or [`FDS_MAX`].
    pub(super) fn new(message: &impl Serialize, fds: Vec<OwnedFd>) -> Result<Self> {
        let mut bytes = vec![0; LEN];
        ciborium::into_writer(message, &mut bytes)
            .map_err(|e| Error::internal("a message could not be encoded").because(&e))?;
        let body = bytes.len() - LEN;
        if body > FRAME_MAX || fds.len() > FDS_MAX {
            let what = format!("a message of {body} bytes and {} descriptors", fds.len());
            return Err(Error::invalid(what)
                .remedy(format!("send at most {FRAME_MAX} bytes and {FDS_MAX} descriptors")));
        }
        let len = u32::try_from(body).unwrap_or(u32::MAX);
        bytes.splice(..LEN, len.to_be_bytes());
        Ok(Self { bytes, at: 0, fds: fds.into() })
    }

    /// One `sendmsg`; `true` when all is sent. Until then the peer cannot have seen a whole frame.
    pub(super) fn step(&mut self, to: BorrowedFd<'_>) -> io::Result<bool> {
        let batch = self.fds.len().min(SEND_FDS);
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        // One byte for each batch but the last, so that the peer's buffer for descriptors is never too small.
        let data = if self.fds.len() > batch { rest.get(..1).unwrap_or(rest) } else { rest };
        let sent = {
            let borrowed: Vec<BorrowedFd<'_>> = self.fds.iter().take(batch).map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SEND_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if batch > 0 {
                control.push(SendAncillaryMessage::ScmRights(&borrowed));
            }
            rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(to, &[IoSlice::new(data)], &mut control, SendFlags::NOSIGNAL)
            })?
        };
        self.fds.drain(..batch);
        self.at += sent;
        Ok(self.at >= self.bytes.len())
    }
}

/// Sends one message on a blocking socket.
pub(super) fn send(
    to: &UnixStream,
    message: &impl Serialize,
    fds: Vec<OwnedFd>,
    until: Instant,
) -> Result<()> {
    let mut writer = Writer::new(message, fds)?;
    loop {
        to.set_write_timeout(Some(left(until)?)).map_err(broken)?;
        match writer.step(to.as_fd()) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(broken(e)),
        }
    }
}

/// Receives one message on a blocking socket.
pub(super) fn receive<T: DeserializeOwned>(from: &UnixStream, until: Instant) -> Result<(T, Vec<OwnedFd>)> {
    let mut reader = Reader::default();
    loop {
        from.set_read_timeout(Some(left(until)?)).map_err(broken)?;
        match reader.step(from.as_fd()) {
            Ok(Step::Frame(frame)) => return Ok((decode(&frame.body)?, frame.fds)),
            Ok(Step::More) => {}
            Ok(Step::End) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(broken(e)),
        }
    }
}

/// Reads a message that is at most a frame long.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    ciborium::from_reader(body).map_err(|e| Error::invalid("a message could not be read").because(&e))
}

/// A message for a field that holds bytes.
pub(super) fn encode(message: &impl Serialize) -> Result<Bytes> {
    let mut bytes = Vec::new();
    ciborium::into_writer(message, &mut bytes)
        .map_err(|e| Error::internal("a message could not be encoded").because(&e))?;
    Ok(bytes.into())
}

fn left(until: Instant) -> Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Error::timeout("the other process did not answer in time")) } else { Ok(left) }
}

fn broken(e: io::Error) -> Error {
    Error::unavailable("the connection to the other process broke").because(&e)
}

/// Bytes of the length.
const LEN: usize = 4;
/// Memory grows by so much with what has really arrived, not with what a length promises.
const CHUNK: usize = 64 << 10;
/// The kernel's limit of descriptors per message: `SCM_MAX_FD`, unix(7).
const SCM_MAX_FD: usize = 253;
/// How many we send at a time.
const SEND_FDS: usize = 64;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use proptest::prelude::any;
    use proptest::prop_assert_eq;
    use proptest::proptest;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn descriptors_arrive_with_their_own_frame_also_when_they_need_many_messages() {
        let (a, b) = UnixStream::pair().unwrap();
        let fds = (0..150).map(|_| OwnedFd::from(File::open("/dev/null").unwrap())).collect();
        send(&a, &"first", fds, soon()).unwrap();
        send(&a, &"second", vec![File::open("/dev/null").unwrap().into()], soon()).unwrap();
        let (text, fds) = receive::<String>(&b, soon()).unwrap();
        assert_eq!((text.as_str(), fds.len()), ("first", 150));
        let (text, fds) = receive::<String>(&b, soon()).unwrap();
        assert_eq!((text.as_str(), fds.len()), ("second", 1));
    }

    #[test]
    fn a_length_above_the_limit_ends_the_connection_before_any_memory_is_taken() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&(u32::try_from(FRAME_MAX).unwrap() + 1).to_be_bytes()).unwrap();
        let mut reader = Reader::default();
        b.set_nonblocking(true).unwrap();
        let refused = loop {
            if let Err(e) = reader.step(b.as_fd()) {
                break e;
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::Other);
        assert!(reader.buf.capacity() < CHUNK);
    }

    #[test]
    fn a_peer_that_goes_away_within_a_frame_is_not_a_clean_end() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[0, 0, 0, 9, 1]).unwrap();
        drop(a);
        let mut reader = Reader::default();
        let end = loop {
            match reader.step(b.as_fd()) {
                Ok(Step::More) => {}
                end => break end,
            }
        };
        assert!(end.is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof));
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert!(matches!(Reader::default().step(b.as_fd()), Ok(Step::End)));
    }

    #[test]
    fn too_large_a_message_is_refused_before_it_is_sent() {
        let error = Writer::new(&Bytes::from(vec![0; FRAME_MAX]), Vec::new()).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            texts in proptest::collection::vec(".{0,40}", 1..5),
            cuts in proptest::collection::vec(1_usize..9, 1..50),
        ) {
            let mut wire = Vec::new();
            for text in &texts {
                wire.extend(Writer::new(text, Vec::new()).unwrap().bytes);
            }
            let (mut a, b) = UnixStream::pair().unwrap();
            b.set_nonblocking(true).unwrap();
            let (mut reader, mut seen, mut cuts) = (Reader::default(), Vec::new(), cuts.into_iter().cycle());
            while !wire.is_empty() {
                let rest = wire.split_off(cuts.next().unwrap().min(wire.len()));
                a.write_all(&wire).unwrap();
                wire = rest;
                while let Ok(step) = reader.step(b.as_fd()) {
                    if let Step::Frame(frame) = step {
                        seen.push(decode::<String>(&frame.body).unwrap());
                    }
                }
            }
            prop_assert_eq!(seen, texts);
        }

        #[test]
        fn no_bytes_of_a_peer_make_a_message_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<super::super::protocol::Ask>(&bytes);
            let answer = decode::<super::super::protocol::Answer>(&bytes);
            let _ = answer.and_then(|answer| answer.result(Vec::new()));
        }
    }
}
