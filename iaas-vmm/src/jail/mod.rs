//! What a child process inherits: a few descriptors, and a death that follows ours.
//!
//! Not yet a jail: namespaces, seccomp and landlock of the runner are left out. QEMU gets its own `-sandbox`.

#![expect(unsafe_code, reason = "between fork and exec: only async-signal-safe system calls")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::process::Command;

use nix::libc;

/// Starts `command` with `fds` under the numbers that they have here; every other descriptor of ours is closed in it.
///
/// The child is killed by the kernel when the calling *thread* ends, so call this from a thread that lives as long as the
/// process, such as the main one. A parent that dies before the child could ask for that is noticed too.
pub fn spawn_bound(command: &mut Command, fds: &[OwnedFd]) -> io::Result<Child> {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = std::process::id();
    let prepare = move || {
        die_with(parent)?;
        numbers.iter().try_for_each(|fd| inherit(*fd))
    };
    // SAFETY: `prepare` runs between fork and exec in the child. It makes system calls only (prctl, getppid, fcntl), all
    // async-signal-safe; it allocates nothing and takes no lock. `io::Error::from_raw_os_error` does not allocate either.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// Asks the kernel to kill this process when its parent goes.
fn die_with(parent: u32) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| io::Error::from_raw_os_error(e as i32))?;
    if u32::try_from(nix::unistd::getppid().as_raw()) == Ok(parent) {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(libc::ESRCH))
}

/// Lets a descriptor survive exec.
fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: the parent holds the `OwnedFd` behind this number until `spawn` has returned, so it is open in the child.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
        .map(drop)
        .map_err(|e| io::Error::from_raw_os_error(e as i32))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_child_has_the_descriptors_it_was_given_and_not_our_others() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        let fds = [OwnedFd::from(theirs)];
        let given = fds[0].as_raw_fd();
        let mut command = Command::new("/bin/ls");
        command.args(["-l", "/proc/self/fd"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = spawn_bound(&mut command, &fds).unwrap();
        let mut open = String::new();
        child.stdout.take().unwrap().read_to_string(&mut open).unwrap();
        child.wait().unwrap();
        drop(fds);
        assert!(open.contains(&format!(" {given} -> socket:")), "{open}");
        assert!(!open.contains(&other.path().display().to_string()), "{open}");
    }

    #[test]
    fn a_child_is_killed_when_the_thread_that_started_it_ends() {
        let starter = std::thread::spawn(|| spawn_bound(Command::new("/bin/sleep").arg("600"), &[]).unwrap());
        let mut child = starter.join().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }
}
