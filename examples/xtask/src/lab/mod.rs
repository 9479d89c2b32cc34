//! `cargo xtask lab`: the tests that need a hardware-grade KVM, on any machine.
//!
//! QEMU's TCG emulates an AMD processor with nested paging in pure software; a Debian kernel in it loads `kvm_amd` and has a real
//! KVM. Test programs and examples are built here, packed into an initramfs with the libraries that they need, and run in there. What they
//! print is read from the serial console. Silence is a failure, and so is a run in which nothing failed without KVM: at its end
//! the module is taken away and one of the tests must fail and name what is missing.

mod bench;
mod console;
mod image;
mod runs;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::command::Cmd;
use crate::crash::executable;
use crate::failure::{Context, Failure, Result};
use crate::random::Random;
use crate::report::{line, seconds, spinner, step};
use crate::setup;
use crate::workspace::{cargo, root, which};

pub(crate) use bench::Peer;
use console::Console;
use runs::Run;

/// What the command line asks for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Only tests whose names contain this.
    pub(crate) filter: Option<String>,
    /// Where the console goes; beside the image without it.
    pub(crate) keep_console: Option<PathBuf>,
    /// The set-up's.
    pub(crate) setup: setup::Options,
}

/// Builds the lab and runs the tests in it.
pub(crate) fn run(options: &Options) -> Result<()> {
    let guest = setup::all(&options.setup)?;
    let qemu = which("qemu-system-x86_64")
        .ok_or_else(|| Failure::new("the lab needs QEMU").remedy("run `cargo xtask setup` as root"))?;
    let filter = options.filter.as_deref().unwrap_or("");
    let runs = runs::chosen(filter);
    let programs = runs.into_iter().map(|run| Ok((run, build(&run)?))).collect::<Result<Vec<_>>>()?;
    let dir = folder()?;
    let nonce = std::env::var("LAB_NONCE").unwrap_or_else(|_| Random::new(std::process::id().into()).word());
    let words = image::Words { nonce: &nonce, filter, control: CONTROL };
    let initrd = dir.join("lab.cpio.gz");
    step("lab: pack the image", || {
        image::pack(&initrd, &options.setup, &guest, &programs, &words, &image::Extra::default())
    })?;
    let path = options.keep_console.clone().unwrap_or_else(|| dir.join("console.log"));
    let console = Console::of(programs.iter().map(|(run, _)| *run));
    let machine = |disk: &Path| machine(&qemu, &guest.kernel, &initrd, disk);
    enter(&dir, machine, &path, console, LIMIT)?.judge(&nonce, options.filter.is_none())
}

/// Measures our VMM beside QEMU's machines and `peers` in the lab; gives the lines of figures.
pub(crate) fn bench(setup: &setup::Options, peers: &[Peer]) -> Result<String> {
    let guest = setup::all(setup)?;
    let qemu = which("qemu-system-x86_64")
        .ok_or_else(|| Failure::new("the lab needs QEMU").remedy("run `cargo xtask setup` as root"))?;
    let dir = folder()?;
    let extra = bench::extra(qemu.clone(), peers)?;
    let words = image::Words { nonce: "", filter: "", control: "" };
    let initrd = dir.join("bench.cpio.gz");
    step("lab: pack the image", || image::pack(&initrd, setup, &guest, &[], &words, &extra))?;
    let machine = |disk: &Path| machine(&qemu, &guest.kernel, &initrd, disk);
    enter(&dir, machine, &dir.join("bench.log"), Console::default(), BENCH_LIMIT)?.figures()
}

fn folder() -> Result<PathBuf> {
    let dir = root().join("target/lab");
    fs::create_dir_all(&dir).at(&dir)?;
    Ok(dir)
}

/// Runs a machine with a disk of its own. What its console says is kept in `path`.
fn enter(
    dir: &Path,
    machine: impl FnOnce(&Path) -> Cmd,
    path: &Path,
    console: Console,
    limit: Duration,
) -> Result<Console> {
    let disk = dir.join("disk.img");
    step("lab: make a disk", || make_disk(&disk))?;
    let outcome = watch(machine(&disk), path, console, limit);
    fs::remove_file(&disk).at(&disk)?;
    line(&format!("lab: the console is in {}", path.display()));
    outcome
}

/// Builds the programs of a run: the one that runs, and what it starts.
fn build(run: &Run) -> Result<Vec<(&'static str, PathBuf)>> {
    let own = (run.package, run.kind, run.name);
    let all = [own].into_iter().chain(run.beside.map(|(package, name)| (package, "--bin", name)));
    all.map(|(package, kind, name)| Ok((name, build_one(package, kind, name)?))).collect()
}

fn build_one(package: &str, kind: &str, name: &str) -> Result<PathBuf> {
    let verb: &[&str] = if kind == "--test" { &["test", "--no-run"] } else { &["build"] };
    let build = Cmd::new(cargo())
        .args(verb)
        .args(["--package", package, kind, name, "--all-features"])
        .args(["--profile", "lab", "--message-format", "json"])
        .dir(&root())
        .limit(BUILD_LIMIT);
    let messages = step(&format!("lab: build {name}"), || build.output())?;
    executable(&messages, name)
        .map(PathBuf::from)
        .ok_or_else(|| Failure::new(format!("cargo built no {name}")))
}

/// An empty ext4 in a sparse file.
fn make_disk(disk: &Path) -> Result<()> {
    let _ = fs::remove_file(disk);
    File::create(disk).and_then(|file| file.set_len(DISK)).at(disk)?;
    let mke2fs = which("mke2fs")
        .ok_or_else(|| Failure::new("mke2fs is missing").remedy("run `cargo xtask setup` as root"))?;
    Cmd::new(mke2fs).args(["-q", "-F", "-t", "ext4"]).arg(disk).output().map(drop)
}

fn machine(qemu: &Path, kernel: &Path, initrd: &Path, disk: &Path) -> Cmd {
    // It ends with us, however we end.
    Cmd::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .arg(qemu)
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", "2", "-m", MEMORY])
        .args(["-nographic", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .arg("-drive")
        .arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()))
}

/// Runs the machine and tells what its tests say as they say it.
fn watch(machine: Cmd, path: &Path, mut console: Console, limit: Duration) -> Result<Console> {
    let started = Instant::now();
    let file = File::create(path).at(path)?;
    let mut child = machine.start_into(file)?;
    let bar = spinner("lab");
    let ended = loop {
        let ended = child.try_wait().context("QEMU")?;
        let text = fs::read(path).at(path)?;
        for told in console.feed(&String::from_utf8_lossy(&text)) {
            bar.suspend(|| line(&format!("lab: {told} [{}]", seconds(started.elapsed()))));
        }
        if ended.is_some() {
            break ended;
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(POLL);
    };
    bar.finish_and_clear();
    match ended {
        Some(status) if status.success() => Ok(console),
        Some(status) => Err(Failure::new(format!("the lab's machine ended with {status}"))),
        None => Err(Failure::new(format!("the lab was not done after {} s", limit.as_secs()))
            .remedy("look at the end of its console")),
    }
}

/// The test that must fail without KVM.
const CONTROL: &str = "boot::kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours";
/// Of the outer machine. A guest of more than 3 GiB fits because it touches little of it.
const MEMORY: &str = "6G";
const DISK: u64 = 8 << 30;
const POLL: Duration = Duration::from_millis(200);
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Every contender several times.
const BENCH_LIMIT: Duration = Duration::from_secs(40 * 60);
