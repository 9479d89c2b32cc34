use std::sync::Arc;
use iaas_core::{ByteSize, Cloud, Result, SystemClock, model::*, security::rbac::Rbac, store::MemoryStore, testing::fake};

#[tokio::main]
async fn main() -> Result<()> {
    let world = fake::World::new(Arc::new(SystemClock::new()));
    let site = fake::Site::new(&world);
    let cloud = Cloud::builder()
        .store(Arc::new(MemoryStore::new()))
        .pool(site.pool, site.volumes())
        .fabric(site.fabric, site.network())
        .host(site.host())
        .authorizer(Arc::new(Rbac::new()))
        .meter(Arc::new(fake::FakeMeter::open(&world)))
        .open()
        .await?;
    let me = cloud.session_as("operator");
    let organization = me.organizations().create(Owner::Cloud, "acme", Empty {}).await?.out;
    let project = me.projects().create(organization, "shop", ProjectSpec { organization }).await?.out;
    let size = VolumeSpec::new(ByteSize::gib(1))?;
    let volume = me.volumes().create(project, "data", size).await?.wait().await?;
    println!("{}", me.volumes().get(volume).await?.meta.name);
    me.volumes().delete(volume).await?.wait().await.map(|_| ())
}
