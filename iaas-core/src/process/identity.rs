//! Which process: its pid, the moment it started, and the boot of the host in which both mean something.

use std::fs;
use std::io;
use std::io::ErrorKind as IoErrorKind;
use std::os::fd::OwnedFd;

use rustix::process::Pid;
use rustix::process::PidfdFlags;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use crate::Error;
use crate::Result;

/// Names one process for ever: pids are used again, within minutes on a busy host and at once after a reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The process id.
    pub pid: u32,
    /// When it started, in clock ticks since the host's boot (`proc(5)`, `/proc/PID/stat` field 22).
    pub start: u64,
    /// The host's boot.
    pub boot: Uuid,
}

impl Identity {
    /// The identity of the process that has `pid` now; `None` if there is none or it has ended (a zombie).
    pub(super) fn of(pid: u32) -> Result<Option<Self>> {
        let Some(start) = start_time(pid)? else { return Ok(None) };
        Ok(Some(Self { pid, start, boot: boot_id()? }))
    }

    /// Whether this very process runs.
    pub fn is_alive(&self) -> Result<bool> {
        Ok(Self::of(self.pid)? == Some(*self))
    }

    /// A descriptor of this very process; `None` if it has ended.
    pub(super) fn pidfd(&self) -> Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(Error::unavailable("a process could not be opened").because(&e)),
        };
        // Looked at after the open: if the pid was taken over before it, the start time read now is not ours.
        Ok(self.is_alive()?.then_some(fd))
    }
}

/// When the process with `pid` started; `None` if there is none or it is a zombie.
fn start_time(pid: u32) -> Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(Error::unavailable("/proc could not be read").because(&e)),
    };
    parse_stat(&stat).ok_or_else(|| Error::internal("/proc/PID/stat has an unknown form").detail(stat))
}

fn is_gone(e: &io::Error) -> bool {
    // ESRCH: it ended between the open and the read.
    e.kind() == IoErrorKind::NotFound || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// `Some(None)` for a process that has ended and waits for its parent.
fn parse_stat(stat: &str) -> Option<Option<u64>> {
    // proc(5): field 2 is the command in parentheses, which may itself hold spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((!matches!(state, "Z" | "X" | "x")).then_some(start))
}

fn boot_id() -> Result<Uuid> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|e| Error::unavailable("the host's boot id could not be read").because(&e))?;
    Uuid::parse_str(text.trim()).map_err(|e| Error::internal("the host's boot id is not a UUID").because(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(parse_stat(stat), Some(Some(4711)));
        assert_eq!(parse_stat(&stat.replace(" S ", " Z ")), Some(None));
        assert_eq!(parse_stat("7 (sh"), None);
    }

    #[test]
    fn another_start_time_is_another_process() {
        let me = Identity::of(std::process::id()).unwrap().unwrap();
        assert!(me.is_alive().unwrap());
        assert!(me.pidfd().unwrap().is_some());
        let reused = Identity { start: me.start + 1, ..me };
        assert!(!reused.is_alive().unwrap());
        assert!(reused.pidfd().unwrap().is_none());
        let rebooted = Identity { boot: Uuid::nil(), ..me };
        assert!(!rebooted.is_alive().unwrap());
    }
}
