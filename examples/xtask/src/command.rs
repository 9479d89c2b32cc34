//! Child programs with a time limit. Each runs in its own process group, which is killed as a whole: at the limit, when this
//! program is interrupted, and when the child itself ends and leaves something behind.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::failure::{Context, Failure, Result};

/// A program to run, and for how long at most.
#[derive(Debug)]
pub(crate) struct Cmd {
    command: Command,
    limit: Duration,
    shown: String,
}

/// What a finished program left.
#[derive(Debug)]
pub(crate) struct Finished {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Its standard output, lossily decoded.
    pub(crate) stdout: String,
    /// Its standard error, lossily decoded.
    pub(crate) stderr: String,
}

impl Cmd {
    /// Prepares `program`, limited to one minute until [`limit`](Self::limit) says otherwise.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let shown = program.as_ref().to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command.process_group(0).stdin(Stdio::null());
        Self { command, limit: MINUTE, shown }
    }

    /// Appends one argument.
    #[must_use]
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.shown.push(' ');
        self.shown.push_str(&arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Appends arguments.
    #[must_use]
    pub(crate) fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    #[must_use]
    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Takes an environment variable away.
    #[must_use]
    pub(crate) fn env_remove(mut self, key: &str) -> Self {
        self.command.env_remove(key);
        self
    }

    /// Runs in `dir`.
    #[must_use]
    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Kills the whole group after `limit`.
    #[must_use]
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs with our own output; a non-zero end is a failure.
    pub(crate) fn run(mut self) -> Result<()> {
        let child = self.command.spawn().context(&self.shown)?;
        let status = wait_group(child, self.limit, &self.shown)?;
        check(status, &self.shown, "")
    }

    /// Runs with our own output and leaves alone what the program started in groups of their own or left behind.
    pub(crate) fn run_and_leave(mut self) -> Result<()> {
        let mut child = self.command.spawn().context(&self.shown)?;
        let status = wait_until(&mut child, self.limit, &self.shown)?;
        check(status, &self.shown, "")
    }

    /// Starts it with its output in `file`; the caller waits for it and ends it.
    pub(crate) fn start_into(mut self, file: File) -> Result<Child> {
        self.command.stdout(file.try_clone().context(&self.shown)?).stderr(file);
        self.command.spawn().context(&self.shown)
    }

    /// Runs with both outputs in `file`; a non-zero end is a failure. What outlives the program may keep the file open.
    pub(crate) fn run_into(mut self, file: File) -> Result<()> {
        self.command.stdout(file.try_clone().context(&self.shown)?).stderr(file);
        let mut child = self.command.spawn().context(&self.shown)?;
        let status = wait_until(&mut child, self.limit, &self.shown)?;
        check(status, &self.shown, "")
    }

    /// Runs with captured output; only a time-out or an unstartable program is a failure.
    pub(crate) fn finish(mut self) -> Result<Finished> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().context(&self.shown)?;
        let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
        let status = wait_group(child, self.limit, &self.shown)?;
        Ok(Finished {
            status,
            stdout: out.join().unwrap_or_default(),
            stderr: err.join().unwrap_or_default(),
        })
    }

    /// Runs with captured output; a non-zero end is a failure that carries the end of what it printed.
    pub(crate) fn output(self) -> Result<String> {
        let shown = self.shown.clone();
        let done = self.finish()?;
        check(done.status, &shown, &done.stderr)?;
        Ok(done.stdout)
    }
}

/// Kills every group started here when this program is interrupted or terminated.
pub(crate) fn kill_groups_on_interrupt() -> Result<()> {
    let handler = || {
        for group in GROUPS.lock().map(|g| g.clone()).unwrap_or_default() {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        std::process::exit(130);
    };
    ctrlc::set_handler(handler).context("cannot watch for interrupts")
}

/// Finds the folder to hand to a `--flag PATH`, made absolute so that it survives a change of folder.
pub(crate) fn absolute(path: &OsString) -> Result<PathBuf> {
    std::path::absolute(path).context(path.to_string_lossy())
}

/// Waits for `child` until `limit`, then kills its group in either case.
fn wait_group(mut child: Child, limit: Duration, shown: &str) -> Result<ExitStatus> {
    let group = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
    let outcome = wait_until(&mut child, limit, shown);
    // ESRCH when nobody is left: the good case.
    let _ = killpg(group, Signal::SIGKILL);
    outcome
}

/// Waits for `child` until `limit`; then kills its group. What a child leaves behind in good time is its own affair.
fn wait_until(child: &mut Child, limit: Duration, shown: &str) -> Result<ExitStatus> {
    let group = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
    remember(group, true);
    let end = Instant::now() + limit;
    let outcome = loop {
        match child.try_wait().context(shown)? {
            Some(status) => break Ok(status),
            None if Instant::now() > end => {
                let _ = killpg(group, Signal::SIGKILL);
                let _ = child.wait();
                break Err(too_long(shown, limit));
            }
            None => thread::sleep(POLL),
        }
    };
    remember(group, false);
    outcome
}

fn too_long(shown: &str, limit: Duration) -> Failure {
    Failure::new(format!("`{shown}` took longer than {} s and was killed", limit.as_secs()))
}

fn remember(group: Pid, alive: bool) {
    if let Ok(mut groups) = GROUPS.lock() {
        if alive {
            groups.insert(group.as_raw())
        } else {
            groups.remove(&group.as_raw())
        };
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn check(status: ExitStatus, shown: &str, stderr: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let tail: Vec<&str> = stderr.lines().rev().take(TAIL).collect();
    let tail: String = tail.iter().rev().map(|line| format!("\n    {line}")).collect();
    Err(Failure::new(format!("`{shown}`: {status}{tail}")))
}

static GROUPS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
const MINUTE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
const TAIL: usize = 25;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_captured_and_a_bad_end_tells_the_last_words() {
        assert_eq!(Cmd::new("sh").args(["-c", "echo hello"]).output().unwrap(), "hello\n");
        let failure =
            Cmd::new("sh").args(["-c", "echo first >&2; echo last words >&2; exit 3"]).output().unwrap_err();
        assert!(failure.what().contains("exit status: 3"), "{failure}");
        assert!(failure.what().ends_with("last words"), "{failure}");
    }

    #[test]
    fn at_the_limit_the_whole_group_dies() {
        let dir = std::env::temp_dir().join(format!("xtask-limit-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let pid_file = dir.join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
        let failure =
            Cmd::new("sh").args(["-c", &script]).limit(Duration::from_millis(300)).output().unwrap_err();
        assert!(failure.what().contains("was killed"), "{failure}");
        let grandchild = std::fs::read_to_string(&pid_file).unwrap();
        // A killed orphan may stay a zombie under an init that does not reap; only one that never ends is a leak.
        let ended = || {
            let stat =
                std::fs::read_to_string(format!("/proc/{}/stat", grandchild.trim())).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let end = Instant::now() + MINUTE;
        while !ended() {
            assert!(Instant::now() < end, "{} outlives its group", grandchild.trim());
            thread::sleep(POLL);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
