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
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

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
    let lab = Lab { dir: &dir, qemu: &qemu, kernel: &guest.kernel, initrd: &initrd };
    let parts = (0..PARTS).map(|part| {
        lab.part(part, Console::of(programs.iter().map(|(run, _)| *run).filter(|run| run.part == part)))
    });
    let machines = parts.collect::<Result<Vec<_>>>()?;
    let outcome = watch(machines, LIMIT);
    let kept = options.keep_console.clone().unwrap_or_else(|| dir.join("console.log"));
    lab.keep(PARTS, &kept)?;
    outcome?.judge(&nonce, options.filter.is_none())
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
    let lab = Lab { dir: &dir, qemu: &qemu, kernel: &guest.kernel, initrd: &initrd };
    let outcome = watch(vec![lab.part(0, Console::default())?], BENCH_LIMIT);
    lab.keep(1, &dir.join("bench.log"))?;
    outcome?.figures()
}

fn folder() -> Result<PathBuf> {
    let dir = root().join("target/lab");
    fs::create_dir_all(&dir).at(&dir)?;
    Ok(dir)
}

/// What all machines of a lab have in common.
struct Lab<'a> {
    dir: &'a Path,
    qemu: &'a Path,
    kernel: &'a Path,
    initrd: &'a Path,
}

/// A machine that runs one part of the lab, with a disk and a console of its own.
struct Machine {
    child: Child,
    ended: Option<ExitStatus>,
    log: PathBuf,
    disk: PathBuf,
    console: Console,
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_file(&self.disk);
    }
}

impl Lab<'_> {
    fn log(&self, part: usize) -> PathBuf {
        self.dir.join(format!("console-{part}.log"))
    }

    /// Starts the machine of a part.
    fn part(&self, part: usize, console: Console) -> Result<Machine> {
        let (disk, log) = (self.dir.join(format!("disk-{part}.img")), self.log(part));
        step("lab: make a disk", || make_disk(&disk))?;
        let file = File::create(&log).at(&log)?;
        let child = self.machine(part, &disk)?.start_into(file)?;
        Ok(Machine { child, ended: None, log, disk, console })
    }

    /// Keeps what the consoles of all parts said in one file.
    fn keep(&self, parts: usize, path: &Path) -> Result<()> {
        let mut all = Vec::new();
        for log in (0..parts).map(|part| self.log(part)) {
            all.extend(fs::read(&log).at(&log)?);
            fs::remove_file(&log).at(&log)?;
        }
        fs::write(path, all).at(path)?;
        line(&format!("lab: the console is in {}", path.display()));
        Ok(())
    }

    fn machine(&self, part: usize, disk: &Path) -> Result<Cmd> {
        // It ends with us, however we end. On one processor of this machine: see `PARTS`.
        let machine = Cmd::new("setpriv")
            .args(["--pdeathsig", "KILL", "taskset", "--cpu-list", &processor(part)?])
            .arg(self.qemu)
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-smp", "2", "-m", MEMORY])
            .args(["-nographic", "-no-reboot", "-nic", "none"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", &format!("console=ttyS0 panic=-1 quiet lab.part={part}")])
            .arg("-drive")
            .arg(format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()));
        Ok(machine)
    }
}

/// One of the processors that this process may use.
fn processor(number: usize) -> Result<String> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("the processors of this process")?;
    let all: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    let cpu = all.iter().cycle().nth(number);
    cpu.map(usize::to_string).ok_or_else(|| Failure::new("this process may use no processor"))
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

/// Waits for the machines to end, and tells what their tests say as they say it.
fn watch(mut machines: Vec<Machine>, limit: Duration) -> Result<Console> {
    let started = Instant::now();
    let bar = spinner("lab");
    while started.elapsed() < limit && machines.iter().any(|machine| machine.ended.is_none()) {
        for machine in &mut machines {
            machine.ended = machine.child.try_wait().context("QEMU")?;
            let text = fs::read(&machine.log).at(&machine.log)?;
            for told in machine.console.feed(&String::from_utf8_lossy(&text)) {
                bar.suspend(|| line(&format!("lab: {told} [{}]", seconds(started.elapsed()))));
            }
        }
        std::thread::sleep(POLL);
    }
    bar.finish_and_clear();
    for machine in &machines {
        match machine.ended {
            Some(status) if status.success() => {}
            Some(status) => return Err(Failure::new(format!("the lab's machine ended with {status}"))),
            None => {
                return Err(Failure::new(format!("the lab was not done after {} s", limit.as_secs()))
                    .remedy("look at the end of its console"));
            }
        }
    }
    Ok(Console::all(machines.iter_mut().map(|machine| std::mem::take(&mut machine.console)).collect()))
}

/// The test that must fail without KVM.
const CONTROL: &str = "boot::kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours";
/// Machines that share the work. Each keeps to one processor of this machine: QEMU's emulation changes the pending interrupts
/// of a processor that enters or leaves a nested guest without a lock, and beside its other threads it loses one now and then.
/// The interrupt stays pending in the local APIC (IRR) while the processor sleeps, with which the whole machine stands.
const PARTS: usize = 2;
/// Of the outer machine. A guest of more than 3 GiB fits because it touches little of it.
const MEMORY: &str = "6G";
const DISK: u64 = 8 << 30;
const POLL: Duration = Duration::from_millis(200);
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Every contender several times.
const BENCH_LIMIT: Duration = Duration::from_secs(40 * 60);
