//! What people see: one line per step, a bar where it is long.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Result;

/// Does `work` under a spinner that names it, then prints one line with the time it took.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = spinner(name);
    let outcome = work();
    bar.finish_and_clear();
    let mark = if outcome.is_ok() { "ok" } else { "FAILED" };
    line(&format!("{name}: {mark} ({})", seconds(started.elapsed())));
    outcome
}

/// A spinner with the time that has passed; invisible when standard error is no terminal.
pub(crate) fn spinner(name: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_message(name.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
}

/// A bar of `length` steps; invisible when standard error is no terminal.
pub(crate) fn bar(name: &str, length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length).with_message(name.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
}

/// Prints one line on standard output. A closed pipe ends the program quietly, as it does for other commands.
pub(crate) fn line(text: &str) {
    if ASIDE.load(Ordering::Relaxed) {
        return eprintln!("{text}");
    }
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(141);
    }
}

/// Sends all further lines to standard error: standard output belongs to a program's JSON.
pub(crate) fn step_aside() {
    ASIDE.store(true, Ordering::Relaxed);
}

/// Seconds with one decimal.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

static ASIDE: AtomicBool = AtomicBool::new(false);
const TICK: Duration = Duration::from_millis(120);
