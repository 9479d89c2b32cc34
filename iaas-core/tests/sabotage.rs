//! Each clause of each contract has a saboteur, each is caught by the check of its own clause, and the clean fake by none.
#![cfg(feature = "conformance")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
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

macro_rules! matrices {
    ($($name:ident: $suite:path, $rig:ident, $saboteurs:ident, at least $least:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                let (checks, saboteurs) = ($suite(), sabotage::$saboteurs());
                let matrix = Matrix::of(name(stringify!($suite)), &checks, &$rig::default(), &saboteurs).await;
                println!("{matrix}");
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
    println!("{matrix}");
    matrix.assert_caught();
    assert!(clauses(&matrix) >= 15);
}

/// The numbered clauses in the documentation of the traits: "/// 3. `name`: …", also two in a line.
fn documented() -> BTreeSet<String> {
    let spi = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/spi");
    let files =
        std::fs::read_dir(spi).unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file());
    let text: String = files.map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let mut clauses = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("/// ")) {
        let mut words = line.split(' ').peekable();
        while let Some(word) = words.next() {
            let numbered = word.strip_suffix('.').is_some_and(|n| n.parse::<u8>().is_ok());
            let name =
                words.peek().and_then(|next| next.strip_prefix('`')).and_then(|next| next.split_once('`'));
            if let (true, Some((name, _))) = (numbered, name) {
                clauses.insert(name.to_owned());
            }
        }
    }
    clauses
}

#[test]
fn each_documented_clause_has_a_check_and_a_saboteur_of_its_name() {
    let (mut checked, mut sabotaged) = (BTreeSet::new(), BTreeSet::new());
    macro_rules! collect {
        ($($suite:expr, $saboteurs:expr;)+) => {$(
            checked.extend($suite.iter().map(|check| check.clause.to_owned()));
            sabotaged.extend($saboteurs.iter().map(|saboteur| saboteur.clause.to_owned()));
        )+};
    }
    collect! {
        hypervisor::suite(), sabotage::hypervisor_saboteurs();
        volume_pool::suite(), sabotage::pool_saboteurs();
        volume_access::suite(), sabotage::access_saboteurs();
        artifacts::suite(), sabotage::artifacts_saboteurs();
        net_program::suite(), sabotage::net_saboteurs();
        plugs::suite(), sabotage::plugs_saboteurs();
        inventory::suite(), sabotage::inventory_saboteurs();
        small::audit_suite(), sabotage::audit_saboteurs();
        small::keys_suite(), sabotage::keys_saboteurs();
        small::placement_suite(), sabotage::placement_saboteurs();
        state_store::suite(), state_store::saboteurs();
        meter::suite(), meter::saboteurs();
        authorizer::suite(), authorizer::saboteurs();
    }
    let documented = documented();
    assert!(documented.len() > 60, "only {} clauses were found in the documentation", documented.len());
    assert_eq!(documented, checked, "left: documented, right: checked");
    assert_eq!(checked, sabotaged, "left: checked, right: sabotaged");
}
