//! Runs one program under ptrace, counts its mutating calls and kills it at the k-th.
//!
//! The whole thread group is followed. A process that the program makes is let go at its first stop, before it runs a single
//! instruction, and so lives on when the program is killed. Kill happens at the *entry* of the k-th call, which then has no
//! effect; "it landed, nobody heard" is what the entry of the next one shows.
//!
//! ptrace binds a tracee to the thread that traces it: [`run`] does everything on a thread of its own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::calls::{self, Call, Caller, mutating};
use crate::failure::{Context, Failure, Result};

/// What to run and when to kill it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    /// Its environment, beside ours.
    pub(super) variables: Vec<(String, PathBuf)>,
    /// Writes and syncs count below this folder.
    pub(super) state: PathBuf,
    /// Its output goes here.
    pub(super) log: PathBuf,
    /// Kill at the entry of this mutating call.
    pub(super) kill_at: Option<At>,
    /// Kill it in any case after this time.
    pub(super) limit: Duration,
}

/// A mutating call, counted from 1: among all, or among those of its kind. No two runs make the same calls in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Call(usize),
    Kind(&'static str, usize),
}

impl At {
    /// Reads `K` or `KIND:K`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (kind, number) = text.split_once(':').map_or((None, text), |(kind, number)| (Some(kind), number));
        let wrong = || {
            Failure::new(format!("`{text}` is no call to kill at"))
                .remedy("say 568, or connect:2 for the second `connect`")
        };
        let number = number.parse().ok().filter(|number| *number > 0).ok_or_else(wrong)?;
        match kind {
            None => Ok(Self::Call(number)),
            Some(kind) => Ok(Self::Kind(calls::kind(kind).ok_or_else(wrong)?, number)),
        }
    }

    /// Whether the last of `calls` is the one.
    pub(super) fn is_reached(self, calls: &[&str]) -> bool {
        match self {
            Self::Call(number) => calls.len() == number,
            Self::Kind(kind, number) => {
                calls.last() == Some(&kind) && calls.iter().filter(|call| **call == kind).count() == number
            }
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By itself, with this code.
    Exited(i32),
    /// By our hand, at the planned call.
    Killed,
    /// By another signal.
    Signal(Signal),
    /// By our hand, at the limit.
    TooLong,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trace {
    /// The mutating calls in the order of their entries. After a kill, the last one is where it happened.
    pub(super) calls: Vec<&'static str>,
    /// How it ended.
    pub(super) end: End,
}

/// Runs the plan on a thread of its own.
pub(super) fn run(plan: Plan) -> Result<Trace> {
    let tracing = thread::spawn(move || trace(&plan));
    tracing.join().map_err(|_| Failure::new("the tracer panicked"))?
}

/// Becomes `command` under its parent's trace: the second half of [`run`], in the child. Never returns on success.
pub(crate) fn exec_traced(command: &[String]) -> Result<()> {
    let (program, args) = command.split_first().ok_or_else(|| Failure::new("nothing to trace"))?;
    ptrace::traceme().context("ptrace")?;
    raise(Signal::SIGSTOP).context("raise")?;
    Err(Failure::new(format!("{program}: {}", Command::new(program).args(args).exec())))
}

fn trace(plan: &Plan) -> Result<Trace> {
    let log = File::options().create(true).append(true).open(&plan.log).at(&plan.log)?;
    let errors = log.try_clone().at(&plan.log)?;
    // By this name and not by its path: `cargo test` may have built another one there since this one was started.
    let mut command = Command::new("/proc/self/exe");
    command.arg(TRACED).args(&plan.command).stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
    command.envs(plan.variables.iter().map(|(name, value)| (name, value)));
    let child = command.spawn().context("trace helper")?;
    let leader = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
    waitpid(leader, None).context("trace helper")?;
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(leader, options).context("ptrace").map_err(|f| {
        f.remedy("tracing must be allowed here: check kernel.yama.ptrace_scope and the container's rights")
    })?;
    ptrace::cont(leader, None).context("ptrace")?;
    let watchdog = Watchdog::start(leader, plan.limit);
    let mut tracer =
        Tracer { plan, leader, threads: BTreeSet::from([leader.as_raw()]), calls: Vec::new(), killed: false };
    let end = tracer.follow()?;
    let end = if watchdog.stop() && end == End::Signal(Signal::SIGKILL) { End::TooLong } else { end };
    Ok(Trace { calls: tracer.calls, end })
}

struct Tracer<'a> {
    plan: &'a Plan,
    leader: Pid,
    threads: BTreeSet<i32>,
    calls: Vec<&'static str>,
    killed: bool,
}

impl Tracer<'_> {
    /// Serves stops until the leader has ended.
    fn follow(&mut self) -> Result<End> {
        // Only what this thread traces: other threads of ours wait for children of their own.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            match waitpid(None, Some(flags)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == self.leader => return Ok(End::Exited(code)),
                Ok(WaitStatus::Signaled(pid, ..)) if pid == self.leader && self.killed => {
                    return Ok(End::Killed);
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == self.leader => {
                    return Ok(End::Signal(signal));
                }
                Ok(WaitStatus::PtraceSyscall(pid)) => self.at_call(pid)?,
                Ok(WaitStatus::PtraceEvent(pid, ..)) => go_on(pid, None)?,
                Ok(WaitStatus::Stopped(pid, signal)) => self.at_stop(pid, signal)?,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(Failure::new(format!("waiting for the traced program: {e}"))),
            }
        }
    }

    /// A signal for one of ours, or the first stop of something new.
    fn at_stop(&mut self, pid: Pid, signal: Signal) -> Result<()> {
        if self.threads.contains(&pid.as_raw()) {
            return go_on(pid, Some(signal));
        }
        if group_of(pid) == Some(self.leader) {
            self.threads.insert(pid.as_raw());
            return go_on(pid, None);
        }
        gone_is_fine(ptrace::detach(pid, None))
    }

    fn at_call(&mut self, pid: Pid) -> Result<()> {
        let Ok(regs) = ptrace::getregs(pid) else { return Ok(()) };
        // Linux on x86-64 enters each call with -ENOSYS as its result so far.
        if regs.rax == ENTRY && !self.killed {
            let call =
                Call { number: regs.orig_rax.cast_signed(), args: [regs.rdi, regs.rsi, regs.rdx, regs.r10] };
            if let Some(name) = mutating(call, &Live(pid), &self.plan.state) {
                self.calls.push(name);
                if self.plan.kill_at.is_some_and(|at| at.is_reached(&self.calls)) {
                    self.killed = true;
                    return gone_is_fine(kill(self.leader, Signal::SIGKILL));
                }
            }
        }
        go_on(pid, None)
    }
}

/// A stopped thread of the traced program.
struct Live(Pid);

impl Caller for Live {
    fn fd(&self, fd: u64) -> Option<String> {
        // The kernel takes descriptors as 32-bit numbers; the upper half of the register may hold anything.
        let fd = fd & u64::from(u32::MAX);
        fs::read_link(format!("/proc/{}/fd/{fd}", self.0)).ok().map(|p| p.to_string_lossy().into_owned())
    }

    fn is_netlink(&self, fd: u64) -> bool {
        let inode = self.fd(fd).and_then(|t| Some(t.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()));
        let table = fs::read_to_string(format!("/proc/{}/net/netlink", self.0)).unwrap_or_default();
        inode.is_some_and(|inode| {
            table.lines().any(|line| line.split_whitespace().next_back() == Some(&inode))
        })
    }

    fn word(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        File::open(format!("/proc/{}/mem", self.0)).ok()?.read_exact_at(&mut bytes, address).ok()?;
        Some(u64::from_ne_bytes(bytes))
    }
}

/// The thread group that a task belongs to.
fn group_of(task: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{task}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("Tgid:"))?.trim().parse().ok().map(Pid::from_raw)
}

/// Continues to the next call. A task that is killed meanwhile cannot be continued: its end is reported by itself.
fn go_on(pid: Pid, signal: Option<Signal>) -> Result<()> {
    gone_is_fine(ptrace::syscall(pid, signal))
}

fn gone_is_fine(result: nix::Result<()>) -> Result<()> {
    match result {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => Err(Failure::new(format!("ptrace: {e}"))),
    }
}

/// Kills the program at its limit, so that the waiting tracer wakes up.
struct Watchdog {
    done: Arc<AtomicBool>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(leader: Pid, limit: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        let thread = thread::spawn(move || {
            let end = Instant::now() + limit;
            while !seen.load(Ordering::Acquire) {
                if Instant::now() > end {
                    return kill(leader, Signal::SIGKILL).is_ok();
                }
                thread::park_timeout(end.saturating_duration_since(Instant::now()));
            }
            false
        });
        Self { done, thread }
    }

    /// Ends the watch and tells whether it has killed.
    fn stop(self) -> bool {
        self.done.store(true, Ordering::Release);
        self.thread.thread().unpark();
        self.thread.join().unwrap_or(false)
    }
}

/// Whether `path` looks like a program, told before anything is started.
pub(super) fn check_program(path: &Path) -> Result<()> {
    match path.is_file() {
        true => Ok(()),
        false => Err(Failure::new(format!("no such program: {}", path.display()))
            .remedy("build it first, and give its path")),
    }
}

/// The hidden verb that turns this program into the traced one.
pub(crate) const TRACED: &str = "__traced";
const ENTRY: u64 = (-38_i64).cast_unsigned();
