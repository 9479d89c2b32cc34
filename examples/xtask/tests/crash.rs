//! The crash machinery against a small subject, honest and with one leak of each kind.

use std::process::{Command, Output};

fn crash(leak: &str, spread: [&str; 2]) -> Output {
    let [how, count] = spread;
    let scratch =
        std::env::temp_dir().join(format!("xtask-crash-test-{leak}{how}{count}-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a folder for the test");
    // A program of its own for each test: the judge watches by program too, and tests run side by side.
    let subject = scratch.join("sample-subject");
    std::fs::copy(env!("CARGO_BIN_EXE_sample-subject"), &subject).expect("a copy of the subject");
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["crash", "--where", "host", "--limit", "60", "--grace", "1", how, count]);
    command.arg("--").arg(&subject).env("TMPDIR", &scratch);
    if !leak.is_empty() {
        command.args(["--leak", leak]);
    }
    let output = command.output().expect("xtask starts");
    std::fs::remove_dir_all(&scratch).expect("the folder is still there");
    output
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The lines `where=host k=…/N CALL leaks=…`.
fn kills(text: &str) -> Vec<&str> {
    text.lines().filter(|l| l.starts_with("where=host k=")).collect()
}

#[test]
fn an_honest_subject_leaves_nothing_wherever_it_is_killed() {
    let output = crash("", ["--points", "1000"]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(kills(&text).len() > 30, "{text}");
    assert!(kills(&text).iter().all(|l| l.ends_with("leaks=0")), "{text}");
    assert!(text.contains(&format!("where=host points={} leaks=0", kills(&text).len())), "{text}");
    // intent, data, role.pid and log by the first thread, `used` by the second.
    assert_eq!(kills(&text).iter().filter(|l| l.contains(" rename ")).count(), 5, "{text}");
    // The role's own start is no call of the control process but its making is.
    assert_eq!(
        kills(&text).iter().filter(|l| l.contains("clone3") || l.contains("fork")).count(),
        1,
        "{text}"
    );
}

#[test]
fn a_forgotten_file_is_found() {
    found("file", "tree: file ");
}

#[test]
fn a_kill_comes_before_the_effect_of_its_call() {
    // The first file that this subject opens is the one that it forgets.
    let verdict = |k: usize| {
        let text = text(&crash("file", ["--at", &k.to_string()]));
        kills(&text).first().map(|l| (*l).to_owned()).unwrap_or(text)
    };
    let opening = (1..20).find(|k| verdict(*k).contains(" openat ")).expect("it opens a file");
    assert!(verdict(opening).ends_with("leaks=0"), "{}", verdict(opening));
    assert!(verdict(opening + 1).ends_with("leaks=1"), "{}", verdict(opening + 1));
}

#[test]
fn a_forgotten_socket_is_found() {
    found("socket", "tree: socket ");
}

#[test]
fn a_forgotten_process_is_found() {
    found("process", "processes: pid=");
}

#[test]
fn a_leak_without_any_crash_is_found_before_the_first_kill() {
    let output = crash("always", ["--points", "14"]);
    assert!(!output.status.success());
    assert!(text(&output).contains("left over without any crash"), "{}", text(&output));
    assert!(kills(&text(&output)).is_empty());
}

#[test]
fn a_subject_that_does_not_settle_counts_as_a_leak() {
    let output = crash("stuck", ["--points", "3"]);
    assert!(!output.status.success());
    let text = text(&output);
    assert!(text.contains("did not settle"), "{text}");
    assert!(text.contains("will not settle"), "its own last words are told: {text}");
}

fn found(leak: &str, thing: &str) {
    let output = crash(leak, ["--points", "14"]);
    let text = text(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&format!("leak {thing}")), "{text}");
    // The first kill comes before the mistake and the last after it is undone.
    assert!(kills(&text)[0].ends_with("leaks=0"), "{text}");
    assert!(kills(&text).iter().any(|l| l.ends_with("leaks=1")), "{text}");
}
