//! The network of a host with a real switch in a process of its own: the conformance suites, and what deaths do to it.
//!
//! The switch is this very binary, so `main` gives it its role before anything else.

#![expect(clippy::unwrap_used, reason = "a test, which the lint cannot see without a harness")]

use std::future::Future;
use std::path::Path;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Cidr;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::model::Port;
use iaas_core::process::Launcher;
use iaas_core::process::Roles;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::network::NetObject;
use iaas_core::spi::network::NetProgram;
use iaas_core::spi::network::NetUpdate;
use iaas_core::spi::network::Plug;
use iaas_core::spi::network::PlugSpec;
use iaas_core::spi::network::Plugs;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Target;
use iaas_core::testing::conformance::net_program;
use iaas_core::testing::conformance::net_program::NetRig;
use iaas_core::testing::conformance::plugs;
use iaas_core::testing::conformance::plugs::PlugsRig;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::wire::Wire;
use iaas_net::HostNetwork;
use iaas_net::RingOpener;
use iaas_net::Settings;
use iaas_net::SwitchRole;
use uuid::Uuid;

type Story = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

/// The tests, by name.
const STORIES: &[Story] = &[
    ("the_program_keeps_its_contract", || Box::pin(the_program_keeps_its_contract())),
    ("the_program_keeps_its_contract_over_a_wire", || Box::pin(the_program_keeps_its_contract_over_a_wire())),
    ("the_plugs_keep_their_contract", || Box::pin(the_plugs_keep_their_contract())),
    ("the_plugs_keep_their_contract_over_a_wire", || Box::pin(the_plugs_keep_their_contract_over_a_wire())),
    ("a_killed_switch_comes_back_and_no_frame_is_lost", || {
        Box::pin(a_killed_switch_comes_back_and_no_frame_is_lost())
    }),
    ("a_runner_gets_the_offloads_that_the_host_agreed_to", || {
        Box::pin(a_runner_gets_the_offloads_that_the_host_agreed_to())
    }),
    ("who_listens_hears_which_plug_changed", || Box::pin(who_listens_hears_which_plug_changed())),
    ("guests_do_not_notice_a_restart_of_control", || Box::pin(guests_do_not_notice_a_restart_of_control())),
    ("a_switch_that_died_with_control_is_back_with_it", || {
        Box::pin(a_switch_that_died_with_control_is_back_with_it())
    }),
    ("the_last_plug_takes_everything_with_it", || Box::pin(the_last_plug_takes_everything_with_it())),
    ("a_switch_that_cannot_start_blocks_the_plugs_and_says_why", || {
        Box::pin(a_switch_that_cannot_start_blocks_the_plugs_and_says_why())
    }),
];

fn main() -> ExitCode {
    iaas_core::process::init(&Roles::new().with_role(SwitchRole));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    for (name, story) in
        STORIES.iter().filter(|(n, _)| wanted.is_empty() || wanted.iter().any(|w| n.contains(w)))
    {
        let ended = runtime.block_on(async { tokio::time::timeout(LONGEST, story()).await });
        assert!(ended.is_ok(), "{name} did not end");
        println!("test {name} ... ok");
    }
    ExitCode::SUCCESS
}

/// A story that takes so long has failed.
const LONGEST: Duration = Duration::from_secs(120);

/// A host's folders; dropping it ends the switch and removes them.
struct Host {
    dir: tempfile::TempDir,
    settings: Settings,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("net").tempdir_in("/tmp").unwrap();
        let settings = Settings {
            host: id(),
            fabric: id(),
            state: dir.path().join("s"),
            runtime: dir.path().join("r"),
            role_binary: None,
            offloads: Offloads::default(),
        };
        Self { dir, settings }
    }

    async fn open(&self) -> HostNetwork {
        HostNetwork::open(self.settings.clone()).await.unwrap()
    }

    async fn end(&self) {
        self.unplug_all();
        let launcher = Launcher::new(&self.settings.state, &self.settings.runtime, None);
        launcher.forget("switch", self.settings.host.uuid()).await.unwrap();
    }

    /// So that a provider which is still open does not start the switch again behind the test.
    fn unplug_all(&self) {
        let _ = std::fs::remove_dir_all(self.settings.state.join("net/plugs"));
    }

    fn files(&self, folder: &str) -> Vec<PathBuf> {
        fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() { walk(&path, out) } else { out.push(path) }
            }
        }
        let mut out = Vec::new();
        walk(&self.dir.path().join(folder), &mut out);
        out.sort();
        out
    }

    /// Everything durable, as text; the counters are no effect of a call.
    fn fingerprint(&self) -> String {
        let files = self.files("s/net").into_iter().filter(|p| !p.to_string_lossy().contains("counters"));
        files.map(|p| format!("{}={:x?};", p.display(), std::fs::read(&p).unwrap_or_default())).collect()
    }
}

impl Drop for Host {
    /// Ends the switch also when a test fails.
    fn drop(&mut self) {
        self.unplug_all();
        let (settings, id) = (self.settings.clone(), self.settings.host.uuid());
        let end = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let launcher = Launcher::new(&settings.state, &settings.runtime, None);
            runtime.block_on(launcher.forget("switch", id)).map_err(std::io::Error::other)
        };
        if let Ok(Err(e)) = std::thread::spawn(end).join() {
            eprintln!("the switch of a test is left: {e}");
        }
    }
}

fn id<K>() -> Id<K> {
    Id::from_uuid(Uuid::now_v7())
}

fn cx(epoch: u64) -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(0xa)),
        incarnation: Uuid::from_u128(0xa00),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::from_u128(1)),
        trace: None,
        budget: Duration::from_secs(30),
    };
    Ctx { call, cancel: Cancel::new() }
}

/// A subnet with ten ports: port `n` has the address 10.5.0.(10+n).
struct Street {
    ports: Vec<Id<Port>>,
    network: NetObject,
    subnet: NetObject,
    subnet_id: Id<iaas_core::model::Subnet>,
}

impl Street {
    fn new() -> Self {
        let (network, subnet) = (id(), id());
        Self {
            ports: (0..10).map(|_| id()).collect(),
            network: NetObject::Network { id: network, vni: 5, mtu: 1500 },
            subnet: NetObject::Subnet {
                id: subnet,
                network,
                cidrs: vec!["10.5.0.0/24".parse::<Cidr>().unwrap()],
                dns: vec![],
            },
            subnet_id: subnet,
        }
    }

    fn address(n: u32) -> (Mac, std::net::Ipv4Addr) {
        let n = u8::try_from(n).unwrap();
        (Mac([2, 0, 0, 0, 5, n]), [10, 5, 0, 10 + n].into())
    }

    fn program(&self) -> Vec<NetObject> {
        let port = |(n, id): (usize, &Id<Port>)| {
            let (mac, addr) = Self::address(u32::try_from(n).unwrap());
            NetObject::Port {
                id: *id,
                subnet: self.subnet_id,
                mac,
                addrs: vec![addr.into()],
                groups: Default::default(),
            }
        };
        let ports = self.ports.iter().enumerate().map(port);
        [self.network.clone(), self.subnet.clone()].into_iter().chain(ports).collect()
    }

    async fn sync(&self, network: &HostNetwork, rev: u64) {
        let up = NetUpdate { from: None, to: Rev(rev), put: self.program(), drop: vec![] };
        network.program().sync(&cx(1), &up).await.unwrap();
    }

    async fn plug(&self, network: &HostNetwork, n: usize) -> (Id<Plug>, Box<dyn FramePort>) {
        let plug = id();
        let spec = PlugSpec { port: self.ports[n], term: Term(1), queues: 1 };
        let seen = network.plugs().ensure(&cx(1), plug, Rev(1), &spec).await.unwrap();
        let wire = open(network, &seen.is.target.unwrap()).await;
        (plug, wire)
    }
}

/// Opens a target as a runner would, and lets the switch in.
async fn open(network: &HostNetwork, target: &Target) -> Box<dyn FramePort> {
    let grant = RingOpener.prepare(target).unwrap();
    let mut port = RingOpener.open(target, grant, &Env::default()).unwrap().remove(0);
    let before = ups(network).await;
    while ups(network).await <= before {
        port.recv(&mut [], &mut []).unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    port
}

async fn ups(network: &HostNetwork) -> usize {
    network.status().await.map_or(0, |s| s.plugs.values().filter(|up| **up).count())
}

/// A UDP frame from port `p` to port `q` of a street, with a number in it.
fn frame(p: u32, q: u32, number: u8) -> Vec<u8> {
    let ((from, src), (to, dst)) = (Street::address(p), Street::address(q));
    let mut out = vec![0; VNET_HEADER];
    out.extend([to.0, from.0].concat());
    out.extend([8, 0, 0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    out.extend([src.octets(), dst.octets()].concat());
    out.extend([0, 1, 0, 2, 0, 9, 0, 0, number]);
    out
}

fn send(port: &mut dyn FramePort, frame: &[u8]) {
    assert_eq!(port.send(&[IoBuffers::copied(frame)]).unwrap(), 1);
}

/// The next frame.
async fn recv(port: &mut dyn FramePort) -> Vec<u8> {
    loop {
        if let Some(frame) = try_recv(port) {
            return frame;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The next frame, while the other port's runner looks around, too.
async fn recv_beside(port: &mut dyn FramePort, other: &mut dyn FramePort) -> Vec<u8> {
    loop {
        other.recv(&mut [], &mut []).unwrap();
        if let Some(frame) = try_recv(port) {
            return frame;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn try_recv(port: &mut dyn FramePort) -> Option<Vec<u8>> {
    let (mut into, mut lens) = ([IoBuffers::zeroed(2048)], [0]);
    port.recv(&mut into, &mut lens).ok()?;
    let mut frame = vec![0; lens[0] as usize];
    into[0].read_at(0, &mut frame);
    Some(frame)
}

/// Kills the switch with SIGKILL: it is our child, or one that this test started.
async fn kill(network: &HostNetwork) -> u32 {
    let pid = network.switch_pid().await.unwrap();
    kill_pid(pid);
    pid
}

fn kill_pid(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

async fn a_killed_switch_comes_back_and_no_frame_is_lost() {
    let (host, street) = (Host::new(), Street::new());
    let network = host.open().await;
    street.sync(&network, 7).await;
    let (_, mut a) = street.plug(&network, 1).await;
    let (plug, mut b) = street.plug(&network, 2).await;
    for number in 0..5 {
        send(&mut *a, &frame(1, 2, number));
        assert_eq!(recv(&mut *b).await, frame(1, 2, number));
    }
    let mut next = 5;
    for _ in 0..3 {
        let old = kill(&network).await;
        for number in next..next + 20 {
            send(&mut *a, &frame(1, 2, number));
        }
        // Both runners look around, as their events tell them.
        let mut got = Vec::new();
        while got.last() != Some(&frame(1, 2, next + 19)) {
            got.push(recv_beside(&mut *b, &mut *a).await);
        }
        // Frames that the dead one had passed on but not released come twice.
        got.dedup();
        assert_eq!(got, (next..next + 20).map(|n| frame(1, 2, n)).collect::<Vec<_>>());
        next += 20;
        assert_ne!(network.switch_pid().await, Some(old));
    }
    let seen = network.plugs().observe(&cx(1), plug).await.unwrap().unwrap();
    assert_eq!((seen.is.program, seen.is.peer_up), (Rev(7), true));
    host.end().await;
}

async fn a_runner_gets_the_offloads_that_the_host_agreed_to() {
    let (mut host, street) = (Host::new(), Street::new());
    let agreed = Offloads { checksum: true, tso6: true, ..Offloads::default() };
    host.settings.offloads = agreed;
    let network = host.open().await;
    street.sync(&network, 1).await;
    let spec = PlugSpec { port: street.ports[1], term: Term(1), queues: 1 };
    let seen = network.plugs().ensure(&cx(1), id(), Rev(1), &spec).await.unwrap();
    let mut target = seen.is.target.unwrap();
    let mut port = open(&network, &target).await;
    assert_eq!(port.offloads(Offloads { checksum: true, tso4: true, tso6: true, uso: true }), agreed);
    // The target's only form is that of the opener; another version of it is not opened.
    let (known, of) = RingOpener.scheme();
    let Form::Opener { scheme, version, .. } = &mut target.forms[0] else { panic!("{:?}", target.forms) };
    assert_eq!((scheme.as_str(), *version), (known, of));
    *version += 1;
    assert_eq!(RingOpener.prepare(&target).unwrap_err().kind(), ErrorKind::Unsupported);
    host.end().await;
}

async fn who_listens_hears_which_plug_changed() {
    let (host, street) = (Host::new(), Street::new());
    let network = host.open().await;
    let mut changes = network.plugs().changes(&cx(1)).await.unwrap();
    street.sync(&network, 1).await;
    let (plug, _port) = street.plug(&network, 1).await;
    network.plugs().remove(&cx(1), plug, Rev(1)).await.unwrap();
    let mut heard = Vec::new();
    while heard.last() != Some(&plug.object()) {
        heard.push(changes.next().await.unwrap().unwrap());
    }
    host.end().await;
}

async fn guests_do_not_notice_a_restart_of_control() {
    let (host, street) = (Host::new(), Street::new());
    let network = host.open().await;
    street.sync(&network, 7).await;
    let (_, mut a) = street.plug(&network, 1).await;
    let (_, mut b) = street.plug(&network, 2).await;
    let pid = network.switch_pid().await.unwrap();
    drop(network);
    send(&mut *a, &frame(1, 2, 1));
    assert_eq!(recv(&mut *b).await, frame(1, 2, 1));
    let network = host.open().await;
    assert_eq!(network.switch_pid().await, Some(pid), "the switch was adopted");
    send(&mut *a, &frame(1, 2, 2));
    assert_eq!(recv(&mut *b).await, frame(1, 2, 2));
    // The adopted one is looked after, too.
    kill(&network).await;
    send(&mut *a, &frame(1, 2, 3));
    assert_eq!(recv_beside(&mut *b, &mut *a).await, frame(1, 2, 3));
    host.end().await;
}

async fn a_switch_that_died_with_control_is_back_with_it() {
    let (host, street) = (Host::new(), Street::new());
    let network = host.open().await;
    street.sync(&network, 7).await;
    let (_, mut a) = street.plug(&network, 1).await;
    let (_, mut b) = street.plug(&network, 2).await;
    let pid = network.switch_pid().await.unwrap();
    drop(network);
    kill_pid(pid);
    send(&mut *a, &frame(1, 2, 1));
    let network = host.open().await;
    assert_eq!(recv_beside(&mut *b, &mut *a).await, frame(1, 2, 1));
    assert_eq!(network.status().await.unwrap().program, Rev(7));
    host.end().await;
}

async fn the_last_plug_takes_everything_with_it() {
    let (host, street) = (Host::new(), Street::new());
    let network = host.open().await;
    street.sync(&network, 1).await;
    assert_eq!(network.switch_pid().await, None, "without plugs there is no switch");
    let (one, _a) = street.plug(&network, 1).await;
    let (two, _b) = street.plug(&network, 2).await;
    let pid = network.switch_pid().await.unwrap();
    network.plugs().remove(&cx(1), one, Rev(1)).await.unwrap();
    assert_eq!(network.switch_pid().await, Some(pid));
    network.plugs().remove(&cx(1), two, Rev(1)).await.unwrap();
    assert_eq!(network.switch_pid().await, None);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(host.files("r"), Vec::<PathBuf>::new(), "no socket is left");
    assert_eq!(host.files("s/net/plugs"), Vec::<PathBuf>::new());
    assert_eq!(host.files("s/net/counters"), Vec::<PathBuf>::new());
    assert_eq!(host.files("s/roles/switch"), Vec::<PathBuf>::new());
}

async fn a_switch_that_cannot_start_blocks_the_plugs_and_says_why() {
    let (mut host, street) = (Host::new(), Street::new());
    host.settings.role_binary = Some("/nonexistent/binary".into());
    let network = host.open().await;
    street.sync(&network, 1).await;
    let spec = PlugSpec { port: street.ports[1], term: Term(1), queues: 1 };
    let seen = network.plugs().ensure(&cx(1), id(), Rev(1), &spec).await.unwrap();
    let iaas_core::spi::Phase::Blocked(error) = seen.phase else { panic!("{:?}", seen.phase) };
    assert!(error.public().contains("could not be started"), "{error:#}");
    drop(network);
    // A program whose binary is there takes over what was accepted.
    host.settings.role_binary = None;
    let network = host.open().await;
    assert_eq!(network.status().await.unwrap().plugs.len(), 1);
    host.end().await;
}

/// A host, its network and who lives on it.
type Here = (Arc<Host>, HostNetwork, Arc<Street>);

/// What both rigs stand on.
#[derive(Default)]
struct Bench {
    now: Mutex<Option<Here>>,
    rev: AtomicU64,
}

impl Bench {
    async fn fresh(&self) -> (HostNetwork, Arc<Street>) {
        self.end().await;
        let host = Arc::new(Host::new());
        let (network, street) = (host.open().await, Arc::new(Street::new()));
        *self.now.lock().unwrap() = Some((host, network.clone(), street.clone()));
        (network, street)
    }

    fn here(&self) -> Here {
        self.now.lock().unwrap().clone().unwrap()
    }

    async fn reopen(&self) -> HostNetwork {
        let (host, network, street) = self.now.lock().unwrap().take().unwrap();
        drop(network);
        let network = host.open().await;
        *self.now.lock().unwrap() = Some((host, network.clone(), street));
        network
    }

    async fn end(&self) {
        let old = self.now.lock().unwrap().take();
        if let Some((host, network, _)) = old {
            drop(network);
            host.end().await;
        }
    }
}

/// A clone is the same bench, so that who lends it to a suite can still end it.
#[derive(Clone, Default)]
struct ProgramBench(Arc<Bench>);

#[async_trait]
impl Rig for ProgramBench {
    type Provider = dyn NetProgram;

    async fn fresh(&self) -> Result<Arc<dyn NetProgram>> {
        Ok(self.0.fresh().await.0.program())
    }

    async fn reopen(&self, _: Arc<dyn NetProgram>) -> Result<Arc<dyn NetProgram>> {
        Ok(self.0.reopen().await.program())
    }

    async fn change(&self, provider: &dyn NetProgram, cx: &Ctx) -> Result<()> {
        let to = Rev(1000 + self.0.rev.fetch_add(1, Ordering::Relaxed));
        provider.sync(cx, &NetUpdate { from: None, to, put: vec![], drop: vec![] }).await.map(|_| ())
    }

    async fn fingerprint(&self) -> Result<Option<String>> {
        Ok(Some(self.0.here().0.fingerprint()))
    }
}

#[async_trait]
impl NetRig for ProgramBench {
    async fn plug(&self, port: Id<Port>) -> Result<Box<dyn FramePort>> {
        let (_, network, _) = self.0.here();
        let spec = PlugSpec { port, term: Term(1), queues: 1 };
        let seen = network.plugs().ensure(&cx(1), id(), Rev(1), &spec).await?;
        Ok(open(&network, &seen.is.target.unwrap()).await)
    }
}

async fn the_program_keeps_its_contract() {
    let bench = ProgramBench::default();
    let report = net_program::run(&bench).await;
    bench.0.end().await;
    report.assert_clean();
}

async fn the_program_keeps_its_contract_over_a_wire() {
    let bench = ProgramBench::default();
    let report = net_program::run(&Wrapped::new(bench.clone(), Wire)).await;
    bench.0.end().await;
    report.assert_clean();
}

/// As [`ProgramBench`], for plugs.
#[derive(Clone, Default)]
struct PlugsBench(Arc<Bench>);

#[async_trait]
impl Rig for PlugsBench {
    type Provider = dyn Plugs;

    async fn fresh(&self) -> Result<Arc<dyn Plugs>> {
        let (network, street) = self.0.fresh().await;
        street.sync(&network, 1).await;
        Ok(network.plugs())
    }

    async fn reopen(&self, _: Arc<dyn Plugs>) -> Result<Arc<dyn Plugs>> {
        Ok(self.0.reopen().await.plugs())
    }

    async fn change(&self, provider: &dyn Plugs, cx: &Ctx) -> Result<()> {
        let rev = Rev(1000 + self.0.rev.fetch_add(1, Ordering::Relaxed));
        provider.ensure(cx, Id::from_uuid(Uuid::from_u128(0xabc)), rev, &self.spec(9)).await.map(|_| ())
    }

    /// The files of plugs, found without the provider.
    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let files = self.0.here().0.files("s/net/plugs");
        let name = |p: &PathBuf| Uuid::parse_str(p.file_name()?.to_str()?).ok();
        Ok(Some(files.iter().filter_map(name).map(|id| Id::<Plug>::from_uuid(id).object()).collect()))
    }

    async fn fingerprint(&self) -> Result<Option<String>> {
        Ok(Some(self.0.here().0.fingerprint()))
    }
}

#[async_trait]
impl ConvergeRig<Plug> for PlugsBench {
    fn spec(&self, number: u32) -> PlugSpec {
        let street = self.0.here().2;
        PlugSpec { port: street.ports[number as usize], term: Term(1), queues: 1 }
    }

    fn bad(&self) -> Vec<PlugSpec> {
        vec![
            PlugSpec { port: id(), term: Term(1), queues: 0 },
            PlugSpec { port: id(), term: Term(1), queues: 2 },
        ]
    }

    /// A file that nobody tagged.
    async fn plant(&self, id: Id<Plug>) -> Result<bool> {
        let path = self.0.here().0.settings.state.join("net/plugs").join(id.to_string());
        std::fs::write(path, b"\xffnot a plug").unwrap();
        Ok(true)
    }
}

#[async_trait]
impl PlugsRig for PlugsBench {
    fn address(&self, number: u32) -> (Mac, std::net::Ipv4Addr, std::net::Ipv4Addr) {
        let (mac, addr) = Street::address(number);
        (mac, addr, [10, 5, 0, 1].into())
    }

    async fn open(&self, target: &Target) -> Result<Box<dyn FramePort>> {
        Ok(open(&self.0.here().1, target).await)
    }
}

async fn the_plugs_keep_their_contract() {
    let bench = PlugsBench::default();
    let report = plugs::run(&bench).await;
    bench.0.end().await;
    report.assert_clean();
}

async fn the_plugs_keep_their_contract_over_a_wire() {
    let bench = PlugsBench::default();
    let report = plugs::run(&Wrapped::new(bench.clone(), Wire)).await;
    bench.0.end().await;
    report.assert_clean();
}
