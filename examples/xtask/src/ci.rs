//! `cargo xtask test` and `cargo xtask ci`.

use std::time::Duration;

use crate::command::Cmd;
use crate::crash;
use crate::failure::Result;
use crate::fuzz;
use crate::licences;
use crate::report::line;
use crate::setup;
use crate::skips;
use crate::stage::Stages;
use crate::surface;
use crate::workspace::{cargo, root, skips_dir};

/// Runs every test: unit, property, conformance, sabotage, documents, on emulated machines, and crash.
pub(crate) fn test() -> Result<()> {
    let mut stages = Stages::default();
    test_stages(&mut stages, false);
    stages.finish()
}

/// Runs what must hold before a change lands, then the tests.
pub(crate) fn ci() -> Result<()> {
    let mut stages = Stages::default();
    stages.stage("format", || cargo_stage(&["fmt", "--all", "--check"], MINUTES_2));
    for (name, features) in FEATURES {
        stages.stage(&format!("clippy, {name}"), || {
            features.iter().try_for_each(|chosen| {
                let clippy =
                    ["clippy", "--all-targets"].iter().chain(*chosen).chain(&["--", "-D", "warnings"]);
                cargo_stage(&clippy.copied().collect::<Vec<_>>(), MINUTES_20)
            })
        });
    }
    stages.stage("documents", documents);
    match licences::metadata() {
        Ok(metadata) => {
            stages.stage("licences", || licences::check(&metadata));
            stages.stage("one version each", || licences::check_single(&metadata));
        }
        Err(failure) => stages.stage("licences", || Err(failure)),
    }
    stages.stage("surface", surface::run);
    test_stages(&mut stages, true);
    stages.finish()
}

fn test_stages(stages: &mut Stages, fuzzed: bool) {
    stages.stage("set-up", set_up);
    stages.stage("clear old skips", || skips::clear(&skips_dir()));
    stages.stage("tests", workspace_tests);
    stages.stage("crash", crash_on_host);
    if fuzzed {
        stages.stage("fuzz", fuzz::in_ci);
    }
    stages.stage("skips", || skips::report(&skips_dir(), is_ci()));
}

/// In CI the machine must have everything; elsewhere the tests that need what is missing skip and say so.
fn set_up() -> Result<()> {
    match setup::all(&setup::Options::default()) {
        Err(failure) if !is_ci() => {
            line(&format!("{failure}\n  going on without; tests that need it are skipped"));
            Ok(())
        }
        outcome => outcome.map(drop),
    }
}

fn workspace_tests() -> Result<()> {
    Cmd::new(cargo())
        .args(["test", "--workspace", "--all-features", "--no-fail-fast"])
        .dir(&root())
        .limit(MINUTES_40)
        .run()
}

fn crash_on_host() -> Result<()> {
    if !crash::has_subject()? {
        return skips::leave(&skips_dir(), "crash::host", "this workspace has no program iaas-crash-subject");
    }
    crash::run(&crash::Options { place: Some("host".to_owned()), ..crash::Options::default() })
}

fn documents() -> Result<()> {
    Cmd::new(cargo())
        .args(["doc", "--workspace", "--all-features", "--no-deps"])
        .dir(&root())
        .env("RUSTDOCFLAGS", "-D warnings")
        .limit(MINUTES_20)
        .run()
}

fn cargo_stage(args: &[&str], limit: Duration) -> Result<()> {
    Cmd::new(cargo()).args(args).dir(&root()).limit(limit).run()
}

fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|ci| ci == "true")
}

/// Each crate alone without its default features: together, one that wants a feature gives it to all.
const FEATURES: [(&str, &[&[&str]]); 3] = [
    ("default features", &[&["--workspace"]]),
    (
        "no default features",
        &[
            &["--package", "iaas-core", "--no-default-features"],
            &["--package", "iaas-vmm", "--no-default-features"],
            &["--package", "iaas-net", "--no-default-features"],
            &["--package", "iaas-store", "--no-default-features"],
            &["--package", "iaas-meter", "--no-default-features"],
        ],
    ),
    ("all features", &[&["--workspace", "--all-features"]]),
];
const MINUTES_2: Duration = Duration::from_secs(2 * 60);
const MINUTES_20: Duration = Duration::from_secs(20 * 60);
const MINUTES_40: Duration = Duration::from_secs(40 * 60);
