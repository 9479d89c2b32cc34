//! The gate, for every action of the table: who is refused learns and changes nothing, who is allowed gets through.
//!
//! What must be allowed is computed here, from patterns, scopes and a list of questions that was written by hand for each
//! action. An action without such a list fails the test. Prints `gate: actions=<n> cells=<m>`.
#![allow(clippy::unwrap_used, reason = "a test program")]

mod common;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::Rig;
use common::Tenant;
use common::tenant;
use common::virtual_clock::START;
use common::virtual_clock::VirtualClock;
use common::virtual_clock::in_virtual_time;
use iaas_core::ByteSize;
use iaas_core::Cidr;
use iaas_core::Cloud;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Labels;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::cloud::Change;
use iaas_core::cloud::Session;
use iaas_core::engine::intent::Intent;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Protocol;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;
use iaas_core::model::*;
use iaas_core::security::actions::CATALOG;
use iaas_core::security::actions::CreateInstance;
use iaas_core::security::actions::Nic;
use iaas_core::security::actions::REFERRED;
use iaas_core::security::actions::TABLE;
use iaas_core::security::actions::catalog_object;
use iaas_core::security::actions::cloud_object;
use iaas_core::security::rbac::Rbac;
use iaas_core::security::rbac::builtin;
use iaas_core::spi::network::PacketQuery;
use iaas_core::testing::fake::Thing;
use jiff::Timestamp;

#[test]
fn every_action_is_refused_to_strangers_and_allowed_by_the_roles_that_name_it() {
    let mut cells = 0;
    let all: Vec<&str> = TABLE.iter().chain(REFERRED).map(|row| row.name).collect();
    for name in &all {
        cells += in_virtual_time(async move { Fixture::new().await.row(name).await });
    }
    println!("gate: actions={} cells={cells}", all.len());
    // 3 strangers, 3 roles on 4 scopes, and all but each action that is asked for.
    assert!(cells >= all.len() * (3 + 12 + 1));
}

#[test]
fn a_reference_to_what_another_tenant_has_answers_like_one_to_nothing() {
    const REFER: [&str; 7] = [
        "project.create",
        "binding.create",
        "subnet.create",
        "port.create",
        "security-group.create",
        "instance.create",
        "attachment.create",
    ];
    in_virtual_time(async {
        let f = Fixture::new().await;
        let other = f.cloud.session_as("other");
        // The catalog is open to all: it is the same in both.
        let Ids { role, here, size, .. } = f.ids;
        let own = |ids: Ids| {
            let (owner_org, owner) = (f.other.organization, f.other.project);
            Ids { owner_org, owner, role, here, size, ..ids }
        };
        for name in REFER {
            let before = f.snapshot().await;
            let real = act(&other, own(f.ids), name, false).await.expect_err(name);
            let absent = act(&other, own(f.ids.absent()), name, false).await.expect_err(name);
            same_answer(name, &real, &absent);
            assert_eq!(f.snapshot().await, before, "{name}");
        }
    });
}

macro_rules! ids {
    ($($field:ident: $kind:ident),+ $(,)?) => {
        /// What actions are about: everything of one tenant, each thing free to be deleted.
        #[derive(Clone, Copy, Debug, PartialEq)]
        struct Ids { $($field: Id<$kind>),+ }

        impl Ids {
            /// Ids of the same kinds that nothing has.
            fn absent(self) -> Self {
                Self { $($field: flip(self.$field)),+ }
            }
        }
    };
}

ids! {
    owner_org: Organization, owner: Project, organization: Organization, project: Project, spare_org: Organization,
    spare_project: Project, region: Region, spare_region: Region, zone: Zone, here: Zone, host: Host, size: InstanceType, spare_size: InstanceType,
    role: Role, binding: Binding, quota: Quota, book: PriceBook, image: Image, spare_image: Image, instance: Instance,
    volume: Volume, attachment: Attachment, network: Network, spare_network: Network, subnet: Subnet,
    spare_subnet: Subnet, port: Port, group: SecurityGroup, key: KeyPair, operation: Operation,
}

fn flip<K>(id: Id<K>) -> Id<K> {
    Id::from_uuid(uuid(id.uuid().as_u128() ^ 1))
}

fn uuid(number: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(number)
}

#[derive(Debug)]
struct Fixture {
    rig: Rig,
    cloud: Cloud,
    root: Session,
    ids: Ids,
    other: Tenant,
}

/// The store's revision, the calls of providers, the effects among them, and what exists.
type Snapshot = (Rev, u64, u64, Vec<Thing>);

const MINUTE: Duration = Duration::from_secs(60);

impl Fixture {
    async fn new() -> Self {
        let rig = Rig::on(Arc::new(VirtualClock::new()));
        let cloud = rig.builder().authorizer(Arc::new(Rbac::new())).open().await.unwrap();
        let root = cloud.session_as("root");
        let a = tenant(&root, &rig, "acme").await.unwrap();
        let other = tenant(&root, &rig, "other").await.unwrap();
        let ids = things(&root, &rig, &a).await.unwrap();
        let f = Self { rig, cloud, root, ids, other };
        let admin = f.root.roles().named(Owner::Cloud, "admin").await.unwrap().meta.id;
        f.bind("other", admin, other.organization.object()).await;
        f
    }

    async fn bind(&self, to: &str, role: Id<Role>, on: ObjectRef) {
        let spec = BindingSpec { to: to.to_owned(), role, on };
        self.root.bindings().create(Owner::Cloud, to, spec).await.unwrap();
    }

    async fn snapshot(&self) -> Snapshot {
        let (_, rev) = self.rig.store.scan(b"", None, 1).await.unwrap();
        let world = &self.rig.world;
        (rev, world.call_count(), world.effect_count(), world.things())
    }

    /// Everybody asks for one action.
    async fn row(self, name: &str) -> usize {
        let asks = asks(&self.ids, name);
        let resource = asks[0].1.clone();
        let scopes = [
            ("cloud", cloud_object()),
            ("organization", self.ids.organization.object()),
            ("project", self.ids.project.object()),
            ("resource", resource),
        ];
        let mut callers: Vec<(String, Vec<Grant>)> = vec![
            (String::new(), Vec::new()),
            ("nobody".to_owned(), Vec::new()),
            ("other".to_owned(), vec![(strings(&["*"]), self.other.organization.object())]),
        ];
        for (role, patterns) in builtin::ALL {
            let id = self.root.roles().named(Owner::Cloud, role).await.unwrap().meta.id;
            for (scope, on) in &scopes {
                let caller = format!("{role}-{scope}");
                self.bind(&caller, id, on.clone()).await;
                callers.push((caller, vec![(strings(patterns), on.clone())]));
            }
        }
        for ask in asks.iter().map(|(action, _)| action).collect::<BTreeSet<_>>() {
            callers.push(self.all_but(ask).await);
        }
        assert!(self.cloud.settled(MINUTE).await, "{name}: the fixture does not settle");
        for (caller, grants) in &callers {
            if self.cell(name, caller, grants, &asks).await && is_change(name) {
                let fresh = Self::new().await;
                assert_eq!(fresh.ids, self.ids, "the fixture is another one");
                fresh.really(name, caller, grants).await;
            }
        }
        callers.len()
    }

    /// A caller that is allowed to change something does so, on a fixture of its own.
    async fn really(self, name: &str, caller: &str, grants: &[Grant]) {
        // `other` has what it has from the start.
        if let Some(action) = caller.strip_prefix("all-but-") {
            self.all_but(action).await;
        } else if let Some((role, _)) = caller.split_once('-') {
            let role = self.root.roles().named(Owner::Cloud, role).await.unwrap().meta.id;
            self.bind(caller, role, grants[0].1.clone()).await;
        }
        assert!(self.cloud.settled(MINUTE).await, "{name}: the fixture does not settle");
        let before = self.snapshot().await;
        let session = self.cloud.session_as(caller);
        act(&session, self.ids, name, false)
            .await
            .unwrap_or_else(|e| panic!("{name} by `{caller}`, for real: {e:#}"));
        assert!(self.snapshot().await.0 > before.0, "{name} by `{caller}` changed nothing");
    }

    /// Somebody who may do everything else.
    async fn all_but(&self, name: &str) -> (String, Vec<Grant>) {
        let rows = TABLE.iter().chain(REFERRED).map(|row| row.name);
        // The cloud and the catalog are read by a pattern: no action of the table bears their noun.
        let reads = (!name.ends_with(".get")).then_some("*.get");
        let actions: Vec<String> = rows.filter(|n| *n != name).chain(reads).map(str::to_owned).collect();
        let spec = RoleSpec { actions: actions.iter().cloned().collect() };
        let caller = format!("all-but-{name}");
        let role = self.root.roles().create(Owner::Cloud, &caller, spec).await.unwrap().out;
        self.bind(&caller, role, cloud_object()).await;
        (caller, vec![(actions, cloud_object())])
    }

    /// One caller asks for one action. Whether it is allowed.
    async fn cell(&self, name: &str, caller: &str, grants: &[Grant], asks: &[Ask]) -> bool {
        let session = self.cloud.session_as(caller);
        let expected = expected(self, caller, grants, asks);
        let before = self.snapshot().await;
        let answer = act(&session, self.ids, name, true).await;
        let told = format!("{name} by `{caller}`: {answer:?}");
        assert_eq!(answer.as_ref().err().map(iaas_core::Error::kind), expected, "{told}");
        let Err(error) = answer else {
            // The count that a refusal must leave alone is one that an answer from a provider raises.
            let asks_a_provider = ["instance.console", "port.explain-packet"].contains(&name);
            assert!(!asks_a_provider || self.snapshot().await.1 > before.1, "{told} asked no provider");
            return true;
        };
        assert_eq!(self.snapshot().await, before, "{told}");
        // Not a dry run either.
        let again = act(&session, self.ids, name, false).await.expect_err(&told);
        assert_eq!(again, error, "{told}");
        assert_eq!(self.snapshot().await, before, "{told}");
        // Of several objects another one may be the first that is absent.
        let one = asks.len() == 1 || !caller.starts_with("all-but");
        if expected == Some(ErrorKind::NotFound) && one {
            let absent = act(&session, self.ids.absent(), name, false).await.expect_err(&told);
            same_answer(&told, &error, &absent);
        }
        if expected == Some(ErrorKind::NotFound) {
            let about = error.object().expect(&told);
            assert!(asks.iter().any(|(_, o)| o == about), "{told} is about what was not asked");
        }
        false
    }
}

/// What differs between the two is the id that was asked for, and nothing else.
fn same_answer(told: &str, real: &iaas_core::Error, absent: &iaas_core::Error) {
    assert_eq!((real.kind(), absent.kind()), (ErrorKind::NotFound, ErrorKind::NotFound), "{told} {absent:?}");
    assert_eq!((real.public(), real.what_to_do()), (absent.public(), absent.what_to_do()), "{told}");
    assert_eq!((real.operator(), real.retry_after()), (absent.operator(), absent.retry_after()), "{told}");
    let (real, absent) = (real.object().expect(told), absent.object().expect(told));
    let fixed = [cloud_object(), catalog_object()].contains(real);
    let other = uuid(real.id.as_u128() ^ 1);
    assert_eq!(absent.id, if fixed { real.id } else { other }, "{told}");
    assert_eq!(real.kind, absent.kind, "{told}");
}

type Grant = (Vec<String>, ObjectRef);
type Ask = (String, ObjectRef);

fn strings(all: &[&str]) -> Vec<String> {
    all.iter().map(|s| (*s).to_owned()).collect()
}

/// What the caller must be told: nothing if it is allowed.
fn expected(f: &Fixture, caller: &str, grants: &[Grant], asks: &[Ask]) -> Option<ErrorKind> {
    if caller.is_empty() {
        return Some(ErrorKind::Unauthenticated);
    }
    let places = places(&f.ids);
    let may = |action: &str, on: &ObjectRef| {
        let above = &places[on];
        let catalog = *on == catalog_object() || above.contains(&catalog_object());
        let open = catalog && (action.ends_with(".get") || action.ends_with(".list"));
        let given = |(patterns, scope): &Grant| {
            (scope == on || above.contains(scope)) && patterns.iter().any(|p| covers(p, action))
        };
        open || grants.iter().any(given)
    };
    if !asks.iter().all(|(_, on)| may(&format!("{}.get", on.kind), on)) {
        return Some(ErrorKind::NotFound);
    }
    let allowed = asks.iter().all(|(action, on)| may(action, on));
    (!allowed).then_some(ErrorKind::Denied)
}

fn covers(pattern: &str, action: &str) -> bool {
    let (noun, verb) = action.split_once('.').unwrap();
    [action.to_owned(), format!("{noun}.*"), format!("*.{verb}"), "*".to_owned()].iter().any(|p| p == pattern)
}

/// What each object lies in.
fn places(ids: &Ids) -> BTreeMap<ObjectRef, Vec<ObjectRef>> {
    let cloud = vec![cloud_object()];
    let catalog = vec![catalog_object(), cloud_object()];
    let organization = vec![ids.organization.object(), cloud_object()];
    let project = vec![ids.project.object(), ids.organization.object(), cloud_object()];
    let mut all: BTreeMap<ObjectRef, Vec<ObjectRef>> = BTreeMap::new();
    let mut put = |objects: Vec<ObjectRef>, above: &Vec<ObjectRef>| {
        all.extend(objects.into_iter().map(|o| (o, above.clone())));
    };
    put(vec![cloud_object()], &Vec::new());
    put(vec![catalog_object(), ids.host.object(), ids.organization.object(), ids.spare_org.object()], &cloud);
    put(vec![ids.region.object(), ids.zone.object(), ids.role.object(), ids.book.object()], &catalog);
    put(
        vec![ids.spare_region.object(), ids.here.object(), ids.size.object(), ids.spare_size.object()],
        &catalog,
    );
    put(vec![ids.project.object(), ids.spare_project.object()], &organization);
    put(
        vec![ids.binding.object(), ids.quota.object(), ids.image.object(), ids.spare_image.object()],
        &project,
    );
    put(
        vec![ids.instance.object(), ids.volume.object(), ids.attachment.object(), ids.key.object()],
        &project,
    );
    put(vec![ids.network.object(), ids.spare_network.object(), ids.port.object()], &project);
    put(vec![ids.subnet.object(), ids.spare_subnet.object(), ids.group.object()], &project);
    put(vec![ids.operation.object()], &project);
    all
}

/// The object that reading, changing and deleting something of `noun` is about, and the owner of such things.
fn one_of(ids: &Ids, noun: &str) -> (ObjectRef, ObjectRef) {
    let (cloud, project) = (cloud_object(), ids.project.object());
    match noun {
        "region" => (ids.spare_region.object(), cloud),
        "zone" => (ids.zone.object(), cloud),
        "host" => (ids.host.object(), cloud),
        "instance-type" => (ids.spare_size.object(), cloud),
        "organization" => (ids.spare_org.object(), cloud),
        "role" => (ids.role.object(), cloud),
        "price-book" => (ids.book.object(), cloud),
        "project" => (ids.spare_project.object(), ids.organization.object()),
        "binding" => (ids.binding.object(), project),
        "quota" => (ids.quota.object(), project),
        "image" => (ids.spare_image.object(), project),
        "instance" => (ids.instance.object(), project),
        "volume" => (ids.volume.object(), project),
        "attachment" => (ids.attachment.object(), project),
        "network" => (ids.spare_network.object(), project),
        "subnet" => (ids.spare_subnet.object(), project),
        "port" => (ids.port.object(), project),
        "security-group" => (ids.group.object(), project),
        "key-pair" => (ids.key.object(), project),
        "operation" => (ids.operation.object(), project),
        other => panic!("`{other}` has no fixture: add one"),
    }
}

/// What the gate must ask for one action.
fn asks(ids: &Ids, name: &str) -> Vec<Ask> {
    let project = ids.project.object();
    let ask = |all: &[(&str, ObjectRef)]| all.iter().map(|(a, o)| ((*a).to_owned(), o.clone())).collect();
    let attach = |what: (&str, ObjectRef)| {
        ask(&[("attachment.create", project.clone()), ("instance.attach", ids.instance.object()), what])
    };
    match name {
        "object.explain"
        | "instance.start"
        | "instance.stop"
        | "instance.reboot"
        | "instance.console"
        | "instance.console-input" => ask(&[(name, ids.instance.object())]),
        "project.bill" => ask(&[(name, project)]),
        "audit.read" => ask(&[(name, cloud_object())]),
        "port.explain-packet" => ask(&[(name, ids.port.object())]),
        "volume.attach" | "instance.attach" | "attachment.create" => {
            attach(("volume.attach", ids.volume.object()))
        }
        "port.attach" => attach(("port.attach", ids.port.object())),
        "zone.create" => ask(&[(name, cloud_object()), ("region.get", ids.region.object())]),
        "host.create" => ask(&[(name, cloud_object()), ("zone.get", ids.zone.object())]),
        "host.replace" => ask(&[(name, ids.host.object()), ("zone.get", ids.zone.object())]),
        "binding.create" => ask(&[(name, project), ("role.get", ids.role.object())]),
        "subnet.create" => ask(&[(name, project), ("network.get", ids.network.object())]),
        "port.create" => ask(&[
            (name, project),
            ("subnet.get", ids.subnet.object()),
            ("security-group.get", ids.group.object()),
        ]),
        "security-group.create" => ask(&[(name, project), ("security-group.get", ids.group.object())]),
        "instance.create" => ask(&[
            (name, project.clone()),
            ("port.create", project),
            ("instance-type.get", ids.size.object()),
            ("image.get", ids.image.object()),
            ("key-pair.get", ids.key.object()),
            ("zone.get", ids.here.object()),
            ("volume.attach", ids.volume.object()),
            ("subnet.get", ids.subnet.object()),
            ("security-group.get", ids.group.object()),
        ]),
        _ => {
            let (noun, verb) = name.split_once('.').unwrap();
            let (object, owner) = one_of(ids, noun);
            match verb {
                "get" | "update" | "delete" | "replace" => ask(&[(name, object)]),
                "create" => ask(&[(name, owner)]),
                "list" if owner == cloud_object() && CATALOG.contains(&noun) => {
                    ask(&[(name, catalog_object())])
                }
                "list" => ask(&[(name, owner)]),
                _ => panic!("`{name}` has no fixture: add one"),
            }
        }
    }
}

/// Whether an action changes something, so that it can be asked for as a dry run, too.
fn is_change(name: &str) -> bool {
    const READ: [&str; 8] =
        ["get", "list", "console", "console-input", "bill", "read", "explain", "explain-packet"];
    !READ.iter().any(|verb| name.split_once('.').unwrap().1 == *verb)
}

async fn ended<A: Intent>(change: Change<A>, dry: bool) -> Result<()> {
    if dry { change.dry_run().await.map(drop) } else { change.await.map(drop) }
}

/// Asks for an action, by the call that a program makes.
async fn act(s: &Session, ids: Ids, name: &str, dry: bool) -> Result<()> {
    let (noun, verb) = name.split_once('.').unwrap();
    let labels = || Labels::new([("colour", "red")]).unwrap();
    macro_rules! family {
        ($family:expr, $id:expr, $owner:expr) => {
            match verb {
                "get" => return $family.get($id).await.map(drop),
                "list" => return $family.list($owner, None, 10).await.map(drop),
                "update" => return ended($family.update($id, labels()), dry).await,
                "delete" => return ended($family.delete($id), dry).await,
                _ => {}
            }
        };
    }
    match noun {
        "region" => family!(s.regions(), ids.spare_region, Owner::Cloud),
        "zone" => family!(s.zones(), ids.zone, Owner::Cloud),
        "host" => family!(s.hosts(), ids.host, Owner::Cloud),
        "instance-type" => family!(s.instance_types(), ids.spare_size, Owner::Cloud),
        "organization" => family!(s.organizations(), ids.spare_org, Owner::Cloud),
        "role" => family!(s.roles(), ids.role, Owner::Cloud),
        "price-book" => family!(s.price_books(), ids.book, Owner::Cloud),
        "project" => family!(s.projects(), ids.spare_project, ids.owner_org),
        "binding" => family!(s.bindings(), ids.binding, ids.owner),
        "quota" => family!(s.quotas(), ids.quota, ids.owner),
        "image" => family!(s.images(), ids.spare_image, ids.owner),
        "instance" => family!(s.instances(), ids.instance, ids.owner),
        "volume" => family!(s.volumes(), ids.volume, ids.owner),
        "attachment" => family!(s.attachments(), ids.attachment, ids.owner),
        "network" => family!(s.networks(), ids.spare_network, ids.owner),
        "subnet" => family!(s.subnets(), ids.spare_subnet, ids.owner),
        "port" => family!(s.ports(), ids.port, ids.owner),
        "security-group" => family!(s.security_groups(), ids.group, ids.owner),
        "key-pair" => family!(s.key_pairs(), ids.key, ids.owner),
        "operation" => family!(s.operations(), ids.operation, ids.owner),
        _ => {}
    }
    match verb {
        "create" | "replace" | "attach" => make(s, ids, name, dry).await,
        _ => use_it(s, ids, name, dry).await,
    }
}

async fn make(s: &Session, ids: Ids, name: &str, dry: bool) -> Result<()> {
    let (cloud, owner) = (Owner::Cloud, ids.owner);
    let attach = |what| {
        let spec = AttachmentSpec { instance: ids.instance, what };
        ended(s.attachments().create(owner, "new", spec), dry)
    };
    let disk = Attached::Volume { volume: ids.volume, boot: None, read_only: false };
    let host = || HostSpec { zone: ids.zone, cordoned: true, vcpus: 2, memory: 1 << 30 };
    let role = || RoleSpec { actions: ["volume.get".to_owned()].into() };
    let rules = || SecurityGroupSpec::new(vec![rule(Remote::Group(ids.group))]).unwrap();
    match name {
        "region.create" => ended(s.regions().create(cloud, "new", Empty {}), dry).await,
        "zone.create" => ended(s.zones().create(cloud, "new", ZoneSpec { region: ids.region }), dry).await,
        "host.create" => ended(s.hosts().create(cloud, "new", host()), dry).await,
        "host.replace" => ended(s.hosts().replace(ids.host, host()), dry).await,
        "instance-type.create" => ended(s.instance_types().create(cloud, "new", small()), dry).await,
        "organization.create" => ended(s.organizations().create(cloud, "new", Empty {}), dry).await,
        "project.create" => {
            let spec = ProjectSpec { organization: ids.organization };
            ended(s.projects().create(ids.owner_org, "new", spec), dry).await
        }
        "role.create" => ended(s.roles().create(cloud, "new", role()), dry).await,
        "role.replace" => ended(s.roles().replace(ids.role, role()), dry).await,
        "binding.create" => {
            let spec = BindingSpec { to: "x".to_owned(), role: ids.role, on: ids.project.object() };
            ended(s.bindings().create(owner, "new", spec), dry).await
        }
        "quota.create" => ended(s.quotas().create(owner, "new", QuotaSpec::default()), dry).await,
        "quota.replace" => ended(s.quotas().replace(ids.quota, QuotaSpec::default()), dry).await,
        "price-book.create" => ended(s.price_books().create(cloud, "new", book()), dry).await,
        "image.create" => ended(s.images().create(owner, "new", linux()), dry).await,
        "volume.create" => ended(s.volumes().create(owner, "new", gib()), dry).await,
        "attachment.create" | "volume.attach" | "instance.attach" => attach(disk).await,
        "port.attach" => attach(Attached::Port(ids.port)).await,
        "network.create" => ended(s.networks().create(owner, "new", NetworkSpec::default()), dry).await,
        "subnet.create" => {
            ended(s.subnets().create(owner, "new", subnet(ids.network, "10.7.0.0/24")), dry).await
        }
        "port.create" => {
            let spec = PortSpec { subnet: ids.subnet, groups: [ids.group].into(), addresses: Vec::new() };
            ended(s.ports().create(owner, "new", spec), dry).await
        }
        "security-group.create" => ended(s.security_groups().create(owner, "new", rules()), dry).await,
        "security-group.replace" => {
            ended(s.security_groups().replace(ids.group, SecurityGroupSpec::default()), dry).await
        }
        "key-pair.create" => ended(s.key_pairs().create(owner, "new", key()), dry).await,
        "instance.create" => {
            let groups = [ids.group].into();
            let spec = InstanceSpec {
                instance_type: ids.size,
                image: ids.image,
                cmdline: String::new(),
                key_pairs: vec![ids.key],
                zone: Some(ids.here),
                power: Power::On,
            };
            let request = CreateInstance {
                project: owner,
                name: iaas_core::Name::new("new")?,
                labels: Labels::default(),
                spec,
                nics: vec![Nic::New(PortSpec { subnet: ids.subnet, groups, addresses: Vec::new() })],
                volumes: vec![ids.volume],
            };
            ended(s.instances().request(request), dry).await
        }
        other => panic!("`{other}` has no fixture: add one"),
    }
}

async fn use_it(s: &Session, ids: Ids, name: &str, dry: bool) -> Result<()> {
    match name {
        "instance.start" => ended(s.instances().start(ids.instance), dry).await,
        "instance.stop" => ended(s.instances().stop(ids.instance, Duration::ZERO), dry).await,
        "instance.reboot" => ended(s.instances().reboot(ids.instance), dry).await,
        "instance.console" => s.instances().console(ids.instance, 0).await.map(drop),
        "instance.console-input" => s.instances().console_input(ids.instance).await.map(drop),
        "project.bill" => s.bill(ids.owner, second(0), second(1)).await.map(drop),
        "audit.read" => s.audit().entries().await.map(drop),
        "object.explain" => s.explain(ids.instance.object()).await.map(drop),
        "port.explain-packet" => {
            let dst = "10.0.1.9".parse().unwrap();
            let packet =
                PacketQuery { from: ids.port, src: None, dst, protocol: 6, src_port: 5000, dst_port: 80 };
            s.explain_packet(packet).await.map(drop)
        }
        other => panic!("`{other}` has no fixture: add one"),
    }
}

/// Makes everything that is asked for.
async fn things(root: &Session, rig: &Rig, a: &Tenant) -> Result<Ids> {
    let (cloud, project) = (Owner::Cloud, a.project);
    let here = root.hosts().get(rig.host).await?.spec.zone;
    let network = root.subnets().get(a.subnet).await?.spec.network();
    let of = ProjectSpec { organization: a.organization };
    let region = root.regions().create(cloud, "spare", Empty {}).await?.out;
    let zone = root.zones().create(cloud, "spare", ZoneSpec { region }).await?.out;
    let host = HostSpec { zone: here, cordoned: true, vcpus: 1, memory: 1 << 30 };
    let role = RoleSpec { actions: ["instance.get".to_owned()].into() };
    let viewer = root.roles().named(cloud, "viewer").await?.meta.id;
    let binding = BindingSpec { to: "somebody".to_owned(), role: viewer, on: project.object() };
    let instance = root.instances().launch(project, a.instance("web", vec![])).await?.wait().await?;
    let volume = root.volumes().create(project, "spare", gib()).await?;
    let port = PortSpec { subnet: a.subnet, groups: Default::default(), addresses: Vec::new() };
    Ok(Ids {
        owner_org: a.organization,
        owner: project,
        organization: a.organization,
        project,
        spare_org: root.organizations().create(cloud, "spare", Empty {}).await?.out,
        spare_project: root.projects().create(a.organization, "spare", of).await?.out,
        region,
        spare_region: root.regions().create(cloud, "spare-2", Empty {}).await?.out,
        zone,
        here,
        host: root.hosts().create(cloud, "spare", host).await?.out,
        size: a.size,
        spare_size: root.instance_types().create(cloud, "spare", small()).await?.out,
        role: root.roles().create(cloud, "spare", role).await?.out,
        binding: root.bindings().create(project, "spare", binding).await?.out,
        quota: root.quotas().create(project, "spare", QuotaSpec::default()).await?.out,
        book: root.price_books().create(cloud, "spare", book()).await?.out,
        image: a.image,
        spare_image: root.images().create(project, "spare", linux()).await?.out,
        instance,
        attachment: root.attachments().list(project, None, 1).await?[0].meta.id,
        volume: volume.wait().await?,
        network,
        spare_network: root.networks().create(project, "spare", NetworkSpec::default()).await?.out,
        subnet: a.subnet,
        spare_subnet: root.subnets().create(project, "spare", subnet(network, "10.7.1.0/24")).await?.out,
        port: root.ports().create(project, "spare", port).await?.out,
        group: root.security_groups().create(project, "spare", SecurityGroupSpec::default()).await?.out,
        key: root.key_pairs().create(project, "spare", key()).await?.out,
        operation: volume.id(),
    })
}

fn gib() -> VolumeSpec {
    VolumeSpec::new(ByteSize::gib(1)).unwrap()
}

fn small() -> InstanceTypeSpec {
    InstanceTypeSpec::new(1, ByteSize::mib(128)).unwrap()
}

fn linux() -> ImageSpec {
    ImageSpec::Kernel { kernel: iaas_core::Digest::of(b"kernel"), initrd: None, cmdline: String::new() }
}

fn key() -> KeyPairSpec {
    KeyPairSpec::try_from("ssh-ed25519 AAAA somebody".to_owned()).unwrap()
}

fn subnet(network: Id<Network>, cidr: &str) -> SubnetSpec {
    SubnetSpec::new(network, vec![cidr.parse::<Cidr>().unwrap()]).unwrap()
}

fn rule(remote: Remote) -> Rule {
    let ports = iaas_core::PortRange::ALL;
    Rule { direction: Direction::Ingress, protocol: Protocol::Any, ports, remote }
}

fn second(n: i64) -> Timestamp {
    Timestamp::from_second(START + n).unwrap()
}

fn book() -> PriceBookSpec {
    PriceBookSpec { currency: "EUR".to_owned(), from: second(-1), prices: BTreeMap::new() }
}
