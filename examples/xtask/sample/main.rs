//! A small program with the habits of a control process, to test the crash machinery on: it journals an intent, makes a file, a
//! socket and a process that outlives it, and takes all away again. `--leak file|socket|process` makes it forget one when
//! it is killed; `--leak always` even when it is not; `--leak stuck` makes it fail after a crash. `--chaos` tells the story again
//! and again for four seconds.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| args.iter().position(|a| a == flag).and_then(|at| args.get(at + 1)).cloned();
    let state = PathBuf::from(value("--state").ok_or("--state DIR")?);
    let has = |flag: &str| args.iter().any(|a| a == flag);
    if has("--iaas-role") {
        return role();
    }
    let leak = value("--leak").unwrap_or_default();
    fs::create_dir_all(&state)?;
    undo(&state)?;
    if leak == "stuck" && has("--settle") {
        return Err("will not settle".into());
    }
    let end = Instant::now() + Duration::from_secs(if has("--chaos") { 4 } else { 0 });
    story(&state, &leak)?;
    while Instant::now() < end {
        story(&state, &leak)?;
    }
    println!("SETTLED\nOK");
    Ok(())
}

/// Create, use, delete, under an intent.
fn story(state: &Path, leak: &str) -> Result<()> {
    // What stands before the intent is forgotten by a crash: the mistake that the judge must see.
    let forgotten = state.join(format!("forgotten-{}", std::process::id()));
    let mut process = None;
    match leak {
        "file" | "always" => drop(File::create(&forgotten)?),
        "socket" => drop(UnixListener::bind(&forgotten)?),
        "process" => {
            process = Some(Command::new("sleep").arg("1000").current_dir(state).process_group(0).spawn()?)
        }
        _ => {}
    }
    durable(state, "intent", b"create")?;
    fs::create_dir(state.join("volume"))?;
    durable(&state.join("volume"), "data", &[7; 4096])?;
    let socket = UnixListener::bind(state.join("socket"))?;
    start_role(state)?;
    std::thread::scope(|threads| {
        threads.spawn(|| {
            durable(&state.join("volume"), "used", b"from a second thread").map_err(|e| e.to_string())
        });
    });
    drop(socket);
    undo(state)?;
    if leak != "always" && !leak.is_empty() {
        let _ = fs::remove_file(forgotten);
    }
    if let Some(mut process) = process {
        process.kill()?;
        process.wait()?;
    }
    // Named as one of the files that stay of a cloud.
    durable(state, "ids.json", b"settled")
}

/// Removes whatever of the story exists, the intent last.
fn undo(state: &Path) -> Result<()> {
    if let Ok(pid) = fs::read_to_string(state.join("role.pid")) {
        end_role(pid.trim().parse()?)?;
        fs::remove_file(state.join("role.pid"))?;
    }
    let _ = fs::remove_file(state.join("socket"));
    let _ = fs::remove_dir_all(state.join("volume"));
    for name in ["role.pid.new", "ids.json.new", "intent.new", "intent"] {
        let _ = fs::remove_file(state.join(name));
    }
    Ok(())
}

/// The role ends by itself unless it hears that it has been written down.
fn start_role(state: &Path) -> Result<()> {
    let mut role = Command::new(std::env::current_exe()?);
    role.args(["--iaas-role", "sample", "--state"])
        .arg(state)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0);
    let mut child = role.spawn()?;
    durable(state, "role.pid", child.id().to_string().as_bytes())?;
    // A role that is dead already hears nothing.
    let _ = child.stdin.take().ok_or("no stdin")?.write_all(b"a");
    Ok(())
}

fn role() -> Result<()> {
    let mut heard = [0];
    if std::io::stdin().read(&mut heard)? == 1 {
        std::thread::sleep(Duration::from_secs(1000));
    }
    Ok(())
}

/// The program that it runs tells whether the number is still the role's: unlike its arguments, which are empty for a moment in
/// the middle of exec, that holds from its first moment to its last.
fn end_role(pid: i32) -> Result<()> {
    let ours = std::env::current_exe()?;
    let runs = || fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == ours);
    if runs() {
        // Someone else may have ended it meanwhile.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        while runs() {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// Writes a file whole or not at all.
fn durable(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let beside = dir.join(format!("{name}.new"));
    let mut file = File::create(&beside)?;
    file.write_all(content)?;
    file.sync_data()?;
    fs::rename(beside, dir.join(name))?;
    Ok(())
}
