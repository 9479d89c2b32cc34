//! `cargo xtask quickstart` and `cargo xtask chaos`: the tutorial program, undisturbed and disturbed.
//!
//! The program is started as `quickstart --kernel PATH --initrd PATH --state DIR …`; `IAAS_RUNTIME_DIR` in its environment says
//! where its sockets belong and `IAAS_XTASK` how to start the judge. Whatever it prints about itself, the judge looks at the
//! machine before and after and has the last word, unless `--keep` asks for machines that live on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::Cmd;
use crate::crash::executable;
use crate::failure::{Context, Failure, Result};
use crate::random::Random;
use crate::report::{line, step, step_aside};
use crate::scan::{Process, Snapshot, Watch, print_things, processes};
use crate::setup::{self, Guest};
use crate::workspace::{cargo, root};

/// What the command line asks for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// The set-up's own.
    pub(crate) setup: setup::Options,
    /// Where the cloud is kept; the default is below `target/`.
    pub(crate) state: Option<PathBuf>,
    /// Passed on as they stand.
    pub(crate) rest: Vec<String>,
}

/// How to disturb it.
#[derive(Debug)]
pub(crate) struct Chaos {
    /// The same seed chooses the same moments and, among the same processes, the same victims.
    pub(crate) seed: u64,
    /// How often to kill.
    pub(crate) kills: usize,
}

impl Default for Chaos {
    fn default() -> Self {
        Self { seed: 1, kills: 10 }
    }
}

/// Sets up, builds and runs the program, and judges what it left.
pub(crate) fn run(options: &Options) -> Result<()> {
    let keep = options.rest.iter().any(|a| a == "--keep");
    if options.rest.iter().any(|a| a == "--json") {
        step_aside();
    }
    let subject = Subject::prepare(options)?;
    let before = subject.watch().take_snapshot()?;
    let program = subject.command(&options.rest)?;
    program.limit(RUN_LIMIT).run_and_leave()?;
    if keep {
        line("quickstart: the machines live on; `cargo xtask quickstart` adopts them");
        return Ok(());
    }
    subject.judge(&before)
}

/// Runs the program again and again while its processes are killed, then lets it finish.
pub(crate) fn chaos(options: &Options, chaos: &Chaos) -> Result<()> {
    let subject = Subject::prepare(options)?;
    let before = subject.watch().take_snapshot()?;
    let mut random = Random::new(chaos.seed);
    let log = subject.state.with_extension("chaos.log");
    let _ = fs::remove_file(&log);
    let mut control = subject.start(&options.rest, &log)?;
    for number in 1..=chaos.kills {
        std::thread::sleep(Duration::from_millis(random.between(SHORTEST_MS, LONGEST_MS)));
        if control.try_wait().context("quickstart")?.is_some() {
            control = subject.start(&options.rest, &log)?;
            continue;
        }
        let victims = subject.processes();
        let Some(victim) = random.choose(&victims) else { continue };
        let _ = kill(Pid::from_raw(victim.pid), Signal::SIGKILL);
        line(&format!(
            "CHAOS seed={} kill={number}/{} {} pid={}",
            chaos.seed,
            chaos.kills,
            role(victim),
            victim.pid
        ));
        if victim.pid == i32::try_from(control.id()).unwrap_or_default() {
            control.wait().context("quickstart")?;
            control = subject.start(&options.rest, &log)?;
        }
    }
    let end = Instant::now() + RUN_LIMIT;
    let status = loop {
        match control.try_wait().context("quickstart")? {
            Some(status) => break status,
            None if Instant::now() > end => {
                control.kill().context("quickstart")?;
                break control.wait().context("quickstart")?;
            }
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let printed = fs::read_to_string(&log).at(&log)?;
    if !status.success() || printed.lines().next_back() != Some("OK") {
        return Err(Failure::new(format!("after the kills the program ended with {status} and without OK"))
            .remedy(format!("read {}", log.display())));
    }
    subject.judge(&before)?;
    line(&format!("CHAOS seed={} kills={} OK", chaos.seed, chaos.kills));
    Ok(())
}

/// The built program and where it works.
struct Subject {
    program: PathBuf,
    guest: Guest,
    state: PathBuf,
    runtime: PathBuf,
}

impl Subject {
    fn prepare(options: &Options) -> Result<Self> {
        let guest = setup::all(&options.setup)?;
        let build = Cmd::new(cargo())
            .args([
                "build",
                "--package",
                "iaas-examples",
                "--bin",
                PROGRAM,
                "--message-format",
                "json-render-diagnostics",
            ])
            .dir(&root())
            .limit(BUILD_LIMIT);
        let messages = step("build quickstart", || build.output())?;
        let program =
            executable(&messages, PROGRAM).ok_or_else(|| Failure::new("cargo built no quickstart"))?;
        let state = options.state.clone().unwrap_or_else(|| root().join("target/quickstart"));
        fs::create_dir_all(state.parent().unwrap_or(Path::new("/"))).at(&state)?;
        // A socket's path has at most 107 bytes, so this is not below the workspace.
        let runtime = std::env::temp_dir().join(format!("iaas-quickstart-{}", nix::unistd::Uid::effective()));
        Ok(Self { program: program.into(), guest, state, runtime })
    }

    fn command(&self, rest: &[String]) -> Result<Cmd> {
        let judge = std::env::current_exe().context("own path")?;
        Ok(Cmd::new(&self.program)
            .arg("--kernel")
            .arg(&self.guest.kernel)
            .arg("--initrd")
            .arg(&self.guest.initrd)
            .arg("--state")
            .arg(&self.state)
            .args(rest)
            .env("IAAS_RUNTIME_DIR", &self.runtime)
            .env("IAAS_XTASK", judge))
    }

    fn start(&self, rest: &[String], log: &Path) -> Result<std::process::Child> {
        let file = File::options().create(true).append(true).open(log).at(log)?;
        self.command(rest)?.arg("--chaos").start_into(file)
    }

    fn watch(&self) -> Watch {
        Watch {
            roots: vec![self.state.clone(), self.runtime.clone()],
            programs: vec![self.program.clone()],
            only: Vec::new(),
        }
    }

    /// The program's own processes: control, switch and runners, but no emulator.
    fn processes(&self) -> Vec<Process> {
        processes(&self.watch()).into_iter().filter(|p| p.exe == self.program).collect()
    }

    /// Fails when something outside the state folder is there that was not there before.
    fn judge(&self, before: &Snapshot) -> Result<()> {
        let end = Instant::now() + GRACE;
        let left = loop {
            let mut left = self.watch().take_snapshot()?.since(before);
            left.retain(|(section, id, _)| match section.as_str() {
                // The store and the logs stay; other programs come and go with cgroups of their own.
                "tree" => !id.contains(&*self.state.to_string_lossy()),
                "cgroups" => id.contains("iaas"),
                _ => true,
            });
            if left.is_empty() || Instant::now() > end {
                break left;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        print_things("left", &left);
        line(&format!("SCAN left={}", left.len()));
        match left.len() {
            0 => Ok(()),
            count => Err(Failure::new(format!("{count} things are left over; they are listed above"))),
        }
    }
}

/// What a process of the program is: roles carry their name after a marker, control has none.
fn role(process: &Process) -> &str {
    let marker = process.args.iter().position(|a| a == "--iaas-role");
    marker.and_then(|at| process.args.get(at + 1)).map_or("control", String::as_str)
}

const PROGRAM: &str = "quickstart";
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
const RUN_LIMIT: Duration = Duration::from_secs(10 * 60);
const GRACE: Duration = Duration::from_secs(5);
const SHORTEST_MS: u64 = 500;
const LONGEST_MS: u64 = 6000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_known_by_its_marker_and_control_by_having_none() {
        let process =
            |args: &[&str]| Process::sample(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        assert_eq!(role(&process(&["iaas-switch", "--iaas-role", "switch", "id", "1"])), "switch");
        assert_eq!(role(&process(&["quickstart", "--keep"])), "control");
    }
}
