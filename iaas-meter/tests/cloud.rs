//! A bill through the whole control plane, on a clock that is turned by hand. Every amount below was worked out by hand:
//! seconds of the story, times what was there, over 3600, times the price.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a panic")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use iaas_core::ByteSize;
use iaas_core::Clock;
use iaas_core::Cloud;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ManualClock;
use iaas_core::cloud::MemoryBlobs;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Op;
use iaas_core::cloud::Session;
use iaas_core::engine::sites::Blobs;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_core::security::rbac::Rbac;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::meter::Bill;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::MemoryStore;
use iaas_core::testing::fake;
use iaas_core::testing::fake::World;
use iaas_meter::Meter;
use jiff::Timestamp;
use tempfile::TempDir;
use uuid::Uuid;

/// What outlives a control plane, and the clock of it all.
struct Story {
    clock: Arc<ManualClock>,
    world: World,
    site: fake::Site,
    host: Id<Host>,
    store: Arc<dyn StateStore>,
    blobs: Arc<MemoryBlobs>,
    log: TempDir,
}

impl Story {
    fn begin() -> Self {
        let clock = Arc::new(ManualClock::at(Timestamp::from_second(START).unwrap()));
        let world = World::new(Arc::clone(&clock) as Arc<dyn Clock>);
        let site = fake::Site::new(&world);
        let host = site.host().id;
        let store = Arc::new(MemoryStore::with_clock(Arc::clone(&clock) as Arc<dyn Clock>));
        Self { clock, world, site, host, store, blobs: Arc::default(), log: tempfile::tempdir().unwrap() }
    }

    /// A control plane over what is there.
    async fn open(&self) -> Cloud {
        let host = self.site.reopen(self.host);
        // The tasks of a control plane that was dropped end a moment later, and then the log is free.
        let meter = loop {
            match Meter::open(self.log.path()) {
                Ok(meter) => break meter,
                Err(error) if error.kind() == ErrorKind::Conflict => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        Cloud::builder()
            .store(Arc::clone(&self.store))
            .clock(Arc::clone(&self.clock) as Arc<dyn Clock>)
            .pool(self.site.pool, self.site.volumes())
            .fabric(self.site.fabric, self.site.network())
            .host(host)
            .authorizer(Arc::new(Rbac::new()))
            .meter(Arc::new(meter))
            .blobs(Arc::clone(&self.blobs) as Arc<dyn Blobs>)
            .operator("root")
            .open()
            .await
            .unwrap()
    }

    /// The next control plane leads when the lease of the dead one has lapsed.
    async fn open_after_a_crash(&self) -> Cloud {
        self.clock.advance(Duration::from_secs(60));
        self.open().await
    }

    /// Waits for an operation. What looks again a moment later, as a removal does, gets its moment.
    async fn done<T: Clone>(&self, op: Op<T>) -> T {
        let moments = async {
            for _ in 0..1000 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.clock.advance(Duration::from_millis(25));
            }
        };
        tokio::select! {
            done = op.wait() => done.unwrap(),
            () = moments => panic!("an operation is not done"),
        }
    }

    /// Goes on to that second of the story. What is due until then is done first, at its own time.
    async fn at(&self, cloud: &Cloud, second: i64) {
        assert!(cloud.settled(LONG).await);
        let then = Timestamp::from_second(START + second).unwrap();
        self.clock.advance(Duration::try_from(self.clock.now().duration_until(then)).unwrap());
        assert!(cloud.settled(LONG).await);
    }

    /// The guest behind a port sends so many frames of 1024 bytes.
    async fn sends(&self, cloud: &Cloud, port: Id<Port>, frames: usize) {
        let call = Call {
            cloud: cloud.id(),
            incarnation: Uuid::nil(),
            epoch: Epoch(0),
            op: Id::from_uuid(Uuid::nil()),
            trace: None,
            budget: LONG,
        };
        let cx = Ctx { call, cancel: Cancel::new() };
        let plugs = self.site.reopen(self.host).plugs.inventory(&cx, None, 10).await.unwrap();
        let mut targets = plugs.into_iter().map(|plug| plug.seen.unwrap().is.target.unwrap());
        let target = targets.find(|target| target.id == port.uuid()).unwrap();
        let opener = fake::FakeOpener::new(&self.world);
        let grant = PortOpener::prepare(&opener, &target).unwrap();
        let mut ports = PortOpener::open(&opener, &target, grant, &Env::default()).unwrap();
        for _ in 0..frames {
            let frame = IoBuffers::copied(&[0; VNET_HEADER + 1024]);
            assert_eq!(ports[0].send(&[frame]).unwrap(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_projects_pay_for_what_they_had_to_the_second_over_a_crash_and_a_change_of_prices() {
    let story = Story::begin();
    let cloud = story.open().await;
    let root = cloud.session_as("root");
    root.price_books().create(Owner::Cloud, "first", prices(0, "0.02")).await.unwrap();
    root.price_books().create(Owner::Cloud, "second", prices(10_800, "0.04")).await.unwrap();
    let acme = Tenant::new(&story, &root, "acme", 2, 4).await;
    let other = Tenant::new(&story, &root, "other", 1, 1).await;
    // Before the periods that are billed: what takes a moment, which is different in each run.
    let size = VolumeSpec::new(ByteSize::gib(10)).unwrap();
    let volume = story.done(root.volumes().create(acme.project, "data", size).await.unwrap()).await;
    let web = root.instances().launch(acme.project, acme.instance("web", vec![volume])).await.unwrap();
    let web = story.done(web).await;
    let app = root.instances().launch(other.project, other.instance("app", vec![])).await.unwrap();
    let app = story.done(app).await;
    for instance in [web, app] {
        story.done(root.instances().stop(instance, Duration::ZERO).await.unwrap()).await;
    }

    story.at(&cloud, 4200).await;
    story.done(root.instances().start(web).await.unwrap()).await;
    let port = root.ports().list(acme.project, None, 10).await.unwrap()[0].meta.id;
    story.sends(&cloud, port, 4).await;
    // Its counters are read now.
    root.bill_so_far(acme.project, second(0)).await.unwrap();
    story.at(&cloud, 5400).await;
    story.done(root.instances().start(app).await.unwrap()).await;
    story.at(&cloud, 6600).await;
    // The control process dies while both run. Nobody is charged twice, and nothing is forgotten.
    drop((root, cloud));
    let cloud = story.open_after_a_crash().await;
    let root = cloud.session_as("root");
    story.at(&cloud, 7800).await;
    story.done(root.instances().stop(web, Duration::ZERO).await.unwrap()).await;
    story.at(&cloud, 11_400).await;
    story.done(root.instances().start(web).await.unwrap()).await;
    story.at(&cloud, 12_600).await;
    story.done(root.instances().delete(app).await.unwrap()).await;
    story.at(&cloud, 13_200).await;
    story.done(root.instances().delete(web).await.unwrap()).await;
    story.at(&cloud, 39_600).await;
    story.done(root.volumes().delete(volume).await.unwrap()).await;
    story.at(&cloud, 50_000).await;

    // 2 vCPUs from 4200 to 7800: 2 × 3600 s = 2 vCPU-hours; 4 GiB × 3600 s = 4 GiB-hours. 10 GiB from 3600 to 10800: 20
    // GiB-hours. 4 × 1024 bytes = 2^-18 GiB.
    let first = bill(&root, acme.project, 3600, 10_800).await;
    assert_eq!(
        lines(&first),
        [
            ("instance memory-bytes".to_owned(), "4", "0.02"),
            ("instance vcpu".to_owned(), "2", "0.04"),
            ("port tx-bytes".to_owned(), "0.000003814697265625", "0.00000003814697265625"),
            ("volume volume-bytes".to_owned(), "20", "0.002"),
        ]
    );
    assert_eq!(first.total, "0.06200003814697265625");
    // 2 vCPUs from 11400 to 13200 at the new price: 1 vCPU-hour; 2 GiB-hours. 10 GiB from 10800 to 39600: 80 GiB-hours.
    let second = bill(&root, acme.project, 10_800, 39_600).await;
    assert_eq!(
        lines(&second),
        [
            ("instance memory-bytes".to_owned(), "2", "0.01"),
            ("instance vcpu".to_owned(), "1", "0.04"),
            ("volume volume-bytes".to_owned(), "80", "0.008"),
        ]
    );
    assert_eq!(second.total, "0.058");
    // 1 vCPU and 1 GiB from 5400 to 12600: 5400 s by the first prices, 1800 s by the second.
    let third = bill(&root, other.project, 3600, 10_800).await;
    let expected =
        [("instance memory-bytes".to_owned(), "1.5", "0.0075"), ("instance vcpu".to_owned(), "1.5", "0.03")];
    assert_eq!((lines(&third), third.total.as_str()), (expected.to_vec(), "0.0375"));
    let fourth = bill(&root, other.project, 10_800, 39_600).await;
    let expected =
        [("instance memory-bytes".to_owned(), "0.5", "0.0025"), ("instance vcpu".to_owned(), "0.5", "0.02")];
    assert_eq!((lines(&fourth), fourth.total.as_str()), (expected.to_vec(), "0.0225"));
    // What is gone costs nothing.
    assert_eq!(bill(&root, acme.project, 40_000, 50_000).await.lines, []);

    // The log alone gives the same bills, to another control plane too.
    drop((root, cloud));
    let cloud = story.open_after_a_crash().await;
    let root = cloud.session_as("root");
    let again = [
        bill(&root, acme.project, 3600, 10_800).await,
        bill(&root, acme.project, 10_800, 39_600).await,
        bill(&root, other.project, 3600, 10_800).await,
        bill(&root, other.project, 10_800, 39_600).await,
    ];
    assert_eq!(again, [first, second, third, fourth]);
}

/// A project and what its instances are made of.
struct Tenant {
    project: Id<Project>,
    subnet: Id<Subnet>,
    image: Id<Image>,
    size: Id<InstanceType>,
}

impl Tenant {
    async fn new(story: &Story, root: &Session, name: &str, vcpus: u32, gib: u64) -> Self {
        let organization = root.organizations().create(Owner::Cloud, name, Empty {}).await.unwrap().out;
        let project =
            root.projects().create(organization, "main", ProjectSpec { organization }).await.unwrap().out;
        let network = root.networks().create(project, "vpc", NetworkSpec::default()).await.unwrap().out;
        let subnet = SubnetSpec::new(network, vec!["10.0.1.0/24".parse().unwrap()]).unwrap();
        let subnet = root.subnets().create(project, "a", subnet).await.unwrap().out;
        let kernel = story.blobs.put("kernel".into()).await.unwrap();
        let image = ImageSpec::Kernel { kernel, initrd: None, cmdline: String::new() };
        let image = root.images().create(project, "linux", image).await.unwrap().out;
        let size = InstanceTypeSpec::new(vcpus, ByteSize::gib(gib)).unwrap();
        let size = root.instance_types().create(Owner::Cloud, name, size).await.unwrap().out;
        Self { project, subnet, image, size }
    }

    fn instance(&self, name: &str, volumes: Vec<Id<Volume>>) -> NewInstance {
        NewInstance {
            name: name.to_owned(),
            instance_type: self.size,
            image: self.image,
            cmdline: String::new(),
            nics: vec![Nic::New(PortSpec { subnet: self.subnet, groups: [].into(), addresses: Vec::new() })],
            volumes,
        }
    }
}

/// Prices from that second of the story on.
fn prices(from: i64, vcpu: &str) -> PriceBookSpec {
    let price = |amount: &str, unit| Price { amount: amount.parse().unwrap(), unit };
    let prices = BTreeMap::from([
        ("vcpu".to_owned(), price(vcpu, Unit::Hour)),
        ("memory-bytes".to_owned(), price("0.005", Unit::GibHour)),
        ("volume-bytes".to_owned(), price("0.0001", Unit::GibHour)),
        ("tx-bytes".to_owned(), price("0.01", Unit::Gib)),
        ("rx-bytes".to_owned(), price("0.01", Unit::Gib)),
    ]);
    PriceBookSpec { currency: "EUR".to_owned(), from: second(from), prices }
}

fn second(second: i64) -> Timestamp {
    Timestamp::from_second(START + second).unwrap()
}

async fn bill(root: &Session, project: Id<Project>, from: i64, to: i64) -> Bill {
    root.bill(project, second(from), second(to)).await.unwrap()
}

/// Each line: kind and meter, quantity, cost. There is one resource of each kind.
fn lines(bill: &Bill) -> Vec<(String, &str, &str)> {
    let told = bill.lines.iter();
    told.map(|l| (format!("{} {}", l.resource.kind, l.meter), l.quantity.as_str(), l.cost.as_str())).collect()
}

/// 2026-01-01T00:00:00Z, in seconds of Unix time.
const START: i64 = 1_767_225_600;
/// More than anything here takes.
const LONG: Duration = Duration::from_secs(20);
