//! Each clause of each contract has a saboteur, each is caught by the check of its own clause, and the clean fake by none.
//!
//! The table of clauses and saboteurs is printed past the harness, which would keep it to itself.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use iaas_core::testing::conformance::Matrix;
use iaas_core::testing::conformance::artifacts;
use iaas_core::testing::conformance::authorizer;
use iaas_core::testing::conformance::fakes::*;
use iaas_core::testing::conformance::hypervisor;
use iaas_core::testing::conformance::inventory;
use iaas_core::testing::conformance::meter;
use iaas_core::testing::conformance::net_program;
use iaas_core::testing::conformance::plugs;
use iaas_core::testing::conformance::sabotage;
use iaas_core::testing::conformance::small;
use iaas_core::testing::conformance::state_store;
use iaas_core::testing::conformance::volume_access;
use iaas_core::testing::conformance::volume_pool;

/// How many clauses a suite has a saboteur for.
fn clauses(matrix: &Matrix) -> usize {
    let mut clauses: Vec<_> = matrix.rows.iter().map(|(clause, ..)| *clause).collect();
    clauses.sort_unstable();
    clauses.dedup();
    clauses.len()
}

/// The name of a suite in the table.
fn name(path: &'static str) -> &'static str {
    path.trim_end_matches("::suite").trim_end_matches("_suite").trim_start_matches("small::")
}

/// Prints a table in one piece; the harness takes only what the macros print.
fn show(matrix: &Matrix) {
    std::io::stdout().lock().write_all(format!("\n{matrix}").as_bytes()).unwrap();
}

macro_rules! matrices {
    ($($name:ident: $suite:path, $rig:ident, $saboteurs:ident, at least $least:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                let (checks, saboteurs) = ($suite(), sabotage::$saboteurs());
                let matrix = Matrix::of(name(stringify!($suite)), &checks, &$rig::default(), &saboteurs).await;
                show(&matrix);
                matrix.assert_caught();
                assert!(clauses(&matrix) >= $least, "only {} clauses have a saboteur", clauses(&matrix));
            }
        )+
    };
}

matrices! {
    hypervisor_saboteurs_are_caught: hypervisor::suite, FakeHypervisorRig, hypervisor_saboteurs, at least 25;
    pool_saboteurs_are_caught: volume_pool::suite, FakePoolRig, pool_saboteurs, at least 23;
    access_saboteurs_are_caught: volume_access::suite, FakeAccessRig, access_saboteurs, at least 18;
    artifacts_saboteurs_are_caught: artifacts::suite, FakeArtifactsRig, artifacts_saboteurs, at least 17;
    network_saboteurs_are_caught: net_program::suite, FakeNetRig, net_saboteurs, at least 11;
    plugs_saboteurs_are_caught: plugs::suite, FakePlugsRig, plugs_saboteurs, at least 20;
    inventory_saboteurs_are_caught: inventory::suite, FakeInventoryRig, inventory_saboteurs, at least 4;
    audit_saboteurs_are_caught: small::audit_suite, FakeAuditRig, audit_saboteurs, at least 2;
    keys_saboteurs_are_caught: small::keys_suite, FakeKeysRig, keys_saboteurs, at least 2;
    placement_saboteurs_are_caught: small::placement_suite, FakePlacementRig, placement_saboteurs, at least 3;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_store_saboteurs_are_caught() {
    let clean = state_store::MemoryRig::default();
    let matrix = Matrix::of("state_store", state_store::suite(), &clean, &state_store::saboteurs()).await;
    show(&matrix);
    matrix.assert_caught();
    assert!(clauses(&matrix) >= 15);
}

#[tokio::test]
async fn authorizer_saboteurs_are_caught() {
    let clean = authorizer::FakeAuthorizerRig;
    let matrix = Matrix::of("authorizer", authorizer::suite(), &clean, &authorizer::saboteurs()).await;
    show(&matrix);
    matrix.assert_caught();
    assert!(clauses(&matrix) >= 4);
}

#[tokio::test]
async fn meter_saboteurs_are_caught() {
    let clean = meter::FakeMeterRig::default();
    let matrix = Matrix::of("meter", meter::suite(), &clean, &meter::saboteurs()).await;
    show(&matrix);
    matrix.assert_caught();
    assert!(clauses(&matrix) >= 7);
}

type Clauses = BTreeSet<String>;

/// The numbered clauses in a line of documentation: "3. `name`: …", also two in a line.
fn numbered(line: &str) -> Clauses {
    let words: Vec<&str> = line.split(' ').collect();
    let pairs = words.windows(2).filter(|pair| {
        let number = pair[0].strip_suffix('.');
        number.is_some_and(|number| number.parse::<u8>().is_ok())
    });
    let name = |pair: &[&str]| Some(pair[1].strip_prefix('`')?.split_once('`')?.0.to_owned());
    pairs.filter_map(name).collect()
}

/// The clauses in the documentation of each trait.
fn documented() -> BTreeMap<String, Clauses> {
    let spi = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/spi");
    let files =
        std::fs::read_dir(spi).unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file());
    let text: String = files.map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let (mut traits, mut pending) = (BTreeMap::new(), Clauses::new());
    for line in text.lines() {
        if let Some(line) = line.strip_prefix("/// ") {
            pending.extend(numbered(line));
        } else if let Some(rest) = line.strip_prefix("pub trait ") {
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap();
            if !pending.is_empty() {
                traits.insert(name.to_owned(), std::mem::take(&mut pending));
            }
        } else if !line.starts_with("///") && !line.starts_with("#[") {
            assert!(pending.is_empty(), "clauses of no trait before `{line}`: {pending:?}");
        }
    }
    traits
}

/// A suite: whose contract it checks, whose clauses that trait inherits, and which of these say nothing about it.
struct Suite {
    of: &'static str,
    inherits: &'static [&'static str],
    without: &'static [&'static str],
    checked: Clauses,
    sabotaged: Clauses,
}

macro_rules! suites {
    ($($of:literal: $inherits:expr, without $without:expr, $suite:expr, $saboteurs:expr;)+) => {
        vec![$(Suite {
            of: $of,
            inherits: $inherits,
            without: $without,
            checked: $suite.iter().map(|check| check.clause.to_owned()).collect(),
            sabotaged: $saboteurs.iter().map(|saboteur| saboteur.clause.to_owned()).collect(),
        }),+]
    };
}

fn suites() -> Vec<Suite> {
    const OBJECTS: &[&str] = &["Provider", "Converge"];
    // These measure nothing of their own, so there is no total that could shrink.
    const UNMETERED: &[&str] = &["usage-cumulative"];
    suites! {
        "Hypervisor": OBJECTS, without &[], hypervisor::suite(), sabotage::hypervisor_saboteurs();
        "VolumePool": OBJECTS, without UNMETERED, volume_pool::suite(), sabotage::pool_saboteurs();
        "VolumeAccess": OBJECTS, without UNMETERED, volume_access::suite(), sabotage::access_saboteurs();
        // And some blob has each digest, so no spec is one that can never be met.
        "Artifacts": OBJECTS, without &["usage-cumulative", "bad-spec-invalid"], artifacts::suite(), sabotage::artifacts_saboteurs();
        "NetProgram": &["Provider"], without UNMETERED, net_program::suite(), sabotage::net_saboteurs();
        "Plugs": OBJECTS, without &[], plugs::suite(), sabotage::plugs_saboteurs();
        // And a lease has no effect that outlives it, so nothing drains.
        "HostInventory": &["Provider"], without &["usage-cumulative", "claim-drains"], inventory::suite(),
            sabotage::inventory_saboteurs();
        "AuditSink": &[], without &[], small::audit_suite(), sabotage::audit_saboteurs();
        "KeyManager": &[], without &[], small::keys_suite(), sabotage::keys_saboteurs();
        "Placement": &[], without &[], small::placement_suite(), sabotage::placement_saboteurs();
        "StateStore": &[], without &[], state_store::suite(), state_store::saboteurs();
        "MeterSink": &[], without &[], meter::suite(), meter::saboteurs();
        "Authorizer": &[], without &[], authorizer::suite(), authorizer::saboteurs();
    }
}

#[test]
fn each_documented_clause_has_a_check_and_a_saboteur_of_its_name() {
    let (documented, suites) = (documented(), suites());
    let found: usize = documented.values().map(BTreeSet::len).sum();
    assert!(found > 60, "only {found} clauses were found in the documentation");
    let proven: BTreeSet<&str> =
        suites.iter().flat_map(|suite| suite.inherits.iter().copied().chain([suite.of])).collect();
    let stated: BTreeSet<&str> = documented.keys().map(String::as_str).collect();
    assert_eq!(stated, proven, "left: traits with a contract, right: those that a suite proves");
    for Suite { of, inherits, without, checked, sabotaged } in suites {
        let owed = inherits.iter().chain([&of]).flat_map(|name| &documented[*name]);
        let owed: Clauses = owed.filter(|clause| !without.contains(&clause.as_str())).cloned().collect();
        assert_eq!(owed, checked, "{of}; left: documented, right: checked");
        assert_eq!(checked, sabotaged, "{of}; left: checked, right: sabotaged");
    }
}
