//! Two real guests in the cloud of this machine: what QEMU holds, what is billed, and what a killed QEMU costs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

mod peers;

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use iaas_core::ByteSize;
use iaas_core::Id;
use iaas_core::PortRange;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Protocol;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_examples::guest::Guest;
use iaas_examples::guest::value;
use iaas_examples::machine;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_holds_no_volume_the_bill_agrees_with_the_runner_and_a_killed_qemu_comes_back() {
    let Some((kernel, initrd)) = guest_files() else {
        iaas_core::testing::skip!("real_guests", "no QEMU or no guest; run `cargo xtask setup`");
    };
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let _guard = Guard(state.clone());
    let quickstart = PathBuf::from(env!("CARGO_BIN_EXE_quickstart"));
    let machine = machine::open_as(&state, Some(quickstart)).await.unwrap();
    let me = machine.cloud.session_as("operator");
    let shop = shop(&me, &kernel, &initrd).await;

    let mut web = Guest::follow(&me, shop.web);
    let (at, first) = web.line_after(0, "GUEST-READY", BOOT).await.unwrap();
    let nonce = web.line("WEB-NONCE", BOOT).await.unwrap().replace("WEB-NONCE ", "");
    let mut client = Guest::follow(&me, shop.client);
    let page = client.line("FETCH nonce", BOOT).await.unwrap();
    assert_eq!(value(&page, "nonce"), Some(nonce.as_str()));

    for qemu in [qemu_of(&state, shop.web), qemu_of(&state, shop.client)] {
        holds_nothing_of_the_host(qemu);
    }
    the_bill_agrees_with_the_runners(&me, &shop, &state).await;
    let log = state.join(format!("host/roles/runner/{}/log", shop.web.uuid()));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        log.contains(&shop.created.uuid().simple().to_string()),
        "the runner's log names no operation: {log}"
    );

    nix::sys::signal::kill(Pid::from_raw(qemu_of(&state, shop.web)), Signal::SIGKILL).unwrap();
    // The scroll-back goes on over boots.
    let (at, second) = web.line_after(at + 1, "GUEST-READY", BOOT).await.unwrap();
    assert_ne!(value(&second, "boot_id"), value(&first, "boot_id"));
    let (_, again) = web.line_after(at, "WEB-NONCE", BOOT).await.unwrap();
    assert_eq!(again, format!("WEB-NONCE {nonce}"));
    let from = client.now().await.unwrap();
    let page = client.line_after(from, "FETCH nonce", BOOT).await.unwrap().1;
    assert_eq!(value(&page, "nonce"), Some(nonce.as_str()));
    drop((web, client));
    machine::delete_all(&me, shop.project).await.unwrap();
    assert_eq!(machine.cloud.orphans_removed(), 0);
    machine.close().await.unwrap();
}

/// Ends what a failed test leaves running: roles outlive their control.
struct Guard(PathBuf);

impl Drop for Guard {
    fn drop(&mut self) {
        for pid in processes(|line| line.starts_with("iaas-")) {
            if files_of(pid).iter().any(|(_, file)| Path::new(file).starts_with(&self.0)) {
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

struct Shop {
    project: Id<Project>,
    web: Id<Instance>,
    client: Id<Instance>,
    /// The operation that created the web.
    created: Id<Operation>,
}

/// One network, a web with a volume, and a client of it.
async fn shop(me: &Session, kernel: &Path, initrd: &Path) -> Shop {
    let organization = me.organizations().create(Owner::Cloud, "acme", Empty {}).await.unwrap().out;
    let project = me.projects().create(organization, "shop", ProjectSpec { organization }).await.unwrap().out;
    me.price_books().create(Owner::Cloud, "prices", machine::prices().unwrap()).await.unwrap();
    let network = me.networks().create(project, "vpc", NetworkSpec::default()).await.unwrap().out;
    let cidrs = vec!["10.1.1.0/24".parse().unwrap(), "fd00:1:1::/64".parse().unwrap()];
    let subnet = SubnetSpec::new(network, cidrs).unwrap();
    let subnet = me.subnets().create(project, "front", subnet).await.unwrap().out;
    let rules = [Direction::Ingress, Direction::Egress].map(|direction| Rule {
        direction,
        protocol: Protocol::Any,
        ports: PortRange::ALL,
        remote: Remote::Any,
    });
    let group = SecurityGroupSpec::new(rules.to_vec()).unwrap();
    let group = me.security_groups().create(project, "open", group).await.unwrap().out;
    let mut ports = Vec::new();
    for name in ["web", "client"] {
        let spec = PortSpec { subnet, groups: [group].into(), addresses: Vec::new() };
        ports.push(me.ports().create(project, name, spec).await.unwrap().out);
    }
    let addresses = me.ports().get(ports[0]).await.unwrap().bind.addrs;
    let size = VolumeSpec::new(ByteSize::gib(1)).unwrap();
    let volume = me.volumes().create(project, "pages", size).await.unwrap().wait().await.unwrap();
    let cmdline = "console=ttyS0 panic=-1 quiet";
    let image = me.images().import(project, "linux", kernel, Some(initrd), cmdline).await.unwrap().out;
    let size = InstanceTypeSpec::new(1, ByteSize::mib(192)).unwrap();
    let size = me.instance_types().create(Owner::Cloud, "small", size).await.unwrap().out;
    let instance = |name: &str, cmdline: String, port, volumes| NewInstance {
        name: name.to_owned(),
        instance_type: size,
        image,
        cmdline,
        nics: vec![Nic::Port(port)],
        volumes,
    };
    let peers: Vec<_> =
        addresses.iter().map(|a| format!("guest.peer{}={a}", if a.is_ipv4() { 4 } else { 6 })).collect();
    let web = instance("web", "guest.run=web".to_owned(), ports[0], vec![volume]);
    let client = instance("client", format!("guest.run=client {}", peers.join(" ")), ports[1], Vec::new());
    let web = me.instances().launch(project, web).await.unwrap();
    let client = me.instances().launch(project, client).await.unwrap();
    let created = web.id();
    Shop { project, web: web.wait().await.unwrap(), client: client.wait().await.unwrap(), created }
}

/// No file but its own binary's, memory, the null device, events and its log; no socket with a name or without a peer in
/// its runner.
fn holds_nothing_of_the_host(qemu: i32) {
    let named = named_sockets();
    let files = files_of(qemu);
    let runner = parent_of(qemu);
    let kept = files_of(runner);
    assert!(files.iter().any(|(_, file)| file.starts_with("/memfd:mem")), "{files:?}");
    for (fd, file) in files {
        let socket = file.strip_prefix("socket:[").and_then(|s| s.strip_suffix("]"));
        if let Some(inode) = socket {
            assert_eq!(named.get(inode).map(String::as_str), Some(""), "fd {fd}: {file} is no unnamed pair");
            let peer = peers::peer(inode.parse().unwrap()).map(|peer| format!("socket:[{peer}]"));
            let at_runner = peer.as_ref().is_some_and(|peer| kept.iter().any(|(_, file)| file == peer));
            assert!(at_runner, "fd {fd}: the peer {peer:?} of {file} is not at the runner: {kept:?}");
            continue;
        }
        let harmless = ["/dev/null", "/memfd:", "anon_inode:", "/dev/kvm", "/dev/urandom", "pipe:["];
        let own = file.ends_with("vmm.log") || file.contains("/artifacts/");
        assert!(own || harmless.iter().any(|start| file.starts_with(start)), "fd {fd} is {file}");
        assert!(!file.contains("/volumes/"), "fd {fd} is the volume {file}");
    }
}

/// The process that started another; proc_pid_stat(5), field 4.
fn parent_of(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = &stat[stat.rfind(')').unwrap() + 1..];
    after_name.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The Unix sockets of this machine by inode, with their paths. Sockets of other families are not in it.
fn named_sockets() -> BTreeMap<String, String> {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            Some(((*words.get(6)?).to_owned(), (*words.get(7).unwrap_or(&"")).to_owned()))
        })
        .collect()
}

fn files_of(pid: i32) -> Vec<(String, String)> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let link = |path: PathBuf| std::fs::read_link(path).ok().map(|l| l.to_string_lossy().into_owned());
    fds.filter_map(|fd| Some((fd.file_name().to_string_lossy().into_owned(), link(fd.path())?))).collect()
}

/// The QEMU of an instance.
fn qemu_of(state: &Path, instance: Id<Instance>) -> i32 {
    let found = processes(|line| line.contains(&format!("guest={instance}")));
    *found.first().unwrap_or_else(|| panic!("no QEMU of {instance} in {}", state.display()))
}

/// The processes whose command line is such.
fn processes(such: impl Fn(&str) -> bool) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let line = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.filter(|pid| such(&String::from_utf8_lossy(&line(*pid)))).collect()
}

/// vCPU time: what the bill says, against the pages that the runners write, just before and just after.
async fn the_bill_agrees_with_the_runners(me: &Session, shop: &Shop, state: &Path) {
    let since = me.projects().get(shop.project).await.unwrap().meta.created;
    let ran = |id| machine::ran(state, id).unwrap();
    let before = [ran(shop.web), ran(shop.client)];
    let bill = me.bill_so_far(shop.project, since).await.unwrap();
    for (id, before) in [shop.web, shop.client].into_iter().zip(before) {
        let after = machine::ran_until_now(state, id).await.unwrap();
        let told = machine::check_vcpu(&bill, id, before, after).unwrap();
        // An hour too much is found.
        machine::check_vcpu(&bill, id, before + 3600.0, after + 3600.0).expect_err(&told);
    }
}

fn guest_files() -> Option<(PathBuf, PathBuf)> {
    iaas_vmm::qemu::find().ok()?;
    let built = Path::new(env!("CARGO_BIN_EXE_quickstart")).ancestors().nth(2)?.join("guest");
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let folder = [built, beside].into_iter().find(|f| f.join("vmlinuz").exists())?;
    Some((folder.join("vmlinuz"), folder.join("initrd.cpio.gz")))
}

/// A guest under emulation needs seconds to boot, on a busy machine many.
const BOOT: Duration = Duration::from_secs(60);
