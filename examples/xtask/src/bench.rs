//! `cargo xtask bench AREA`: one line per figure, `BENCH <name> ours=<x> peer=<y|-> ratio=<r|-> goal=<g|-> PASS|FAIL|INFO`.
//!
//! Two sources. Criterion: a group is a figure, its functions `ours` and `peer` are the two sides; with a throughput the figure
//! is a rate, else nanoseconds; medians. Harnesses: a line `HARNESS <name> ours=<x> peer=<y|->` on their output, and
//! `NOTE <text>` for what a reader should know, such as how to get a missing peer. A figure with a goal passes when ours is
//! at least that many times the peer's rate (or, for times, takes at most the peer's time over the goal).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::lab;
use crate::report::line;
use crate::setup;
use crate::workspace::{cargo, root};

/// What the command line asks for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// The only area to run.
    pub(crate) area: Option<String>,
    /// VMMs beside those that `vmm` has anyway.
    pub(crate) peers: Vec<lab::Peer>,
    /// The set-up's.
    pub(crate) setup: setup::Options,
}

/// Runs the benches of one area, or of all that need no lab, and prints their lines. A missed goal, or no figure where one
/// must be, is a failure.
pub(crate) fn run(options: &Options) -> Result<()> {
    let area = options.area.as_deref();
    if area == Some(VMM) {
        let printed = lab::bench(&options.setup, &options.peers)?;
        let mut figures: Vec<Figure> = printed.lines().filter_map(harness).collect();
        figures.sort_by(|a, b| a.name.cmp(&b.name));
        return tell(&figures, &printed, &[(VMM, &VMM_FIGURES)]);
    }
    if !options.peers.is_empty() {
        return Err(Failure::new("only `bench vmm` takes --peer"));
    }
    let areas = areas(area)?;
    let results = results_dir();
    // Figures of an earlier run are not of this one.
    let _ = fs::remove_dir_all(&results);
    let bench = Cmd::new(cargo()).args(["bench", "--package", "iaas-benches"]).dir(&root()).limit(LIMIT);
    let bench = areas.iter().fold(bench, |bench, (area, _)| bench.args(["--bench", area]));
    let printed = bench.env("IAAS_GUEST_DIR", crate::workspace::guest_dir()).output()?;
    tell(&figures(&results, &printed)?, &printed, &areas)
}

fn tell(figures: &[Figure], printed: &str, areas: &[(&str, &[&str])]) -> Result<()> {
    figures.iter().for_each(|figure| line(&figure.to_string()));
    printed.lines().filter(|text| text.starts_with("NOTE ")).for_each(line);
    judge(figures, areas)
}

/// The areas to run, each with the figures that it must leave.
fn areas(wanted: Option<&str>) -> Result<Vec<(&'static str, &'static [&'static str])>> {
    let chosen: Vec<_> = AREAS.into_iter().filter(|(area, _)| wanted.is_none_or(|w| w == *area)).collect();
    match (chosen.is_empty(), wanted) {
        (true, Some(wanted)) => Err(Failure::new(format!("there is no area `{wanted}`"))
            .remedy(format!("choose one of {}, {VMM}", AREAS.map(|(area, _)| area).join(", ")))),
        _ => Ok(chosen),
    }
}

/// All figures of a run, by name.
fn figures(results: &Path, printed: &str) -> Result<Vec<Figure>> {
    let mut figures = criterion(results)?;
    figures.extend(printed.lines().filter_map(harness));
    figures.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(figures)
}

fn judge(figures: &[Figure], areas: &[(&str, &[&str])]) -> Result<()> {
    let must = areas.iter().flat_map(|(_, must)| *must);
    let gone: Vec<&str> = must.filter(|name| figures.iter().all(|f| f.name != **name)).copied().collect();
    if !gone.is_empty() {
        return Err(Failure::new(format!("the benches left no figure {}", gone.join(", ")))
            .remedy("look for its criterion group or its HARNESS line"));
    }
    // A peer that did not boot measures nothing.
    let alone: Vec<&str> = figures
        .iter()
        .filter(|f| f.peer.is_none() && VMM_FIGURES.contains(&f.name.as_str()))
        .map(|f| f.name.as_str())
        .collect();
    if !alone.is_empty() {
        return Err(Failure::new(format!("the lab measured no peer for {}", alone.join(", ")))
            .remedy("look at its console for why the peer's machine did not come up"));
    }
    match figures.iter().filter(|f| f.verdict() == "FAIL").count() {
        0 => Ok(()),
        missed => Err(Failure::new(format!("{missed} figures miss their goals"))),
    }
}

/// One figure. More is better when it is a rate, less when it is a time.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    name: String,
    ours: f64,
    peer: Option<f64>,
    goal: Option<f64>,
    is_rate: bool,
}

impl Figure {
    /// How many times better than the peer.
    fn ratio(&self) -> Option<f64> {
        self.peer.map(|peer| if self.is_rate { self.ours / peer } else { peer / self.ours })
    }

    fn verdict(&self) -> &'static str {
        match (self.goal, self.ratio()) {
            (None, _) => "INFO",
            (Some(goal), Some(ratio)) if ratio >= goal => "PASS",
            _ => "FAIL",
        }
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
        let (peer, ratio, goal) = (or_dash(self.peer), or_dash(self.ratio()), or_dash(self.goal));
        write!(
            f,
            "BENCH {} ours={:.2} peer={peer} ratio={ratio} goal={goal} {}",
            self.name,
            self.ours,
            self.verdict()
        )
    }
}

/// Reads every group that criterion has left.
fn criterion(results: &Path) -> Result<Vec<Figure>> {
    let mut groups: BTreeMap<String, BTreeMap<String, (f64, bool)>> = BTreeMap::new();
    for dir in folders(results) {
        for function in folders(&dir) {
            let new = function.join("new");
            if let (Some(about), Some(estimates)) =
                (json(&new.join("benchmark.json"))?, json(&new.join("estimates.json"))?)
            {
                let (group, side, value) = read_criterion(&about, &estimates).context(new.display())?;
                groups.entry(group).or_default().insert(side, value);
            }
        }
    }
    Ok(groups.into_iter().filter_map(|(name, sides)| figure(name, &sides)).collect())
}

/// (group, function, (value, is a rate)).
fn read_criterion(
    about: &Value,
    estimates: &Value,
) -> std::result::Result<(String, String, (f64, bool)), String> {
    let group = about["group_id"].as_str().ok_or("no group_id")?;
    let side = about["function_id"].as_str().unwrap_or("ours");
    let nanoseconds = estimates["median"]["point_estimate"].as_f64().ok_or("no median")?;
    let amount = about["throughput"].as_object().and_then(|t| t.values().next()?.as_f64());
    let value = amount.map_or((nanoseconds, false), |amount| (amount * 1e9 / nanoseconds, true));
    Ok((group.to_owned(), side.to_owned(), value))
}

/// A group without `ours` is no figure.
fn figure(name: String, sides: &BTreeMap<String, (f64, bool)>) -> Option<Figure> {
    let (ours, is_rate) = *sides.get("ours")?;
    let goal = GOALS.iter().find(|(figure, _)| *figure == name).map(|(_, goal)| *goal);
    Some(Figure { name, ours, peer: sides.get("peer").map(|p| p.0), goal, is_rate })
}

/// A harness's line. Its figures are rates but for those whose unit says that less is better.
fn harness(line: &str) -> Option<Figure> {
    let mut words = line.strip_prefix("HARNESS ")?.split_whitespace();
    let name = words.next()?.to_owned();
    let values: BTreeMap<&str, &str> = words.filter_map(|w| w.split_once('=')).collect();
    let number = |key: &str| values.get(key).and_then(|v| v.parse().ok());
    let goal =
        GOALS.iter().find(|(figure, _)| *figure == name).map(|(_, goal)| *goal).or_else(|| number("goal"));
    Some(Figure {
        name,
        ours: number("ours")?,
        peer: number("peer"),
        goal,
        is_rate: !matches!(values.get("unit"), Some(&("ns" | "ms" | "MiB"))),
    })
}

fn json(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).at(path).map(Some),
        Err(_) => Ok(None),
    }
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

fn results_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), PathBuf::from)
        .join("criterion")
}

/// Name of a figure, and how many times better than its peer it must be. A figure that is not here is told, not judged.
const GOALS: [(&str, f64); 0] = [];
/// The benches' programs, and the figures without which a run of one is broken.
const AREAS: [(&str, &[&str]); 5] = [
    ("block", &["block.randread.qd32", "block.randwrite.qd32"]),
    ("control", &["control.ready", "control.ready.commits", "control.ready.synced_bytes"]),
    ("meter", &["meter.ingest.durable"]),
    ("network", &["net.mem.64b"]),
    ("state", &["state.commit.one", "state.commit.64", "state.scan.1000"]),
];
/// The area that is measured in the lab.
const VMM: &str = "vmm";
const VMM_FIGURES: [&str; 12] = [
    "boot.init.q35",
    "boot.init.microvm",
    "mem.overhead.q35",
    "mem.overhead.microvm",
    "blk.randread.q35",
    "blk.randread.microvm",
    "blk.randwrite.q35",
    "blk.randwrite.microvm",
    "net.tcp.out.q35",
    "net.tcp.out.microvm",
    "net.tcp.in.q35",
    "net.tcp.in.microvm",
];
const LIMIT: Duration = Duration::from_secs(60 * 60);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_throughput_makes_a_rate_and_none_a_time() {
        let estimates = json!({"median": {"point_estimate": 2000.0}});
        let about = json!({"group_id": "net.mem.64b", "function_id": "ours", "throughput": {"Elements": 64}});
        // 64 in 2 µs are 32 million a second.
        assert_eq!(
            read_criterion(&about, &estimates).unwrap(),
            ("net.mem.64b".into(), "ours".into(), (32e6, true))
        );
        let about = json!({"group_id": "x", "function_id": null, "throughput": null});
        assert_eq!(read_criterion(&about, &estimates).unwrap().2, (2000.0, false));
    }

    #[test]
    fn a_line_tells_both_sides_and_judges_only_by_a_goal() {
        let rate = Figure { name: "b".into(), ours: 3.0, peer: Some(2.0), goal: None, is_rate: true };
        assert_eq!(rate.to_string(), "BENCH b ours=3.00 peer=2.00 ratio=1.50 goal=- INFO");
        assert_eq!(Figure { goal: Some(1.5), ..rate.clone() }.verdict(), "PASS");
        assert_eq!(Figure { goal: Some(1.6), ..rate.clone() }.verdict(), "FAIL");
        assert_eq!(
            Figure { goal: Some(1.0), peer: None, ..rate.clone() }.verdict(),
            "FAIL",
            "a goal without a peer"
        );
        assert_eq!(Figure { goal: Some(1.0), is_rate: false, ..rate }.verdict(), "FAIL", "a longer time");
    }

    #[test]
    fn a_harness_speaks_in_lines_of_its_own() {
        let figure = harness("HARNESS control.ready ours=120 peer=-").unwrap();
        assert_eq!(figure.to_string(), "BENCH control.ready ours=120.00 peer=- ratio=- goal=- INFO");
        let figure = harness("HARNESS boot.init.q35 unit=ms ours=100 peer=250").unwrap();
        assert_eq!(figure.to_string(), "BENCH boot.init.q35 ours=100.00 peer=250.00 ratio=2.50 goal=- INFO");
        assert_eq!(harness("control.ready ours=1"), None);
        assert_eq!(harness("HARNESS broken ours=x"), None);
    }

    /// Criterion's files for one function: the folders' names are cut and changed, the names inside are whole.
    fn leave(results: &Path, group: &str, side: &str, amount: Option<u64>, nanoseconds: f64) {
        let new = results.join(group.replace('/', "_")).join(side).join("new");
        fs::create_dir_all(&new).unwrap();
        let throughput = amount.map(|n| json!({"Elements": n}));
        let about = json!({"group_id": group, "function_id": side, "throughput": throughput});
        fs::write(new.join("benchmark.json"), about.to_string()).unwrap();
        let estimates = json!({"mean": {"point_estimate": 1.0}, "median": {"point_estimate": nanoseconds}});
        fs::write(new.join("estimates.json"), estimates.to_string()).unwrap();
    }

    #[test]
    fn both_sides_of_a_group_are_one_figure_whatever_its_name() {
        let dir = std::env::temp_dir().join(format!("xtask-bench-sides-{}", std::process::id()));
        for name in ["g", "a.b.c", "a/b.c"] {
            leave(&dir, name, "ours", Some(1), 10.0);
            leave(&dir, name, "peer", Some(1), 40.0);
        }
        let figures = criterion(&dir).unwrap();
        let names: Vec<_> = figures.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a.b.c", "a/b.c", "g"]);
        assert!(figures.iter().all(|f| f.ratio() == Some(4.0)));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn every_figure_is_told_under_its_exact_name() {
        let dir = std::env::temp_dir().join(format!("xtask-bench-names-{}", std::process::id()));
        leave(&dir, "net.mem.64b", "ours", Some(64), 3200.0);
        leave(&dir, "meter.ingest.durable", "ours", Some(1), 1e6);
        leave(&dir, "control.ready", "ours", None, 5e6);
        let printed = "
            noise
            HARNESS block.randread.qd32 ours=50000 peer=40000
            HARNESS block.randwrite.qd32 ours=30000 peer=-
            HARNESS control.ready.commits ours=6.00 peer=-
            HARNESS control.ready.synced_bytes ours=200000.00 peer=-";
        let printed: String = printed.lines().map(|text| format!("{}\n", text.trim_start())).collect();
        let figures = figures(&dir, &printed).unwrap();
        let told: Vec<_> = figures.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "BENCH block.randread.qd32 ours=50000.00 peer=40000.00 ratio=1.25 goal=- INFO",
                "BENCH block.randwrite.qd32 ours=30000.00 peer=- ratio=- goal=- INFO",
                "BENCH control.ready ours=5000000.00 peer=- ratio=- goal=- INFO",
                "BENCH control.ready.commits ours=6.00 peer=- ratio=- goal=- INFO",
                "BENCH control.ready.synced_bytes ours=200000.00 peer=- ratio=- goal=- INFO",
                "BENCH meter.ingest.durable ours=1000.00 peer=- ratio=- goal=- INFO",
                // 64 in 3.2 µs.
                "BENCH net.mem.64b ours=20000000.00 peer=- ratio=- goal=- INFO",
            ]
        );
        let ran = areas(None).unwrap();
        let missing = judge(&figures, &ran).unwrap_err().to_string();
        assert!(missing.contains("state.commit.one"), "{missing}");
        let ran: Vec<_> = ran.into_iter().filter(|(area, _)| *area != "state").collect();
        judge(&figures, &ran).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_figure_of_the_lab_is_nothing_without_its_peer() {
        let of = |peer| {
            let figure = |name: &str| Figure {
                name: name.to_owned(),
                ours: 2.0,
                peer: Some(3.0),
                goal: None,
                is_rate: true,
            };
            let mut figures: Vec<_> = VMM_FIGURES.into_iter().map(figure).collect();
            figures[0].peer = peer;
            judge(&figures, &[(VMM, &VMM_FIGURES)])
        };
        of(Some(1.0)).unwrap();
        let error = of(None).unwrap_err().to_string();
        assert!(error.contains("boot.init.q35"), "{error}");
    }

    #[test]
    fn an_area_that_is_not_there_is_told_with_those_that_are() {
        let error = areas(Some("disk")).unwrap_err().to_string();
        assert!(
            error.contains("`disk`") && error.contains("block, control, meter, network, state, vmm"),
            "{error}"
        );
        assert_eq!(areas(Some("network")).unwrap(), [("network", ["net.mem.64b"].as_slice())]);
    }
}
