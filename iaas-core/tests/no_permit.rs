//! No permit, no effect: what the compiler must refuse, and with which words.
//!
//! What it must accept is compiled with this test, so that the cases need only be checked, not built and linked.
//! `TRYBUILD=overwrite cargo test -p iaas-core --test no_permit` writes the words anew; read whether each is still the reason
//! that its case is about.

use std::process::Command;

#[path = "no_permit/allowed.rs"]
mod allowed;

#[test]
fn the_engine_acts_on_a_permit_of_the_gate_and_on_nothing_else() {
    let version = compiler();
    if !version.starts_with(COMPILER) {
        iaas_core::testing::skip!(
            "the_engine_acts_on_a_permit_of_the_gate_and_on_nothing_else",
            &format!("the expected words are those of {COMPILER}x, not of `{version}`; use that toolchain")
        );
    }
    allowed::main();
    let cases = trybuild::TestCases::new();
    for wrong in ["without", "of_another_action", "twice", "forged", "cloned", "made", "around"] {
        cases.compile_fail(format!("tests/no_permit/{wrong}.rs"));
    }
}

fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = Command::new(rustc).arg("--version").output().map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// The compiler by whose words the expected output was written.
const COMPILER: &str = "rustc 1.95.";
