//! `cargo xtask crash`: the control process is killed at the k-th mutating call, started again, and nothing may be left.
//!
//! The subject is a program that is started as `PROGRAM --state DIR`, does its whole story (create, use, delete), prints
//! `SETTLED` and exits with 0. Killed anywhere in it and started again as `PROGRAM --state DIR --settle`, it must finish the same
//! story and end the same way. Its environment says where its sockets belong (`IAAS_RUNTIME_DIR`) and where a guest to boot is
//! (`IAAS_GUEST_DIR`). What is left is judged by [`scan`](mod@crate::scan), not by the subject: nothing outside the state
//! folder, and no file in it that an undisturbed run does not leave too.

mod calls;
mod tracer;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::report::{bar, line, step};
use crate::scan::{Process, Snapshot, Things, Watch, print_things, processes};
use crate::setup;
use crate::workspace::{cargo, guest_dir, root};

pub(crate) use tracer::{At, TRACED, exec_traced};
use tracer::{End, Plan, Trace};

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Options {
    /// `host`, `fake`, or both when `None`.
    pub(crate) place: Option<String>,
    /// How many kills to spread over the sequence.
    pub(crate) points: usize,
    /// Kill at this call only, to look into one leak.
    pub(crate) at: Option<At>,
    /// How long one run of the subject may take.
    pub(crate) limit: Duration,
    /// How long what is ending may take to be gone.
    pub(crate) grace: Duration,
    /// Folders beside the state folder that belong to the subject.
    pub(crate) roots: Vec<PathBuf>,
    /// The subject; empty for the project's own.
    pub(crate) command: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            place: None,
            points: 16,
            at: None,
            limit: Duration::from_secs(120),
            grace: Duration::from_secs(5),
            roots: Vec::new(),
            command: Vec::new(),
        }
    }
}

/// Runs the crash tests that the options name.
pub(crate) fn run(options: &Options) -> Result<()> {
    let place = options.place.as_deref();
    match place {
        None | Some("host" | "fake") => {}
        Some(other) => {
            return Err(Failure::new(format!("where={other}?")).remedy("use --where host or --where fake"));
        }
    }
    if place != Some("host") {
        fake()?;
    }
    if place != Some("fake") {
        host(options)?;
    }
    Ok(())
}

/// The matrix on fakes is a test of the core; it prints its own `where=fake points=… leaks=…`.
fn fake() -> Result<()> {
    let test = Cmd::new(cargo())
        .args([
            "test",
            "--quiet",
            "--package",
            "iaas-core",
            "--features",
            "conformance",
            "--test",
            "crash_matrix",
        ])
        .args(["--", "--nocapture"])
        .dir(&root())
        .limit(FAKE_LIMIT);
    let printed = step("crash matrix on fakes", || test.output())?;
    let verdicts = fake_verdicts(&printed);
    verdicts.iter().for_each(|verdict| line(verdict));
    match verdicts.iter().all(|v| v.contains("leaks=0")) && !verdicts.is_empty() {
        true => Ok(()),
        false => Err(Failure::new("the crash matrix on fakes printed no `where=fake points=… leaks=0`")),
    }
}

/// The matrix's lines. The harness may have put its dots in front of one.
fn fake_verdicts(printed: &str) -> Vec<&str> {
    printed.lines().filter_map(|l| Some(l[l.find("where=fake")?..].trim())).collect()
}

fn host(options: &Options) -> Result<()> {
    let command = match options.command.as_slice() {
        [] => own_subject()?,
        given => given.to_vec(),
    };
    let scratch = std::env::temp_dir().join(format!("iaas-crash-{}", std::process::id()));
    fs::create_dir_all(&scratch).at(&scratch)?;
    let scratch = fs::canonicalize(&scratch).at(&scratch)?;
    let mut campaign = Campaign::new(command, scratch.clone(), options)?;
    let outcome = campaign.run(options);
    end_all(&scratch);
    match &outcome {
        Ok(()) => fs::remove_dir_all(&scratch).at(&scratch)?,
        Err(_) => line(&format!("crash: logs and left-over files are in {}", scratch.display())),
    }
    outcome
}

/// Builds the project's subject and makes sure that it has a guest to boot.
fn own_subject() -> Result<Vec<String>> {
    let guest = setup::all(&setup::Options::default())?;
    let build = Cmd::new(cargo())
        .args(["build", "--package", "iaas-examples", "--bin", SUBJECT, "--message-format", "json"])
        .dir(&root())
        .limit(BUILD_LIMIT);
    let messages = step(&format!("build {SUBJECT}"), || build.output())?;
    let program =
        executable(&messages, SUBJECT).ok_or_else(|| Failure::new(format!("cargo built no {SUBJECT}")))?;
    // The smallest guest: each kill boots one or two.
    let initrd = guest.initrd.with_file_name("initrd-tiny.cpio.gz");
    let paths = ["--kernel".into(), guest.kernel, "--initrd".into(), initrd];
    Ok([program].into_iter().chain(paths.iter().map(|p| p.to_string_lossy().into_owned())).collect())
}

/// Whether this workspace has the project's subject.
pub(crate) fn has_subject() -> Result<bool> {
    let text =
        Cmd::new(cargo()).args(["metadata", "--format-version", "1", "--no-deps"]).dir(&root()).output()?;
    Ok(text.contains(&format!("\"name\":\"{SUBJECT}\"")))
}

/// The path that cargo's messages give for a built program.
pub(crate) fn executable(messages: &str, name: &str) -> Option<String> {
    messages
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .filter(|m| m["target"]["name"] == name)
        .find_map(|m| m["executable"].as_str().map(str::to_owned))
}

/// What the kills have come to.
#[derive(Debug, Default)]
struct Tally {
    kills: usize,
    leaks: usize,
    /// The kinds of calls at which a run was killed.
    met: BTreeSet<&'static str>,
}

/// One subject, killed again and again in the same folder.
struct Campaign {
    command: Vec<String>,
    scratch: PathBuf,
    limit: Duration,
    grace: Duration,
    roots: Vec<PathBuf>,
    /// What may stand after a run: what stood before the first one, and the files of an undisturbed run.
    allowed: Vec<Snapshot>,
}

impl Campaign {
    fn new(mut command: Vec<String>, scratch: PathBuf, options: &Options) -> Result<Self> {
        tracer::check_program(Path::new(&command[0]))?;
        // As `/proc` shows it.
        let program = fs::canonicalize(&command[0]).context(&command[0])?;
        command[0] = program.to_string_lossy().into_owned();
        Ok(Self {
            command,
            scratch,
            limit: options.limit,
            grace: options.grace,
            roots: options.roots.clone(),
            allowed: Vec::new(),
        })
    }

    fn run(&mut self, options: &Options) -> Result<()> {
        let calls = self.undisturbed()?;
        let total = calls.len();
        let chosen = match options.at {
            Some(at) => vec![at],
            None => spread(total, options.points).into_iter().map(At::Call).collect(),
        };
        line(&format!("where=host calls={total} points={}", chosen.len()));
        let progress = bar("crash", u64::try_from(chosen.len()).unwrap_or(u64::MAX));
        let mut tally = Tally::default();
        for &at in &chosen {
            match at {
                At::Call(k) => self.kill_or_earlier(k, total, options.at.is_some(), &mut tally)?,
                At::Kind(..) => drop(self.kill_at(at, total, &mut tally)?),
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        if tally.kills < chosen.len() && tally.leaks == 0 {
            return Err(Failure::new(format!(
                "only {} of {} kills happened: the sequence is shorter at each run",
                tally.kills,
                chosen.len()
            )));
        }
        if options.at.is_none() {
            self.kill_at_each_kind(&calls, &mut tally)?;
        }
        line(&format!("where=host points={} leaks={}", tally.kills, tally.leaks));
        match tally.leaks {
            0 => Ok(()),
            leaks => Err(Failure::new(format!(
                "{leaks} things are left over after a crash; they are listed above"
            ))),
        }
    }

    /// Polling makes no two runs equally long: one that was over before its call is cut short a little earlier.
    fn kill_or_earlier(&self, k: usize, total: usize, only: bool, tally: &mut Tally) -> Result<()> {
        let mut at = k;
        loop {
            let killed = self.kill_at(At::Call(at), total, tally)?;
            let earlier = at - at / 32;
            if killed || only || earlier == at || at <= total - total / 4 {
                return Ok(());
            }
            at = earlier;
        }
    }

    /// Kills in the middle of each kind of call that no kill has met yet.
    fn kill_at_each_kind(&self, calls: &[&'static str], tally: &mut Tally) -> Result<()> {
        let kinds: BTreeSet<&'static str> = calls.iter().copied().collect();
        for kind in &kinds {
            let mut number = calls.iter().filter(|call| *call == kind).count().div_ceil(2);
            // A run may make fewer calls of a kind than the first did.
            while number > 0 && !tally.met.contains(kind) {
                self.kill_at(At::Kind(kind, number), calls.len(), tally)?;
                number /= 2;
            }
        }
        let missed: Vec<&str> = kinds.difference(&tally.met).copied().collect();
        line(&format!("where=host kinds={}/{}", kinds.len() - missed.len(), kinds.len()));
        match missed.as_slice() {
            [] => Ok(()),
            missed => Err(Failure::new(format!("no run was killed at {}", missed.join(", ")))),
        }
    }

    /// Runs twice without a kill. The first run teaches which files stay; the second must add none.
    fn undisturbed(&mut self) -> Result<Vec<&'static str>> {
        self.clear()?;
        self.allowed = vec![self.watch().take_snapshot()?];
        let trace = self.traced(None)?;
        match trace.end {
            End::Exited(0) => self.check_settled(&self.log())?,
            end => return Err(self.failed(&format!("the undisturbed run ended with {end:?}"))),
        }
        let mut first = self.left()?;
        first.retain(|(section, ..)| section != "tree");
        self.allowed.push(self.watch().take_snapshot()?);
        self.settle(&[])?;
        first.extend(self.left()?);
        if !first.is_empty() {
            print_things("where=host undisturbed leak", &first);
            return Err(Failure::new(format!("{} things are left over without any crash", first.len())));
        }
        Ok(trace.calls)
    }

    /// One kill, one restart, one judgement: whether the call was reached.
    fn kill_at(&self, at: At, total: usize, tally: &mut Tally) -> Result<bool> {
        self.clear()?;
        let trace = self.traced(Some(at))?;
        let (killed, k) = (trace.end == End::Killed, trace.calls.len());
        let call = match (trace.end, trace.calls.last()) {
            (End::Killed, Some(call)) => call,
            (End::Exited(0), _) => "end",
            (end, _) => return Err(self.failed(&format!("k={k}: the run ended with {end:?}"))),
        };
        let settled = self.settle(&["--settle"]);
        let left = self.left()?;
        let count = left.len() + usize::from(settled.is_err());
        line(&format!("where=host k={k}/{total} {call} leaks={count}"));
        print_things(&format!("  k={k} leak"), &left);
        if let Err(failure) = settled {
            line(&format!("  k={k} did not settle: {}", failure.what()));
        }
        if count > 0 {
            end_all(&self.scratch);
            self.keep(k)?;
        }
        tally.kills += usize::from(killed);
        tally.leaks += count;
        tally.met.extend(trace.calls.last().filter(|_| killed));
        Ok(killed)
    }

    fn traced(&self, kill_at: Option<At>) -> Result<Trace> {
        let mut command = self.command.clone();
        command.extend(["--state".to_owned(), self.state().to_string_lossy().into_owned()]);
        let variables =
            vec![("IAAS_GUEST_DIR".to_owned(), guest_dir()), ("IAAS_RUNTIME_DIR".to_owned(), self.runtime())];
        tracer::run(Plan {
            command,
            variables,
            state: self.state(),
            log: self.log(),
            kill_at,
            limit: self.limit,
        })
    }

    /// Starts the subject without a tracer and waits for its `SETTLED`.
    fn settle(&self, extra: &[&str]) -> Result<()> {
        let log = self.scratch.join("settle.log");
        let file = fs::File::create(&log).at(&log)?;
        Cmd::new(&self.command[0])
            .args(&self.command[1..])
            .arg("--state")
            .arg(self.state())
            .args(extra)
            .env("IAAS_GUEST_DIR", guest_dir())
            .env("IAAS_RUNTIME_DIR", self.runtime())
            .limit(self.limit)
            .run_into(file)
            .map_err(|failure| Failure::new(format!("{}{}", failure.what(), tail(&log))))?;
        self.check_settled(&log)
    }

    fn check_settled(&self, log: &Path) -> Result<()> {
        match fs::read_to_string(log).at(log)?.lines().any(|l| l.trim() == "SETTLED") {
            true => Ok(()),
            false => Err(self.failed("the subject printed no SETTLED")),
        }
    }

    /// What stands now and is not allowed. Ending processes get a moment to be gone.
    fn left(&self) -> Result<Things> {
        let end = Instant::now() + self.grace;
        loop {
            let now = self.watch().take_snapshot()?;
            let mut left = self.allowed.iter().fold(None, |left: Option<Things>, allowed| {
                let new = now.since(allowed);
                Some(left.map_or(new.clone(), |left| {
                    left.into_iter().filter(|thing| new.contains(thing)).collect()
                }))
            });
            // Other programs come and go with cgroups of their own.
            left.iter_mut()
                .for_each(|left| left.retain(|(section, id, _)| section != "cgroups" || id.contains("iaas")));
            match left {
                Some(left) if !left.is_empty() && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(50))
                }
                left => return Ok(left.unwrap_or_default()),
            }
        }
    }

    fn watch(&self) -> Watch {
        let roots = self.roots.iter().cloned().chain([self.state(), self.runtime()]).collect();
        Watch { roots, programs: vec![PathBuf::from(&self.command[0])], only: Vec::new() }
    }

    fn state(&self) -> PathBuf {
        self.scratch.join("state")
    }

    fn runtime(&self) -> PathBuf {
        self.scratch.join("run")
    }

    fn log(&self) -> PathBuf {
        self.scratch.join("run.log")
    }

    /// A folder that does not exist yet, and empty logs.
    fn clear(&self) -> Result<()> {
        for path in [self.log(), self.scratch.join("settle.log")] {
            let _ = fs::remove_file(path);
        }
        for folder in [self.state(), self.runtime()] {
            if folder.exists() {
                fs::remove_dir_all(&folder).at(&folder)?;
            }
        }
        Ok(())
    }

    /// Keeps the folder and the logs of a run that left something.
    fn keep(&self, k: usize) -> Result<()> {
        let kept = self.scratch.join(format!("leak-{k}"));
        fs::create_dir_all(&kept).at(&kept)?;
        for name in ["state", "run", "run.log", "settle.log"] {
            let _ = fs::rename(self.scratch.join(name), kept.join(name));
        }
        Ok(())
    }

    fn failed(&self, what: &str) -> Failure {
        Failure::new(format!("{what}{}", tail(&self.log())))
    }
}

/// The last lines of a log, indented below what they explain.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(10).collect();
    lines.iter().rev().map(|l| format!("\n    {l}")).collect()
}

/// `points` numbers from 1 to `total`, both ends among them, as even as they come.
fn spread(total: usize, points: usize) -> Vec<usize> {
    let points = points.min(total);
    match points {
        0 => Vec::new(),
        1 => vec![1],
        _ => (0..points).map(|i| 1 + i * (total - 1) / (points - 1)).collect(),
    }
}

/// Ends what a subject of ours left running. Each is known by number and start time.
fn end_all(scratch: &Path) {
    let ours = Watch { roots: vec![scratch.to_path_buf()], ..Watch::default() };
    for process in processes(&ours).iter().filter(|p| Process::is_alive(p)) {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
}

const SUBJECT: &str = "iaas-crash-subject";
const FAKE_LIMIT: Duration = Duration::from_secs(20 * 60);
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_found_by_its_number_and_by_that_among_its_kind() {
        let calls = ["write", "kill", "write", "kill", "write"];
        let reached = |at: At| (1..=calls.len()).filter(|&n| at.is_reached(&calls[..n])).collect::<Vec<_>>();
        assert_eq!(reached(At::Call(3)), [3]);
        assert_eq!(reached(At::Kind("kill", 2)), [4]);
        assert!(reached(At::Kind("bind", 1)).is_empty());
    }

    #[test]
    fn the_kills_reach_both_ends_and_are_even() {
        assert_eq!(spread(117, 12), [1, 11, 22, 32, 43, 53, 64, 74, 85, 95, 106, 117]);
        assert_eq!(spread(3, 12), [1, 2, 3]);
        assert!(spread(0, 12).is_empty());
    }

    #[test]
    fn a_verdict_is_found_behind_the_harness_dots() {
        assert_eq!(
            fake_verdicts("running 3 tests\n..where=fake points=9 leaks=0\n.\n"),
            ["where=fake points=9 leaks=0"]
        );
    }

    #[test]
    fn the_built_program_is_found_in_cargos_messages() {
        let messages =
            "{\"reason\":\"x\"}\nnot json\n{\"target\":{\"name\":\"a\"},\"executable\":\"/t/a\"}\n";
        assert_eq!(executable(messages, "a").as_deref(), Some("/t/a"));
        assert_eq!(executable(messages, "b"), None);
    }
}
