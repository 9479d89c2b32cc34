//! What the tests of this folder share: the guest's files, its console, volumes, and processes of their own.

use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Term;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;
use iaas_vmm::vm::VmBuilder;

use crate::disk;

/// The folder of the guest's files. Skips where KVM interprets, or where there is no guest.
macro_rules! need_guest {
    ($name:literal) => {
        match (iaas_vmm::probe(), crate::rig::guest()) {
            (iaas_vmm::Capability::Hardware, Some(folder)) => folder,
            (iaas_vmm::Capability::Hardware, None) => iaas_core::testing::skip!(
                $name,
                "no guest kernel; make it with `cargo xtask setup`, or set IAAS_GUEST_DIR"
            ),
            (found, _) if std::env::var_os(crate::rig::IN_LAB).is_some() => panic!("{found}"),
            (found, _) => {
                iaas_core::testing::skip!($name, &format!("{found}; run it in the lab: `cargo xtask lab`"))
            }
        }
    };
}
pub(crate) use need_guest;

pub(crate) fn guest() -> Option<PathBuf> {
    let named = std::env::var_os("IAAS_GUEST_DIR").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest").into());
    folder.join("vmlinuz").exists().then_some(folder)
}

/// A machine of 256 MiB with the guest's kernel.
pub(crate) fn linux(folder: &Path, initrd: &str, line: &str) -> VmBuilder {
    let open = |name: &str| File::open(folder.join(name)).unwrap();
    let boot = Boot::kernel(open("vmlinuz")).with_initrd(open(initrd));
    let line = format!("console=ttyS0 panic=-1 {line}");
    Vm::builder().with_memory(256 << 20).with_boot(boot.with_command_line(line))
}

/// A machine whose guest obeys commands on its console.
pub(crate) fn shell(folder: &Path) -> VmBuilder {
    linux(folder, "initrd-tiny.cpio.gz", "quiet guest.run=shell")
}

/// The volume in a file, opened anew as the next boot of an instance would.
pub(crate) fn volume(path: &Path) -> Box<dyn BlockDevice> {
    let token = path.to_str().unwrap().to_owned().into_bytes().into();
    let forms = vec![Form::Opener { scheme: disk::SCHEME.into(), version: 1, token }];
    let target = Target { id: uuid::Uuid::nil(), term: Term(1), mode: Mode::Write, forms, key: None };
    let grant = disk::PlainFile.prepare(&target).unwrap();
    disk::PlainFile.open(&target, grant, None, &Env::default()).unwrap()
}

/// A console that is read line by line.
pub(crate) struct Console<'a> {
    vm: &'a Vm,
    next: u64,
    /// Read, and not yet asked for.
    ahead: String,
}

impl<'a> Console<'a> {
    /// Of a guest that has started.
    pub(crate) fn of(vm: &'a Vm) -> Self {
        Self { vm, next: 0, ahead: String::new() }
    }

    /// Of a guest that has come up.
    pub(crate) fn when_ready(vm: &'a Vm) -> Self {
        let mut console = Self::of(vm);
        console.line("GUEST-READY");
        console
    }

    /// The next line that has `text` in it; those before are passed over.
    pub(crate) fn line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            let line = self.next_line(text, deadline);
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The next line. What is missing of it must come before `deadline`.
    fn next_line(&mut self, wanted: &str, deadline: Instant) -> String {
        loop {
            if let Some((line, rest)) = self.ahead.split_once('\n') {
                let line = line.trim_end().to_owned();
                self.ahead = rest.to_owned();
                return line;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let output = self.vm.read_console(self.next, 4096, left);
            assert!(!output.bytes.is_empty(), "`{wanted}` did not come; {}", self.story());
            self.ahead.push_str(&String::from_utf8_lossy(&output.bytes));
            self.next = output.next;
        }
    }

    /// How the machine is, and all that it has said.
    fn story(&self) -> String {
        let said = self.vm.read_console(0, usize::MAX, Duration::ZERO).bytes;
        let (end, faults) = (self.vm.wait(Duration::ZERO), self.vm.device_faults());
        format!("end {end:?}, faults {faults:?}, console:\n{}", String::from_utf8_lossy(&said))
    }

    /// Types a command for the guest's shell.
    pub(crate) fn send(&mut self, command: &str) {
        let line = format!("sh {command}\n");
        assert_eq!(self.vm.write_console(line.as_bytes()), line.len());
    }

    /// Waits for the end of a command, which must be a good one, and gives the lines that were printed until then.
    pub(crate) fn done(&mut self) -> Vec<String> {
        let deadline = Instant::now() + LONG;
        let mut lines = Vec::new();
        loop {
            let line = self.next_line("SH rc=", deadline);
            if line.starts_with("SH rc=") {
                assert_eq!(line, "SH rc=0", "after {lines:#?}; {}", self.story());
                return lines;
            }
            // The guest says each second that it lives.
            if !line.starts_with("ALIVE ") {
                lines.push(line);
            }
        }
    }

    /// Runs a command, which must succeed, and gives what it printed.
    pub(crate) fn run(&mut self, command: &str) -> Vec<String> {
        self.send(command);
        self.done()
    }

    /// Runs a command that prints one line.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        let mut lines = self.run(command);
        assert_eq!(lines.len(), 1, "`{command}` printed {lines:#?}");
        lines.remove(0)
    }
}

/// Whether this process runs the test `name` and no other. If not, the test is run in a process that does, and what became
/// of it there is what becomes of it here.
pub(crate) fn alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = only(name).env(ALONE, "1").output().unwrap();
    let told =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name that no test has would be a success, too.
    assert!(output.status.success() && told.contains("1 passed"), "in a process of its own:\n{told}");
    false
}

/// This program, to run only the test `name`.
pub(crate) fn only(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--test-threads=1", "--nocapture"]);
    command
}

/// Waits until `is_so`, which must be within five minutes.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not after {LONG:?}");
        std::thread::yield_now();
    }
}

/// Longer than anything takes that works, on the slowest machine.
pub(crate) const LONG: Duration = Duration::from_secs(300);
/// Set where a real KVM is promised; its value goes on the guest's command line.
pub(crate) const IN_LAB: &str = "LAB_NONCE";
/// Set in a process that runs one test.
const ALONE: &str = "TEST_RUNS_ALONE";
