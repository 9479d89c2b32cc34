//! Starts roles, finds those that live, and removes what is left of those that do not.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use uuid::Uuid;

use super::Identity;
use super::NamedFds;
use super::RoleFolder;
use super::RoleHandle;
use super::folder;
use super::frame;
use super::handle;
use super::handshake::Detached;
use super::handshake::HelloRole;
use super::handshake::MARKER;
use super::handshake::Ready;
use super::handshake::Stored;
use super::lock::LockState;
use super::lock::Range;
use super::lock::RangeLock;
use super::protocol::Answer;
use super::protocol::Ask;
use super::protocol::IDENTITY_VERB;
use super::protocol::SPOKEN;
use super::protocol::WhoAmI;
use crate::Error;
use crate::Outcome;
use crate::Result;

/// The most bytes of a passport.
pub const PASSPORT_MAX: usize = 16 << 10;

/// Starts and finds the roles of one host's state folder. Several may use one folder, also in several processes.
#[derive(Clone, Debug)]
pub struct Launcher {
    state: PathBuf,
    runtime: PathBuf,
    binary: Option<PathBuf>,
    patience: Duration,
}

/// A role that was found.
#[derive(Debug)]
pub enum Adopted {
    /// It runs.
    Alive(RoleHandle),
    /// No process is left of it; its folder, with counters and log, is there until it is forgotten. The folder may be
    /// half-made.
    Dead(RoleFolder),
    /// It cannot be said yet: it is being started or removed, or does not answer. Look again later.
    Unclear(Error),
}

impl Launcher {
    /// Uses the folders `state` (durable) and `runtime` (sockets; a short path), which are made when they are needed.
    /// `binary` is run as the role; `None` for the binary of this process, even if it was replaced on disk since.
    pub fn new(state: impl AsRef<Path>, runtime: impl AsRef<Path>, binary: Option<PathBuf>) -> Self {
        // A role runs in `/`. Fails only for an empty path or without a current folder; then it is an error on use.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            state: absolute(state.as_ref()),
            runtime: absolute(runtime.as_ref()),
            binary: binary.map(|path| absolute(&path)),
            patience: PATIENCE,
        }
    }

    /// Gives a role so long to start instead of 30 s.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts the role `id`, and returns when it lives on its own and is recorded durably.
    ///
    /// `passport` (at most [`PASSPORT_MAX`], no secrets) is kept beside it for whoever adopts it; `args` and `fds` reach its
    /// [`main`](super::Role::main) and are stored nowhere. Dropping the future does not stop the start: adopt it later.
    ///
    /// # Errors
    /// All with [`Outcome::NotDone`] and nothing left behind, unless the error says otherwise:
    /// - `AlreadyExists`: it runs; [`adopt`](Self::adopt) it.
    /// - `Conflict`: a dead one is there; read what is wanted of it and [`forget`](Self::forget) it.
    /// - `Invalid`: a bad name, too large a passport, arguments or number of descriptors, too long a runtime path.
    /// - `Unavailable`: it could not be started or ended at once; the operator's lines hold the end of its log.
    pub async fn spawn(
        &self,
        role: &str,
        id: Uuid,
        passport: Bytes,
        args: Bytes,
        fds: NamedFds,
    ) -> Result<RoleHandle> {
        self.spawn_traced(role, id, passport, args, fds, None).await
    }

    /// As [`spawn`](Self::spawn), in the trace `trace`.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub async fn spawn_traced(
        &self,
        role: &str,
        id: Uuid,
        passport: Bytes,
        args: Bytes,
        fds: NamedFds,
        trace: Option<String>,
    ) -> Result<RoleHandle> {
        let folder = self.folder(role, id)?;
        let (names, fds) = fds.into_iter().unzip();
        let hello = HelloRole {
            role: role.to_owned(),
            id,
            folder: folder.path().to_owned(),
            runtime: self.runtime.clone(),
            socket: folder.socket().to_owned(),
            args,
            fds: names,
            trace,
        };
        let birth = Birth { launcher: self.clone(), folder, hello, fds, passport };
        let runtime = tokio::runtime::Handle::current();
        blocking(move || {
            let handle = birth.run()?;
            let child = handle.clone();
            // Somebody must collect the exit status of our child.
            runtime.spawn(async move { child.exited().await });
            Ok(handle)
        })
        .await
    }

    /// Looks at every `role` of the folder, in order of id: its passport (empty if half-made), and whether it runs.
    pub async fn adopt(&self, role: &str) -> Result<Vec<(Uuid, Bytes, Adopted)>> {
        let (this, role) = (self.clone(), role.to_owned());
        blocking(move || {
            let mut found = Vec::new();
            for id in folder::ids_in(&this.role_dir(&role)?)? {
                found.extend(this.look(&role, id)?.map(|(passport, adopted)| (id, passport, adopted)));
            }
            Ok(found)
        })
        .await
    }

    /// Looks at one role; `None`: nothing is left of it, also nothing half-made.
    pub async fn find(&self, role: &str, id: Uuid) -> Result<Option<(Bytes, Adopted)>> {
        let (this, role) = (self.clone(), role.to_owned());
        blocking(move || this.look(&role, id)).await
    }

    /// Replaces the passport of a role that is there, durably.
    ///
    /// # Errors
    /// `NotFound`: there is no such role. `Invalid`: it is too large.
    pub async fn set_passport(&self, role: &str, id: Uuid, passport: Bytes) -> Result<()> {
        let (this, folder) = (self.clone(), self.folder(role, id)?);
        check_passport(&passport)?;
        blocking(move || {
            let _guard = this.guard(id)?;
            if !folder.exists()? {
                return Err(Error::not_found("there is no such role on this host"));
            }
            folder.set_passport(&passport)
        })
        .await
    }

    /// Kills the role if it runs, and removes its folder and socket. `Ok` if nothing is there; removes half-made ones too.
    ///
    /// # Errors
    /// `Unavailable` with [`Outcome::Unknown`]: something is left, call again.
    pub async fn forget(&self, role: &str, id: Uuid) -> Result<()> {
        let (this, role, folder) = (self.clone(), role.to_owned(), self.folder(role, id)?);
        blocking(move || {
            let _guard = this.guard(id)?;
            if !folder.exists()? {
                return folder.remove(); // a socket may be left
            }
            match life(&role, id, &folder)? {
                Life::Alive(_, pidfd) => end(&pidfd)?,
                Life::Gone => {}
                Life::Unclear(e) => return Err(e),
            }
            folder.remove()
        })
        .await
    }

    /// The folder that the role `id` has or would have.
    ///
    /// # Errors
    /// `Invalid`: a bad name, or the path of the control socket would be too long.
    pub fn folder(&self, role: &str, id: Uuid) -> Result<RoleFolder> {
        let socket = self.runtime.join(format!("{role}-{}.sock", id.simple()));
        if socket.as_os_str().as_bytes().len() > SUN_PATH_MAX {
            return Err(Error::invalid("the path of the runtime folder is too long for sockets")
                .detail(socket.display().to_string())
                .remedy("choose a short one, such as /run/iaas"));
        }
        Ok(RoleFolder::new(self.role_dir(role)?.join(id.to_string()), socket))
    }

    fn role_dir(&self, role: &str) -> Result<PathBuf> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if role.is_empty() || role.len() > 24 || !role.chars().all(good) {
            return Err(Error::invalid(format!("`{role}` is not the name of a role"))
                .remedy("use 1 to 24 of a-z, 0-9 and -"));
        }
        Ok(self.roles_dir().join(role))
    }

    fn roles_dir(&self) -> PathBuf {
        self.state.join("roles")
    }

    /// Keeps others from starting and removing the same id, in this process and in others.
    fn guard(&self, id: Uuid) -> Result<RangeLock> {
        let until = Instant::now() + self.patience;
        loop {
            if let Some(guard) = self.try_guard(id, true)? {
                return Ok(guard);
            }
            if Instant::now() >= until {
                return Err(busy());
            }
            std::thread::sleep(GUARD_PAUSE);
        }
    }

    /// Exclusive for those who start and remove, shared for those who look.
    fn try_guard(&self, id: Uuid, exclusive: bool) -> Result<Option<RangeLock>> {
        folder::make_dirs(&self.roles_dir())?;
        // A byte for each id; two ids that share one only wait for each other.
        let (high, low) = id.as_u64_pair();
        let start = (high ^ low) >> 2;
        RangeLock::try_take(&self.roles_dir().join("guard"), Range { start, len: 1, exclusive })
    }

    fn look(&self, role: &str, id: Uuid) -> Result<Option<(Bytes, Adopted)>> {
        let folder = self.folder(role, id)?;
        if !folder.exists()? {
            return Ok(None);
        }
        let passport = folder.passport()?.unwrap_or_default();
        let Some(_guard) = self.try_guard(id, false)? else {
            return Ok(Some((passport, Adopted::Unclear(busy()))));
        };
        if !folder.exists()? {
            return Ok(None);
        }
        let adopted = match life(role, id, &folder) {
            Ok(Life::Alive(identity, pidfd)) => {
                Adopted::Alive(RoleHandle::new(role, id, identity, pidfd, folder))
            }
            Ok(Life::Gone) => Adopted::Dead(folder),
            Ok(Life::Unclear(e)) | Err(e) => Adopted::Unclear(e),
        };
        Ok(Some((passport, adopted)))
    }

    fn command(&self, hello: &HelloRole) -> Command {
        let binary = self.binary.as_deref().unwrap_or(Path::new("/proc/self/exe"));
        let mut command = Command::new(binary);
        command
            .arg0(format!("iaas-{}", hello.role))
            .args([MARKER, &hello.role, &hello.id.to_string(), &std::process::id().to_string()])
            .current_dir("/")
            // Control's environment may hold its secrets.
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|passed| name == passed)));
        command
    }
}

/// Everything that one start needs.
struct Birth {
    launcher: Launcher,
    folder: RoleFolder,
    hello: HelloRole,
    fds: Vec<OwnedFd>,
    passport: Bytes,
}

impl Birth {
    /// Blocks; all on one thread, because a child dies with the *thread* that made it (prctl(2), `PR_SET_PDEATHSIG`).
    #[tracing::instrument(name = "spawn", skip_all, fields(role = self.hello.role, id = %self.hello.id), err)]
    fn run(self) -> Result<RoleHandle> {
        check_passport(&self.passport)?;
        // Refused here if it is too large, before anything is made.
        frame::Writer::new(&self.hello, Vec::new())?;
        let _guard = self.launcher.guard(self.hello.id)?;
        self.check_free()?;
        let folder = self.folder.clone();
        folder.make(&self.passport).map_err(Failed::from).and_then(|()| self.start()).map_err(|failed| {
            let e = failed.error.detail(format!("the end of its log: {}", folder.log_tail(LOG_TAIL)));
            // What still has a process keeps its folder, by which it is found.
            match failed.left.map_or_else(|| folder.remove(), Err) {
                Ok(()) => e.outcome_is(Outcome::NotDone),
                Err(left) => {
                    e.detail(format!("and it left something: {left:#}")).outcome_is(Outcome::Unknown)
                }
            }
        })
    }

    fn check_free(&self) -> Result<()> {
        if !self.folder.exists()? {
            return Ok(());
        }
        let what = format!("the {} {}", self.hello.role, self.hello.id);
        match life(&self.hello.role, self.hello.id, &self.folder)? {
            Life::Alive(..) => Err(Error::already_exists(format!("{what} runs")).remedy("adopt it")),
            Life::Gone => {
                Err(Error::conflict(format!("{what} ended, and is not forgotten")).remedy("forget it"))
            }
            Life::Unclear(e) => Err(e.outcome_is(Outcome::NotDone)),
        }
    }

    fn start(self) -> Result<RoleHandle, Failed> {
        let cannot = |e: io::Error| Error::unavailable("a role could not be started").because(&e);
        let (ours, theirs) = UnixStream::pair().map_err(cannot)?;
        let log = self.folder.open_log()?;
        let mut command = self.launcher.command(&self.hello);
        command
            .stdin(OwnedFd::from(theirs))
            .stdout(log.try_clone().map_err(cannot)?)
            .stderr(Stdio::from(log));
        let child = command.spawn().map_err(cannot)?;
        drop(command); // it holds their end of the socket
        self.shake_hands(&ours, &child).map_err(|error| Failed { error, left: end_child(&child).err() })
    }

    fn shake_hands(self, role: &UnixStream, child: &Child) -> Result<RoleHandle> {
        let until = Instant::now() + self.launcher.patience;
        frame::send(role, &self.hello, self.fds, until)?;
        let (ready, _) = frame::receive::<Ready>(role, until)?;
        if ready.pid != child.id() {
            return Err(Error::internal("the role is not the process that was started"));
        }
        let gone = || Error::unavailable("the role ended as soon as it was started");
        let identity = Identity::of(child.id())?.ok_or_else(gone)?;
        let pidfd = identity.pidfd()?.ok_or_else(gone)?;
        self.folder.store(identity)?;
        frame::send(role, &Stored {}, Vec::new(), until)?;
        frame::receive::<Detached>(role, until)?;
        Ok(RoleHandle::new(&self.hello.role, self.hello.id, identity, pidfd, self.folder))
    }
}

/// Why a start failed, and whether its process could not be ended.
struct Failed {
    error: Error,
    left: Option<Error>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, left: None }
    }
}

enum Life {
    Alive(Identity, OwnedFd),
    Gone,
    Unclear(Error),
}

/// Whether a process is left of the role, by its record and its lock. The caller holds the guard, so nobody else is starting
/// the role; but a start may just have been cut off, and then the process is about to die or to detach.
fn life(role: &str, id: Uuid, folder: &RoleFolder) -> Result<Life> {
    let until = Instant::now() + ENDING;
    loop {
        let recorded = folder.identity().ok().flatten();
        let process = match recorded {
            Some(identity) => identity.pidfd()?.map(|fd| (identity, fd)),
            None => None,
        };
        match (process, folder.lock_state()?) {
            (None, LockState::Free) => return Ok(Life::Gone),
            (Some((identity, pidfd)), LockState::Detached) => return Ok(Life::Alive(identity, pidfd)),
            // It gives its lock back shortly before it is gone.
            (Some((_, pidfd)), LockState::Free) if wait_end(&pidfd, ENDING)? => return Ok(Life::Gone),
            (Some(_), LockState::Free) => {
                return Ok(Life::Unclear(Error::unavailable("a role runs without its lock")));
            }
            (Some(_), LockState::Held) if Instant::now() >= until => {
                return Ok(Life::Unclear(Error::unavailable("a role neither detaches nor ends")));
            }
            (Some(_), LockState::Held) => std::thread::sleep(GUARD_PAUSE),
            // The record is lost, or of another life.
            (None, LockState::Held | LockState::Detached) => return recover(role, id, folder),
        }
    }
}

/// Finds the holder of the lock by asking the socket, until it answers or the lock is free.
fn recover(role: &str, id: Uuid, folder: &RoleFolder) -> Result<Life> {
    let until = Instant::now() + ENDING;
    let mut last = None;
    while Instant::now() < until {
        if folder.lock_state()? == LockState::Free {
            return Ok(Life::Gone);
        }
        match ask_identity(role, id, folder, until.min(Instant::now() + ASK)) {
            Ok(identity) => {
                // Only saves the next one from asking, and others may be storing the same now.
                let _ = folder.store(identity);
                return Ok(identity.pidfd()?.map_or(Life::Gone, |fd| Life::Alive(identity, fd)));
            }
            Err(e) => last = Some(e),
        }
        std::thread::sleep(GUARD_PAUSE);
    }
    let error = Error::unavailable("a process holds the lock of a role but does not say who it is");
    Ok(Life::Unclear(last.iter().fold(error, |error, e| error.detail(format!("{e:#}")))))
}

fn ask_identity(role: &str, id: Uuid, folder: &RoleFolder, until: Instant) -> Result<Identity> {
    let silent = |e: &dyn std::error::Error| Error::unavailable("the role does not answer").because(e);
    let stream = UnixStream::connect(folder.socket()).map_err(|e| silent(&e))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|e| silent(&e))?;
    let ask = Ask {
        v: SPOKEN,
        verb: IDENTITY_VERB.to_owned(),
        body: Bytes::new(),
        fds: Vec::new(),
        op: None,
        trace: None,
        budget_ms: 0,
    };
    frame::send(&stream, &ask, Vec::new(), until)?;
    let (answer, fds) = frame::receive::<Answer>(&stream, until)?;
    let me: WhoAmI = frame::decode(&answer.result(fds)?.0)?;
    if me.id != id || me.role != role {
        return Err(Error::unavailable("another role listens in its place"));
    }
    let pid = u32::try_from(peer.pid.as_raw_pid()).map_err(|e| silent(&e))?;
    Identity::of(pid)?.ok_or_else(|| Error::unavailable("the role ended"))
}

/// Kills a child that nobody has waited for, so that its pid is still its own.
fn end_child(child: &Child) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::internal("a child without a pid"))?;
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => end(&pidfd),
        // The program ignores SIGCHLD, and the kernel has collected the child by itself.
        Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(Error::unavailable("a process could not be opened").because(&e)),
    }
}

/// Kills the process and waits for its end.
fn end(pidfd: &OwnedFd) -> Result<()> {
    handle::kill(pidfd)?;
    if wait_end(pidfd, KILLED)? {
        return Ok(());
    }
    // A process in uninterruptible sleep, for example on a dead disk.
    Err(Error::unavailable("a killed process does not end")
        .remedy("look at what it waits for, then try again"))
}

/// Whether the process ends within `span`. Collects the status if it was our child.
fn wait_end(pidfd: &OwnedFd, span: Duration) -> Result<bool> {
    let until = Instant::now() + span;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let fd = pidfd.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => {
                handle::reap(pidfd);
                return Ok(true);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::unavailable("a process could not be watched").because(&e)),
        }
    }
}

fn check_passport(passport: &[u8]) -> Result<()> {
    if passport.len() > PASSPORT_MAX {
        return Err(Error::invalid(format!(
            "a passport of {} bytes; the limit is {PASSPORT_MAX}",
            passport.len()
        )));
    }
    Ok(())
}

fn busy() -> Error {
    Error::conflict("the role is being started or removed by another call")
        .retry_in(Duration::from_millis(200))
}

/// Runs `work` where it may block; it goes on if the caller stops waiting.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on the host ended abruptly").because(&e)),
    }
}

/// unix(7): `sun_path` has 108 bytes, the last of them zero.
const SUN_PATH_MAX: usize = 107;
/// How long a role may take to start; on a busy host the exec of a large binary alone can take seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a process may take to end once it has given its lock back, or its parent has died.
const ENDING: Duration = Duration::from_secs(5);
/// How long a killed process may take to give back its memory: hundreds of GiB take a while.
const KILLED: Duration = Duration::from_secs(60);
/// How long one question for an identity may take.
const ASK: Duration = Duration::from_secs(1);
const GUARD_PAUSE: Duration = Duration::from_millis(2);
/// Bytes of the log in an error.
const LOG_TAIL: u64 = 2048;
/// What a role sees of control's environment.
const PASSED_ON: [&str; 9] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "TZ",
    "LANG",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "LLVM_PROFILE_FILE",
];
