//! What the dependencies' licences and versions may be, judged from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::report::line;
use crate::workspace::{cargo, root};

/// Everything that cargo knows of the packages in the lock file.
pub(crate) fn metadata() -> Result<Value> {
    let text = Cmd::new(cargo())
        .args(["metadata", "--format-version", "1", "--all-features"])
        .dir(&root())
        .output()?;
    serde_json::from_str(&text).context("cargo metadata")
}

/// Fails when a package can be had under no permissive licence.
pub(crate) fn check(metadata: &Value) -> Result<()> {
    let packages = packages(metadata);
    let bad: Vec<String> = packages
        .iter()
        .filter(|p| !is_permissive(p["license"].as_str().unwrap_or_default()))
        .map(|p| format!("{} {} ({})", text(&p["name"]), text(&p["version"]), text(&p["license"])))
        .collect();
    line(&format!("licences: {} packages", packages.len()));
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(format!("no permissive licence: {}", bad.join(", "))).remedy(
            "choose another crate; a copyleft one may stand only where `OR` offers a permissive choice",
        )),
    }
}

/// Fails when one of the rust-vmm crates is there twice: their types would not fit each other.
pub(crate) fn check_single(metadata: &Value) -> Result<()> {
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages(metadata) {
        if let Some(name) = SINGLE.iter().find(|name| package["name"] == ***name) {
            versions.entry(name).or_default().insert(package["version"].as_str().unwrap_or_default());
        }
    }
    for (name, versions) in &versions {
        line(&format!("{name}: {}", versions.iter().copied().collect::<Vec<_>>().join(" and ")));
    }
    let twice: Vec<&str> = versions.iter().filter(|(_, v)| v.len() > 1).map(|(name, _)| *name).collect();
    match twice.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(format!("in two versions: {}", twice.join(", ")))
            .remedy("`cargo tree --duplicates` shows who wants which; make all want one")),
    }
}

fn packages(metadata: &Value) -> &[Value] {
    metadata["packages"].as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("none stated")
}

/// Whether the SPDX expression can be satisfied with permissive licences alone. `/` is an old spelling of `OR`.
fn is_permissive(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    any(&mut rest) && rest.is_empty()
}

/// `all OR all …`
fn any(words: &mut &[&str]) -> bool {
    let mut good = all(words);
    while take(words, "OR") {
        good |= all(words);
    }
    good
}

/// `one AND one …`
fn all(words: &mut &[&str]) -> bool {
    let mut good = one(words);
    while take(words, "AND") {
        good &= one(words);
    }
    good
}

/// A licence, with or without an exception, or an expression in parentheses. An exception only grants more.
fn one(words: &mut &[&str]) -> bool {
    if take(words, "(") {
        let good = any(words);
        return take(words, ")") && good;
    }
    let Some((licence, rest)) = words.split_first() else { return false };
    *words = rest;
    if take(words, "WITH") {
        *words = words.get(1..).unwrap_or_default();
    }
    PERMISSIVE.contains(licence)
}

fn take(words: &mut &[&str], word: &str) -> bool {
    match words.split_first() {
        Some((first, rest)) if *first == word => {
            *words = rest;
            true
        }
        _ => false,
    }
}

const PERMISSIVE: [&str; 15] = [
    "0BSD",
    "Apache-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Zlib",
];

const SINGLE: [&str; 11] = [
    "acpi_tables",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
    "virtio-bindings",
    "kvm-ioctls",
    "kvm-bindings",
    "linux-loader",
    "virtio-queue",
    "vhost",
    "vhost-user-backend",
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_copyleft_licence_passes_only_beside_a_permissive_choice() {
        for good in [
            "MIT",
            "Apache-2.0 OR MIT",
            "MIT/Apache-2.0",
            "LGPL-2.1-or-later OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
        ] {
            assert!(is_permissive(good), "{good}");
        }
        assert!(is_permissive("Apache-2.0 WITH LLVM-exception OR GPL-2.0-only"));
        for bad in [
            "GPL-3.0-only",
            "AGPL-3.0",
            "LGPL-2.1",
            "MIT AND GPL-2.0-only",
            "(MIT OR GPL-2.0) AND AGPL-3.0",
            "",
            "MIT GPL-2.0",
        ] {
            assert!(!is_permissive(bad), "{bad}");
        }
    }

    #[test]
    fn a_package_without_a_permissive_licence_is_named() {
        let metadata = json!({"packages": [
            {"name": "good", "version": "1.0.0", "license": "MIT"},
            {"name": "bad", "version": "2.0.0", "license": "AGPL-3.0-only"},
            {"name": "none", "version": "3.0.0", "license": null},
        ]});
        let failure = check(&metadata).unwrap_err();
        assert_eq!(
            failure.what(),
            "no permissive licence: bad 2.0.0 (AGPL-3.0-only), none 3.0.0 (none stated)"
        );
    }

    #[test]
    fn two_versions_of_a_virtual_machine_crate_fail_and_of_others_do_not() {
        let package = |name: &str, version: &str| json!({"name": name, "version": version, "license": "MIT"});
        let fine = json!({"packages": [package("vm-memory", "0.18.0"), package("syn", "1.0.0"), package("syn", "2.0.0")]});
        check_single(&fine).unwrap();
        let split = json!({"packages": [package("vm-memory", "0.18.0"), package("vm-memory", "0.17.0")]});
        assert!(check_single(&split).unwrap_err().what().contains("vm-memory"));
    }
}
