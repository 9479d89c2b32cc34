//! The control plane on fakes: instances live and go, and nothing is left of them.

mod common;

use std::time::Duration;

use common::LONG;
use common::Rig;
use common::tenant;
use iaas_core::ByteSize;
use iaas_core::ErrorKind;
use iaas_core::model::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_with_a_volume_runs_and_goes_without_a_trace() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let tenant = tenant(&root, &rig, "acme").await.unwrap();
    let before = rig.world.things().len();
    let size = VolumeSpec::new(ByteSize::gib(1)).unwrap();
    let volume = root.volumes().create(tenant.project, "data", size).await.unwrap().wait().await.unwrap();
    let launch = root.instances().launch(tenant.project, tenant.instance("web", vec![volume]));
    let web = tokio::time::timeout(LONG, launch.await.unwrap().wait()).await.expect("in time").unwrap();
    let record = root.instances().get(web).await.unwrap();
    assert_eq!(record.state(), InstanceState::Running);
    let used = rig.world.things().len();
    assert!(used > before, "nothing was made");

    let gone = root.instances().delete(web).await.unwrap();
    tokio::time::timeout(LONG, gone.wait()).await.expect("in time").unwrap();
    assert_eq!(root.instances().get(web).await.unwrap_err().kind(), ErrorKind::NotFound);
    let gone = root.volumes().delete(volume).await.unwrap();
    tokio::time::timeout(LONG, gone.wait()).await.expect("in time").unwrap();
    // The kernel stays on the host for the next instance of its image.
    let left: Vec<_> = rig.world.things().into_iter().filter(|t| t.object.kind != "artifact").collect();
    assert!(left.len() <= before, "left: {left:?}");
    assert_eq!(cloud.orphans_removed(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_control_plane_adopts_what_runs() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let tenant = tenant(&root, &rig, "acme").await.unwrap();
    let launch = root.instances().launch(tenant.project, tenant.instance("web", vec![])).await.unwrap();
    let web = launch.wait().await.unwrap();
    cloud.close().await.unwrap();
    let effects = rig.world.effect_count();

    let cloud = rig.open().await.unwrap();
    assert!(cloud.settled(LONG).await);
    let root = cloud.session_as("root");
    assert_eq!(root.instances().get(web).await.unwrap().state(), InstanceState::Running);
    let record = root.instances().get(web).await.unwrap();
    assert_eq!(record.bind.boot.0, 1, "adopted, not started again ({} effects before)", effects);
    let op = root.instances().reboot(web).await.unwrap();
    tokio::time::timeout(LONG, op.wait()).await.expect("in time").unwrap();
    assert_eq!(root.instances().get(web).await.unwrap().bind.boot.0, 2);
    let op = root.instances().stop(web, Duration::ZERO).await.unwrap();
    tokio::time::timeout(LONG, op.wait()).await.expect("in time").unwrap();
    assert_eq!(root.instances().get(web).await.unwrap().state(), InstanceState::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_token_gives_the_same_answer_and_another_request_a_conflict() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let make = |name: &str| root.organizations().create(Owner::Cloud, name, Empty {}).token("42");
    let first = make("acme").await.unwrap();
    let again = make("acme").await.unwrap();
    assert_eq!((first.id(), first.out), (again.id(), again.out));
    assert_eq!(make("other").await.unwrap_err().kind(), ErrorKind::Conflict);
    let stale =
        root.organizations().update(first.out, iaas_core::Labels::default()).if_version(iaas_core::Rev(1));
    assert_eq!(stale.await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let tenant = tenant(&root, &rig, "acme").await.unwrap();
    assert!(cloud.settled(LONG).await);
    let effects = rig.world.effect_count();
    let plan =
        root.instances().launch(tenant.project, tenant.instance("web", vec![])).dry_run().await.unwrap();
    // The instance, its port and their attachment; where it would go; one commit with its operation and audit leaf.
    let kinds: Vec<_> = plan.creates.iter().map(|o| o.kind.as_str()).collect();
    assert_eq!(kinds, ["instance", "port", "attachment"]);
    assert_eq!(plan.placement, [format!("host {}", rig.host)]);
    assert_eq!(rig.world.effect_count(), effects);
    assert_eq!(root.instances().list(tenant.project, None, 10).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_kernel_is_missing_fails_the_create_and_leaves_nothing() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let tenant = tenant(&root, &rig, "acme").await.unwrap();
    let kernel = iaas_core::Digest::of(b"nobody has this");
    let spec = ImageSpec::Kernel { kernel, initrd: None, cmdline: String::new() };
    let image = root.images().create(tenant.project, "lost", spec).await.unwrap().wait().await.unwrap();
    let mut new = tenant.instance("web", vec![]);
    new.image = image;
    let op = root.instances().launch(tenant.project, new).await.unwrap();
    let error = tokio::time::timeout(LONG, op.wait()).await.expect("in time").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let mut left = root.instances().list(tenant.project, None, 10).await.unwrap();
    for _ in 0..200 {
        if left.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        left = root.instances().list(tenant.project, None, 10).await.unwrap();
    }
    assert_eq!(left, []);
    assert_eq!(root.ports().list(tenant.project, None, 10).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_is_a_leaf_of_the_audit_log_and_can_be_proved() {
    let rig = Rig::new();
    let cloud = rig.open().await.unwrap();
    let root = cloud.session_as("root");
    let made = root.organizations().create(Owner::Cloud, "acme", Empty {}).await.unwrap();
    let entries = root.audit().entries().await.unwrap();
    let index = entries.iter().position(|e| e.operation == made.id()).expect("an entry for the change");
    assert_eq!((entries[index].action.as_str(), entries[index].by.as_str()), ("organization.create", "root"));
    let (leaf, proof, checkpoint) = root.audit().prove(index as u64).await.unwrap();
    proof.verify(&leaf, &checkpoint.root()).unwrap();
    assert!(proof.verify(b"another leaf", &checkpoint.root()).is_err());
}
