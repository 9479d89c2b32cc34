//! How you test with this crate and prove what you replaced: an in-memory fake for each trait, and the conformance suites.
//!
//! [`fake`] is always compiled. It is one shared [`World`](fake::World) of hosts, pools and networks that outlives the
//! providers which act on it, so a test can drop them at any point and open them again, as after a crash.

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod fake;

/// Leaves a note that a test could not run here, and returns from it.
///
/// The harness swallows what a passing test prints, so the note is also a file: `target/skips/<test>`.
///
/// ```no_run
/// # fn has_kvm() -> bool { false }
/// # fn a_guest_boots() {
/// if !has_kvm() {
///     iaas_core::testing::skip!("a_guest_boots", "no /dev/kvm; run on a machine with virtualization");
/// }
/// # }
/// ```
#[macro_export]
macro_rules! __iaas_skip {
    ($test:expr, $missing:expr) => {{
        $crate::testing::note_skip($test, $missing);
        return;
    }};
}
pub use crate::__iaas_skip as skip;

/// Writes the note of [`skip!`](crate::testing::skip).
#[doc(hidden)]
pub fn note_skip(test: &str, missing: &str) {
    let line = format!("SKIP {test}: {missing}");
    eprintln!("{line}");
    let folder = target_folder().join("skips");
    let name: String = test.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    let written = std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join(name), format!("{line}\n")));
    if let Err(error) = written {
        eprintln!("the note could not be kept in {}: {error}", folder.display());
    }
}

/// `CARGO_TARGET_DIR`, or the `target` folder beside the lock file of the workspace.
fn target_folder() -> std::path::PathBuf {
    if let Some(folder) = std::env::var_os("CARGO_TARGET_DIR") {
        return folder.into();
    }
    let here = std::env::current_dir().unwrap_or_else(|_| ".".into());
    let root = here.ancestors().find(|p| p.join("Cargo.lock").exists()).unwrap_or(&here);
    root.join("target")
}
