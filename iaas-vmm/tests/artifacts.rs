//! The reference store of kernels and initrds against the suite of its contract.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use iaas_core::Digest;
use iaas_core::Entity;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::Ctx;
use iaas_core::spi::artifact::Artifact;
use iaas_core::spi::artifact::Artifacts;
use iaas_core::testing::conformance::artifacts;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_vmm::HostArtifacts;
use uuid::Uuid;

struct Folder(Mutex<Option<tempfile::TempDir>>);

impl Folder {
    fn state(&self) -> PathBuf {
        self.0.lock().unwrap().as_ref().unwrap().path().to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Artifacts>> {
        let (cloud, host) = (Id::from_uuid(Uuid::from_u128(0xa)), Id::from_uuid(Uuid::from_u128(4)));
        Ok(Arc::new(HostArtifacts::open(&self.state(), cloud, host)?))
    }
}

#[async_trait]
impl Rig for Folder {
    type Provider = dyn Artifacts;

    async fn fresh(&self) -> Result<Arc<dyn Artifacts>> {
        *self.0.lock().unwrap() = Some(tempfile::tempdir().unwrap());
        self.open()
    }

    async fn reopen(&self, old: Arc<dyn Artifacts>) -> Result<Arc<dyn Artifacts>> {
        drop(old);
        self.open()
    }

    async fn change(&self, provider: &dyn Artifacts, cx: &Ctx) -> Result<()> {
        let id = Id::from_uuid(Uuid::from_u128(99));
        provider.ensure(cx, id, Rev(1), &Digest::of(b"change")).await.map(drop)
    }

    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let entries = std::fs::read_dir(self.state().join("artifacts")).unwrap().flatten();
        let ids = entries.filter_map(|e| Uuid::try_parse(e.file_name().to_str()?).ok());
        Ok(Some(ids.map(|id| ObjectRef { kind: Artifact::NAME.to_owned(), id }).collect()))
    }
}

#[async_trait]
impl ConvergeRig<Artifact> for Folder {
    fn spec(&self, number: u32) -> Digest {
        Digest::of(&artifacts::blob(number))
    }

    fn bad(&self) -> Vec<Digest> {
        Vec::new()
    }

    async fn drive(&self, provider: &dyn Artifacts, cx: &Ctx, id: Id<Artifact>, spec: &Digest) -> Result<()> {
        let number = (0..100).find(|n| Digest::of(&artifacts::blob(*n)) == *spec).unwrap();
        artifacts::upload(provider, cx, id, &artifacts::blob(number)).await
    }

    async fn plant(&self, id: Id<Artifact>) -> Result<bool> {
        let folder = self.state().join("artifacts").join(id.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("blob"), "whose?").unwrap();
        Ok(true)
    }
}

impl artifacts::ArtifactsRig for Folder {}

#[tokio::test(flavor = "multi_thread")]
async fn the_artifacts_of_a_host_keep_their_contract() {
    artifacts::run(&Folder(Mutex::default())).await.assert_clean();
}
