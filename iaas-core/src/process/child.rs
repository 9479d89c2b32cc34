//! The first moments of a role.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use rustix::fs::Mode;
use rustix::process::Pid;
use rustix::process::Signal;
use uuid::Uuid;

use super::ControlServer;
use super::CountersPage;
use super::Role;
use super::RoleFolder;
use super::RoleLock;
use super::Roles;
use super::frame;
use super::handshake::Detached;
use super::handshake::HelloRole;
use super::handshake::MARKER;
use super::handshake::Ready;
use super::handshake::Stored;
use super::protocol::named;
use crate::Error;
use crate::Result;

/// What a role starts with.
#[derive(Debug)]
pub struct RoleStart {
    /// Its id.
    pub id: Uuid,
    /// What [`Launcher::spawn`](super::Launcher::spawn) was given.
    pub args: Bytes,
    /// The descriptors that it was given, by name.
    pub fds: BTreeMap<String, OwnedFd>,
    /// Its folder.
    pub folder: PathBuf,
    /// The folder for sockets, shared by all roles of the host.
    pub runtime: PathBuf,
    /// Answers control.
    pub server: ControlServer,
    /// Survives this process.
    pub counters: CountersPage,
    /// The trace in which it was started.
    pub trace: Option<String>,
}

/// Returns if this process is not a role.
pub(super) fn run_if_role(roles: &Roles) {
    let args: Vec<OsString> = std::env::args_os().skip(1).take(4).collect();
    let [marker, role, id, parent] = args.as_slice() else { return };
    if marker != MARKER {
        return;
    }
    let code = run(roles, role.to_str(), id.to_str(), parent.to_str()).unwrap_or_else(|e| {
        eprintln!("the role could not start: {e:#}");
        ExitCode::FAILURE
    });
    std::process::exit(number(code));
}

fn run(roles: &Roles, role: Option<&str>, id: Option<&str>, parent: Option<&str>) -> Result<ExitCode> {
    die_with(parent.and_then(|pid| pid.parse().ok()))?;
    close_inherited()?;
    let name = role.unwrap_or_default();
    let role = roles.mains.iter().find(|r| r.name() == name).ok_or_else(|| {
        Error::unsupported(format!("this binary has no role `{name}`"))
            .remedy("give it to `process::init` in the first line of `main`")
    })?;
    let id =
        id.and_then(|id| Uuid::try_parse(id).ok()).ok_or_else(|| Error::invalid("a role needs an id"))?;
    let control = take_stdin()?;
    let (start, _lock) = shake_hands(&control, role.as_ref(), id)?;
    drop(control);
    let span = tracing::info_span!("role", name, %id, trace = start.trace);
    Ok(span.in_scope(|| role.main(start, roles)))
}

/// Dies with control from here on. If control died before, the parent has changed.
fn die_with(parent: Option<i32>) -> Result<()> {
    let failed =
        |e: rustix::io::Errno| Error::unavailable("the role could not be tied to its parent").because(&e);
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed)?;
    if parent.is_none() || rustix::process::getppid().map(Pid::as_raw_pid) != parent {
        return Err(Error::unavailable("the control process is gone"));
    }
    // Out of control's session: a Ctrl-C there is not meant for us.
    rustix::process::setsid().map_err(failed)?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    Ok(())
}

/// Closes what a careless library of control let through: it would stay open for as long as the role lives. Whatever this
/// process opened itself before now is closed on exec, and so is told apart.
fn close_inherited() -> Result<()> {
    let failed = |e: &dyn std::error::Error| {
        Error::unavailable("the role's open files could not be listed").because(e)
    };
    let names: Vec<OsString> = std::fs::read_dir("/proc/self/fd")
        .and_then(|dir| dir.map(|entry| entry.map(|e| e.file_name())).collect())
        .map_err(|e| failed(&e))?;
    for fd in names.iter().filter_map(|n| n.to_str()?.parse::<i32>().ok()).filter(|fd| *fd > 2) {
        // The descriptor of the listing itself is gone by now.
        let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else { continue };
        if !closes_on_exec(&info) {
            nix::unistd::close(fd).map_err(|e| failed(&e))?;
        }
    }
    Ok(())
}

/// proc(5): `flags:` is octal and includes `O_CLOEXEC`.
fn closes_on_exec(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & nix::libc::O_CLOEXEC != 0)
}

fn take_stdin() -> Result<UnixStream> {
    let taken = io::stdin().as_fd().try_clone_to_owned().and_then(|stdin| {
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(UnixStream::from(stdin))
    });
    taken.map_err(|e| Error::unavailable("the role has no connection to control").because(&e))
}

fn shake_hands(control: &UnixStream, role: &dyn Role, id: Uuid) -> Result<(RoleStart, RoleLock)> {
    // Control's own limit is shorter; and if it dies, so do we.
    let until = Instant::now() + PATIENCE;
    let (hello, fds) = frame::receive::<HelloRole>(control, until)?;
    if hello.id != id || hello.role != role.name() {
        return Err(Error::invalid("the hello is for another role"));
    }
    let fds = named(hello.fds, fds)?.into_iter().collect();
    let folder = RoleFolder::new(hello.folder, hello.socket);
    let mut lock = RoleLock::try_take(&folder.lock_path())?.ok_or_else(|| {
        Error::conflict("another process is this role").remedy("adopt it instead of starting it again")
    })?;
    let counters = CountersPage::create(&folder.counters_path())?;
    let server = ControlServer::listen(folder.socket(), role.name(), id)?;
    frame::send(control, &Ready { pid: std::process::id() }, Vec::new(), until)?;
    frame::receive::<Stored>(control, until)?;
    rustix::process::set_parent_process_death_signal(None)
        .map_err(|e| Error::unavailable("the role could not be untied from its parent").because(&e))?;
    lock.detach(&folder.lock_path())?;
    // Control may be gone by now: this role is on its own, and whoever adopts it will find it.
    let _ = frame::send(control, &Detached {}, Vec::new(), until);
    let (args, trace) = (hello.args, hello.trace);
    let folder = folder.path().to_owned();
    Ok((RoleStart { id, args, fds, folder, runtime: hello.runtime, server, counters, trace }, lock))
}

/// `ExitCode` does not tell its number, but can be compared.
fn number(code: ExitCode) -> i32 {
    (0..=u8::MAX).find(|n| ExitCode::from(*n) == code).unwrap_or(1).into()
}

/// How long control may take in the handshake.
const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_keeps_its_number() {
        assert_eq!(number(ExitCode::SUCCESS), 0);
        assert_eq!(number(ExitCode::from(42)), 42);
    }

    #[test]
    fn inherited_descriptors_are_those_that_exec_does_not_close() {
        assert!(closes_on_exec("pos:\t0\nflags:\t02100002\nmnt_id:\t1\n"));
        assert!(!closes_on_exec("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"));
    }
}
