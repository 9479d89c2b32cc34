//! The control plane from the call to the running instance, and what that costs the store.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use criterion::Criterion;
use iaas_core::ByteSize;
use iaas_core::Cloud;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::cloud::CloudBuilder;
use iaas_core::cloud::MemoryBlobs;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::engine::sites::Blobs;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use tokio::runtime::Runtime;

/// Composes the cloud to measure.
pub trait ControlRig: Debug {
    /// A new cloud with one host, whose operator is called `operator`. Kernels are brought by the bench.
    fn cloud(&self) -> CloudBuilder;

    /// What the cloud's store has made durable so far, if it counts.
    fn written(&self) -> Option<Written>;
}

/// What a store has made durable since some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Commits that succeeded.
    pub commits: u64,
    /// Bytes that were written and synced.
    pub synced_bytes: u64,
}

/// Measures instances with one port, one after the other; each is deleted before the next.
///
/// * `control.ready`: nanoseconds from the call that creates an instance until the cloud says that it runs.
/// * `control.ready.commits`, `control.ready.synced_bytes`: the store's work for one of them, up to the last commit that the
///   creation causes.
///
/// # Panics
/// If the cloud fails.
pub fn control(criterion: &mut Criterion, rig: &impl ControlRig) {
    let runtime = Runtime::new().expect("a runtime");
    let tenant = runtime.block_on(Tenant::new(rig)).expect("a cloud with a tenant");
    let (mut made, mut cost) = (0, Written::default());
    let mut group = criterion.benchmark_group("control.ready");
    group.sample_size(20);
    group.bench_function("ours", |bencher| {
        bencher.iter_custom(|instances| {
            let mut time = Duration::ZERO;
            for _ in 0..instances {
                let before = rig.written().unwrap_or_default();
                let (took, instance) = runtime.block_on(tenant.create(made)).expect("an instance");
                let after = rig.written().unwrap_or_default();
                runtime.block_on(tenant.delete(instance)).expect("a deletion");
                made += 1;
                time += took;
                cost.commits += after.commits - before.commits;
                cost.synced_bytes += after.synced_bytes - before.synced_bytes;
            }
            time
        });
    });
    group.finish();
    if rig.written().is_some() && made > 0 {
        let each = |sum: u64| format!("{:.2}", sum as f64 / f64::from(made));
        println!("HARNESS control.ready.commits ours={} peer=-", each(cost.commits));
        println!("HARNESS control.ready.synced_bytes ours={} peer=-", each(cost.synced_bytes));
    }
    runtime.block_on(tenant.cloud.close()).expect("an end");
}

/// A project with everything that an instance needs.
#[derive(Debug)]
struct Tenant {
    cloud: Cloud,
    operator: Session,
    project: Id<Project>,
    subnet: Id<Subnet>,
    group: Id<SecurityGroup>,
    image: Id<Image>,
    size: Id<InstanceType>,
}

impl Tenant {
    async fn new(rig: &impl ControlRig) -> Result<Self> {
        let blobs = Arc::new(MemoryBlobs::default());
        let kernel = blobs.put("kernel".into()).await?;
        let cloud = rig.cloud().blobs(blobs).open().await?;
        let me = cloud.session_as("operator");
        let organization = me.organizations().create(Owner::Cloud, "bench", Empty {}).await?.wait().await?;
        let project = ProjectSpec { organization };
        let project = me.projects().create(organization, "bench", project).await?.wait().await?;
        let network = me.networks().create(project, "vpc", NetworkSpec::default()).await?.wait().await?;
        let subnet = SubnetSpec::new(network, vec!["10.0.0.0/16".parse()?])?;
        let subnet = me.subnets().create(project, "a", subnet).await?.wait().await?;
        let group = SecurityGroupSpec::default();
        let group = me.security_groups().create(project, "own", group).await?.wait().await?;
        let image = ImageSpec::Kernel { kernel, initrd: None, cmdline: String::new() };
        let image = me.images().create(project, "linux", image).await?.wait().await?;
        let size = InstanceTypeSpec::new(1, ByteSize::mib(128))?;
        let size = me.instance_types().create(Owner::Cloud, "small", size).await?.wait().await?;
        let tenant = Self { operator: me, cloud, project, subnet, group, image, size };
        // The first instance of an image brings the kernel to the host; what is measured is the next one.
        let (_, first) = tenant.create(u32::MAX).await?;
        tenant.delete(first).await?;
        Ok(tenant)
    }

    /// Makes an instance, and says how long it took until it ran.
    async fn create(&self, number: u32) -> Result<(Duration, Id<Instance>)> {
        let port = PortSpec { subnet: self.subnet, groups: [self.group].into(), addresses: Vec::new() };
        let new = NewInstance {
            name: format!("i-{number}"),
            instance_type: self.size,
            image: self.image,
            cmdline: String::new(),
            nics: vec![Nic::New(port)],
            volumes: Vec::new(),
        };
        let begun = Instant::now();
        let instance = self.operator.instances().launch(self.project, new).await?.wait().await?;
        let took = begun.elapsed();
        let state = self.operator.instances().get(instance).await?.state();
        assert_eq!(state, InstanceState::Running, "what is timed is a running instance");
        assert!(self.cloud.settled(LONG).await, "the cloud comes to rest");
        Ok((took, instance))
    }

    async fn delete(&self, instance: Id<Instance>) -> Result<()> {
        self.operator.instances().delete(instance).await?.wait().await?;
        assert!(self.cloud.settled(LONG).await, "the cloud comes to rest");
        Ok(())
    }
}

/// By the cloud's clock.
const LONG: Duration = Duration::from_secs(60);
