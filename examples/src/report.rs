//! What a person sees: a line per step with its evidence, and a bar while something takes time.

use std::time::Duration;
use std::time::Instant;

use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use serde_json::Value;
use serde_json::json;

/// Prints steps as they are proved.
#[derive(Debug)]
pub struct Report {
    json: bool,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Report {
    /// A report for people, or one JSON object per line.
    pub fn new(json: bool) -> Self {
        Self { json, began: Instant::now(), bar: None }
    }

    /// Shows what is waited for.
    pub fn waiting(&mut self, what: &str) {
        if self.json {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        bar.set_message(what.to_owned());
    }

    /// A step is done; `evidence` says how we know.
    pub fn step(&mut self, name: &str, evidence: impl AsRef<str>) {
        let (at, evidence) = (self.began.elapsed().as_secs_f64(), evidence.as_ref());
        self.clear();
        if self.json {
            println!("{}", json!({ "step": name, "evidence": evidence, "at_s": at }));
        } else {
            println!("{at:7.1} s  {name:<12} {evidence}");
        }
    }

    /// A figure for programs that read the report.
    pub fn figure(&mut self, name: &str, value: Value) {
        if self.json {
            println!("{}", json!({ "figure": name, "value": value }));
        }
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
