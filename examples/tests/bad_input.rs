//! What the composition of this machine answers when its surroundings are wrong: which kind of error, naming which thing and
//! which remedy, with nothing left behind; and that it works again once they are right.
//!
//! As root each row has a small disk and a view of the mounts of its own, and starts control as an ordinary user where that
//! matters. An ordinary user sees less of it; what cannot be arranged is skipped by name.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use iaas_core::ErrorKind;
use iaas_core::store::RedbStore;
use iaas_core::testing::note_skip;
use nix::mount::MntFlags;
use nix::mount::MsFlags;
use nix::mount::mount;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use nix::sys::stat::SFlag;

/// One row: what is wrong, and what shall be said of it.
struct Case {
    name: &'static str,
    /// Makes it wrong; `None` if that cannot be done here, which it has noted.
    wrong: fn(&Place) -> Option<Wrong>,
    kind: Kind,
    names: &'static [&'static str],
    remedy: &'static str,
}

/// What becomes of the start.
enum Kind {
    Fails(ErrorKind),
    /// It goes on without, as far as the kernel that is not there.
    GoesOn,
}
use Kind::Fails;
use Kind::GoesOn;

const CASES: &[Case] = &[
    Case {
        name: "a store that another process has open",
        wrong: held_store,
        kind: Fails(ErrorKind::Conflict),
        names: &["cloud.redb", "in use by another process"],
        remedy: "folder of its own",
    },
    Case {
        name: "the state folder of another cloud",
        wrong: anothers_ids,
        kind: Fails(ErrorKind::Conflict),
        names: &["the pool of another cloud", "/state/volumes"],
        remedy: "a folder of its own",
    },
    Case {
        name: "a runtime folder whose path is too long",
        wrong: long_runtime_folder,
        kind: Fails(ErrorKind::Invalid),
        names: &["runtime folder is too long", "rrrr/runner-"],
        remedy: "choose a short one",
    },
    Case {
        name: "a full disk before there is a cloud",
        wrong: full_disk_at_first,
        kind: Fails(ErrorKind::Unavailable),
        names: &["the disk of", "cloud.redb"],
        remedy: "free space on it",
    },
    Case {
        name: "a full disk under a cloud",
        wrong: full_disk,
        kind: Fails(ErrorKind::Unavailable),
        names: &["this host's disk is full", "/state/host/fence/"],
        remedy: "free space below the state folder",
    },
    Case {
        name: "a limit on the size of files",
        wrong: limited_files,
        kind: Fails(ErrorKind::Unavailable),
        names: &["the disk of cloud.redb is full", "/state/store/cloud.redb"],
        remedy: "free space on it",
    },
    Case {
        name: "a kernel that this user may not read",
        wrong: closed_kernel,
        kind: Fails(ErrorKind::Invalid),
        names: &["closed` cannot be read: permission denied"],
        remedy: "check the path and its permissions",
    },
    Case {
        name: "no QEMU",
        wrong: no_qemu,
        kind: Fails(ErrorKind::Unavailable),
        names: &["there is no `qemu-system-x86_64` on this host"],
        remedy: "install it",
    },
    Case {
        name: "no permission for KVM",
        wrong: closed_kvm,
        kind: GoesOn,
        names: &["machine      QEMU with Tcg", "this user may not use /dev/kvm"],
        remedy: "add this user to the group `kvm`",
    },
];

#[test]
fn wrong_surroundings_are_named_with_their_remedy_and_leave_nothing() {
    // On a thread of its own: a view of the mounts is a thread's. All are tried, so that one does not hide another.
    let fails = |case: &&'static Case| {
        let row = std::thread::Builder::new().name(case.name.to_owned());
        let case = *case;
        row.spawn(move || check(case)).unwrap().join().is_err()
    };
    let failed: Vec<_> = CASES.iter().filter(fails).map(|case| case.name).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

fn check(case: &Case) {
    let place = Place::new();
    let works = place.control(&as_it_is);
    assert!(works.contains(as_far_as()), "{works}");
    let Some(wrong) = (case.wrong)(&place) else { return };
    let before = place.scan();
    let text = place.control(&*wrong.command);
    let kind = match case.kind {
        Fails(kind) => format!("quickstart failed ({kind:?})"),
        GoesOn => as_far_as().to_owned(),
    };
    for word in case.names.iter().chain([&case.remedy, &kind.as_str()]) {
        assert!(text.contains(word), "{}: `{word}` in: {text}", case.name);
    }
    assert!(!text.contains("panicked"), "{text}");
    let (after, name) = (place.scan(), case.name);
    let changed: Vec<_> = after.symmetric_difference(&before).collect();
    assert!(changed.is_empty(), "{name}: left or taken: {changed:#?}");
    (wrong.right)();
    let again = place.control(&as_it_is);
    assert!(again.contains(as_far_as()), "{}, and right again: {again}", case.name);
}

/// What a start ends with whose surroundings are right: the kernel of the guests is not there.
fn as_far_as() -> &'static str {
    if iaas_vmm::qemu::find().is_ok() { "absent` cannot be read" } else { "there is no `qemu-system-x86_64`" }
}

fn as_it_is(_: &mut Command) {}

/// How control is started in wrong surroundings, and how they become right.
struct Wrong {
    command: Box<dyn Fn(&mut Command)>,
    right: Box<dyn FnOnce()>,
}

impl Wrong {
    fn new(command: impl Fn(&mut Command) + 'static, right: impl FnOnce() + 'static) -> Option<Self> {
        Some(Self { command: Box::new(command), right: Box::new(right) })
    }
}

fn held_store(place: &Place) -> Option<Wrong> {
    let held = RedbStore::open(place.state().join("store/cloud.redb")).unwrap();
    Wrong::new(as_it_is, || drop(held))
}

fn anothers_ids(place: &Place) -> Option<Wrong> {
    let ids = place.state().join("ids.json");
    let own = fs::read(&ids).unwrap();
    let other = Place::new();
    other.control(&as_it_is);
    fs::copy(other.state().join("ids.json"), &ids).unwrap();
    Wrong::new(as_it_is, move || fs::write(ids, own).unwrap())
}

fn long_runtime_folder(place: &Place) -> Option<Wrong> {
    let long = place.path().join("r".repeat(100));
    let command = move |command: &mut Command| {
        command.env("IAAS_RUNTIME_DIR", &long);
    };
    Wrong::new(command, || ())
}

fn full_disk_at_first(place: &Place) -> Option<Wrong> {
    fs::remove_dir_all(place.state()).unwrap();
    fs::create_dir_all(place.state().join("store")).unwrap();
    if place.own_disk { full_disk(place) } else { limited_files(place) }
}

/// Fills the disk up to its last block.
fn full_disk(place: &Place) -> Option<Wrong> {
    if !place.own_disk {
        note_skip("a_full_disk_under_a_cloud", "no disk of its own could be mounted; run as root");
        return None;
    }
    let ballast = place.path().join("ballast");
    let mut file = File::create(&ballast).unwrap();
    let full = std::iter::repeat_with(|| file.write_all(&[1; 4096])).find_map(|r| r.err()).unwrap();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    Wrong::new(as_it_is, || fs::remove_file(ballast).unwrap())
}

/// What an ordinary user can have of a full disk: EFBIG.
fn limited_files(_: &Place) -> Option<Wrong> {
    Wrong::new(limit_files, || ())
}

fn limit_files(command: &mut Command) {
    use nix::sys::resource::Resource;
    use nix::sys::signal::SigHandler;
    use nix::sys::signal::Signal;
    // SAFETY: between fork and exec only system calls are made.
    #[expect(unsafe_code, reason = "the limit is for the child alone")]
    unsafe {
        command.pre_exec(|| {
            nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn)?;
            nix::sys::resource::setrlimit(Resource::RLIMIT_FSIZE, 4096, 4096).map_err(Into::into)
        });
    }
}

fn closed_kernel(place: &Place) -> Option<Wrong> {
    if iaas_vmm::qemu::find().is_err() {
        note_skip("a_kernel_that_this_user_may_not_read", "no QEMU; run `cargo xtask setup`");
        return None;
    }
    let closed = place.path().join("closed");
    fs::write(&closed, "a kernel").unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    let user = place.ordinary_user();
    let command = move |command: &mut Command| {
        user(command);
        command.arg("--kernel").arg(&closed);
    };
    Wrong::new(command, || ())
}

/// QEMU is looked for in `PATH` and where distributions put it: something else lies over it there.
fn no_qemu(place: &Place) -> Option<Wrong> {
    let mut hidden = Vec::new();
    while let Ok(qemu) = iaas_vmm::qemu::find() {
        if !place.own_disk || !lay_over(Path::new("/dev/null"), &qemu) {
            note_skip("no_qemu", "QEMU cannot be hidden; run as root, or where there is none");
            return None;
        }
        hidden.push(qemu);
    }
    Wrong::new(as_it_is, move || hidden.iter().for_each(|qemu| nix::mount::umount(qemu).unwrap()))
}

/// The device as most distributions have it: a node that only its group may open lies over it, where one can be made.
fn closed_kvm(place: &Place) -> Option<Wrong> {
    let (kvm, node) = (Path::new("/dev/kvm"), place.path().join("kvm"));
    let Ok(device) = fs::metadata(kvm).map(|device| device.rdev()) else {
        note_skip("no_permission_for_kvm", "no /dev/kvm; run on a machine that has it");
        return None;
    };
    let user = place.ordinary_user();
    let laid = place.own_disk
        && nix::sys::stat::mknod(&node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, device).is_ok()
        && lay_over(&node, kvm);
    let right = move || {
        if laid {
            nix::mount::umount(kvm).unwrap()
        }
    };
    if found_by_ordinary_user() != iaas_vmm::Capability::NoPermission {
        right();
        note_skip("no_permission_for_kvm", "every user may open /dev/kvm; run as root");
        return None;
    }
    Wrong::new(user, right)
}

fn found_by_ordinary_user() -> iaas_vmm::Capability {
    let probe = || {
        if nix::unistd::geteuid().is_root() {
            // For this thread alone; the right to pass over permissions goes with it.
            nix::unistd::setfsgid(NOBODY.into());
            nix::unistd::setfsuid(NOBODY.into());
        }
        iaas_vmm::probe()
    };
    std::thread::spawn(probe).join().unwrap()
}

fn lay_over(what: &Path, target: &Path) -> bool {
    mount(Some(what), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).is_ok()
}

/// A state folder and a runtime folder of its own.
struct Place {
    folder: tempfile::TempDir,
    /// The folder is a small file system, which this thread and its children alone see.
    own_disk: bool,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own_disk = own_disk(folder.path()).is_ok();
        assert!(own_disk || !nix::unistd::geteuid().is_root() || std::env::var_os("CI").is_none());
        Self { folder, own_disk }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Starts control as a user would, waits for its end, and answers with all it said.
    fn control(&self, change: &dyn Fn(&mut Command)) -> String {
        // Through the descriptor, because an ordinary user may not be able to enter the folder where root builds.
        let program = File::open(env!("CARGO_BIN_EXE_quickstart")).unwrap();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.arg("--control").arg("--state").arg(self.state());
        for option in ["--kernel", "--initrd"] {
            command.arg(option).arg(self.path().join("absent"));
        }
        command.env("IAAS_RUNTIME_DIR", self.path().join("run"));
        change(&mut command);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{output:?}");
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat()
    }

    /// Gives all files to an ordinary user, and answers how to start a command as that one: as this one, if it is one.
    fn ordinary_user(&self) -> impl Fn(&mut Command) + use<> {
        let root = nix::unistd::geteuid().is_root();
        if root {
            for path in tree(self.path()).keys().map(PathBuf::as_path).chain([self.path()]) {
                std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        move |command| {
            if root {
                command.uid(NOBODY).gid(NOBODY);
            }
        }
    }

    /// All that could be left behind: files, sockets, and processes that were started for it or hold a file of it open.
    fn scan(&self) -> BTreeSet<String> {
        let files = tree(self.path()).into_iter().map(|(path, is)| format!("{is} {}", path.display()));
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        // Its path is the last field.
        let sockets = sockets.lines().filter_map(|line| Some(line.split_whitespace().nth(7)?.to_owned()));
        let sockets = sockets.filter(|path| path.contains(self.path().to_str().unwrap()));
        files.chain(sockets.map(|path| format!("bound {path}"))).chain(processes(self.path())).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.own_disk {
            let _ = nix::mount::umount2(self.path(), MntFlags::MNT_DETACH);
        }
    }
}

/// Everything below `folder`, and what it is.
fn tree(folder: &Path) -> BTreeMap<PathBuf, &'static str> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let is = entry.file_type().unwrap();
        if is.is_dir() {
            all.extend(tree(&entry.path()));
        }
        let is = match is {
            _ if is.is_dir() => "folder",
            _ if is.is_file() => "file",
            _ if is.is_socket() => "socket",
            _ => "other",
        };
        all.insert(entry.path(), is);
    }
    all
}

fn processes(place: &Path) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let others = all.filter(|process| !process.ends_with(std::process::id().to_string()));
    let line = |process: &Path| fs::read_to_string(process.join("cmdline")).unwrap_or_default();
    let of_place = |process: &PathBuf| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut open = open.filter_map(|fd| fs::read_link(fd.path()).ok());
        line(process).contains(place.to_str().unwrap()) || open.any(|file| file.starts_with(place))
    };
    others.filter(of_place).map(|process| format!("process {}", line(&process))).collect()
}

/// From here on this thread sees mounts of its own, and `folder` is a file system of its own.
fn own_disk(folder: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=700"))
}

/// The user that owns nothing.
const NOBODY: u32 = 65534;
