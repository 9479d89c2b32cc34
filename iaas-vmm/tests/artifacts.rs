//! The reference store of kernels and initrds against the suite of its contract.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Digest;
use iaas_core::Entity;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::ByteStream;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::Phase;
use iaas_core::spi::artifact::Artifact;
use iaas_core::spi::artifact::Artifacts;
use iaas_core::testing::conformance::artifacts;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::wire::Wire;
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

#[tokio::test(flavor = "multi_thread")]
async fn the_artifacts_of_a_host_keep_their_contract_over_a_wire() {
    artifacts::run(&Wrapped::new(Folder(Mutex::default()), Wire)).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_one_way_and_counts_only_when_it_was_closed_with_the_right_bytes() {
    let (folder, blob) = (Folder(Mutex::default()), artifacts::blob(1));
    let artifacts = folder.fresh().await.unwrap();
    let (cx, id) = (cx(), Id::from_uuid(Uuid::from_u128(7)));
    artifacts.ensure(&cx, id, Rev(1), &Digest::of(&blob)).await.unwrap();

    let mut wrong: Box<dyn ByteStream> = artifacts.upload(&cx, id).await.unwrap();
    wrong.write(blob.slice(1..)).await.unwrap();
    let refused = wrong.close().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert_eq!(refused.outcome(), Outcome::NotDone);
    assert_eq!(wrong.write(blob.clone()).await.unwrap_err().kind(), ErrorKind::Conflict, "it is closed");

    let mut right = artifacts.upload(&cx, id).await.unwrap();
    assert_eq!(right.read().await.unwrap(), None, "nothing comes back");
    for part in [blob.slice(..10), blob.slice(10..)] {
        right.write(part).await.unwrap();
        assert_ne!(artifacts.observe(&cx, id).await.unwrap().unwrap().phase, Phase::Settled);
    }
    right.close().await.unwrap();
    right.close().await.unwrap();
    let seen = artifacts.observe(&cx, id).await.unwrap().unwrap();
    assert_eq!((seen.phase, seen.is.size), (Phase::Settled, blob.len() as u64));
}

fn cx() -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(0xa)),
        incarnation: Uuid::from_u128(0xa00),
        epoch: Epoch(1),
        op: Id::from_uuid(Uuid::from_u128(1)),
        trace: None,
        budget: Duration::from_secs(30),
    };
    Ctx { call, cancel: Cancel::new() }
}
