//! `cargo xtask quickstart` and `cargo xtask chaos`: the tutorial program, undisturbed and disturbed.
//!
//! The program is started as `quickstart --kernel PATH --initrd PATH --state DIR …`; `IAAS_RUNTIME_DIR` in its environment says
//! where its sockets belong and `IAAS_XTASK` how to start the judge. Whatever it prints about itself, the judge looks at the
//! machine before and after and has the last word, unless `--keep` asks for machines that live on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
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
    /// A program to run in place of the tutorial.
    pub(crate) program: Option<PathBuf>,
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
    /// The longest pause between two kills, in milliseconds.
    pub(crate) pace: u64,
}

impl Default for Chaos {
    fn default() -> Self {
        Self { seed: 1, kills: 10, pace: 6000 }
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
        line("quickstart: the machines live on; the next `cargo xtask quickstart` adopts them");
    } else {
        subject.judge(&before)?;
    }
    line("OK");
    Ok(())
}

/// Kills the program's processes at random moments, starting it again each time it ends, then lets it finish.
pub(crate) fn chaos(options: &Options, chaos: &Chaos) -> Result<()> {
    let subject = Subject::prepare(options)?;
    let before = subject.watch().take_snapshot()?;
    let mut random = Random::new(chaos.seed);
    let mut control = subject.start(&options.rest)?;
    let mut kills = 0;
    while kills < chaos.kills {
        std::thread::sleep(Duration::from_millis(random.between(chaos.pace / 10, chaos.pace)));
        if let Some(status) = control.try_wait().context(PROGRAM)? {
            // It came to its end between two kills: that end must be a good one.
            subject.check_end(status)?;
            control = subject.start(&options.rest)?;
            continue;
        }
        let victims = subject.processes();
        let Some(victim) = random.choose(&victims) else { continue };
        let _ = kill(Pid::from_raw(victim.pid), Signal::SIGKILL);
        kills += 1;
        line(&format!(
            "CHAOS seed={} kill={kills}/{} {} pid={}",
            chaos.seed,
            chaos.kills,
            role(victim),
            victim.pid
        ));
        if u32::try_from(victim.pid) == Ok(control.id()) {
            control.wait().context(PROGRAM)?;
            control = subject.start(&options.rest)?;
        }
    }
    subject.check_end(wait(&mut control)?)?;
    subject.judge(&before)?;
    line(&format!("CHAOS seed={} kills={kills} OK", chaos.seed));
    Ok(())
}

/// Waits for the program within its limit.
fn wait(control: &mut Child) -> Result<ExitStatus> {
    let end = Instant::now() + RUN_LIMIT;
    loop {
        match control.try_wait().context(PROGRAM)? {
            Some(status) => return Ok(status),
            None if Instant::now() > end => {
                control.kill().context(PROGRAM)?;
                return control.wait().context(PROGRAM);
            }
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    }
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
        let guest = match &options.program {
            Some(_) => setup::guest(&options.setup)?,
            None => setup::all(&options.setup)?,
        };
        let program = options.program.clone().map_or_else(build, Ok)?;
        // As `/proc` shows it.
        let program = fs::canonicalize(&program).at(&program)?;
        let state = options.state.clone().unwrap_or_else(|| root().join("target/quickstart"));
        fs::create_dir_all(state.parent().unwrap_or(Path::new("/"))).at(&state)?;
        // A socket's path has at most 107 bytes, so this is not below the workspace.
        let runtime = std::env::temp_dir().join(format!("iaas-{:08x}", digest(&state)));
        Ok(Self { program, guest, state, runtime })
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

    fn start(&self, rest: &[String]) -> Result<Child> {
        let log = self.log();
        let file = File::create(&log).at(&log)?;
        self.command(rest)?.arg("--chaos").start_into(file)
    }

    /// What the program printed in its last run.
    fn log(&self) -> PathBuf {
        self.state.with_extension("log")
    }

    /// Fails unless the program ended by itself and well.
    fn check_end(&self, status: ExitStatus) -> Result<()> {
        let printed = fs::read_to_string(self.log()).at(&self.log())?;
        if status.success() && printed.lines().next_back() == Some("OK") {
            return Ok(());
        }
        let tail: Vec<&str> = printed.lines().rev().take(10).collect();
        let tail: String = tail.iter().rev().map(|l| format!("\n    {l}")).collect();
        Err(Failure::new(format!("the program ended with {status} and without OK{tail}"))
            .remedy(format!("read {}", self.log().display())))
    }

    fn watch(&self) -> Watch {
        Watch {
            roots: vec![self.state.clone(), self.runtime.clone()],
            programs: vec![self.program.clone()],
            only: Vec::new(),
        }
    }

    /// The program's own processes: control, switch and runners, but no emulator, and none of another run of the program.
    fn processes(&self) -> Vec<Process> {
        let ours = |p: &Process| p.exe == self.program && p.works_in(&self.state);
        processes(&self.watch()).into_iter().filter(ours).collect()
    }

    /// Fails when something is there that was not there before, but for what a cloud without tenants has.
    fn judge(&self, before: &Snapshot) -> Result<()> {
        let end = Instant::now() + GRACE;
        let left = loop {
            let mut left = self.watch().take_snapshot()?.since(before);
            left.retain(|(section, id, _)| match section.as_str() {
                "tree" => !stays(id, &self.state),
                // Other programs come and go with cgroups of their own.
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

/// Whether a thing of the tree (`file PATH`) is one that a cloud without tenants has.
fn stays(thing: &str, state: &Path) -> bool {
    let Some((kind, path)) = thing.split_once(' ') else { return false };
    let Ok(inside) = Path::new(path).strip_prefix(state) else { return false };
    STAYS.contains(&format!("{kind} {}", without_ids(&inside.to_string_lossy())).trim_end())
}

/// `path` with `#` in the place of each id or number, also of one behind a word and a dash.
fn without_ids(path: &str) -> String {
    let is_id = |text: &str| text.len() >= 8 && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    let shown = path.split_inclusive(['/', '.']).map(|part| {
        let word = part.trim_end_matches(['/', '.']);
        let end = &part[word.len()..];
        match word.split_once('-') {
            _ if is_id(word) => format!("#{end}"),
            Some((name, id)) if is_id(id) => format!("{name}-#{end}"),
            _ => part.to_owned(),
        }
    });
    shown.collect()
}

/// A short name for a state folder: two clouds on one machine keep their sockets apart.
fn digest(state: &Path) -> u32 {
    // FNV-1a, 32 bits.
    state
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Builds the tutorial program and returns its path.
fn build() -> Result<PathBuf> {
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
    executable(&messages, PROGRAM).map(PathBuf::from).ok_or_else(|| Failure::new("cargo built no quickstart"))
}

/// What a process of the program is: roles carry their name after a marker, control has none.
fn role(process: &Process) -> &str {
    let marker = process.args.iter().position(|a| a == "--iaas-role");
    marker.and_then(|at| process.args.get(at + 1)).map_or("control", String::as_str)
}

/// The state folder of a cloud without tenants: its store, its usage log, what fences its sites, and blobs, which are forgotten
/// an hour after the last image that named them.
const STAYS: [&str; 36] = [
    "dir",
    "dir blobs",
    "file blobs/#",
    "dir host",
    "dir host/access",
    "dir host/access/#",
    "file host/access/#/install",
    "dir host/artifacts",
    "dir host/fence",
    "file host/fence/#.fabric-#.lock",
    "file host/fence/#.fabric-#.record",
    "file host/fence/#.host-#.lock",
    "file host/fence/#.host-#.record",
    "file host/fence/#.pool-#.lock",
    "file host/fence/#.pool-#.record",
    "file host/install.cbor",
    "dir host/net",
    "file host/net/claimed",
    "dir host/net/counters",
    "file host/net/install",
    "file host/net/lock",
    "dir host/net/plugs",
    "file host/net/program",
    "dir host/roles",
    "file host/roles/guard",
    "dir host/roles/runner",
    "dir host/roles/switch",
    "dir host/vms",
    "file ids.json",
    "dir store",
    "file store/cloud.redb",
    "dir usage",
    "file usage/usage-#.log",
    "file usage/usage.lock",
    "dir volumes",
    "file volumes/pool.meta",
];
const PROGRAM: &str = "quickstart";
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
const RUN_LIMIT: Duration = Duration::from_secs(10 * 60);
const GRACE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_state_folders_have_two_short_names() {
        // The published FNV-1a value of "a".
        assert_eq!(digest(Path::new("a")), 0xe40c_292c);
        assert_ne!(digest(Path::new("/a/b")), digest(Path::new("/b/a")));
    }

    #[test]
    fn a_cloud_without_tenants_keeps_its_books_and_nothing_of_a_tenant() {
        let (state, id) = (Path::new("/s/quick-bead"), "01a20e43-3ace-72c1-89ac-48f4e7323ed3");
        let short = id.replace('-', "");
        let stay = |thing: String| stays(&thing, state);
        assert!(stay("dir /s/quick-bead".to_owned()));
        assert!(stay("file /s/quick-bead/store/cloud.redb".to_owned()));
        assert!(stay(format!("file /s/quick-bead/host/fence/{short}.pool-{id}.record")));
        assert!(stay("file /s/quick-bead/usage/usage-0000000012.log".to_owned()));
        for left in [
            format!("file /s/quick-bead/volumes/{id}.raw"),
            format!("file /s/quick-bead/volumes/{id}.meta"),
            format!("dir /s/quick-bead/host/vms/{id}"),
            format!("dir /s/quick-bead/host/roles/runner/{id}"),
            format!("file /s/quick-bead/host/net/plugs/{id}"),
            format!("dir /s/quick-bead/host/artifacts/{id}"),
            format!("file /s/quick-bead/blobs/.{id}"),
            "socket /s/quick-bead/ids.json".to_owned(),
            "file /elsewhere".to_owned(),
        ] {
            assert!(!stay(left.clone()), "{left}");
        }
    }

    #[test]
    fn a_role_is_known_by_its_marker_and_control_by_having_none() {
        let process =
            |args: &[&str]| Process::sample(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        assert_eq!(role(&process(&["iaas-switch", "--iaas-role", "switch", "id", "1"])), "switch");
        assert_eq!(role(&process(&["quickstart", "--keep"])), "control");
    }
}
