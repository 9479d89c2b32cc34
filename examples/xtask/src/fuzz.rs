//! `cargo xtask fuzz`: hostile guests and images, thought up by a fuzzer, for a while. The programs are the package
//! `iaas-vmm/fuzz`; they need the nightly toolchain, and nothing else in the workspace does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::report::{line, step};
use crate::skips;
use crate::workspace::{root, skips_dir, which};

/// What to fuzz, and for how long.
#[derive(Debug)]
pub(crate) struct Options {
    /// One target; else each in turn.
    pub(crate) target: Option<String>,
    /// For each target.
    pub(crate) seconds: u64,
    /// Whether the time is added to the table of hours.
    pub(crate) record: bool,
    /// Whether new inputs are kept in the corpus, which is then made as small as it can be.
    pub(crate) keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { target: None, seconds: 10, record: false, keep: false }
    }
}

/// Runs the targets one after the other. All run, so that one run tells everything.
///
/// # Errors
/// An input broke something: its path, and how to replay it. There is no nightly toolchain, or no such target.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !has_nightly() {
        return Err(Failure::new("fuzzing needs a nightly toolchain").remedy(NIGHTLY));
    }
    if which("cargo-fuzz").is_none() {
        step("install cargo-fuzz", install)?;
    }
    let targets = chosen(options.target.as_deref())?;
    build()?;
    let mut broken = Vec::new();
    for target in &targets {
        match fuzz(target, options) {
            Ok(ran) if options.record => record(target, &ran)?,
            Ok(_) => {}
            Err(failure) => {
                line(&failure.to_string());
                broken.push(target.as_str());
            }
        }
    }
    match broken.as_slice() {
        [] => Ok(()),
        _ => Err(Failure::new(format!(
            "{} of {} targets failed: {}",
            broken.len(),
            targets.len(),
            broken.join(", ")
        ))
        .remedy("replay the input that is named above; mended, it belongs into the target's corpus")),
    }
}

/// A short run of every target, where there is a toolchain for it.
pub(crate) fn in_ci() -> Result<()> {
    if !has_nightly() {
        return skips::leave(&skips_dir(), "fuzz", &format!("no nightly toolchain; {NIGHTLY}"));
    }
    run(&Options { seconds: 5, ..Options::default() })
}

/// What one run of a target did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ran {
    execs: u64,
    new: u64,
    seconds: u64,
}

fn fuzz(target: &str, options: &Options) -> Result<Ran> {
    let (committed, found) = (corpus().join(target), found(target));
    fs::create_dir_all(&found).at(&found)?;
    let artifacts = folder().join("artifacts").join(target);
    fs::create_dir_all(&artifacts).at(&artifacts)?;
    // The first folder is the one that is written to.
    let (first, second) = if options.keep { (&committed, &found) } else { (&found, &committed) };
    let started = Instant::now();
    let done = Cmd::new(program(target))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={}", options.seconds))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1"])
        .args([first, second])
        .dir(&folder())
        .limit(Duration::from_secs(options.seconds * 2) + MINUTES_5)
        .finish()?;
    let ran = Ran { seconds: started.elapsed().as_secs(), ..numbers(&done.stderr) };
    let verdict = if done.status.success() { "ok" } else { "FAILED" };
    line(&format!("FUZZ {target} execs={} new={} seconds={} {verdict}", ran.execs, ran.new, ran.seconds));
    if !done.status.success() {
        return Err(broken(target, &done.stderr));
    }
    if options.keep {
        minimize(target)?;
    }
    Ok(ran)
}

/// What the fuzzer counted, from its own final words.
fn numbers(text: &str) -> Ran {
    let number = |name: &str| {
        let found = text.lines().rev().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        found.and_then(|rest| rest.trim_start_matches(':').trim().parse().ok()).unwrap_or(0)
    };
    Ran { execs: number("number_of_executed_units"), new: number("new_units_added"), seconds: 0 }
}

fn broken(target: &str, text: &str) -> Failure {
    let why =
        text.lines().skip_while(|line| !line.contains("panicked at")).take(2).collect::<Vec<_>>().join(" ");
    let why = if why.is_empty() {
        text.lines().rev().find(|line| line.starts_with("SUMMARY")).unwrap_or_default()
    } else {
        &why
    };
    let input =
        text.lines().find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path.trim()));
    match input {
        Some(input) => Failure::new(format!("{target}: {why}\n  the input: {input}"))
            .remedy(format!("{} {input}", program(target).display())),
        None => Failure::new(format!(
            "{target}: the fuzzer did not run: {}",
            text.lines().last().unwrap_or_default()
        )),
    }
}

/// Keeps of the corpus a few inputs that reach together nearly what all of them reach.
fn minimize(target: &str) -> Result<()> {
    let (committed, small) = (corpus().join(target), found(target).with_extension("small"));
    let _ = fs::remove_dir_all(&small);
    fs::create_dir_all(&small).at(&small)?;
    // A place that was reached counts, not how often it was.
    let cover = ["-set_cover_merge=1", "-use_counters=0", "-max_len=4096"];
    Cmd::new(program(target)).args(cover).args([&small, &committed]).limit(MINUTES_5).output()?;
    // An input with a name of its own once broke something, or says where the corpus came from.
    for entry in fs::read_dir(&committed).at(&committed)?.flatten() {
        if is_digest(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path()).at(&entry.path())?;
        }
    }
    let mut inputs = Vec::new();
    for entry in fs::read_dir(&small).at(&small)?.flatten() {
        inputs.push((fs::read(entry.path()).at(&entry.path())?, entry.file_name()));
    }
    // The longest do the most.
    inputs.sort_by_key(|(bytes, _)| std::cmp::Reverse(bytes.len()));
    for (bytes, name) in inputs.into_iter().take(INPUTS_MAX) {
        if !is_there(&committed, &bytes)? {
            fs::write(committed.join(&name), bytes).at(&committed)?;
        }
    }
    fs::remove_dir_all(&small).at(&small)
}

fn is_there(folder: &Path, bytes: &[u8]) -> Result<bool> {
    let kept = fs::read_dir(folder).at(folder)?.flatten();
    Ok(kept.map(|entry| fs::read(entry.path())).any(|kept| kept.is_ok_and(|kept| kept == bytes)))
}

/// Names that the fuzzer gives: the input's SHA-1.
fn is_digest(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Adds a run to the table of hours.
fn record(target: &str, ran: &Ran) -> Result<()> {
    let file = folder().join("HOURS.md");
    let mut rows = rows(&fs::read_to_string(&file).unwrap_or_default());
    let row = rows.entry(target.to_owned()).or_default();
    (row.seconds, row.execs, row.last) = (row.seconds + ran.seconds, row.execs + ran.execs, today());
    let line = |(name, Row { seconds, execs, last }): (&String, &Row)| {
        format!("| {name} | {seconds} | {execs} | {last} |\n")
    };
    let table: String = rows.iter().map(line).collect();
    fs::write(&file, format!("{HEAD}{table}")).at(&file)
}

/// A line of the table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Row {
    seconds: u64,
    execs: u64,
    last: String,
}

fn rows(text: &str) -> BTreeMap<String, Row> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, name, seconds, execs, last, _] = cells.as_slice() else { return None };
        let (seconds, execs) = (seconds.parse().ok()?, execs.parse().ok()?);
        Some(((*name).to_owned(), Row { seconds, execs, last: (*last).to_owned() }))
    };
    text.lines().filter_map(row).collect()
}

/// The date in UTC.
fn today() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
    date(days)
}

/// The date so many days after 1970-01-01, in the proleptic Gregorian calendar.
fn date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for len in months {
        if days < len {
            break;
        }
        (days, month) = (days - len, month + 1);
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}

/// The targets are the folders of the corpus; the crate's tests hold that each has a function.
fn chosen(target: Option<&str>) -> Result<Vec<String>> {
    let entries = fs::read_dir(corpus()).at(&corpus())?.flatten();
    let mut all: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    match target {
        None => Ok(all),
        Some(target) if all.iter().any(|known| known == target) => Ok(vec![target.to_owned()]),
        Some(target) => Err(Failure::new(format!("there is no fuzz target `{target}`"))
            .remedy(format!("take one of {}", all.join(", ")))),
    }
}

fn build() -> Result<()> {
    // `cargo run` names the toolchain that we were started by.
    let command = Cmd::new("cargo").args(["+nightly", "fuzz", "build", "--fuzz-dir", "fuzz", "--target-dir"]);
    let command =
        command.arg(target_dir()).dir(&crate_dir()).env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    command.limit(MINUTES_20).run()
}

fn install() -> Result<()> {
    let command = Cmd::new("cargo").args(["install", "--quiet", "--locked", "cargo-fuzz"]);
    command.dir(&root()).env_remove("CARGO_TARGET_DIR").limit(MINUTES_20).run()
}

fn has_nightly() -> bool {
    let asked = Cmd::new("cargo").args(["+nightly", "--version"]).env_remove("RUSTUP_TOOLCHAIN").finish();
    asked.is_ok_and(|asked| asked.status.success())
}

fn crate_dir() -> PathBuf {
    root().join("iaas-vmm")
}

fn folder() -> PathBuf {
    crate_dir().join("fuzz")
}

fn corpus() -> PathBuf {
    folder().join("corpus")
}

/// Where new inputs go that are not kept with the sources.
fn found(target: &str) -> PathBuf {
    target_dir().join("found").join(target)
}

/// Beside the skips, in cargo's target folder.
fn target_dir() -> PathBuf {
    skips_dir().with_file_name("fuzz")
}

fn program(target: &str) -> PathBuf {
    target_dir().join(TRIPLE).join("release").join(target)
}

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const NIGHTLY: &str = "run `rustup toolchain install nightly --profile minimal`";
/// Inputs without a name that a target's corpus may have: it is read by people's tools, and replayed by each test run.
const INPUTS_MAX: usize = 45;
const MINUTES_5: Duration = Duration::from_secs(5 * 60);
const MINUTES_20: Duration = Duration::from_secs(20 * 60);
const HEAD: &str = "# How long each target has run

Written by `cargo xtask fuzz --record`: seconds and inputs in all, and the day of the last run.

| target | seconds | inputs | last run |
|---|---|---|---|
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuzzer_is_understood() {
        let text = "#9 DONE\nstat::number_of_executed_units: 1234\nstat::new_units_added:          5\n";
        assert_eq!(numbers(text), Ran { execs: 1234, new: 5, seconds: 0 });
        let text = "thread panicked at x.rs:1:\nbad thing\nTest unit written to /a/crash-1\n";
        let failure = broken("block", text);
        assert!(failure.what().contains("bad thing") && failure.what().contains("/a/crash-1"), "{failure}");
        assert!(broken("block", "no such file").what().contains("did not run"));
    }

    #[test]
    fn the_table_is_read_as_it_is_written() {
        let text = format!("{HEAD}| net | 12 | 3400 | 2026-01-02 |\n");
        let row = Row { seconds: 12, execs: 3400, last: "2026-01-02".to_owned() };
        assert_eq!(rows(&text), BTreeMap::from([("net".to_owned(), row)]));
    }

    #[test]
    fn days_have_dates() {
        let known = [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_454, "2026-01-01")];
        known.iter().for_each(|(days, text)| assert_eq!(date(*days), *text));
    }
}
