//! Tests that could not run here. Each leaves one file in `target/skips/`, because test harnesses swallow what a passing test
//! prints: the file's name is the test's, its content `SKIP <test>: <what is missing and how to get it>`.

use std::fs;
use std::path::Path;

use crate::failure::{Context, Failure, Result};
use crate::report::line;
use crate::setup::PROVIDED;

/// Forgets the skips of an earlier run.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(dir),
        _ => fs::create_dir_all(dir).at(dir),
    }
}

/// Leaves a skip of our own.
pub(crate) fn leave(dir: &Path, test: &str, reason: &str) -> Result<()> {
    let file = dir.join(test.replace(['/', ':'], "_"));
    fs::write(&file, format!("SKIP {test}: {reason}\n")).at(&file)
}

/// Prints and counts the skips. With `ci`, one for want of something that the set-up provides is a failure.
pub(crate) fn report(dir: &Path, ci: bool) -> Result<()> {
    let skips = read(dir)?;
    skips.iter().for_each(|skip| line(skip));
    line(&format!("SKIPPED {}", skips.len()));
    let ours: Vec<&String> = skips.iter().filter(|skip| ci && is_provided(skip)).collect();
    match ours.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(Failure::new(format!(
            "{} tests were skipped for what the set-up provides; the first: {first}",
            ours.len()
        ))
        .remedy("run `cargo xtask setup` and look why the test does not find it")),
    }
}

fn read(dir: &Path) -> Result<Vec<String>> {
    let mut skips = Vec::new();
    for entry in fs::read_dir(dir).at(dir)?.flatten() {
        let text = fs::read_to_string(entry.path()).at(&entry.path())?;
        let first = text.lines().next().unwrap_or_default();
        let named = format!("SKIP {}: (no reason given)", entry.file_name().to_string_lossy());
        skips.push(if first.starts_with("SKIP ") { first.to_owned() } else { named });
    }
    skips.sort();
    Ok(skips)
}

fn is_provided(skip: &str) -> bool {
    skip.contains("cargo xtask setup") || PROVIDED.iter().any(|program| program.is_named_in(skip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_for_what_the_set_up_provides_fails_in_ci_only() {
        let dir = std::env::temp_dir().join(format!("xtask-skips-{}", std::process::id()));
        clear(&dir).unwrap();
        report(&dir, true).unwrap();
        leave(&dir, "vmm::kvm", "no /dev/kvm; run on a machine with hardware virtualization").unwrap();
        report(&dir, true).unwrap();
        leave(&dir, "vmm::qemu", "no qemu-system-x86_64; install it").unwrap();
        report(&dir, false).unwrap();
        assert!(report(&dir, true).unwrap_err().what().contains("vmm::qemu"));
        clear(&dir).unwrap();
        assert!(read(&dir).unwrap().is_empty(), "an earlier run is forgotten");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_without_a_reason_still_counts() {
        let dir = std::env::temp_dir().join(format!("xtask-skips-bare-{}", std::process::id()));
        clear(&dir).unwrap();
        fs::write(dir.join("some_test"), "").unwrap();
        assert_eq!(read(&dir).unwrap(), ["SKIP some_test: (no reason given)"]);
        fs::remove_dir_all(&dir).unwrap();
    }
}
