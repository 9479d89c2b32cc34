//! The test guest under a bare emulator: what its payloads promise on the console.
//!
//! Two machines are joined by a pair of datagram sockets; nothing of the project's own runs beside them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A scratch folder that ends with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("xtask-guest-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder for the test");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running machine; killed when dropped.
struct Machine {
    child: Child,
    console: PathBuf,
}

impl Machine {
    fn boot(
        guest: &Path,
        scratch: &Scratch,
        name: &str,
        append: &str,
        devices: &[impl AsRef<OsStr>],
    ) -> Self {
        let console = scratch.path(&format!("{name}.console"));
        let output = File::create(&console).expect("a console file");
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "192",
                "-nographic",
                "-no-reboot",
                "-nodefaults",
            ])
            .arg("-kernel")
            .arg(guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(guest.join("initrd.cpio.gz"))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 {append}"), "-serial", "stdio"])
            .args(devices)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("a console file"))
            .stderr(output)
            .spawn()
            .expect("the emulator starts");
        Self { child, console }
    }

    fn printed(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// The rest of the first line that starts with `word`, once it is there.
    fn line(&mut self, word: &str) -> String {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let printed = self.printed();
            // The firmware leaves escape sequences in front of the first line.
            let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(rest) = whole.lines().find_map(|l| l.split_once(word).map(|(_, rest)| rest)) {
                return rest.trim().to_owned();
            }
            if self.child.try_wait().expect("the emulator is ours").is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("no `{word}` on the console:\n{}", self.printed());
    }

    fn type_line(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("a piped console");
        writeln!(stdin, "{text}").expect("the console takes a line");
    }

    /// Waits until the machine has switched itself off.
    fn off(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("the emulator is ours").is_none() {
            assert!(Instant::now() < end, "it does not switch off:\n{}", self.printed());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the guest is, or `None` after leaving a note that this test was skipped.
fn guest(test: &str) -> Option<PathBuf> {
    let set_up = Command::new(env!("CARGO_BIN_EXE_xtask")).arg("setup").output().expect("xtask starts");
    if set_up.status.success() {
        let text = String::from_utf8_lossy(&set_up.stdout).into_owned();
        let kernel = text
            .lines()
            .find_map(|l| l.strip_prefix("guest kernel:"))
            .expect("it tells the kernel")
            .trim()
            .to_owned();
        return Some(Path::new(&kernel).parent().expect("a file in a folder").to_path_buf());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders above");
    let skips =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from).join("skips");
    fs::create_dir_all(&skips).expect("a folder for skips");
    fs::write(skips.join(test), format!("SKIP {test}: no guest or no emulator; run cargo xtask setup\n"))
        .expect("a note");
    None
}

fn network(scratch: &Scratch, me: u8, peer: u8) -> Vec<String> {
    let socket = |n: u8| scratch.path(&format!("{n}.sock")).display().to_string();
    let netdev = format!(
        "dgram,id=n,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        socket(me),
        socket(peer)
    );
    let device = format!("virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:00:{me:02x}");
    ["-netdev", &netdev, "-device", &device].map(str::to_owned).to_vec()
}

fn volume(path: &Path) -> Vec<String> {
    let drive = format!("file={},if=none,id=d,format=raw", path.display());
    ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"].map(str::to_owned).to_vec()
}

#[test]
fn a_page_made_once_is_fetched_and_survives_the_death_of_its_server() {
    let Some(guest) = guest("a_page_made_once_is_fetched_and_survives_the_death_of_its_server") else {
        return;
    };
    let scratch = Scratch::new("page");
    let disk = scratch.path("volume");
    File::create(&disk).and_then(|f| f.set_len(64 << 20)).expect("a volume");
    let web_devices = [network(&scratch, 1, 2), volume(&disk)].concat();
    let web_append = "guest.run=web guest.ip4=10.0.0.1/24 guest.ip6=fd00::1/64";
    let client_append = "guest.run=client guest.ip4=10.0.0.2/24 guest.ip6=fd00::2/64 guest.peer4=10.0.0.1 guest.peer6=fd00::1";

    let mut web = Machine::boot(&guest, &scratch, "web", web_append, &web_devices);
    let mut client = Machine::boot(&guest, &scratch, "client", client_append, &network(&scratch, 2, 1));
    assert_eq!(web.line("WEB-MKFS "), "ext4");
    let nonce = web.line("WEB-NONCE ");
    assert!(client.line("PING4 ok ms=").parse::<f64>().is_ok());
    assert!(client.line("PING6 ok ms=").parse::<f64>().is_ok());
    assert_eq!(client.line("CLOSED "), "refused port=81", "nothing filters here");
    assert!(client.line(&format!("FETCH nonce={nonce} ")).contains("connect_ms="));
    client.line(&format!("FETCH6 nonce={nonce} "));
    assert!(client.line("TICK ").contains("max_gap_ms="));
    client.type_line("stats");
    assert!(
        client
            .line("NETSTAT rx=")
            .split_once(" tx=")
            .is_some_and(|(rx, tx)| rx.parse::<u64>().is_ok() && tx.parse::<u64>().is_ok())
    );

    // Killed without a word: what was written is whole.
    drop(web);
    let check = Command::new("/sbin/e2fsck").arg("-fn").arg(&disk).output().expect("e2fsck starts");
    let told =
        format!("{}{}", String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{told}");
    assert!(!told.contains("journal recovery"), "the file system had nothing open: {told}");

    // The next one makes nothing, and serves the old page.
    let mut web = Machine::boot(&guest, &scratch, "web-again", web_append, &web_devices);
    assert_eq!(web.line("WEB-NONCE "), nonce);
    assert!(!web.printed().contains("WEB-MKFS"));
    assert!(client.line("GAP seq=").contains("ms="), "its absence was noticed");
    client.type_line("poweroff");
    client.off();
}

#[test]
fn an_address_comes_from_the_network_and_the_power_button_is_obeyed() {
    let Some(guest) = guest("an_address_comes_from_the_network_and_the_power_button_is_obeyed") else {
        return;
    };
    let scratch = Scratch::new("dhcp");
    let monitor = scratch.path("monitor");
    let listen = format!("unix:{},server,nowait", monitor.display());
    let net = ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="];
    let devices = [&net[..], &["-monitor", &listen]].concat();
    let mut machine = Machine::boot(&guest, &scratch, "shell", "guest.run=shell", &devices);
    // The emulator's own network: RFC 2131 answers with 10.0.2.15, a router that advertises fec0::/64.
    assert!(machine.line("NET4 addr=10.0.2.15/").contains("gw=10.0.2.2"));
    let boot_id = machine.line("GUEST-READY boot_id=");
    assert!(machine.line("ALIVE boot_id=").starts_with(boot_id.split(' ').next().unwrap_or("-")));
    machine.type_line("sh until ip -6 addr show dev eth0 scope site | grep -q fec0; do sleep 0.1; done; echo AUTOCONFIGURED yes");
    assert_eq!(machine.line("AUTOCONFIGURED "), "yes");
    let mut monitor = std::os::unix::net::UnixStream::connect(&monitor).expect("the monitor listens");
    monitor.write_all(b"system_powerdown\n").expect("the monitor takes a line");
    machine.off();
    assert!(machine.printed().contains("GUEST-OFF"));
}

const PATIENCE: Duration = Duration::from_secs(240);
