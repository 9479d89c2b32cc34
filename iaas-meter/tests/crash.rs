//! What was answered with `Ok` outlives a `kill -9` at any moment.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a panic")]

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Rev;
use iaas_core::model::Project;
use iaas_core::spi::meter::MeterSink;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use iaas_core::spi::meter::UsageKey;
use iaas_meter::Meter;
use iaas_meter::Period;
use jiff::Timestamp;
use uuid::Uuid;

/// Names the folder to the child; nobody else sets it.
const FOLDER: &str = "IAAS_METER_CRASH_FOLDER";

/// The n-th event allocates n things from second n on; its revision is n.
fn event(n: u64) -> UsageEvent {
    let of = ObjectRef { kind: "instance".to_owned(), id: Uuid::nil() };
    let at = Timestamp::from_second(i64::try_from(n).unwrap()).unwrap();
    UsageEvent {
        project: Id::<Project>::from_uuid(Uuid::nil()),
        key: UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(n), index: 0 },
        what: Usage::Allocated { of, meter: "vcpu".to_owned(), quantity: n, order: 0, at },
    }
}

/// Not a test of its own: the process that the test below kills.
#[test]
#[ignore = "runs as the child of what_was_acknowledged_outlives_kill_9"]
fn child_that_appends_until_it_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let meter = Meter::open(Path::new(&folder)).unwrap();
        let mut out = std::io::stdout();
        for n in meter.head().records.. {
            meter.append(&[event(n)]).await.unwrap();
            writeln!(out, "acknowledged {n}").unwrap();
            out.flush().unwrap();
        }
    });
}

/// Starts the child, kills it after `after` acknowledgements, and returns the last one that it wrote.
fn kill_after(folder: &Path, after: usize) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_appends_until_it_is_killed", "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The harness writes lines of its own, and may put one before ours without a break.
    let number = |line: String| line.split_once("acknowledged ")?.1.parse::<u64>().ok();
    let mut acknowledged = lines.map_while(Result::ok).filter_map(number);
    let last = acknowledged.by_ref().take(after).last();
    child.kill().unwrap();
    // What was written before the kill counts too.
    let last = acknowledged.last().or(last).expect("the child acknowledges something");
    child.wait().unwrap();
    last
}

#[test]
fn what_was_acknowledged_outlives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    for after in [1, 2, 3, 5, 8, 13, 21, 34] {
        let last = kill_after(folder.path(), after);
        let meter = Meter::open(folder.path()).unwrap();
        let records = meter.head().records;
        assert!(records > last, "event {last} was acknowledged, and {records} are there");
        // Event n holds for one second, from n to n + 1: together 0 + 1 + … + (records - 1).
        let end = Timestamp::from_second(i64::try_from(records).unwrap()).unwrap();
        let period = Period::new(Timestamp::UNIX_EPOCH, end).unwrap();
        let used = runtime.block_on(meter.used(Id::from_uuid(Uuid::nil()), period)).unwrap();
        let sum = u128::from(records * (records - 1) / 2) * 1_000_000_000;
        assert_eq!(used.iter().map(|u| u.raw).sum::<u128>(), sum);
    }
}
