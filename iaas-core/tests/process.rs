//! Real processes: roles that outlive their control process, are adopted, and leave nothing behind.
//!
//! This program is everything at once: without arguments it runs the tests, re-executed by a launcher it is a role, and with
//! `control` or `fence` as its first argument it is another control process, which the tests kill. What is left of a role is
//! judged by a scan of `/proc` and of the folders, not by the launcher.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Seek;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use ciborium::Value;
use iaas_core::Epoch;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::process::Adopted;
use iaas_core::process::HostFence;
use iaas_core::process::Launcher;
use iaas_core::process::Reply;
use iaas_core::process::Request;
use iaas_core::process::Role;
use iaas_core::process::RoleHandle;
use iaas_core::process::RoleStart;
use iaas_core::process::Roles;
use iaas_core::process::init;
use iaas_core::spi::Call;
use iaas_core::spi::Site;
use iaas_core::testing::skip;
use libtest_mimic::Arguments;
use libtest_mimic::Trial;
use rustix::process::PidfdFlags;
use rustix::process::PidfdGetfdFlags;
use uuid::Uuid;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    before_init(&args);
    init(&ROLES.iter().fold(Roles::new(), |roles, name| roles.with_role(Echo(name))));
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_, "control", state, runtime, role, id] => control(state, runtime, role, id),
        [_, "fence", state, epoch, log] => fence_worker(Path::new(state), epoch, log),
        _ => libtest_mimic::run(&Arguments::from_args(), trials()).exit_code(),
    }
}

fn trials() -> Vec<Trial> {
    macro_rules! trials {
        ($($name:ident),+ $(,)?) => {
            vec![$(Trial::test(stringify!($name), || { $name(); Ok(()) })),+]
        };
    }
    trials![
        a_role_starts_answers_passes_descriptors_and_leaves_nothing,
        a_role_outlives_a_killed_control_process_and_is_adopted,
        a_kill_of_control_at_any_moment_leaves_nothing_or_something_that_is_found,
        a_role_dies_with_control_until_it_is_recorded,
        a_role_whose_control_died_before_it_looked_does_not_start,
        a_pid_that_another_process_has_now_is_neither_adopted_nor_killed,
        a_role_whose_record_is_lost_is_found_by_its_lock_and_socket,
        a_dead_role_keeps_its_counters_passport_and_log_until_it_is_forgotten,
        a_role_that_ends_before_its_hello_tells_why_and_leaves_nothing,
        an_id_is_started_once_however_many_try,
        a_role_inherits_neither_descriptors_nor_secrets,
        bad_wishes_are_refused_before_anything_is_made,
        older_leaders_in_other_processes_are_fenced,
        a_killed_holder_does_not_block_a_claim,
    ]
}

// ---- the role ------------------------------------------------------------------------------------------------------

const ROLES: [&str; 3] = ["echo", "stuck", "late"];

#[derive(Debug)]
struct Echo(&'static str);

impl Role for Echo {
    fn name(&self) -> &'static str {
        self.0
    }

    fn main(&self, start: RoleStart, _roles: &Roles) -> ExitCode {
        println!("hello from {}", start.id);
        let RoleStart { server, counters, args, fds, .. } = start;
        let stopper = server.stopper();
        let served = server.serve(|request: Request| match request.verb.as_str() {
            "echo" => Ok(Reply { body: request.body, fds: request.fds }),
            "args" => Ok(Reply::from(args.clone())),
            "granted" => read_all(fds.get("file").expect("it was granted")).map(Reply::from),
            "read" => read_all(&request.fds.first().expect("one came").1).map(Reply::from),
            "count" => {
                counters.write(&request.body).map(|seq| Bytes::copy_from_slice(&seq.to_le_bytes()).into())
            }
            "whose" => Ok(Bytes::from(format!("{:?} {:?}", request.op, request.trace)).into()),
            "fds" => Ok(Bytes::from(open_files(std::process::id()).join("\n")).into()),
            "env" => Ok(Bytes::from(std::env::vars().map(|(k, _)| k + "\n").collect::<String>()).into()),
            "stop" => {
                stopper.stop();
                Ok(Reply::from(Bytes::from_static(b"bye")))
            }
            verb => Err(Error::unsupported(format!("no verb `{verb}`"))),
        });
        if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// What the tests do to a role before its first line.
fn before_init(args: &[String]) {
    let [_, marker, role, id, ..] = args else { return };
    if marker != "--iaas-role" {
        return;
    }
    // `HOME` is one of the few variables that reach a role.
    let state = || PathBuf::from(std::env::var_os("HOME").expect("the tests set it"));
    match role.as_str() {
        "broken" => {
            eprintln!("a library is missing");
            std::process::exit(3);
        }
        // Control will wait in the open of its temporary record until somebody reads from this.
        "stuck" => mkfifo(&state().join("roles/stuck").join(id).join("role.new")),
        "late" => {
            fs::write(state().join("started"), "").expect("the state folder is there");
            wait_for("the test", || state().join("go").exists());
        }
        _ => {}
    }
}

fn read_all(fd: &OwnedFd) -> Result<Bytes> {
    let mut file = File::from(fd.try_clone().expect("room for a file"));
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(|e| Error::invalid("unreadable").because(&e))?;
    Ok(bytes.into())
}

// ---- a control process to kill -------------------------------------------------------------------------------------

/// Starts one role, says so, and waits to be killed.
fn control(state: &str, runtime: &str, role: &str, id: &str) -> ExitCode {
    let id = Uuid::parse_str(id).expect("a uuid");
    // Inherited by whatever is executed from here on: `dup` does not set close-on-exec.
    let leak = rustix::io::dup(File::open("/proc/version").expect("a file")).expect("a descriptor");
    let started = block_on(async {
        let launcher = Launcher::new(state, runtime, None);
        launcher
            .spawn(role, id, Bytes::from_static(b"passport"), Bytes::from_static(b"args"), Vec::new())
            .await
    });
    match started {
        Ok(handle) => println!("spawned {}", handle.pid()),
        Err(e) => println!("failed {e:#}"),
    }
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop(leak);
    ExitCode::SUCCESS
}

/// Writes its epoch to the log while it is allowed to, until it is fenced.
fn fence_worker(state: &Path, epoch: &str, log: &str) -> ExitCode {
    let epoch: u64 = epoch.parse().expect("a number");
    let fence = HostFence::open(state, Id::from_uuid(CLOUD), SITE).expect("a fence");
    let mut log = File::options().append(true).open(log).expect("the log");
    loop {
        match fence.enter_now(&call(epoch)) {
            Ok(_guard) => {
                // Nearly always within an effect, so that a claim that does not wait is seen.
                for _ in 0..200 {
                    log.write_all(format!("{epoch}\n").as_bytes()).expect("room");
                    std::thread::yield_now();
                }
            }
            Err(e) if e.kind() == ErrorKind::Fenced => return ExitCode::SUCCESS,
            Err(e) => {
                println!("failed {e:#}");
                return ExitCode::FAILURE;
            }
        }
    }
}

// ---- the stories ---------------------------------------------------------------------------------------------------

fn a_role_starts_answers_passes_descriptors_and_leaves_nothing() {
    let lab = Lab::new();
    let id = lab.id();
    block_on(async {
        let fds = vec![("file".to_owned(), lab.file("granted"))];
        let role = lab
            .launcher
            .spawn("echo", id, Bytes::new(), Bytes::from_static(b"arguments"), fds)
            .await
            .unwrap();
        assert_eq!(ask(&role, "args").await.unwrap(), "arguments");
        assert_eq!(ask(&role, "granted").await.unwrap(), "granted");
        let fds = vec![("other".to_owned(), lab.file("passed"))];
        assert_eq!(role.call("read", Bytes::new(), fds, LONG).await.unwrap(), "passed");
        let fds = vec![("a".to_owned(), lab.file("A")), ("b".to_owned(), lab.file("B"))];
        let (body, fds) = role.call_fds("echo", Bytes::from(vec![7; 900_000]), fds, LONG).await.unwrap();
        assert_eq!(body, vec![7; 900_000]);
        let names: Vec<(&str, Bytes)> =
            fds.iter().map(|(n, fd)| (n.as_str(), read_all(fd).unwrap())).collect();
        assert_eq!(names, [("a", Bytes::from_static(b"A")), ("b", Bytes::from_static(b"B"))]);
        let traced = Call { trace: Some("t".to_owned()), ..call(1) };
        let whose = ask(&role.on_behalf(&traced), "whose").await.unwrap();
        assert_eq!(whose, format!("{:?} {:?}", Some(traced.op.uuid()), traced.trace));
        let error = ask(&role, "levitate").await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unsupported, Outcome::NotDone));
        lab.check_modes(&role);
        assert_eq!(ask(&role, "stop").await.unwrap(), "bye");
        role.exited().await.unwrap();
        assert!(!role.is_alive().unwrap());
        assert!(!Path::new("/proc").join(role.pid().to_string()).exists(), "not even a zombie");
        let error = ask(&role, "args").await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
        assert_eq!(role.folder().log_tail(100), format!("hello from {id}\n"));
        lab.launcher.forget("echo", id).await.unwrap();
        lab.launcher.forget("echo", id).await.unwrap();
    });
    lab.nothing_is_left(id);
}

fn a_role_outlives_a_killed_control_process_and_is_adopted() {
    let lab = Lab::new();
    let id = lab.id();
    let mut control = lab.control("echo", id);
    assert!(control.says().starts_with("spawned "));
    control.kill();
    block_on(async {
        let (passport, role) = lab.adopted("echo", id).await.unwrap();
        assert_eq!(passport, "passport");
        let role = role.unwrap();
        assert_eq!(ask(&role, "args").await.unwrap(), "args");
        assert_eq!(lab.processes(id), [role.pid()]);
        let looks: Vec<_> = (0..200)
            .map(|_| {
                let launcher = lab.launcher.clone();
                tokio::spawn(async move { launcher.find("echo", id).await })
            })
            .collect();
        for look in looks {
            let found = look.await.unwrap().unwrap();
            assert!(matches!(found, Some((_, Adopted::Alive(_)))), "looking is in nobody's way: {found:?}");
        }
        lab.launcher.set_passport("echo", id, Bytes::from_static(b"new")).await.unwrap();
        assert_eq!(lab.adopted("echo", id).await.unwrap().0, "new");
        role.kill().await.unwrap();
        assert!(lab.adopted("echo", id).await.unwrap().1.is_none());
        lab.launcher.forget("echo", id).await.unwrap();
        assert!(lab.adopted("echo", id).await.is_none());
    });
    lab.nothing_is_left(id);
}

fn a_kill_of_control_at_any_moment_leaves_nothing_or_something_that_is_found() {
    let lab = Lab::new();
    // As soon as a file of each step of a start is there, and then at finely spread moments.
    let steps = ["", "passport", "log", "lock", "counters", "role.new", "role.cbor"];
    let spread = (0..40).map(|n| Duration::from_micros(n * 500));
    let moments = steps.iter().map(|s| (Some(*s), Duration::ZERO)).chain(spread.map(|d| (None, d)));
    let mut seen = BTreeSet::new();
    for (step, delay) in moments {
        let id = lab.id();
        let mut control = lab.control("echo", id);
        match step {
            Some(step) => {
                let path = lab.dir("echo", id).join(step);
                // `role.new` may come and go unseen; then `role.cbor` is there.
                let after = lab.dir("echo", id).join("role.cbor");
                wait_for(step, || path.exists() || after.exists());
            }
            None => {
                wait_for("the start", || lab.dir("echo", id).exists());
                std::thread::sleep(delay); // only spreads the moments; nothing is asserted about it
            }
        }
        control.kill();
        let outcome = block_on(async {
            match lab.adopted("echo", id).await {
                None => "none",
                Some((_, None)) => "dead",
                Some((passport, Some(role))) => {
                    assert_eq!(passport, "passport");
                    assert_eq!(ask(&role, "args").await.unwrap(), "args");
                    assert_eq!(lab.processes(id), [role.pid()]);
                    "alive"
                }
            }
        });
        if outcome != "alive" {
            wait_for("the end of what was being started", || lab.processes(id).is_empty());
        }
        seen.insert(outcome);
        block_on(lab.launcher.forget("echo", id)).unwrap();
        lab.nothing_is_left(id);
    }
    assert!(seen.contains("dead"), "no kill came before the record");
}

fn a_role_dies_with_control_until_it_is_recorded() {
    let lab = Lab::new();
    let id = lab.id();
    let mut control = lab.control("stuck", id);
    // It listens: so it has said that it is ready, and control is about to wait in `role.new`.
    let socket = lab.launcher.folder("stuck", id).unwrap().socket().to_owned();
    wait_for("the role", || socket.exists());
    assert_eq!(lab.processes(id).len(), 1);
    // Holding control's end of the connection, we make sure that it is not the end of file that ends the role.
    let Some(held) = control.steal_sockets() else {
        skip!("a_role_dies_with_control_until_it_is_recorded", NO_STEALING);
    };
    assert!(!held.is_empty());
    control.kill();
    wait_for("the role's end", || lab.processes(id).is_empty());
    block_on(async {
        assert!(lab.adopted("stuck", id).await.unwrap().1.is_none());
        lab.launcher.forget("stuck", id).await.unwrap();
    });
    lab.nothing_is_left(id);
}

fn a_role_whose_control_died_before_it_looked_does_not_start() {
    let lab = Lab::new();
    let id = lab.id();
    let mut control = lab.control("late", id);
    wait_for("the role", || lab.state().join("started").exists());
    let Some(held) = control.steal_sockets() else {
        skip!("a_role_whose_control_died_before_it_looked_does_not_start", NO_STEALING);
    };
    assert!(!held.is_empty());
    control.kill();
    fs::write(lab.state().join("go"), "").unwrap();
    wait_for("the role's end", || lab.processes(id).is_empty());
    assert!(!lab.dir("late", id).join("lock").exists(), "it touched nothing");
    block_on(lab.launcher.forget("late", id)).unwrap();
    lab.nothing_is_left(id);
}

fn a_pid_that_another_process_has_now_is_neither_adopted_nor_killed() {
    let lab = Lab::new();
    let id = lab.id();
    let mut bystander = Control(Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap());
    // Start times count in clock ticks of 10 ms; a process of the same tick as the role would be a stranger test.
    let uptime =
        || fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse::<f64>().unwrap();
    let started = uptime();
    wait_for("another tick", || uptime() > started + 0.02);
    block_on(async {
        let role = lab.spawn("echo", id).await.unwrap();
        role.kill().await.unwrap();
        lab.edit_record("echo", id, "pid", bystander.0.id().into());
        assert!(lab.adopted("echo", id).await.unwrap().1.is_none());
        lab.launcher.forget("echo", id).await.unwrap();
    });
    assert!(bystander.0.try_wait().unwrap().is_none(), "the bystander lives");
    bystander.kill();
    lab.nothing_is_left(id);
}

fn a_role_whose_record_is_lost_is_found_by_its_lock_and_socket() {
    let lab = Lab::new();
    let id = lab.id();
    let record = lab.dir("echo", id).join("role.cbor");
    block_on(async {
        let role = lab.spawn("echo", id).await.unwrap();
        fs::remove_file(&record).unwrap();
        assert_eq!(lab.adopted("echo", id).await.unwrap().1.unwrap().identity(), role.identity());
        fs::write(&record, [0xff]).unwrap();
        assert_eq!(lab.adopted("echo", id).await.unwrap().1.unwrap().identity(), role.identity());
        // The record of another life: the lock says that this one is not over.
        lab.edit_record("echo", id, "start", 1.into());
        assert_eq!(lab.adopted("echo", id).await.unwrap().1.unwrap().identity(), role.identity());
        fs::remove_file(&record).unwrap();
        lab.launcher.forget("echo", id).await.unwrap();
    });
    lab.nothing_is_left(id);
}

fn a_dead_role_keeps_its_counters_passport_and_log_until_it_is_forgotten() {
    let lab = Lab::new();
    let id = lab.id();
    block_on(async {
        let role = lab.spawn("echo", id).await.unwrap();
        assert_eq!(role.counters().unwrap(), None);
        role.call("count", Bytes::from_static(b"seven"), Vec::new(), LONG).await.unwrap();
        role.call("count", Bytes::from_static(b"eight"), Vec::new(), LONG).await.unwrap();
        role.kill().await.unwrap();
        assert_eq!(role.counters().unwrap(), Some((2, Bytes::from_static(b"eight"))));
        let found = lab.launcher.adopt("echo").await.unwrap();
        let [(found_id, passport, Adopted::Dead(folder))] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((*found_id, passport.as_ref()), (id, b"passport".as_slice()));
        assert_eq!(folder.counters().unwrap(), Some((2, Bytes::from_static(b"eight"))));
        assert_eq!(folder.log_tail(5), format!("{}\n", &id.to_string()[32..]));
        let error = lab.spawn("echo", id).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Conflict, Outcome::NotDone));
        lab.launcher.forget("echo", id).await.unwrap();
        assert!(lab.spawn("echo", id).await.unwrap().is_alive().unwrap());
        lab.launcher.forget("echo", id).await.unwrap();
    });
    lab.nothing_is_left(id);
}

fn a_role_that_ends_before_its_hello_tells_why_and_leaves_nothing() {
    let lab = Lab::new();
    for (role, why) in [("broken", "a library is missing"), ("ghost", "no role `ghost`")] {
        let id = lab.id();
        let error = block_on(lab.spawn(role, id)).unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
        assert!(error.operator().iter().any(|line| line.contains(why)), "{error:#}");
        lab.nothing_is_left(id);
    }
    let id = lab.id();
    let launcher = Launcher::new(lab.state(), lab.runtime(), Some("/no/such/binary".into()));
    let error = block_on(launcher.spawn("echo", id, Bytes::new(), Bytes::new(), Vec::new())).unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
    lab.nothing_is_left(id);
}

fn an_id_is_started_once_however_many_try() {
    let lab = Lab::new();
    let id = lab.id();
    block_on(async {
        let tries: Vec<_> = (0..8)
            .map(|_| {
                // A launcher of its own, like another process has.
                let launcher = Launcher::new(lab.state(), lab.runtime(), None);
                tokio::spawn(async move {
                    launcher.spawn("echo", id, Bytes::new(), Bytes::new(), Vec::new()).await
                })
            })
            .collect();
        let mut started = 0;
        for one in tries {
            match one.await.unwrap() {
                Ok(_) => started += 1,
                Err(e) => assert_eq!((e.kind(), e.outcome()), (ErrorKind::AlreadyExists, Outcome::NotDone)),
            }
        }
        assert_eq!(started, 1);
        assert_eq!(lab.processes(id).len(), 1);
        lab.launcher.forget("echo", id).await.unwrap();
    });
    lab.nothing_is_left(id);
}

fn a_role_inherits_neither_descriptors_nor_secrets() {
    let lab = Lab::new();
    let id = lab.id();
    let mut control = lab.control("echo", id);
    assert!(control.says().starts_with("spawned "));
    let leaked = |pid| open_files(pid).iter().any(|file| file == "/proc/version");
    assert!(leaked(control.0.id()), "the control process leaks on purpose");
    block_on(async {
        let role = lab.adopted("echo", id).await.unwrap().1.unwrap();
        assert!(!leaked(role.pid()), "{:?}", open_files(role.pid()));
        let seen_inside = String::from_utf8(ask(&role, "fds").await.unwrap().into()).unwrap();
        assert!(seen_inside.starts_with("/dev/null\n"), "standard input: {seen_inside}");
        let env = String::from_utf8(ask(&role, "env").await.unwrap().into()).unwrap();
        assert!(env.contains("HOME\n") && !env.contains("IAAS_TEST_SECRET"), "{env}");
        lab.launcher.forget("echo", id).await.unwrap();
    });
    control.kill();
    lab.nothing_is_left(id);
}

fn bad_wishes_are_refused_before_anything_is_made() {
    let lab = Lab::new();
    let id = lab.id();
    let long = Launcher::new(lab.state(), lab.runtime().join("x".repeat(80)), None);
    let spawn = |launcher: &Launcher, role: &str, passport: usize, args: usize| {
        let (passport, args) = (vec![0; passport].into(), vec![0; args].into());
        block_on(launcher.spawn(role, id, passport, args, Vec::new())).unwrap_err()
    };
    for error in [
        spawn(&lab.launcher, "../up", 0, 0),
        spawn(&lab.launcher, "", 0, 0),
        spawn(&lab.launcher, "echo", 16 * 1024 + 1, 0),
        spawn(&lab.launcher, "echo", 0, 1 << 20),
        spawn(&long, "echo", 0, 0),
    ] {
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Invalid, Outcome::NotDone), "{error:#}");
    }
    assert!(!lab.state().join("roles").exists());
}

fn older_leaders_in_other_processes_are_fenced() {
    let lab = Lab::new();
    let log = lab.state().join("log");
    fs::write(&log, "").unwrap();
    let wrote = |line: &str| fs::read_to_string(&log).unwrap().lines().any(|l| l == line);
    let mut old: Vec<Child> = (0..2).map(|_| lab.fence_worker(1, &log)).collect();
    wait_for("effects of epoch 1", || wrote("1"));
    let fence = HostFence::open(&lab.state(), Id::from_uuid(CLOUD), SITE).unwrap();
    block_on(fence.claim(&call(2))).unwrap();
    File::options().append(true).open(&log).unwrap().write_all(b"claimed\n").unwrap();
    let mut new = lab.fence_worker(2, &log);
    assert!(old.iter_mut().all(|child| child.wait().unwrap().success()));
    wait_for("effects of epoch 2", || wrote("2"));
    block_on(fence.claim(&call(3))).unwrap();
    assert!(new.wait().unwrap().success());
    let lines = fs::read_to_string(&log).unwrap();
    let (_, after) = lines.split_once("claimed\n").unwrap();
    assert!(after.lines().all(|line| line == "2"), "an effect of epoch 1 after the claim of epoch 2");
}

fn a_killed_holder_does_not_block_a_claim() {
    let lab = Lab::new();
    let log = lab.state().join("log");
    // Writing to a full pipe, the worker is stuck within its effect.
    mkfifo(&log);
    let pipe = File::options().read(true).write(true).open(&log).unwrap();
    rustix::pipe::fcntl_setpipe_size(&pipe, 4096).unwrap();
    (&pipe).write_all(&[b'x'; 4096]).unwrap();
    let mut holder = lab.fence_worker(1, &log);
    let fence = HostFence::open(&lab.state(), Id::from_uuid(CLOUD), SITE).unwrap();
    wait_for("the holder", || fence.newest().unwrap().is_some());
    let impatient = Call { budget: Duration::from_millis(50), ..call(2) };
    assert_eq!(block_on(fence.claim(&impatient)).unwrap_err().kind(), ErrorKind::Timeout);
    holder.kill().unwrap();
    holder.wait().unwrap();
    block_on(fence.claim(&call(2))).unwrap();
}

// ---- the lab -------------------------------------------------------------------------------------------------------

/// Folders of its own, and the ids that it gave out: what is left of them dies with it.
struct Lab {
    dir: tempfile::TempDir,
    launcher: Launcher,
    ids: Mutex<Vec<Uuid>>,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("lab").tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        let launcher = Launcher::new(dir.path().join("state"), dir.path().join("run"), None);
        Self { dir, launcher, ids: Mutex::default() }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn runtime(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn dir(&self, role: &str, id: Uuid) -> PathBuf {
        self.state().join("roles").join(role).join(id.to_string())
    }

    fn id(&self) -> Uuid {
        let id = Uuid::now_v7();
        self.ids.lock().unwrap().push(id);
        id
    }

    fn file(&self, content: &str) -> OwnedFd {
        let mut file = tempfile::tempfile_in(self.dir.path()).unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file.into()
    }

    async fn spawn(&self, role: &str, id: Uuid) -> Result<RoleHandle> {
        self.launcher.spawn(role, id, Bytes::from_static(b"passport"), Bytes::new(), Vec::new()).await
    }

    /// The one role that is to be found: `None` if there is none, else whether it lives.
    async fn adopted(&self, role: &str, id: Uuid) -> Option<(Bytes, Option<RoleHandle>)> {
        let until = Instant::now() + LONG;
        loop {
            let found = self.launcher.adopt(role).await.unwrap();
            match found.into_iter().find(|(found, ..)| *found == id) {
                None => return None,
                Some((_, passport, Adopted::Alive(role))) => return Some((passport, Some(role))),
                Some((_, passport, Adopted::Dead(_))) => return Some((passport, None)),
                Some((.., Adopted::Unclear(e))) => assert!(Instant::now() < until, "{e:#}"),
            }
        }
    }

    fn control(&self, role: &str, id: Uuid) -> Control {
        let child = this_program()
            .args([
                "control",
                &self.state().to_string_lossy(),
                &self.runtime().to_string_lossy(),
                role,
                &id.to_string(),
            ])
            .env("IAAS_TEST_SECRET", "secret")
            .env("HOME", self.state())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Control(child)
    }

    fn fence_worker(&self, epoch: u64, log: &Path) -> Child {
        this_program()
            .args(["fence", &self.state().to_string_lossy(), &epoch.to_string(), &log.to_string_lossy()])
            .spawn()
            .unwrap()
    }

    /// Changes a number in the identity of a stored record.
    fn edit_record(&self, role: &str, id: Uuid, field: &str, number: Value) {
        let path = self.dir(role, id).join("role.cbor");
        let mut record: Value = ciborium::from_reader(fs::read(&path).unwrap().as_slice()).unwrap();
        let place = record.as_map_mut().unwrap().iter_mut().find(|(k, _)| *k == "identity".into()).unwrap();
        let fields = place.1.as_map_mut().unwrap();
        fields.iter_mut().find(|(k, _)| *k == field.into()).unwrap().1 = number;
        let mut bytes = Vec::new();
        ciborium::into_writer(&record, &mut bytes).unwrap();
        fs::write(&path, bytes).unwrap();
    }

    fn check_modes(&self, role: &RoleHandle) {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(role.folder().path()), 0o700);
        assert_eq!(mode(&self.runtime()), 0o700);
        assert_eq!(mode(role.folder().socket()) & 0o077, 0);
        for file in ["lock", "role.cbor", "passport", "log", "counters"] {
            assert_eq!(mode(&role.folder().path().join(file)), 0o600, "{file}");
        }
    }

    /// The pids of the processes that were started as the role `id`.
    fn processes(&self, id: Uuid) -> Vec<u32> {
        let name = id.to_string();
        let pids =
            fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
        // A zombie's command line is empty.
        let is_it = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let args: Vec<&[u8]> = line.split(|b| *b == 0).collect();
            args.contains(&b"--iaas-role".as_slice()) && args.contains(&name.as_bytes())
        };
        pids.filter(is_it).collect()
    }

    fn nothing_is_left(&self, id: Uuid) {
        assert_eq!(self.processes(id), [0; 0]);
        let names = [id.to_string(), id.simple().to_string()];
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                assert!(!names.iter().any(|n| name.contains(n)), "{} is left", path.display());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for id in self.ids.lock().unwrap().iter() {
            for pid in self.processes(*id) {
                let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Another process, which does not outlive the test.
struct Control(Child);

impl Control {
    fn says(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Copies of its sockets, so that they stay open when it is killed; `None` if this user may not take them.
    fn steal_sockets(&self) -> Option<Vec<OwnedFd>> {
        let pid = rustix::process::Pid::from_raw(self.0.id().try_into().unwrap()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let fds = fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().map(|e| e.unwrap().path());
        let sockets =
            fds.filter(|fd| fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")));
        let numbers = sockets.map(|fd| fd.file_name().unwrap().to_str().unwrap().parse().unwrap());
        let copies: std::result::Result<Vec<_>, _> =
            numbers.map(|fd| rustix::process::pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())).collect();
        match copies {
            Err(rustix::io::Errno::PERM | rustix::io::Errno::NOSYS) => None,
            copies => Some(copies.unwrap()),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn ask(role: &RoleHandle, verb: &str) -> Result<Bytes> {
    role.call(verb, Bytes::new(), Vec::new(), LONG).await
}

fn call(epoch: u64) -> Call {
    Call {
        cloud: Id::from_uuid(CLOUD),
        incarnation: Uuid::from_u128(9),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::nil()),
        trace: None,
        budget: LONG,
    }
}

/// What the open descriptors of a process refer to, in order of their numbers.
fn open_files(pid: u32) -> Vec<String> {
    let mut files: Vec<(u32, String)> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| {
            let number = path.file_name()?.to_str()?.parse().ok()?;
            Some((number, fs::read_link(&path).ok()?.to_string_lossy().into_owned()))
        })
        .collect();
    files.sort_unstable();
    files.into_iter().map(|(_, file)| file).collect()
}

fn this_program() -> Command {
    Command::new(std::env::current_exe().unwrap())
}

fn mkfifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what} did not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

const NO_STEALING: &str =
    "pidfd_getfd is not allowed; set kernel.yama.ptrace_scope to 0 or 1, or run as root";
const LONG: Duration = Duration::from_secs(60);
const CLOUD: Uuid = Uuid::from_u128(1);
const SITE: Site = Site::Host(Id::from_uuid(Uuid::from_u128(2)));
