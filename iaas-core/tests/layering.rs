//! The layers of the crate are arrows in one direction, and no reference crate knows another.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::path::PathBuf;

/// Which rooms each room may name, besides itself and the leaves `id`, `unit`, `error` and `clock`.
const ARROWS: &[(&str, &[&str])] = &[
    ("model", &["spi"]),
    ("spi", &["model"]),
    ("store", &["spi", "model"]),
    ("security", &["spi", "model"]),
    ("engine", &["security", "spi", "store", "model"]),
    ("cloud", &["engine", "security", "spi", "store", "model"]),
    ("process", &["spi", "model"]),
    ("testing", &["spi", "model", "store", "process", "security"]),
];

#[test]
fn the_rooms_of_the_core_name_only_what_lies_below() {
    let used = uses(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let rooms: BTreeSet<&str> = ARROWS.iter().map(|(room, _)| *room).collect();
    assert!(rooms.iter().all(|room| used.contains_key(*room)), "rooms without imports: {used:?}");
    let mut wrong = Vec::new();
    for (room, names) in &used {
        let may = ARROWS.iter().find(|(r, _)| r == room).map(|(_, may)| *may);
        for (name, file) in names.iter().filter(|(name, _)| rooms.contains(name.as_str()) && *name != room) {
            if !may.is_some_and(|may| may.contains(&name.as_str())) {
                wrong.push(format!("{room} names {name} in {}", file.display()));
            }
        }
    }
    assert_eq!(wrong, [] as [String; 0]);
}

/// For each folder of `src`: the rooms that its `crate::` paths name, with a file that does.
fn uses(src: &Path) -> BTreeMap<String, BTreeMap<String, PathBuf>> {
    let mut all: BTreeMap<String, BTreeMap<String, PathBuf>> = BTreeMap::new();
    for file in rust_files(src) {
        let inside = file.strip_prefix(src).unwrap();
        let Some(room) = inside.parent().and_then(|p| p.iter().next()) else { continue };
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for rest in line.split("crate::").skip(1) {
                let name: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                let room = room.to_string_lossy().into_owned();
                all.entry(room).or_default().entry(name).or_insert_with(|| file.clone());
            }
        }
    }
    all
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            all.push(path);
        }
    }
    all
}

#[test]
fn the_reference_crates_do_not_know_each_other() {
    const CRATES: [&str; 4] = ["iaas-vmm", "iaas-net", "iaas-store", "iaas-meter"];
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for name in CRATES {
        let text = std::fs::read_to_string(workspace.join(name).join("Cargo.toml")).unwrap();
        let section = text.split("[dependencies]").nth(1).unwrap();
        // Tests may join crates; what is shipped may not.
        let shipped = section.split("\n[").next().unwrap();
        assert!(shipped.contains("iaas-core"), "{name} does not stand on the core");
        for other in CRATES.iter().filter(|other| **other != name) {
            assert!(!shipped.contains(other), "{name} depends on {other}");
        }
    }
}
