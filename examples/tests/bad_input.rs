//! What the composition of this machine answers when its surroundings are wrong: which kind of error, naming which thing and
//! which remedy, and nothing left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;

use iaas_core::ErrorKind;
use iaas_core::store::RedbStore;
use iaas_examples::machine;
use nix::sys::resource::Resource;
use nix::sys::resource::setrlimit;

/// A state folder and a runtime folder of its own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    /// Starts control as a user would, and waits for its end.
    fn control(&self, change: impl FnOnce(&mut Command)) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
        command.arg("--control").arg("--state").arg(self.state());
        for option in ["--kernel", "--initrd"] {
            command.arg(option).arg(self.0.path().join("absent"));
        }
        command.env("IAAS_RUNTIME_DIR", self.0.path().join("run"));
        change(&mut command);
        command.output().unwrap()
    }

    fn processes(&self) -> usize {
        iaas_examples::supervise::roles("switch", &self.state()).len()
            + iaas_examples::supervise::roles("runner", &self.state()).len()
    }
}

fn text(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn a_store_that_another_process_has_open_is_a_conflict() {
    let place = Place::new();
    std::fs::create_dir_all(place.state().join("store")).unwrap();
    let held = RedbStore::open(place.state().join("store/cloud.redb")).unwrap();
    let text = text(&place.control(|_| ()));
    says(&text, &["in use by another process", "folder of its own", "cloud.redb"]);
    drop(held);
    assert!(!place.state().join("ids.json").exists(), "nothing was begun");
    assert_eq!(place.processes(), 0);
}

#[test]
fn a_runtime_folder_whose_path_is_too_long_is_named_with_its_remedy() {
    let place = Place::new();
    let long = place.0.path().join("r".repeat(100));
    let text = text(&place.control(|command| {
        command.env("IAAS_RUNTIME_DIR", &long);
    }));
    says(&text, &["too long", "choose a short one"]);
    assert!(!long.exists(), "a folder that is of no use is not left");
    assert_eq!(place.processes(), 0);
}

#[test]
fn a_full_disk_is_said_and_the_next_start_works() {
    let place = Place::new();
    let full = place.control(|command| {
        // SAFETY: between fork and exec only system calls are made.
        #[expect(unsafe_code, reason = "the limit is for the child alone")]
        unsafe {
            command.pre_exec(|| {
                nix::sys::signal::signal(
                    nix::sys::signal::Signal::SIGXFSZ,
                    nix::sys::signal::SigHandler::SigIgn,
                )?;
                setrlimit(Resource::RLIMIT_FSIZE, 4096, 4096).map_err(Into::into)
            });
        }
    });
    says(&text(&full), &["cloud.redb"]);
    assert_eq!(place.processes(), 0);
    // With room it gets as far as the kernel that is not there, or QEMU.
    let next = place.control(|_| ());
    let missing = if iaas_vmm::qemu::find().is_ok() { "absent" } else { "qemu-system-x86_64" };
    says(&text(&next), &[missing]);
    assert_eq!(place.processes(), 0);
}

#[tokio::test]
async fn the_state_folder_of_another_cloud_is_refused() {
    let (one, other) = (Place::new(), Place::new());
    for place in [&one, &other] {
        open(&place.state()).await.unwrap().close().await.unwrap();
    }
    std::fs::copy(other.state().join("ids.json"), one.state().join("ids.json")).unwrap();
    let error = open(&one.state()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:#}");
    says(&format!("{error:#}"), &["cloud"]);
    assert!(error.what_to_do().is_some(), "{error:#}");
    says(&text(&one.control(|_| ())), &["another cloud"]);
    assert!(!one.0.path().join("run").exists(), "no folder for sockets is left");
    assert_eq!(one.processes(), 0);
}

async fn open(state: &Path) -> iaas_core::Result<machine::Machine> {
    machine::open(state).await
}
