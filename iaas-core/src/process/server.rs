//! The role's end of the control protocol: one poll loop on the thread that serves, many connections, no other threads.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use uuid::Uuid;

use super::NamedFds;
use super::frame;
use super::frame::Frame;
use super::frame::Reader;
use super::frame::Step;
use super::frame::Writer;
use super::protocol::Answer;
use super::protocol::Ask;
use super::protocol::IDENTITY_VERB;
use super::protocol::SPOKEN;
use super::protocol::Versions;
use super::protocol::WhoAmI;
use super::protocol::named;
use crate::Error;
use crate::Outcome;
use crate::Result;

/// A call that arrived.
#[derive(Debug)]
pub struct Request {
    /// What to do; a role answers `Unsupported` to a verb that it does not know.
    pub verb: String,
    /// The verb's arguments.
    pub body: Bytes,
    /// Descriptors that came with it.
    pub fds: NamedFds,
    /// The operation on whose behalf.
    pub op: Option<Uuid>,
    /// The trace that spans belong to.
    pub trace: Option<String>,
    /// The time that the caller had left when it asked; zero if it did not say.
    pub budget: Duration,
}

/// What a call answers.
#[derive(Debug, Default)]
pub struct Reply {
    /// The verb's result.
    pub body: Bytes,
    /// Descriptors for the caller.
    pub fds: NamedFds,
}

impl From<Bytes> for Reply {
    fn from(body: Bytes) -> Self {
        Self { body, fds: Vec::new() }
    }
}

impl From<()> for Reply {
    fn from((): ()) -> Self {
        Self::default()
    }
}

/// Answers calls to a role. It accepts connections for ever: from the control process that started the role and from each
/// that adopts it later.
///
/// Only processes of one user (that of the role when it started) are heard. A request is answered before the next of the
/// same connection is read; at most 64 connections are open, and a new one takes the place of the longest silent.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    me: WhoAmI,
    peer_uid: u32,
    versions: Versions,
    shared: Arc<Shared>,
}

impl ControlServer {
    /// Listens at `socket`. Whatever is at that path is replaced: the caller holds the role's lock.
    pub(super) fn listen(socket: &Path, role: &str, id: Uuid) -> Result<Self> {
        let cannot = |e: io::Error| {
            Error::unavailable("the control socket of a role could not be made")
                .detail(socket.display().to_string())
                .because(&e)
        };
        match std::fs::remove_file(socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(cannot(e)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| cannot(e.into()))?;
        Ok(Self {
            listener,
            me: WhoAmI { role: role.to_owned(), id },
            peer_uid: rustix::process::geteuid().as_raw(),
            versions: SPOKEN,
            shared: Arc::new(Shared { wake, inbox: Mutex::default() }),
        })
    }

    /// Hears the processes of `uid`, as this process sees it, instead of its own user's: for a role that moves into a user
    /// namespace or to another user.
    #[must_use]
    pub fn with_peer_uid(mut self, uid: u32) -> Self {
        self.peer_uid = uid;
        self
    }

    #[cfg(test)]
    fn with_versions(mut self, versions: Versions) -> Self {
        self.versions = versions;
        self
    }

    /// Ends [`serve`](Self::serve) from its handler or from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    /// Answers each call with what `handler` returns, one after the other, until it is stopped.
    ///
    /// # Errors
    /// `Unavailable`: the listening socket itself failed; no connection can do that.
    pub fn serve<R: Into<Reply>>(self, mut handler: impl FnMut(Request) -> Result<R>) -> Result<()> {
        self.serve_deferred(|request, responder| responder.answer(handler(request)))
    }

    /// Hands each call to `handler` with a [`Responder`], which may answer later and from another thread; other connections
    /// go on meanwhile.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn serve_deferred(self, handler: impl FnMut(Request, Responder)) -> Result<()> {
        Loop { server: self, conns: BTreeMap::new(), next: 0, tired: false, handler }.run()
    }
}

/// Ends the serving of a [`ControlServer`].
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Lets the server send the answers that it has, for at most a second, and return.
    pub fn stop(&self) {
        self.0.lock().stop = true;
        self.0.wake();
    }
}

/// Answers one call; one that is dropped answers `Internal`.
#[derive(Debug)]
pub struct Responder {
    conn: u64,
    shared: Option<Arc<Shared>>,
}

impl Responder {
    /// Sends the answer.
    pub fn answer<R: Into<Reply>>(mut self, result: Result<R>) {
        self.put(result.map(Into::into));
    }

    fn put(&mut self, result: Result<Reply>) {
        if let Some(shared) = self.shared.take() {
            shared.lock().answers.push((self.conn, result));
            shared.wake();
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.put(Err(Error::internal("the role forgot to answer")));
    }
}

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    inbox: Mutex<Inbox>,
}

#[derive(Debug, Default)]
struct Inbox {
    answers: Vec<(u64, Result<Reply>)>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the loop is about to wake anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

struct Loop<H> {
    server: ControlServer,
    conns: BTreeMap<u64, Conn>,
    next: u64,
    /// `accept` failed: leave it alone for a moment.
    tired: bool,
    handler: H,
}

#[derive(Debug)]
struct Conn {
    stream: UnixStream,
    state: State,
}

#[derive(Debug)]
enum State {
    Reading(Reader),
    /// A request is with the handler; answer in this version.
    Busy(u16),
    Writing(Writer),
}

impl<H: FnMut(Request, Responder)> Loop<H> {
    fn run(mut self) -> Result<()> {
        let mut flush_until = None;
        loop {
            let stop = self.deliver();
            if stop {
                let until = *flush_until.get_or_insert_with(|| Instant::now() + FLUSH);
                let writing = self.conns.values().any(|c| matches!(c.state, State::Writing(_)));
                if !writing || Instant::now() >= until {
                    return Ok(());
                }
            }
            let ready = self.wait(stop)?;
            for id in ready.conns {
                self.progress(id, stop);
            }
            if ready.listener && !stop {
                self.accept();
            }
        }
    }

    /// Gives answers to their connections and says whether to stop.
    fn deliver(&mut self) -> bool {
        let mut clear = [0; 8];
        let _ = rustix::io::read(&self.server.shared.wake, &mut clear);
        let (answers, stop) = {
            let mut inbox = self.server.shared.lock();
            (std::mem::take(&mut inbox.answers), inbox.stop)
        };
        for (id, result) in answers {
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            let State::Busy(v) = conn.state else { continue };
            match writer(v, result) {
                Ok(writer) => conn.state = State::Writing(writer),
                Err(_) => drop(self.conns.remove(&id)),
            }
            self.progress(id, stop);
        }
        stop
    }

    fn wait(&mut self, stop: bool) -> Result<Ready> {
        let listen = !self.tired && self.has_room();
        let pause = self.tired || stop;
        self.tired = false;
        let mut fds = vec![PollFd::new(&self.server.shared.wake, PollFlags::IN)];
        for conn in self.conns.values() {
            let want = match conn.state {
                State::Reading(_) => PollFlags::IN,
                // A peer that hangs up is reported unasked.
                State::Busy(_) => PollFlags::empty(),
                State::Writing(_) => PollFlags::OUT,
            };
            fds.push(PollFd::new(&conn.stream, want));
        }
        if listen {
            fds.push(PollFd::new(&self.server.listener, PollFlags::IN));
        }
        let timeout = pause.then_some(&PAUSE);
        match rustix::event::poll(&mut fds, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::unavailable("the control sockets could not be polled").because(&e)),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            conns: self
                .conns
                .keys()
                .zip(fds.iter().skip(1))
                .filter(|(_, fd)| is_ready(fd))
                .map(|(id, _)| *id)
                .collect(),
            listener: listen && fds.last().is_some_and(is_ready),
        })
    }

    fn has_room(&self) -> bool {
        self.conns.len() < CONNS_MAX || self.conns.values().any(|c| matches!(c.state, State::Reading(_)))
    }

    fn accept(&mut self) {
        let stream = match self.server.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(e) => {
                tracing::warn!(error = %e, "a control connection could not be accepted");
                self.tired = true;
                return;
            }
        };
        let peer = rustix::net::sockopt::socket_peercred(&stream);
        if !peer.is_ok_and(|peer| peer.uid.as_raw() == self.server.peer_uid) {
            tracing::warn!("a control connection from another user was refused");
            return;
        }
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.conns.len() >= CONNS_MAX {
            let silent =
                self.conns.iter().find(|(_, c)| matches!(c.state, State::Reading(_))).map(|(id, _)| *id);
            silent.and_then(|id| self.conns.remove(&id));
        }
        self.conns.insert(self.next, Conn { stream, state: State::Reading(Reader::default()) });
        self.next += 1;
    }

    /// Does what the connection is ready for; one that fails is closed.
    fn progress(&mut self, id: u64, stop: bool) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let outcome = match &mut conn.state {
            State::Reading(reader) => reader.step(conn.stream.as_fd()).map(Some),
            State::Busy(_) => Ok(Some(Step::End)), // the caller hung up
            State::Writing(writer) => writer.step(conn.stream.as_fd()).map(|done| {
                if done {
                    conn.state = State::Reading(Reader::default());
                }
                None
            }),
        };
        match outcome {
            Ok(Some(Step::Frame(frame))) if !stop => self.request(id, frame),
            Ok(Some(Step::End)) => drop(self.conns.remove(&id)),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                tracing::debug!(error = %e, "a control connection broke");
                self.conns.remove(&id);
            }
        }
    }

    fn request(&mut self, id: u64, frame: Frame) {
        let parsed = frame::decode::<Ask>(&frame.body).and_then(|ask| {
            let v = self.server.versions.agree(ask.v)?;
            Ok((v, ask.verb, ask.body, named(ask.fds, frame.fds)?, ask.op, ask.trace, ask.budget_ms))
        });
        let responder = Responder { conn: id, shared: Some(self.server.shared.clone()) };
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let (v, verb, body, fds, op, trace, budget_ms) = match parsed {
            Ok(parsed) => parsed,
            Err(e) => {
                conn.state = State::Busy(self.server.versions.1);
                return responder.answer::<Reply>(Err(e.outcome_is(Outcome::NotDone)));
            }
        };
        conn.state = State::Busy(v);
        if verb == IDENTITY_VERB {
            return responder.answer(frame::encode(&self.server.me));
        }
        let span = tracing::info_span!("control", verb, op = op.map(tracing::field::display), trace);
        let request = Request { verb, body, fds, op, trace, budget: Duration::from_millis(budget_ms) };
        span.in_scope(|| (self.handler)(request, responder));
    }
}

struct Ready {
    conns: Vec<u64>,
    listener: bool,
}

fn writer(v: u16, result: Result<Reply>) -> Result<Writer> {
    let sent = result.and_then(|reply| {
        let (names, fds) = reply.fds.into_iter().unzip();
        Writer::new(&Answer::ok(v, reply.body, names), fds)
    });
    // An answer that is too large was acted upon all the same.
    sent.or_else(|e| Writer::new(&Answer::err(v, &e), Vec::new()))
}

/// More is either a leak of ours or an attack of our own user.
const CONNS_MAX: usize = 64;
/// How long a stopped server tries to send its last answers.
const FLUSH: Duration = Duration::from_secs(1);
/// How long to leave a failing `accept` alone.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ciborium::Value;
    use ciborium::cbor;

    use super::*;
    use crate::ErrorKind;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A server that echoes, on a thread of its own, with its socket's folder.
    fn echo(versions: Versions) -> (tempfile::TempDir, UnixStream, Stopper) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = ControlServer::listen(&socket, "echo", Uuid::nil()).unwrap().with_versions(versions);
        let stopper = server.stopper();
        std::thread::spawn(move || {
            server.serve(|request| match request.verb.as_str() {
                "echo" => Ok(Reply { body: request.body, fds: request.fds }),
                verb => Err(Error::unsupported(format!("no verb `{verb}`"))),
            })
        });
        let stream = UnixStream::connect(&socket).unwrap();
        (dir, stream, stopper)
    }

    fn ask(stream: &UnixStream, message: &Value) -> (BTreeMap<String, Value>, Vec<OwnedFd>) {
        frame::send(stream, message, Vec::new(), soon()).unwrap();
        frame::receive(stream, soon()).unwrap()
    }

    #[test]
    fn a_peer_of_the_next_release_is_served_in_our_version_and_told_what_we_do_not_know() {
        let (_dir, stream, _stop) = echo(Versions(1, 2));
        let hi = || Value::Bytes(b"hi".to_vec());
        let next = cbor!({ "v" => [2, 3], "verb" => "echo", "body" => hi(), "mood" => "good" }).unwrap();
        let (answer, _) = ask(&stream, &next);
        assert_eq!((&answer["v"], &answer["ok"]), (&Value::from(2), &hi()));
        let new_verb = cbor!({ "v" => [2, 3], "verb" => "levitate" }).unwrap();
        let error: Error = ask(&stream, &new_verb).0["err"].deserialized().unwrap();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unsupported, Outcome::NotDone));
    }

    #[test]
    fn a_peer_two_releases_away_and_one_that_talks_nonsense_get_an_error_and_no_effect() {
        let (_dir, stream, _stop) = echo(Versions(1, 2));
        let far = cbor!({ "v" => [3, 4], "verb" => "echo" }).unwrap();
        let error: Error = ask(&stream, &far).0["err"].deserialized().unwrap();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unsupported, Outcome::NotDone));
        let error: Error = ask(&stream, &Value::from(7)).0["err"].deserialized().unwrap();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Invalid, Outcome::NotDone));
        let unnamed = cbor!({ "v" => [1, 2], "verb" => "echo", "fds" => ["a"] }).unwrap();
        let error: Error = ask(&stream, &unnamed).0["err"].deserialized().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_call_that_is_answered_later_holds_up_nobody_and_an_unanswered_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = ControlServer::listen(&socket, "r", Uuid::nil()).unwrap();
        let stopper = server.stopper();
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            server.serve_deferred(|request, responder| match request.verb.as_str() {
                "keep" => kept.push(responder),
                "release" => {
                    kept.drain(..).for_each(|kept| kept.answer(Ok(Bytes::from_static(b"late"))));
                    responder.answer(Ok(()));
                }
                _ => drop(responder),
            })
        });
        let (a, b) = (UnixStream::connect(&socket).unwrap(), UnixStream::connect(&socket).unwrap());
        frame::send(&a, &cbor!({ "v" => [1, 1], "verb" => "keep" }).unwrap(), Vec::new(), soon()).unwrap();
        let (forgotten, _) = ask(&b, &cbor!({ "v" => [1, 1], "verb" => "forget" }).unwrap());
        assert_eq!(forgotten["err"].deserialized::<Error>().unwrap().kind(), ErrorKind::Internal);
        ask(&b, &cbor!({ "v" => [1, 1], "verb" => "release" }).unwrap());
        let (late, _) = frame::receive::<Answer>(&a, soon()).unwrap();
        assert_eq!(late.ok, Some(Bytes::from_static(b"late")));
        stopper.stop();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_longest_silent() {
        let (dir, first, _stop) = echo(SPOKEN);
        let echo = cbor!({ "v" => [1, 1], "verb" => "echo" }).unwrap();
        ask(&first, &echo);
        let others: Vec<UnixStream> =
            (0..CONNS_MAX).map(|_| UnixStream::connect(dir.path().join("s")).unwrap()).collect();
        ask(others.last().unwrap(), &echo);
        let closed = frame::receive::<Value>(&first, soon()).unwrap_err();
        assert_eq!(closed.kind(), ErrorKind::Unavailable);
    }
}
