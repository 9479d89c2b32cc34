//! Control's end: one running role.

use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use uuid::Uuid;

use super::Identity;
use super::NamedFds;
use super::RoleFolder;
use super::frame;
use super::frame::Frame;
use super::frame::Reader;
use super::frame::Step;
use super::frame::Writer;
use super::protocol::Answer;
use super::protocol::Ask;
use super::protocol::SPOKEN;
use super::protocol::Versions;
use crate::Error;
use crate::Outcome;
use crate::Result;
use crate::spi::Call;

/// A role that was alive when this was made. Cheap to clone; dropping it does nothing to the role.
#[derive(Clone, Debug)]
pub struct RoleHandle {
    inner: Arc<Inner>,
    op: Option<Uuid>,
    trace: Option<String>,
}

#[derive(Debug)]
struct Inner {
    role: String,
    id: Uuid,
    identity: Identity,
    pidfd: OwnedFd,
    folder: RoleFolder,
    versions: Versions,
}

impl RoleHandle {
    pub(super) fn new(role: &str, id: Uuid, identity: Identity, pidfd: OwnedFd, folder: RoleFolder) -> Self {
        let inner = Inner { role: role.to_owned(), id, identity, pidfd, folder, versions: SPOKEN };
        Self { inner: Arc::new(inner), op: None, trace: None }
    }

    /// A handle whose calls carry the operation and the trace of `call` into the role.
    #[must_use]
    pub fn on_behalf(&self, call: &Call) -> Self {
        Self { inner: self.inner.clone(), op: Some(call.op.uuid()), trace: call.trace.clone() }
    }

    /// The name of its role.
    pub fn role(&self) -> &str {
        &self.inner.role
    }

    /// Its id.
    pub fn id(&self) -> Uuid {
        self.inner.id
    }

    /// Its process id: for showing, never for signalling.
    pub fn pid(&self) -> u32 {
        self.inner.identity.pid
    }

    /// Which process it is.
    pub fn identity(&self) -> Identity {
        self.inner.identity
    }

    /// Its folder, which outlives it.
    pub fn folder(&self) -> &RoleFolder {
        &self.inner.folder
    }

    /// The newest content of its counters page and its number; `None` if it wrote none. Works also when it has ended.
    pub fn counters(&self) -> Result<Option<(u64, Bytes)>> {
        self.inner.folder.counters()
    }

    /// Asks the role to do `verb`, within `budget`.
    ///
    /// # Errors
    /// - what the role answered, with the outcome that it stated;
    /// - `Timeout`, [`Outcome::Unknown`] once the request was sent; `Unavailable` likewise when the role ends meanwhile;
    /// - `Unavailable` or `Timeout`, [`Outcome::NotDone`]: the request did not reach the role;
    /// - `Invalid`: more than [`FRAME_MAX`](super::FRAME_MAX) bytes or [`FDS_MAX`](super::FDS_MAX) descriptors.
    pub async fn call(&self, verb: &str, body: Bytes, fds: NamedFds, budget: Duration) -> Result<Bytes> {
        Ok(self.call_fds(verb, body, fds, budget).await?.0)
    }

    /// As [`call`](Self::call), for a verb that answers with descriptors.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub async fn call_fds(
        &self,
        verb: &str,
        body: Bytes,
        fds: NamedFds,
        budget: Duration,
    ) -> Result<(Bytes, NamedFds)> {
        let (names, fds) = fds.into_iter().unzip();
        let ask = Ask {
            v: self.inner.versions,
            verb: verb.to_owned(),
            body,
            fds: names,
            op: self.op,
            trace: self.trace.clone(),
            budget_ms: u64::try_from(budget.as_millis()).unwrap_or(u64::MAX),
        };
        let writer = Writer::new(&ask, fds)?;
        let mut sent = false;
        let turn = turn(self.inner.folder.socket(), self.inner.identity.pid, writer, &mut sent);
        let answer = match tokio::time::timeout(budget, turn).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::timeout(format!("the {} did not answer `{verb}` in time", self.inner.role))),
        };
        let frame =
            answer.map_err(|e| e.outcome_is(if sent { Outcome::Unknown } else { Outcome::NotDone }))?;
        let answer: Answer = frame::decode(&frame.body).map_err(|e| e.outcome_is(Outcome::Unknown))?;
        answer.result(frame.fds)
    }

    /// Whether the process runs.
    pub fn is_alive(&self) -> Result<bool> {
        self.inner.identity.is_alive()
    }

    /// Returns when the process has ended.
    ///
    /// # Errors
    /// `Unavailable`: this process has no room for another open file.
    pub async fn exited(&self) -> Result<()> {
        let unwatchable = |e: io::Error| Error::unavailable("a process could not be watched").because(&e);
        let fd = self.inner.pidfd.try_clone().map_err(unwatchable)?;
        #[expect(
            deprecated,
            reason = "its unsafe successor asks that the descriptor be owned, which `OwnedFd` proves"
        )]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE).map_err(unwatchable)?;
        // pidfd_open(2): readable when the process ends.
        let _ = fd.readable().await.map_err(unwatchable)?;
        reap(&self.inner.pidfd);
        Ok(())
    }

    /// Kills the process, and returns when it has ended. The folder stays until it is forgotten.
    ///
    /// # Errors
    /// `Unavailable`: it could not be signalled or watched.
    pub async fn kill(&self) -> Result<()> {
        kill(&self.inner.pidfd)?;
        self.exited().await
    }
}

/// Sends SIGKILL to exactly the process of `pidfd`; `Ok` if it has ended.
pub(super) fn kill(pidfd: &OwnedFd) -> Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(Error::unavailable("a process could not be killed").because(&e)),
    }
}

/// Collects the exit status if the process is our child: nobody else would.
pub(super) fn reap(pidfd: &OwnedFd) {
    // ECHILD: it is not our child, or was collected already.
    let _ =
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
}

/// One request and its answer on a connection of their own. `sent` says whether the role can have seen the request.
async fn turn(socket: &Path, pid: u32, mut writer: Writer, sent: &mut bool) -> Result<Frame> {
    let stream = connect(socket).await?;
    check_peer(&stream, pid)?;
    let broken = |e: io::Error| Error::unavailable("the role closed the connection").because(&e);
    // The frame is whole to the peer only after the last step.
    while !stream.async_io(Interest::WRITABLE, || writer.step(stream.as_fd())).await.map_err(broken)? {}
    *sent = true;
    let mut reader = Reader::default();
    loop {
        match stream.async_io(Interest::READABLE, || reader.step(stream.as_fd())).await.map_err(broken)? {
            Step::Frame(frame) => return Ok(frame),
            Step::More => {}
            Step::End => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

async fn connect(socket: &Path) -> Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            // unix(7): the listener's queue is full. The caller's budget ends this.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(QUEUE_FULL).await,
            Err(e) => return Err(Error::unavailable("the role does not listen").because(&e)),
        }
    }
}

/// Whoever listens at the path must be the process that we know: a socket file is only a name.
fn check_peer(stream: &UnixStream, pid: u32) -> Result<()> {
    let peer =
        stream.peer_cred().map_err(|e| Error::unavailable("the role's process is unknown").because(&e))?;
    let peer = peer.pid().and_then(|pid| u32::try_from(pid).ok());
    if peer != Some(pid) {
        let what = format!("expected {pid}, found {peer:?}");
        return Err(Error::unavailable("another process listens in the role's place").detail(what));
    }
    Ok(())
}

/// The pause before a full queue is tried again.
const QUEUE_FULL: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;
    use std::time::Instant;

    use ciborium::cbor;

    use super::*;
    use crate::ErrorKind;

    const LONG: Duration = Duration::from_secs(60);

    /// A handle on this very process, with `act` as what listens at its socket.
    fn handle(
        act: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static,
    ) -> (RoleHandle, JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let me = Identity::of(std::process::id()).unwrap().unwrap();
        let folder = RoleFolder::new(dir.path().into(), dir.path().join("s"));
        let handle = RoleHandle::new("x", Uuid::nil(), me, me.pidfd().unwrap().unwrap(), folder);
        let thread = std::thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            act(stream);
            drop(dir);
        });
        (handle, thread)
    }

    /// Waits until the caller has closed the connection.
    fn gone(stream: &std::os::unix::net::UnixStream) {
        let closed = frame::receive::<Ask>(stream, Instant::now() + LONG).unwrap_err();
        assert_eq!(closed.kind(), ErrorKind::Unavailable);
    }

    fn seen(stream: &std::os::unix::net::UnixStream) -> Ask {
        frame::receive(stream, Instant::now() + LONG).unwrap().0
    }

    #[tokio::test]
    async fn a_role_of_the_next_release_may_answer_with_more_than_we_know() {
        let (handle, _thread) = handle(|stream| {
            assert_eq!(seen(&stream).v, SPOKEN);
            let body = ciborium::Value::Bytes(vec![5]);
            let more = cbor!({ "v" => 1, "ok" => body, "weather" => { "sun" => true } }).unwrap();
            frame::send(&stream, &more, Vec::new(), Instant::now() + LONG).unwrap();
        });
        assert_eq!(handle.call("x", Bytes::new(), Vec::new(), LONG).await.unwrap(), Bytes::from_static(&[5]));
    }

    #[tokio::test]
    async fn a_role_that_ends_after_the_request_leaves_the_outcome_unknown() {
        let (handle, _thread) = handle(|stream| drop((seen(&stream), stream)));
        let error = handle.call("x", Bytes::new(), Vec::new(), LONG).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::Unknown));
    }

    #[tokio::test]
    async fn a_role_that_does_not_answer_leaves_the_outcome_unknown() {
        let (handle, thread) = handle(|stream| {
            seen(&stream);
            // Until the caller has given up.
            gone(&stream);
        });
        let error = handle.call("x", Bytes::new(), Vec::new(), Duration::from_millis(200)).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Timeout, Outcome::Unknown));
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn a_request_that_nobody_takes_was_not_done() {
        let (alive, thread) = handle(drop);
        drop(UnixStream::connect(alive.folder().socket()).await);
        thread.join().unwrap();
        let error = alive.call("x", Bytes::new(), Vec::new(), LONG).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
    }

    #[tokio::test]
    async fn a_stranger_at_the_socket_is_not_asked() {
        let (me, thread) = handle(|stream| {
            gone(&stream);
        });
        let other = Identity { pid: 1, ..me.identity() };
        let pidfd = me.inner.pidfd.try_clone().unwrap();
        let stranger = RoleHandle::new("x", Uuid::nil(), other, pidfd, me.folder().clone());
        let error = stranger.call("x", Bytes::new(), Vec::new(), LONG).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
        thread.join().unwrap();
    }
}
