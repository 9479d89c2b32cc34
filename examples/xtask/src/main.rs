//! The commands of this workspace, reached as `cargo xtask VERB`.
//!
//! This package depends on no crate of the project: what it measures and judges is measured and judged from outside.

mod bench;
mod ci;
mod command;
mod crash;
mod failure;
mod fresh;
mod fuzz;
mod lab;
mod licences;
mod quickstart;
mod random;
mod report;
mod scan;
mod setup;
mod skips;
mod stage;
mod surface;
mod workspace;

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use lexopt::{Arg, Parser};

use crate::failure::{Context, Failure, Result};

fn main() -> ExitCode {
    match command::kill_groups_on_interrupt().and_then(|()| run(Parser::from_env())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut parser: Parser) -> Result<()> {
    let verb = match parser.next().context("arguments")? {
        Some(Arg::Value(verb)) => verb.to_string_lossy().into_owned(),
        None | Some(Arg::Short('h') | Arg::Long("help")) => return help(),
        Some(other) => return Err(unexpected(&other)),
    };
    match verb.as_str() {
        "setup" => setup::all(&setup_options(&mut parser)?).map(drop),
        "quickstart" => quickstart_options(&mut parser).and_then(|(options, _)| quickstart::run(&options)),
        "chaos" => {
            quickstart_options(&mut parser).and_then(|(options, chaos)| quickstart::chaos(&options, &chaos))
        }
        "fresh-check" => rest(&mut parser).and_then(|commands| fresh::run(&commands)),
        "lab" => lab::run(&lab_options(&mut parser)?),
        "bench" => bench::run(&bench_options(&mut parser)?),
        "fuzz" => fuzz::run(&fuzz_options(&mut parser)?),
        "test" => nothing_more(&mut parser).and_then(|()| ci::test()),
        "ci" => nothing_more(&mut parser).and_then(|()| ci::ci()),
        "surface" => nothing_more(&mut parser).and_then(|()| surface::run()),
        "scan" => scan(&mut parser),
        "crash" => crash::run(&crash_options(&mut parser)?),
        crash::TRACED => crash::exec_traced(&rest(&mut parser)?),
        "help" => help(),
        other => {
            Err(Failure::new(format!("there is no verb `{other}`"))
                .remedy("run `cargo xtask help` for the list"))
        }
    }
}

fn help() -> Result<()> {
    report::line(HELP.trim());
    Ok(())
}

/// Reads the set-up's flags and nothing else.
fn setup_options(parser: &mut Parser) -> Result<setup::Options> {
    let mut options = setup::Options::default();
    while let Some(arg) = parser.next().context("arguments")? {
        let Arg::Long(flag) = &arg else { return Err(unexpected(&arg)) };
        let flag = (*flag).to_owned();
        if !options.take(&flag, || parser.value().context(format!("--{flag}")))? {
            return Err(unexpected(&Arg::Long(&flag)));
        }
    }
    Ok(options)
}

fn scan(parser: &mut Parser) -> Result<()> {
    let (mut watch, mut json, mut words) = (scan::Watch::default(), false, Vec::new());
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Value(word) => words.push(word),
            Arg::Long("json") => json = true,
            Arg::Long(flag) => {
                let flag = flag.to_owned();
                if !watch.take(&flag, || parser.value().context(format!("--{flag}")))? {
                    return Err(unexpected(&Arg::Long(&flag)));
                }
            }
            other @ Arg::Short(_) => return Err(unexpected(&other)),
        }
    }
    let verb = match words.iter().map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().as_slice() {
        [] => scan::Verb::Print,
        [save, file] if save == "save" => scan::Verb::Save(file.into()),
        [diff, file] if diff == "diff" => scan::Verb::Diff(file.into()),
        _ => return Err(Failure::new("scan takes nothing, `save FILE` or `diff FILE`")),
    };
    scan::run(&verb, &watch, json)
}

/// The set-up's flags and chaos's are read; every other argument is the program's.
fn quickstart_options(parser: &mut Parser) -> Result<(quickstart::Options, quickstart::Chaos)> {
    let (mut options, mut chaos) = (quickstart::Options::default(), quickstart::Chaos::default());
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Long("state") => {
                options.state = Some(command::absolute(&parser.value().context("--state")?)?)
            }
            Arg::Long("program") => {
                options.program = Some(command::absolute(&parser.value().context("--program")?)?);
            }
            Arg::Long("seed") => chaos.seed = number(parser, "--seed")?,
            Arg::Long("pace") => chaos.pace = number(parser, "--pace")?,
            Arg::Long("kills") => chaos.kills = number(parser, "--kills")?,
            Arg::Long(flag) => {
                let flag = flag.to_owned();
                if !options.setup.take(&flag, || parser.value().context(format!("--{flag}")))? {
                    options.rest.push(format!("--{flag}"));
                }
            }
            Arg::Value(word) => options.rest.push(word.to_string_lossy().into_owned()),
            Arg::Short(short) => options.rest.push(format!("-{short}")),
        }
    }
    Ok((options, chaos))
}

fn lab_options(parser: &mut Parser) -> Result<lab::Options> {
    let mut options = lab::Options::default();
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Long("keep-console") => {
                let path = parser.value().context("--keep-console")?;
                options.keep_console = Some(command::absolute(&path)?);
            }
            Arg::Long(flag) => {
                let flag = flag.to_owned();
                if !options.setup.take(&flag, || parser.value().context(format!("--{flag}")))? {
                    return Err(unexpected(&Arg::Long(&flag)));
                }
            }
            Arg::Value(word) if options.filter.is_none() => {
                options.filter = Some(word.to_string_lossy().into_owned());
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(options)
}

fn bench_options(parser: &mut Parser) -> Result<bench::Options> {
    let mut options = bench::Options::default();
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Long("peer") => options.peers.push(lab::Peer::parse(&text(parser, "--peer")?)?),
            Arg::Long(flag) => {
                let flag = flag.to_owned();
                if !options.setup.take(&flag, || parser.value().context(format!("--{flag}")))? {
                    return Err(unexpected(&Arg::Long(&flag)));
                }
            }
            Arg::Value(word) if options.area.is_none() => {
                options.area = Some(word.to_string_lossy().into_owned());
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(options)
}

fn crash_options(parser: &mut Parser) -> Result<crash::Options> {
    let mut options = crash::Options::default();
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Long("where") => options.place = Some(text(parser, "--where")?),
            Arg::Long("points") => options.points = number(parser, "--points")?,
            Arg::Long("at") => options.at = Some(crash::At::parse(&text(parser, "--at")?)?),
            Arg::Long("limit") => options.limit = Duration::from_secs(number(parser, "--limit")?),
            Arg::Long("grace") => options.grace = Duration::from_secs(number(parser, "--grace")?),
            Arg::Long("root") => options.roots.push(command::absolute(&parser.value().context("--root")?)?),
            Arg::Value(program) => {
                options.command = vec![program.to_string_lossy().into_owned()];
                options.command.extend(rest(parser)?);
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(options)
}

fn fuzz_options(parser: &mut Parser) -> Result<fuzz::Options> {
    let mut options = fuzz::Options::default();
    while let Some(arg) = parser.next().context("arguments")? {
        match arg {
            Arg::Long("seconds") => options.seconds = number(parser, "--seconds")?,
            Arg::Long("record") => options.record = true,
            Arg::Long("keep") => options.keep = true,
            Arg::Value(word) if options.target.is_none() => {
                options.target = Some(word.to_string_lossy().into_owned());
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(options)
}

fn nothing_more(parser: &mut Parser) -> Result<()> {
    match parser.next().context("arguments")? {
        None => Ok(()),
        Some(other) => Err(unexpected(&other)),
    }
}

fn text(parser: &mut Parser, flag: &str) -> Result<String> {
    Ok(parser.value().context(flag)?.to_string_lossy().into_owned())
}

fn number<T: FromStr>(parser: &mut Parser, flag: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text(parser, flag)?.parse().context(flag)
}

/// Everything that is left, as it stands.
fn rest(parser: &mut Parser) -> Result<Vec<String>> {
    Ok(parser.raw_args().context("arguments")?.map(|a| a.to_string_lossy().into_owned()).collect())
}

fn unexpected(arg: &Arg<'_>) -> Failure {
    let shown = match arg {
        Arg::Short(c) => format!("-{c}"),
        Arg::Long(name) => format!("--{name}"),
        Arg::Value(value) => value.to_string_lossy().into_owned(),
    };
    Failure::new(format!("unexpected argument `{shown}`"))
        .remedy("run `cargo xtask help` for the flags of each verb")
}

const HELP: &str = "
cargo xtask VERB

  setup        install what is missing on this machine, make the test guest under target/guest/
                 --offline           use only what is already here
                 --refresh           fetch the newest kernel and busybox again
                 --kernel PATH       boot this kernel in place of Debian's
                 --initrd PATH       boot this initramfs in place of ours
  quickstart   the tutorial program: a cloud with two guests, and the proof that nothing is left of it
                 --state DIR         where the cloud is kept (target/quickstart)
                 --program PATH      another program with the same flags and manners
                 setup's flags; all others are the program's: --json, --keep
  chaos        the same program while its processes are killed
                 --seed S --kills N  which moments and victims (1), how many (10)
                 --pace MS           the longest pause between two kills (6000)
  test         every test, and the skips counted
  ci           format, lints, documents, licences, then every test; what .ci/run calls
  surface      each method of the provider traits with the test that calls it on a reference
  bench [AREA] run the benches and print one line per figure
  bench vmm    our own VMM beside QEMU's q35 and microvm, all in one run of the lab
                 --peer NAME=COMMAND one more VMM: its program on this machine, and arguments (split at blanks) with
                                     {kernel} {initrd} {cmdline} {mem} (MiB) {disk} (raw) {tap}; the guest's serial
                                     console must be its standard output (may repeat)
                 setup's flags
  lab [FILTER] run the tests that need a hardware-grade KVM, in a machine that emulates one
                 --keep-console FILE where its console is kept (target/lab/console.log)
                 setup's flags
                 LAB_NONCE in the environment is put on an inner kernel's command line and must come back
  fuzz [TARGET]
               hostile guests and images against the devices and loaders; needs a nightly toolchain
                 --seconds N         for each target (10)
                 --record            add the time to iaas-vmm/fuzz/HOURS.md
                 --keep              keep what is new in iaas-vmm/fuzz/corpus/, and make that small
  fresh-check [COMMAND ...]
               clone HEAD into a fresh Debian 12 and run the README's commands there; needs root
  scan         print what stands on this machine; an independent judge of leaks
  scan save FILE, scan diff FILE
               keep it in a file; compare with it and fail when something is new
                 --root DIR          watch this folder, its sockets and the processes that use it (may repeat)
                 --program PATH      watch every process that runs this program (may repeat)
                 --only A,B          of processes memfds sockets links nft cgroups mounts tree
                 --json              for machines
  crash [-- PROGRAM ARGS]
               kill a control process at the k-th mutating call, start it again, and judge what is left
                 --where host|fake   only one of the two places
                 --points N          kills to spread over the sequence (16)
                 --at K | KIND:K     kill at this call only, or at the K-th of this kind, as in `connect:2`
                 --limit SECONDS     for one run of the program (120)
                 --grace SECONDS     for what is ending to be gone (5)
                 --root DIR          belongs to the program beside its state folder (may repeat)
";
