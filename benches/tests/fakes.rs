//! Every bench runs on the fakes, and leaves its figures under their names: the rigs that an integrator writes, at their
//! shortest.

#![allow(clippy::unwrap_used, reason = "a test may unwrap")]

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use iaas_benches::BlockRig;
use iaas_benches::ControlRig;
use iaas_benches::MeterRig;
use iaas_benches::NetworkRig;
use iaas_benches::Service;
use iaas_benches::StateRig;
use iaas_benches::VolumeParts;
use iaas_benches::Written;
use iaas_core::Cloud;
use iaas_core::Epoch;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::Rev;
use iaas_core::SystemClock;
use iaas_core::Term;
use iaas_core::cloud::CloudBuilder;
use iaas_core::model::Port;
use iaas_core::security::rbac::Rbac;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::Provider;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::meter::MeterSink;
use iaas_core::spi::network::NetObject;
use iaas_core::spi::network::NetProgram;
use iaas_core::spi::network::NetUpdate;
use iaas_core::spi::network::PlugSpec;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::MemoryStore;
use iaas_core::testing::fake;
use iaas_core::testing::fake::World;
use tokio::runtime::Runtime;
use uuid::Uuid;

#[test]
fn a_volume_is_measured_directly_and_through_the_runners_service() {
    let world = world();
    let direct = ["block.direct.randread.qd32", "block.direct.randwrite.qd32"];
    assert_eq!(groups(|criterion| iaas_benches::block(criterion, &Volume(world))), names(&direct));
}

#[test]
fn a_control_plane_is_measured_until_its_instances_run() {
    let world = world();
    assert_eq!(groups(|c| iaas_benches::control(c, &Plane(world))), names(&["control.ready"]));
}

#[test]
fn a_meter_is_measured() {
    let all = ["meter.bill", "meter.ingest.durable", "meter.ingest.durable.alone"];
    assert_eq!(groups(|criterion| iaas_benches::meter(criterion, &Meter)), names(&all));
}

#[test]
fn a_network_is_measured() {
    assert_eq!(groups(|c| iaas_benches::network(c, &mut Wire::new().unwrap())), names(&["net.mem.64b"]));
}

#[test]
fn a_store_is_measured() {
    let all = ["state.commit.64", "state.commit.one", "state.scan.1000"];
    assert_eq!(groups(|criterion| iaas_benches::state(criterion, &Store)), names(&all));
}

/// The groups that have a function `ours` after a run as short as may be.
fn groups(run: impl FnOnce(&mut Criterion)) -> BTreeSet<String> {
    let folder = tempfile::tempdir().unwrap();
    let short = Duration::from_millis(1);
    let criterion = Criterion::default().without_plots().sample_size(10).nresamples(10);
    let mut criterion = criterion.warm_up_time(short).measurement_time(short).output_directory(folder.path());
    run(&mut criterion);
    let groups = std::fs::read_dir(folder.path()).unwrap().map(|group| group.unwrap().path());
    let whole = groups.filter(|group| group.join("ours/new/estimates.json").exists());
    whole.map(|group| group.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

fn names(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(ToString::to_string).collect()
}

fn world() -> World {
    World::new(Arc::new(SystemClock::new()))
}

/// One disk of the fake pool.
#[derive(Debug)]
struct Volume(World);

impl BlockRig for Volume {
    fn open(&self) -> Box<dyn BlockDevice> {
        let id = |n| Uuid::from_u128(n);
        let pool = Id::from_uuid(id(2));
        let parts = VolumeParts {
            cloud: Id::from_uuid(id(1)),
            id: pool,
            pool: Arc::new(fake::FakePool::open(&self.0, pool)),
            access: Arc::new(fake::FakeAccess::open(&self.0, Id::from_uuid(id(3)), pool)),
            opener: Arc::new(fake::FakeOpener::new(&self.0)),
        };
        Runtime::new().unwrap().block_on(parts.open(1 << 20)).unwrap()
    }

    fn serve(&self, socket: &Path) -> io::Result<Service> {
        Service::thread(self.open(), socket)
    }

    fn peer(&self, _: &Path) -> Result<Service, String> {
        Err("a disk in memory has no peer".into())
    }
}

/// Everything fake, the store too.
#[derive(Debug)]
struct Plane(World);

impl ControlRig for Plane {
    fn cloud(&self) -> CloudBuilder {
        let site = fake::Site::new(&self.0);
        Cloud::builder()
            .store(Arc::new(MemoryStore::new()))
            .pool(site.pool, site.volumes())
            .fabric(site.fabric, site.network())
            .host(site.host())
            .authorizer(Arc::new(Rbac::new()))
            .meter(Arc::new(fake::FakeMeter::open(&self.0)))
    }

    fn written(&self) -> Option<Written> {
        None
    }
}

#[derive(Debug)]
struct Meter;

impl MeterRig for Meter {
    fn fresh(&self) -> Arc<dyn MeterSink> {
        Arc::new(fake::FakeMeter::open(&world()))
    }
}

#[derive(Debug)]
struct Store;

impl StateRig for Store {
    fn open(&self) -> Arc<dyn StateStore> {
        Arc::new(MemoryStore::new())
    }
}

/// Two plugged ports of one subnet of the fake network.
#[derive(Debug)]
struct Wire {
    from: Box<dyn FramePort>,
    to: Box<dyn FramePort>,
}

impl Wire {
    fn new() -> iaas_core::Result<Self> {
        let site = fake::Site::new(&world());
        let (network, plugs) = (site.network(), site.host().plugs);
        let cx = Ctx { call: call(), cancel: Cancel::new() };
        let all = NetUpdate { from: None, to: Rev(1), put: program()?, drop: Vec::new() };
        let opener = fake::FakeOpener::new(&site.world);
        Runtime::new().unwrap().block_on(async {
            network.claim(&cx).await?;
            plugs.claim(&cx).await?;
            network.sync(&cx, &all).await?;
            let mut ports = Vec::new();
            for port in [10, 20] {
                let spec = PlugSpec { port: port_id(port), term: Term(1), queues: 1 };
                let id = Id::from_uuid(Uuid::from_u128(u128::from(port) + 1000));
                let seen = plugs.ensure(&cx, id, Rev(2), &spec).await?;
                let target = seen.is.target.unwrap();
                let grant = PortOpener::prepare(&opener, &target)?;
                ports.append(&mut PortOpener::open(&opener, &target, grant, &Env::default())?);
            }
            let (to, from) = (ports.pop().unwrap(), ports.pop().unwrap());
            Ok(Self { from, to })
        })
    }
}

impl NetworkRig for Wire {
    fn forward(&mut self) -> u64 {
        let mut frame = vec![0; VNET_HEADER];
        frame.extend([2, 0, 0, 0, 0, 20, 2, 0, 0, 0, 0, 10, 8, 0]);
        frame.extend([0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 10, 10, 0, 0, 20]);
        frame.extend([0x10, 0, 0x20, 0, 0, 26, 0, 0]);
        frame.resize(VNET_HEADER + 60, 0);
        let sent = self.from.send(&[IoBuffers::copied(&frame)]).unwrap();
        let arrived = self.to.recv(&mut [IoBuffers::zeroed(2048)], &mut [0]);
        arrived.unwrap_or(0).min(sent) as u64
    }
}

fn program() -> iaas_core::Result<Vec<NetObject>> {
    let (network, subnet) = (Id::from_uuid(Uuid::from_u128(100)), Id::from_uuid(Uuid::from_u128(101)));
    let port = |n: u8| NetObject::Port {
        id: port_id(n),
        subnet,
        mac: Mac([2, 0, 0, 0, 0, n]),
        addrs: vec![[10, 0, 0, n].into()],
        groups: BTreeSet::default(),
    };
    Ok(vec![
        NetObject::Network { id: network, vni: 1, mtu: 1500 },
        NetObject::Subnet { id: subnet, network, cidrs: vec!["10.0.0.0/24".parse()?], dns: Vec::new() },
        port(10),
        port(20),
    ])
}

fn port_id(n: u8) -> Id<Port> {
    Id::from_uuid(Uuid::from_u128(n.into()))
}

fn call() -> Call {
    Call {
        cloud: Id::from_uuid(Uuid::from_u128(1)),
        incarnation: Uuid::from_u128(6),
        epoch: Epoch(1),
        op: Id::from_uuid(Uuid::nil()),
        trace: None,
        budget: Duration::from_secs(60),
    }
}
