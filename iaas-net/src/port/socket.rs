//! The socket of a port: the runner listens, the switch dials; the ring's descriptor comes over it, then doorbells.

use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

/// What comes with the ring.
const HELLO: &[u8; 8] = b"iaasrng1";

/// Listens at `path`; replaces whatever a listener before it left there.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = socket()?;
    rustix::net::bind(&socket, &address)?;
    rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// Dials the listener at `path`. Does not block.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` if nobody listens, `WouldBlock` if too many are waiting.
pub(crate) fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The next connection to a listener that does not block.
pub(crate) fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()
}

pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// Sends the ring to whoever dialled.
pub(crate) fn send_ring(peer: &OwnedFd, memfd: &OwnedFd) -> io::Result<()> {
    let fds = [memfd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(peer, &[IoSlice::new(HELLO)], &mut control, SEND)?;
    Ok(())
}

/// The ring that the runner sent; `None` if it has not yet.
///
/// # Errors
/// `InvalidData` if it sent something else, `UnexpectedEof` if it hung up.
pub(crate) fn receive_ring(peer: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut hello = [0; HELLO.len()];
    // Room for a few more than the one, so that a crowd is seen and closed instead of cut off.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match rustix::net::recvmsg(peer, &mut [IoSliceMut::new(&mut hello)], &mut control, flags) {
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        other => other?.bytes,
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    match (got, fds.pop()) {
        (0, None) => Err(io::ErrorKind::UnexpectedEof.into()),
        (_, Some(fd)) if fds.is_empty() && &hello == HELLO => Ok(Some(fd)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the runner sent no ring")),
    }
}

/// Rings the peer's doorbell. If its queue is full it has rung already.
pub(crate) fn ring(peer: &OwnedFd) {
    let _ = rustix::net::send(peer, &[1], SEND);
}

/// Empties the doorbell; `false` if the peer is gone.
pub(crate) fn drain(peer: &OwnedFd) -> bool {
    let mut bell = [0; 8];
    // A peer that rings faster than this empties cannot keep us: what it says is always the same.
    for _ in 0..MOST_RINGS {
        match rustix::net::recv(peer, &mut bell, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
    true
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Never waits, never raises SIGPIPE.
const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
/// Rings that one `drain` takes.
const MOST_RINGS: usize = 64;
