//! The five crates from outside: what the README promises to who adds them as dependencies.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn the_readme_shows_the_smallest_program_and_every_place_that_it_names_exists() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let smallest = std::fs::read_to_string(root().join("examples/smallest.rs")).unwrap();
    assert!(readme.contains(&format!("```rust\n{}\n```\n", smallest.trim_end())), "another program");
    let table = readme.split("## Where is").nth(1).unwrap().split("\n## ").next().unwrap();
    let places: Vec<&str> = table.split('`').skip(1).step_by(2).collect();
    assert!(places.len() > 10, "{places:?}");
    let missing: Vec<_> = places.into_iter().filter(|place| !root().join(place).exists()).collect();
    assert_eq!(missing, Vec::<&str>::new());
}

/// Built in a folder of its own that stays: its crates have the default features, the workspace's have more, so neither can
/// use what is built for the other. Without debug information, which nobody looks at here.
#[test]
fn a_crate_of_another_workspace_runs_the_smallest_program() {
    let folder = target().join("outside");
    let at = |path: &str| folder.join(path);
    let crates = ["iaas-core", "iaas-vmm", "iaas-net", "iaas-store", "iaas-meter"];
    let dependencies: String =
        crates.iter().map(|name| format!("{name} = {{ path = {:?} }}\n", root().join(name))).collect();
    let manifest = format!(
        "[package]\nname = \"outside\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         {dependencies}tokio = {{ version = \"1\", features = [\"macros\", \"rt-multi-thread\"] }}\n\n\
         [profile.dev]\ndebug = 0\n"
    );
    std::fs::create_dir_all(at("src")).unwrap();
    std::fs::write(at("Cargo.toml"), manifest).unwrap();
    std::fs::copy(root().join("Cargo.lock"), at("Cargo.lock")).unwrap();
    std::fs::copy(root().join("examples/smallest.rs"), at("src/main.rs")).unwrap();
    // A program of an earlier run cannot stand in for one that does not build.
    let program = at("target/debug/outside");
    let _ = std::fs::remove_file(&program);
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--offline", "--manifest-path"])
        .arg(at("Cargo.toml"))
        .arg("--target-dir")
        .arg(at("target"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(program).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out == "data\n", "{out}{err}");
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The folder with the profiles' folders, two above the binaries of this crate.
fn target() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_quickstart")).ancestors().nth(2).unwrap().to_owned()
}
