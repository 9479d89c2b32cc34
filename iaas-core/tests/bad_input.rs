//! What is wrong is refused with its kind, the thing's name and the remedy, and nothing was changed by it.
#![allow(clippy::unwrap_used, reason = "a test program")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use common::Rig;
use common::Tenant;
use common::tenant;
use common::virtual_clock::VirtualClock;
use common::virtual_clock::in_virtual_time;
use iaas_core::ByteSize;
use iaas_core::Cidr;
use iaas_core::Cloud;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Labels;
use iaas_core::PortRange;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::cloud::Session;
use iaas_core::engine::adopt::CloudRecord;
use iaas_core::engine::adopt::FORMAT;
use iaas_core::engine::codec;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_core::spi::state_store::Write;
use iaas_core::testing::fake::FakeMeter;
use iaas_core::testing::fake::Thing;

const MINUTE: Duration = Duration::from_secs(60);

struct Fixture {
    rig: Rig,
    cloud: Cloud,
    root: Session,
    own: Tenant,
    other: Tenant,
    files: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let cloud = rig.open().await.unwrap();
        let root = cloud.session_as("root");
        let own = tenant(&root, &rig, "acme").await.unwrap();
        let other = tenant(&root, &rig, "other").await.unwrap();
        let quota = QuotaSpec { limits: [("volumes".to_owned(), 1)].into() };
        root.quotas().create(own.project, "limits", quota).await.unwrap();
        assert!(cloud.settled(MINUTE).await);
        Self { rig, cloud, root, own, other, files: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    async fn network(&self) -> Id<Network> {
        self.root.subnets().get(self.own.subnet).await.unwrap().spec.network()
    }

    /// The error of `bad`, after which everything is as before, and which says what it is about and what to do.
    async fn refused<T: std::fmt::Debug>(
        &self,
        kind: ErrorKind,
        names: &str,
        bad: impl Future<Output = Result<T>>,
    ) {
        let before = snapshot(&self.rig).await;
        let error = bad.await.expect_err(names);
        told(&error, kind, names);
        assert_eq!(snapshot(&self.rig).await, before, "{names}: something was changed");
    }
}

fn told(error: &Error, kind: ErrorKind, names: &str) {
    assert_eq!(error.kind(), kind, "{error:?}");
    assert!(error.to_string().contains(names), "`{names}` is not named: {error:?}");
    assert!(error.what_to_do().is_some(), "no remedy: {error:?}");
}

async fn snapshot(rig: &Rig) -> (Rev, u64, Vec<Thing>) {
    let (_, rev) = rig.store.scan(b"", None, 1).await.unwrap();
    (rev, rig.world.effect_count(), rig.world.things())
}

#[test]
fn values_out_of_range_are_refused_before_they_reach_the_cloud() {
    let invalid = |names: &str, result: std::result::Result<(), Error>| {
        told(&result.expect_err(names), ErrorKind::Invalid, names);
    };
    let cidr = |text: &str| text.parse::<Cidr>();
    let network = Id::from_uuid(uuid::Uuid::nil());
    let subnet =
        |all: &[&str]| SubnetSpec::new(network, all.iter().map(|c| cidr(c).unwrap()).collect()).map(drop);
    invalid("10.0.1.7/24", cidr("10.0.1.7/24").map(drop));
    invalid("10.0.1.0/33", cidr("10.0.1.0/33").map(drop));
    invalid("ten/8", cidr("ten/8").map(drop));
    invalid("10.0.0.0/30", subnet(&["10.0.0.0/30"]));
    invalid("127.0.0.0/8", subnet(&["127.0.0.0/8"]));
    invalid("224.0.0.0/24", subnet(&["224.0.0.0/24"]));
    invalid("9-5", PortRange::new(9, 5).map(drop));
    invalid("70000", "70000".parse::<PortRange>().map(drop));
    invalid("UPPER", Labels::new([("UPPER", "x")]).map(drop));
    invalid("line", Labels::new([("line", "a\nb")]).map(drop));
    invalid("64 labels", Labels::new((0..65).map(|n| (format!("k{n}"), "v"))).map(drop));
    invalid("-name", iaas_core::Name::new("-name").map(drop));
    invalid("0 vCPUs", InstanceTypeSpec::new(0, ByteSize::mib(128)).map(drop));
    invalid("257 vCPUs", InstanceTypeSpec::new(257, ByteSize::mib(128)).map(drop));
    invalid("instance type", InstanceTypeSpec::new(1, ByteSize(1)).map(drop));
    invalid("instance type", InstanceTypeSpec::new(1, ByteSize::mib((1 << 24) + 1)).map(drop));
    invalid("size of a volume", VolumeSpec::new(ByteSize(0)).map(drop));
    invalid("size of a volume", VolumeSpec::new(ByteSize((1 << 20) + 1)).map(drop));
    invalid("size of a volume", VolumeSpec::new(ByteSize::gib((64 << 10) + 1)).map(drop));
    invalid("OpenSSH", KeyPairSpec::try_from("no key".to_owned()).map(drop));
}

/// Runs `test` as an ordinary user: root reads what nobody may read.
fn as_ordinary_user(test: impl FnOnce() + Send + 'static) {
    let test = || {
        if nix::unistd::geteuid().is_root() {
            // The user 65534 owns nothing. For this thread and those it starts alone, with what it makes; the right to
            // pass over permissions goes with it.
            nix::unistd::setfsgid(65534.into());
            nix::unistd::setfsuid(65534.into());
        }
        test();
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn images_that_cannot_start_are_refused_by_their_file() {
    as_ordinary_user(|| {
        in_virtual_time(async {
            let f = Fixture::new().await;
            // An ELF header of class 64 for AArch64 (machine 183), and one for 32 bits.
            let mut arm = vec![0; 0x400];
            arm[..5].copy_from_slice(b"\x7fELF\x02");
            arm[18] = 183;
            let mut narrow = arm.clone();
            (narrow[4], narrow[18]) = (1, 3);
            let mut bz = vec![0; 0x400];
            bz[0x202..0x206].copy_from_slice(b"HdrS");
            let closed = f.file("closed", b"a kernel");
            std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).unwrap();
            let cases = [
                (f.file("arm", &arm), "arm` is a kernel for another architecture"),
                (f.file("narrow", &narrow), "narrow` is a kernel for another architecture"),
                (f.file("bz", &bz), "bz` is a kernel for another architecture"),
                (f.file("text", b"hello"), "text` is not a Linux kernel"),
                (f.file("empty", b""), "empty` is empty"),
                (f.files.path().join("absent"), "absent` cannot be read: entity not found"),
                (closed, "closed` cannot be read: permission denied"),
                (f.files.path().to_owned(), "` cannot be read: is a directory"),
            ];
            for (path, names) in cases {
                let images = f.root.images();
                f.refused(ErrorKind::Invalid, names, images.import(f.own.project, "bad", &path, None, ""))
                    .await;
            }
        })
    });
}

#[test]
fn changes_that_do_not_fit_are_refused_whole() {
    in_virtual_time(async {
        let f = Fixture::new().await;
        let (root, own, other) = (&f.root, f.own, f.other);
        let network = f.network().await;
        let gib = || VolumeSpec::new(ByteSize::gib(1)).unwrap();
        let clash = SubnetSpec::new(network, vec!["10.0.0.0/16".parse().unwrap()]).unwrap();
        f.refused(
            ErrorKind::Invalid,
            "10.0.0.0/16",
            root.subnets().create(own.project, "b", clash).into_future(),
        )
        .await;
        let twice = root.networks().create(own.project, "vpc", NetworkSpec::default());
        f.refused(ErrorKind::AlreadyExists, "`vpc`", twice.into_future()).await;
        let volume = root.volumes().create(own.project, "one", gib()).await.unwrap().wait().await.unwrap();
        let theirs = root.volumes().create(other.project, "one", gib()).await.unwrap().wait().await.unwrap();
        let theirs_nic = PortSpec { subnet: other.subnet, groups: [].into(), addresses: Vec::new() };
        let port =
            root.ports().create(other.project, "theirs", theirs_nic).await.unwrap().wait().await.unwrap();
        assert!(f.cloud.settled(MINUTE).await);
        let more = root.volumes().create(own.project, "two", gib());
        f.refused(ErrorKind::QuotaExceeded, "volumes: 1 used and 1 more", more.into_future()).await;
        let nobodys: Id<Volume> = Id::from_uuid(uuid::Uuid::from_u128(7));
        let gone = root.volumes().delete(nobodys);
        f.refused(ErrorKind::NotFound, "there is no such volume", gone.into_future()).await;
        let launch = |nics: Vec<Nic>, volumes: Vec<Id<Volume>>| {
            let mut new = own.instance("web", volumes);
            new.nics.extend(nics);
            root.instances().launch(own.project, new).into_future()
        };
        f.refused(ErrorKind::Invalid, "volume belongs to another", launch(vec![], vec![theirs])).await;
        f.refused(ErrorKind::Invalid, "port belongs to another", launch(vec![Nic::Port(port)], vec![])).await;
        f.refused(ErrorKind::Conflict, "attached already", launch(vec![], vec![volume, volume])).await;
        f.refused(ErrorKind::Invalid, "16 interfaces", launch(vec![own.nic(); 16], vec![])).await;
        f.refused(ErrorKind::Invalid, "16 interfaces or disks", launch(vec![], vec![volume; 17])).await;
        let name = root.organizations().create(Owner::Cloud, "No Name", Empty {});
        f.refused(ErrorKind::Invalid, "No Name", name.into_future()).await;
        let lines = ImageSpec::Kernel {
            kernel: iaas_core::Digest::of(b"k"),
            initrd: None,
            cmdline: "a\nb".to_owned(),
        };
        let image = root.images().create(own.project, "bad", lines);
        f.refused(ErrorKind::Invalid, "command line", image.into_future()).await;
        let role = RoleSpec { actions: ["instance.creat".to_owned()].into() };
        let role = root.roles().create(Owner::Cloud, "typo", role);
        f.refused(ErrorKind::Invalid, "instance.creat", role.into_future()).await;
        let quota = QuotaSpec { limits: [("volume".to_owned(), 1)].into() };
        let quota = root.quotas().create(own.project, "typo", quota);
        f.refused(ErrorKind::Invalid, "`volume`", quota.into_future()).await;
    });
}

#[test]
fn a_second_control_plane_another_cloud_and_a_newer_format_are_refused() {
    in_virtual_time(async {
        let f = Fixture::new().await;
        f.refused(ErrorKind::Conflict, "another control plane leads", f.rig.open()).await;
        let id = f.cloud.id();
        f.cloud.clone().close().await.unwrap();
        let change = f.root.organizations().create(Owner::Cloud, "late", Empty {});
        let error = change.await.expect_err("a closed cloud");
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, iaas_core::Outcome::NotDone));
        told(&error, ErrorKind::Unavailable, "the cloud was closed");
        drop((f.cloud, f.root));

        let things = f.rig.world.things();
        let effects = f.rig.world.effect_count();
        let stranger = Id::from_uuid(uuid::Uuid::from_u128(9));
        let error = f.rig.builder().id(stranger).open().await.expect_err("another cloud");
        told(&error, ErrorKind::Conflict, &id.to_string());
        // Whoever failed to open does not keep the lead.
        f.rig.builder().id(id).open().await.unwrap().close().await.unwrap();

        let entry = f.rig.store.get(b"cloud").await.unwrap().unwrap();
        let record: CloudRecord = codec::decode(&entry.value).unwrap();
        let newer = codec::encode(&CloudRecord { format: FORMAT + 1, ..record }).unwrap();
        let lead =
            f.rig.store.lead(uuid::Uuid::from_u128(1), MINUTE, iaas_core::Epoch(0)).await.unwrap().unwrap();
        f.rig.store.commit(&lead, vec![], vec![Write::Put("cloud".into(), newer)]).await.unwrap();
        f.rig.store.resign(lead).await.unwrap();
        for _ in 0..2 {
            let error = f.rig.open().await.expect_err("a newer format");
            told(&error, ErrorKind::Unsupported, &format!("format {}", FORMAT + 1));
        }
        assert_eq!((f.rig.world.things(), f.rig.world.effect_count()), (things, effects));
    });
}

#[test]
fn a_cloud_without_a_part_is_not_opened() {
    in_virtual_time(async {
        let told_of = |error: Error, part: &str| told(&error, ErrorKind::Invalid, part);
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let meter = || Arc::new(FakeMeter::open(&rig.world));
        told_of(Cloud::builder().open().await.unwrap_err(), "an authorizer");
        let authorizer = || Arc::new(iaas_core::testing::fake::FakeAuthorizer::new());
        let storeless = Cloud::builder().authorizer(authorizer()).meter(meter());
        told_of(storeless.open().await.unwrap_err(), "a state store");
        let unpaid = Cloud::builder().authorizer(authorizer()).store(Arc::clone(&rig.store));
        told_of(unpaid.open().await.unwrap_err(), "a meter");
    });
}
