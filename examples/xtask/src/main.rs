//! The commands of this workspace, reached as `cargo xtask VERB`.
//!
//! This package depends on no crate of the project: what it measures and judges is measured and judged from outside.

mod command;
mod failure;
mod report;
mod setup;
mod workspace;

use std::process::ExitCode;

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
";
