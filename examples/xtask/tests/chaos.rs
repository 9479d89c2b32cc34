//! Chaos against a small subject: honest, and with one that forgets a process when it is killed.

use std::process::Command;

fn chaos(name: &str, leak: &[&str]) -> (bool, String) {
    let scratch = std::env::temp_dir().join(format!("xtask-chaos-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a folder for the test");
    let subject = scratch.join("sample-subject");
    std::fs::copy(env!("CARGO_BIN_EXE_sample-subject"), &subject).expect("a copy of the subject");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "chaos",
            "--seed",
            "3",
            "--kills",
            "8",
            "--pace",
            "1000",
            "--kernel",
            "/proc/self/exe",
            "--initrd",
            "/proc/self/exe",
            "--program",
        ])
        .arg(&subject)
        .arg("--state")
        .arg(scratch.join("state"))
        .args(leak)
        .env("TMPDIR", &scratch)
        .output()
        .expect("xtask starts");
    std::fs::remove_dir_all(&scratch).expect("the folder is still there");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

#[test]
fn an_honest_program_ends_well_after_all_kills() {
    let (good, text) = chaos("honest", &[]);
    assert!(good, "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("CHAOS seed=3 kill=")).count(), 8, "{text}");
    assert!(text.contains("SCAN left=0") && text.contains("CHAOS seed=3 kills=8 OK"), "{text}");
}

#[test]
fn a_process_that_a_kill_made_it_forget_is_found() {
    let (good, text) = chaos("leaky", &["--leak", "process"]);
    let left: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("left processes: pid=")?.split(' ').next()).collect();
    left.iter().for_each(|pid| drop(Command::new("kill").arg(pid).status()));
    assert!(!good, "{text}");
    assert!(!left.is_empty(), "{text}");
}
