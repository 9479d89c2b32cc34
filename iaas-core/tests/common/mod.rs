//! A cloud on fakes: one host, one pool, one fabric, in a world that outlives every control plane.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test uses its own part; a test may unwrap"
)]

pub mod faulty_store;
pub mod judge;
pub mod stall;
pub mod virtual_clock;

use std::sync::Arc;
use std::time::Duration;

use iaas_core::Cidr;
use iaas_core::Clock;
use iaas_core::Cloud;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::SystemClock;
use iaas_core::cloud::CloudBuilder;
use iaas_core::cloud::MemoryBlobs;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::engine::sites::Blobs;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_core::spi::host::HostProviders;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::MemoryStore;
use iaas_core::testing::fake;
use iaas_core::testing::fake::FakeAuthorizer;
use iaas_core::testing::fake::FakeMeter;
use iaas_core::testing::fake::World;

/// The parts that outlive a control plane.
#[derive(Clone, Debug)]
pub struct Rig {
    pub clock: Arc<dyn Clock>,
    pub world: World,
    pub site: fake::Site,
    pub host: Id<Host>,
    pub store: Arc<dyn StateStore>,
    pub blobs: Arc<MemoryBlobs>,
    /// Puts something around the host's providers.
    pub around: fn(&World, HostProviders) -> HostProviders,
}

impl Rig {
    pub fn new() -> Self {
        Self::on(Arc::new(SystemClock::new()))
    }

    pub fn on(clock: Arc<dyn Clock>) -> Self {
        let world = World::new(Arc::clone(&clock));
        let site = fake::Site::new(&world);
        let host = site.host().id;
        let store = Arc::new(MemoryStore::with_clock(Arc::clone(&clock)));
        Self { clock, world, site, host, store, blobs: Arc::default(), around: |_, host| host }
    }

    /// Opens the cloud, as after a restart.
    pub async fn open(&self) -> Result<Cloud> {
        self.builder().open().await
    }

    /// All parts, before the opening.
    pub fn builder(&self) -> CloudBuilder {
        Cloud::builder()
            .store(Arc::clone(&self.store))
            .clock(Arc::clone(&self.clock))
            .pool(self.site.pool, self.site.volumes())
            .fabric(self.site.fabric, self.site.network())
            .host((self.around)(&self.world, self.site.reopen(self.host)))
            .authorizer(Arc::new(FakeAuthorizer::new()))
            .meter(Arc::new(FakeMeter::open(&self.world)))
            .blobs(Arc::clone(&self.blobs) as Arc<dyn Blobs>)
            .operator("root")
    }
}

/// A project with a network, ready for instances.
#[derive(Clone, Copy, Debug)]
pub struct Tenant {
    pub organization: Id<Organization>,
    pub project: Id<Project>,
    pub subnet: Id<Subnet>,
    pub group: Id<SecurityGroup>,
    pub image: Id<Image>,
    pub size: Id<InstanceType>,
}

pub const LONG: Duration = Duration::from_secs(20);

/// Makes everything that an instance needs; `name` keeps two of them apart.
pub async fn tenant(root: &Session, rig: &Rig, name: &str) -> Result<Tenant> {
    let organization = root.organizations().create(Owner::Cloud, name, Empty {}).await?.wait().await?;
    let project =
        root.projects().create(organization, "main", ProjectSpec { organization }).await?.wait().await?;
    let network = root.networks().create(project, "vpc", NetworkSpec::default()).await?.wait().await?;
    let cidrs: Vec<Cidr> = vec!["10.0.1.0/24".parse()?, "fd00:1::/64".parse()?];
    let subnet = SubnetSpec::new(network, cidrs)?;
    let subnet = root.subnets().create(project, "a", subnet).await?.wait().await?;
    let group =
        root.security_groups().create(project, "web", SecurityGroupSpec::default()).await?.wait().await?;
    let kernel = rig.blobs.put("kernel".into()).await?;
    let spec = ImageSpec::Kernel { kernel, initrd: None, cmdline: "console=ttyS0".to_owned() };
    let image = root.images().create(project, "linux", spec).await?.wait().await?;
    let spec = InstanceTypeSpec::new(1, iaas_core::ByteSize::mib(128))?;
    let size =
        root.instance_types().create(Owner::Cloud, &format!("{name}-small"), spec).await?.wait().await?;
    Ok(Tenant { organization, project, subnet, group, image, size })
}

impl Tenant {
    pub fn nic(&self) -> Nic {
        let groups = [self.group].into();
        Nic::New(PortSpec { subnet: self.subnet, groups, addresses: Vec::new() })
    }

    pub fn instance(&self, name: &str, volumes: Vec<Id<Volume>>) -> NewInstance {
        NewInstance {
            name: name.to_owned(),
            instance_type: self.size,
            image: self.image,
            cmdline: String::new(),
            nics: vec![self.nic()],
            volumes,
        }
    }
}
