//! A parent that starts the control process again when it was killed: what an init system does for a real one.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::Deserialize;
use serde::Serialize;

/// The argument that marks the control process.
pub const CONTROL: &str = "--control";

/// Runs this program again as the control process, and once more after each kill, at most `most` times.
///
/// # Errors
/// Those of starting a process.
pub fn until_done(most: u32) -> io::Result<ExitCode> {
    for _ in 0..=most {
        let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
        arguments.push(CONTROL.into());
        let status = Command::new(std::env::current_exe()?).args(arguments).status()?;
        match (status.code(), status.signal()) {
            (Some(code), _) => return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)),
            (None, Some(signal)) if signal == Signal::SIGKILL as i32 => continue,
            (None, signal) => {
                eprintln!("the control process ended by signal {signal:?}");
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    eprintln!("the control process was killed more than {most} times");
    Ok(ExitCode::FAILURE)
}

/// Kills this very process with SIGKILL: nothing of it gets to clean up.
pub fn kill_self() -> ! {
    let _ = nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGKILL);
    // SIGKILL cannot be held back; this line is for the compiler.
    std::process::abort()
}

/// A process, told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it began, in ticks since the machine did.
    pub start: u64,
}

impl Process {
    /// This process.
    ///
    /// # Errors
    /// `NotFound` without `/proc`.
    pub fn me() -> io::Result<Self> {
        Self::of(nix::unistd::getpid().as_raw()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The process with that number, if it runs.
    ///
    /// # Source
    /// proc_pid_stat(5): the state is field 3, the start field 22, the name in brackets field 2.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let runs = !matches!(*fields.first()?, "Z" | "X");
        runs.then_some(Self { pid, start: fields.get(19)?.parse().ok()? })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

/// The processes of this program that were started as the role `role` and hold a file below `state` open.
pub fn roles(role: &str, state: &Path) -> Vec<Pid> {
    let Ok(me) = std::fs::read_link("/proc/self/exe") else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let ours = pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == me));
    let named = ours.filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).any(|word| word == role.as_bytes())
    });
    named.filter(|pid| holds(*pid, state)).map(Pid::from_raw).collect()
}

fn holds(pid: i32, state: &Path) -> bool {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|file| file.starts_with(state))
}
