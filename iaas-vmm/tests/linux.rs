//! An unmodified distribution kernel on our own machines. It needs a real KVM, and the guest's files.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(feature = "kvm")]

#[path = "hypervisor/disk.rs"]
mod disk;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Term;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use iaas_core::testing::skip;
use iaas_vmm::Capability;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;
use iaas_vmm::vm::VmBuilder;
use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

/// Skips where KVM interprets, or where there is no guest.
macro_rules! need_guest {
    ($name:literal) => {
        match (iaas_vmm::probe(), guest()) {
            (Capability::Hardware, Some(folder)) => folder,
            (Capability::Hardware, None) => {
                skip!($name, "no guest kernel; make it with `cargo xtask setup`, or set IAAS_GUEST_DIR")
            }
            (found, _) if std::env::var_os(IN_LAB).is_some() => panic!("{found}"),
            (found, _) => skip!($name, &format!("{found}; run it in the lab: `cargo xtask lab`")),
        }
    };
}

fn guest() -> Option<PathBuf> {
    let named = std::env::var_os("IAAS_GUEST_DIR").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest").into());
    folder.join("vmlinuz").exists().then_some(folder)
}

fn linux(folder: &std::path::Path, initrd: &str, line: &str) -> VmBuilder {
    let open = |name: &str| File::open(folder.join(name)).unwrap();
    let boot = Boot::kernel(open("vmlinuz")).with_initrd(open(initrd));
    let line = format!("console=ttyS0 panic=-1 {line}");
    Vm::builder().with_memory(256 << 20).with_boot(boot.with_command_line(line))
}

/// A console that is read line by line, with what was read before a failure.
struct Console<'a> {
    vm: &'a Vm,
    next: u64,
    seen: String,
}

impl<'a> Console<'a> {
    fn of(vm: &'a Vm) -> Self {
        Self { vm, next: 0, seen: String::new() }
    }

    /// Reads until `text` comes. Fails after five minutes without a byte.
    fn expect(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let output = self.vm.read_console(self.next, 4096, Duration::from_secs(300));
            assert!(!output.bytes.is_empty(), "`{text}` did not come; before:\n{}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&output.bytes));
            self.next = output.next;
        }
        let end = self.seen.find(text).unwrap() + text.len();
        self.seen.drain(..end);
    }

    /// Types a command for the guest's shell.
    fn send(&mut self, command: &str) {
        let line = format!("sh {command}\n");
        assert_eq!(self.vm.write_console(line.as_bytes()), line.len());
    }

    /// Runs a command that prints `text` and succeeds.
    fn run(&mut self, command: &str, text: &str) {
        self.send(command);
        self.expect(text);
        self.expect("SH rc=0");
    }
}

const LONG: Duration = Duration::from_secs(300);
/// Set where a real KVM is promised; its value goes on the guest's command line.
const IN_LAB: &str = "LAB_NONCE";

#[test]
fn kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours() {
    let folder = need_guest!("kvm_runs_an_unmodified_kernel_with_a_command_line_of_ours");
    let nonce = format!("lab.nonce={}", std::env::var(IN_LAB).unwrap_or_else(|_| "none".to_owned()));
    let vm = linux(&folder, "initrd.cpio.gz", &format!("guest.run=shell {nonce}")).build().unwrap();
    vm.start().unwrap();
    let mut console = Console::of(&vm);
    // What the guest's kernel says, on the serial port that this machine captures.
    console.expect("Hypervisor detected: KVM");
    println!("EVIDENCE Hypervisor detected: KVM");
    console.expect("GUEST-READY");
    console.run("cat /proc/cmdline", &nonce);
    println!("EVIDENCE /proc/cmdline has {nonce}");
    assert_eq!(vm.stop(LONG), End::Stopped);
}

#[test]
fn a_debian_kernel_boots_and_obeys_the_power_button() {
    let folder = need_guest!("a_debian_kernel_boots_and_obeys_the_power_button");
    let vm = linux(&folder, "initrd-tiny.cpio.gz", "guest.run=tiny quiet").with_vcpus(2).build().unwrap();
    let start = Instant::now();
    vm.start().unwrap();
    Console::of(&vm).expect("GUEST-READY");
    eprintln!("spawn to init: {:?}; processors: {:?}", start.elapsed(), vm.usage());
    assert_eq!(vm.stop(LONG), End::Stopped);
    assert_eq!(vm.device_faults(), []);
}

#[test]
fn a_panic_resets() {
    let folder = need_guest!("a_panic_resets");
    let vm = linux(&folder, "initrd-tiny.cpio.gz", "rdinit=/missing root=/dev/nothing").build().unwrap();
    vm.start().unwrap();
    Console::of(&vm).expect("Kernel panic");
    assert_eq!(vm.wait(LONG), Some(End::GuestReset));
}

/// One end of a cable.
#[derive(Debug)]
struct Plug {
    inward: Arc<Lane>,
    outward: Arc<Lane>,
}

#[derive(Debug)]
struct Lane(Mutex<VecDeque<Vec<u8>>>, EventFd);

fn cable() -> (Box<dyn FramePort>, Box<dyn FramePort>) {
    let lane = || Arc::new(Lane(Mutex::default(), EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()));
    let (one, two) = (lane(), lane());
    let end = |inward: &Arc<Lane>, outward: &Arc<Lane>| {
        Box::new(Plug { inward: inward.clone(), outward: outward.clone() })
    };
    (end(&one, &two), end(&two, &one))
}

impl FramePort for Plug {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        want
    }
    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let _ = self.inward.1.read();
        let mut frames = self.inward.0.lock().unwrap();
        let mut count = 0;
        for (buffers, len) in into.iter().zip(lens) {
            let Some(frame) = frames.pop_front() else { break };
            *len = u32::try_from(buffers.write_at(0, &frame)).unwrap();
            count += 1;
        }
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }
    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for frame in frames {
            let mut bytes = vec![0; frame.len()];
            frame.read_at(0, &mut bytes);
            self.outward.0.lock().unwrap().push_back(bytes);
        }
        self.outward.1.write(1).unwrap();
        Ok(frames.len())
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.inward.1.as_fd()
    }
}

fn volume(file: File) -> Box<dyn BlockDevice> {
    let target = Target { id: uuid::Uuid::nil(), term: Term(1), mode: Mode::Write, forms: vec![], key: None };
    let mut grant = Grant::default();
    grant.fds.insert("file".into(), file.into());
    disk::PlainFile.open(&target, grant, None, &Env::default()).unwrap()
}

#[test]
fn a_guest_uses_a_disk_a_nic_and_randomness_and_survives_pauses() {
    let folder = need_guest!("a_guest_uses_a_disk_a_nic_and_randomness_and_survives_pauses");
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 << 20).unwrap();
    let volume = volume(file.try_clone().unwrap());
    let (left, right) = cable();
    let line = |n: u8| format!("quiet guest.run=shell guest.ip4=10.0.0.{n}/24");
    let one = linux(&folder, "initrd.cpio.gz", &line(1))
        .with_disk(&*volume, "data")
        .with_nic(left, [2, 0, 0, 0, 0, 1])
        .with_entropy();
    let one = one.build().unwrap();
    let two = linux(&folder, "initrd.cpio.gz", &line(2)).with_nic(right, [2, 0, 0, 0, 0, 2]).build().unwrap();
    [&one, &two].into_iter().for_each(|vm| vm.start().unwrap());
    let (mut first, mut second) = (Console::of(&one), Console::of(&two));
    first.expect("GUEST-READY");
    second.expect("GUEST-READY");
    first.run("cat /sys/class/misc/hw_random/rng_current", "virtio_rng");
    first.run("head -c 4 /dev/hwrng > /tmp/r", "");
    first.run("cat /sys/block/vda/serial; echo", "data");
    first.run("seq 1 100000 > /tmp/n; dd if=/tmp/n of=/dev/vda bs=64k conv=fsync", "");
    first.run(
        "echo 3 > /proc/sys/vm/drop_caches; head -c $(stat -c %s /tmp/n) /dev/vda | md5sum; md5sum < /tmp/n",
        "",
    );
    let mut written = vec![0; 20];
    file.read_exact_at(&mut written, 0).unwrap();
    assert_eq!(written, b"1\n2\n3\n4\n5\n6\n7\n8\n9\n10"[..20]);
    first.run("ping -c 3 10.0.0.2", "3 packets received");
    first.send("ping -c 20 -i 0.2 10.0.0.2");
    for _ in 0..20 {
        one.pause().unwrap();
        one.start().unwrap();
    }
    first.expect("20 packets received");
    assert_eq!(two.stop(LONG), End::Stopped);
    assert_eq!((one.device_faults(), two.device_faults()), (vec![], vec![]));
    assert_eq!(one.kill(), End::Forced);
}
