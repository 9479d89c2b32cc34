//! One run of one machine, watched from its start to the end of its loads.

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::sys::signal::killpg;
use nix::unistd::Pid;

use crate::Result;
use crate::contender::Contender;
use crate::contender::Machine;
use crate::memory;

/// The name of a figure and its value in this run.
pub(crate) type Seen = Vec<(&'static str, f64)>;

/// Starts a machine, reads what its guest does, and ends it.
///
/// # Errors
/// It does not start, does not come to its end, or its guest says that a load failed.
pub(crate) fn take(contender: &Contender, machine: &Machine) -> Result<Seen> {
    let command = contender.command(machine);
    let (program, words) = command.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let started = Instant::now();
    let mut group = Group(command.spawn()?);
    let lines = listen(group.0.stdout.take().ok_or("no console")?);
    let seen = follow(&contender.name, started, &lines, || memory::beside(group.id(), machine.memory << 20));
    if seen.is_err() {
        eprintln!("{} stood at:\n{}", contender.name, memory::standing(group.id()));
    }
    drop(group);
    // To the end of the pipe, so that nothing of this machine runs beside the next one.
    lines.iter().for_each(drop);
    seen
}

/// A VMM's processes, which end with this.
struct Group(Child);

impl Group {
    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Ok(id) = i32::try_from(self.id()) {
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// The lines of a console, each with the moment at which it came.
fn listen(console: impl io::Read + Send + 'static) -> Receiver<(Instant, String)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(io::Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((Instant::now(), line)).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Reads figures until the guest is done. `idle` measures the memory, at the moment when the guest asks for it.
fn follow(
    name: &str,
    started: Instant,
    lines: &Receiver<(Instant, String)>,
    idle: impl Fn() -> Result<memory::Parts>,
) -> Result<Seen> {
    let mut reader = Reader { started, begun: None, seen: Vec::new() };
    loop {
        let (at, line) =
            lines.recv_timeout(PATIENCE).map_err(|_| "its console went silent before its end")?;
        if !line.starts_with("ALIVE") {
            eprintln!("{name} {:.3} {line}", (at - started).as_secs_f64());
        }
        match reader.take(at, &line)? {
            Next::On => {}
            Next::Measure => {
                let parts = idle()?;
                eprintln!("{name} {parts:?}");
                reader.seen.push(("mem.overhead", parts.overhead_mib()));
            }
            Next::Done => return Ok(reader.seen),
        }
    }
}

/// What a line calls for.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    On,
    Measure,
    Done,
}

#[derive(Debug)]
struct Reader {
    started: Instant,
    begun: Option<(Instant, &'static str)>,
    seen: Seen,
}

impl Reader {
    fn take(&mut self, at: Instant, line: &str) -> Result<Next> {
        let mut words = line.split_whitespace();
        match words.next().unwrap_or_default() {
            "GUEST-READY" => self.seen.push(("boot.init", (at - self.started).as_secs_f64() * 1e3)),
            "BENCH-IDLE" => return Ok(Next::Measure),
            "BENCH-BEGIN" => self.begun = words.next().and_then(load).map(|load| (at, load)),
            "BENCH-END" => self.ended(at, words.next(), words.next())?,
            "BENCH-DONE" => return Ok(Next::Done),
            "BENCH-FAILED" => return Err(line.to_owned().into()),
            _ if line.contains("Kernel panic") => return Err(line.to_owned().into()),
            _ => {}
        }
        Ok(Next::On)
    }

    fn ended(&mut self, at: Instant, name: Option<&str>, count: Option<&str>) -> Result<()> {
        let (begun, load) = self.begun.take().ok_or("a load ended that had not begun")?;
        let count = count.and_then(|word| word.strip_prefix("count=")).ok_or("a load without a count")?;
        if name != Some(load) {
            return Err(format!("{load} ended as {name:?}").into());
        }
        let scale = if load.starts_with("net.") { 1e6 } else { 1.0 };
        self.seen.push((load, count.parse::<f64>()? / scale / (at - begun).as_secs_f64()));
        Ok(())
    }
}

fn load(name: &str) -> Option<&'static str> {
    LOADS.into_iter().find(|load| *load == name)
}

const LOADS: [&str; 4] = ["blk.randread", "blk.randwrite", "net.tcp.out", "net.tcp.in"];
/// Without a line: a guest that is up prints one each second.
const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_console_becomes_figures_by_the_moments_of_its_lines() {
        let started = Instant::now();
        let mut reader = Reader { started, begun: None, seen: Vec::new() };
        let lines = [
            (1500, "GUEST-READY boot_id=x uptime=1.0", Next::On),
            (2000, "BENCH-IDLE", Next::Measure),
            (5000, "BENCH-BEGIN blk.randread", Next::On),
            (5500, "ALIVE boot_id=x uptime=2", Next::On),
            (7000, "BENCH-END blk.randread count=3000", Next::On),
            (7000, "BENCH-BEGIN net.tcp.in", Next::On),
            (8000, "BENCH-END net.tcp.in count=5000000", Next::On),
            (9000, "BENCH-DONE", Next::Done),
        ];
        for (at, line, next) in lines {
            assert_eq!(reader.take(started + Duration::from_millis(at), line).unwrap(), next);
        }
        // 3000 in 2 s; 5 MB in 1 s.
        assert_eq!(reader.seen, [("boot.init", 1500.0), ("blk.randread", 1500.0), ("net.tcp.in", 5.0)]);
    }

    #[test]
    fn what_a_guest_could_not_do_is_no_figure() {
        let now = Instant::now();
        for bad in ["BENCH-FAILED disk", "Kernel panic - not syncing", "BENCH-END blk.randread count=1"] {
            let mut reader = Reader { started: now, begun: None, seen: Vec::new() };
            reader.take(now, bad).unwrap_err();
        }
    }
}
