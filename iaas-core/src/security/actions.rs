//! The one table of actions: name, request, what it asks for, whether it changes anything.
//!
//! The gate, the audit log, the role matrix and the test matrix come from this table.

use std::fmt::Debug;

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Id;
use crate::Labels;
use crate::Name;
use crate::ObjectRef;
use crate::id::Cloud;
use crate::model::*;
use crate::spi::network::PacketQuery;

mod sealed {
    pub trait Sealed {}
}

/// A request that needs a permit. `Self` is the request.
pub trait Action: sealed::Sealed + Serialize + Debug + Send + Sync + 'static {
    /// `noun.verb`.
    const NAME: &'static str;
    /// Whether it changes anything.
    const MUTATES: bool;
    /// What the caller gets at once.
    type Out: Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static;

    /// Every (action, object) that must be allowed.
    fn asks(&self) -> Vec<(&'static str, ObjectRef)>;
}

/// The objects that a wish refers to, with the action that referring to them needs.
pub trait References {
    /// Every (action, object).
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        Vec::new()
    }
}

/// Makes a resource.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Create<R: Resource> {
    /// Whose it will be.
    pub owner: Owner,
    /// Its name, unique among the owner's resources of its type.
    pub name: Name,
    /// Its labels.
    pub labels: Labels,
    /// The wish.
    pub spec: R::Spec,
}

/// Reads a resource.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Get<R: Resource> {
    /// Which.
    pub id: Id<R>,
}

/// Lists the resources of one owner, ordered by id.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct List<R: Resource> {
    /// Whose.
    pub owner: Owner,
    /// Only those after this one.
    pub after: Option<Id<R>>,
    /// At most so many, up to 1000.
    pub limit: u32,
}

/// Replaces the labels of a resource.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Update<R: Resource> {
    /// Which.
    pub id: Id<R>,
    /// The new labels.
    pub labels: Labels,
}

/// Replaces the wish of a resource.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Replace<R: Resource> {
    /// Which.
    pub id: Id<R>,
    /// The new wish.
    pub spec: R::Spec,
}

/// Removes a resource.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Delete<R: Resource> {
    /// Which.
    pub id: Id<R>,
}

/// Makes an instance with its interfaces and disks, at most 16 of each, in one commit.
#[derive(Clone, Debug, Serialize)]
pub struct CreateInstance {
    /// Whose it will be.
    pub project: Id<Project>,
    /// Its name.
    pub name: Name,
    /// Its labels.
    pub labels: Labels,
    /// The wish.
    pub spec: InstanceSpec,
    /// Its interfaces, in order.
    pub nics: Vec<Nic>,
    /// Its disks, in order.
    pub volumes: Vec<Id<Volume>>,
}

/// An interface of a new instance.
#[derive(Clone, Debug, Serialize)]
pub enum Nic {
    /// A port is made for it and goes with it.
    New(PortSpec),
    /// An existing port.
    Port(Id<Port>),
}

/// Starts an instance.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// Which.
    pub id: Id<Instance>,
}

/// Stops an instance.
#[derive(Clone, Debug, Serialize)]
pub struct Stop {
    /// Which.
    pub id: Id<Instance>,
    /// How long the guest may take before it is forced.
    pub grace: std::time::Duration,
}

/// Starts a running instance anew.
#[derive(Clone, Debug, Serialize)]
pub struct Reboot {
    /// Which.
    pub id: Id<Instance>,
}

/// Reads an instance's console.
#[derive(Clone, Debug, Serialize)]
pub struct Console {
    /// Which.
    pub id: Id<Instance>,
    /// From which offset in bytes.
    pub from: u64,
}

/// Writes to an instance's console.
#[derive(Clone, Debug, Serialize)]
pub struct ConsoleInput {
    /// Which.
    pub id: Id<Instance>,
}

/// Computes a project's bill.
#[derive(Clone, Debug, Serialize)]
pub struct ReadBill {
    /// Whose.
    pub project: Id<Project>,
    /// Its first moment.
    pub from: Timestamp,
    /// The first moment after it.
    pub to: Timestamp,
}

/// Reads the audit log.
#[derive(Clone, Debug, Serialize)]
pub struct ReadAudit {
    /// Of which cloud.
    pub cloud: Id<Cloud>,
}

/// Says who waits for what.
#[derive(Clone, Debug, Serialize)]
pub struct Explain {
    /// About what.
    pub object: ObjectRef,
}

/// Says what the network does with a packet.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainPacket {
    /// Which packet.
    pub packet: PacketQuery,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// `noun.verb`.
    pub name: &'static str,
    /// The type of object that it is asked about.
    pub noun: &'static str,
    /// Whether it changes anything.
    pub mutates: bool,
}

macro_rules! table {
    (
        common { $($res:ident $noun:literal;)+ }
        create { $($cres:ident $cnoun:literal;)+ }
        replace { $($rres:ident $rnoun:literal;)+ }
        $($name:literal, $noun2:literal, $req:ident, mutates: $mut:literal, $out:ty, |$r:ident| $asks:expr;)+
    ) => {
        $(
            impl sealed::Sealed for Get<$res> {}
            impl Action for Get<$res> {
                const NAME: &'static str = concat!($noun, ".get");
                const MUTATES: bool = false;
                type Out = Record<$res>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    vec![(Self::NAME, self.id.object())]
                }
            }
            impl sealed::Sealed for List<$res> {}
            impl Action for List<$res> {
                const NAME: &'static str = concat!($noun, ".list");
                const MUTATES: bool = false;
                type Out = Vec<Record<$res>>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    vec![(Self::NAME, list_object($noun, self.owner))]
                }
            }
            impl sealed::Sealed for Update<$res> {}
            impl Action for Update<$res> {
                const NAME: &'static str = concat!($noun, ".update");
                const MUTATES: bool = true;
                type Out = Id<$res>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    vec![(Self::NAME, self.id.object())]
                }
            }
            impl sealed::Sealed for Delete<$res> {}
            impl Action for Delete<$res> {
                const NAME: &'static str = concat!($noun, ".delete");
                const MUTATES: bool = true;
                type Out = Id<$res>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    vec![(Self::NAME, self.id.object())]
                }
            }
        )+
        $(
            impl sealed::Sealed for Create<$cres> {}
            impl Action for Create<$cres> {
                const NAME: &'static str = concat!($cnoun, ".create");
                const MUTATES: bool = true;
                type Out = Id<$cres>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    let mut asks = vec![(Self::NAME, owner_object(self.owner))];
                    asks.extend(self.spec.references());
                    asks
                }
            }
        )+
        $(
            impl sealed::Sealed for Replace<$rres> {}
            impl Action for Replace<$rres> {
                const NAME: &'static str = concat!($rnoun, ".replace");
                const MUTATES: bool = true;
                type Out = Id<$rres>;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    let mut asks = vec![(Self::NAME, self.id.object())];
                    asks.extend(self.spec.references());
                    asks
                }
            }
        )+
        $(
            impl sealed::Sealed for $req {}
            impl Action for $req {
                const NAME: &'static str = $name;
                const MUTATES: bool = $mut;
                type Out = $out;
                fn asks(&self) -> Vec<(&'static str, ObjectRef)> {
                    let $r = self;
                    $asks
                }
            }
        )+

        /// Every action.
        pub const TABLE: &[Row] = &[
            $(
                Row { name: concat!($noun, ".get"), noun: $noun, mutates: false },
                Row { name: concat!($noun, ".list"), noun: $noun, mutates: false },
                Row { name: concat!($noun, ".update"), noun: $noun, mutates: true },
                Row { name: concat!($noun, ".delete"), noun: $noun, mutates: true },
            )+
            $(Row { name: concat!($cnoun, ".create"), noun: $cnoun, mutates: true },)+
            $(Row { name: concat!($rnoun, ".replace"), noun: $rnoun, mutates: true },)+
            $(Row { name: $name, noun: $noun2, mutates: $mut },)+
        ];
    };
}

table! {
    common {
        Region "region"; Zone "zone"; Host "host"; InstanceType "instance-type"; Organization "organization";
        Project "project"; Role "role"; Binding "binding"; Quota "quota"; PriceBook "price-book"; Image "image";
        Instance "instance"; Volume "volume"; Attachment "attachment"; Network "network"; Subnet "subnet"; Port "port";
        SecurityGroup "security-group"; KeyPair "key-pair"; Operation "operation";
    }
    create {
        Region "region"; Zone "zone"; Host "host"; InstanceType "instance-type"; Organization "organization";
        Project "project"; Role "role"; Binding "binding"; Quota "quota"; PriceBook "price-book"; Image "image";
        Volume "volume"; Attachment "attachment"; Network "network"; Subnet "subnet"; Port "port";
        SecurityGroup "security-group"; KeyPair "key-pair";
    }
    replace {
        Host "host"; Role "role"; Quota "quota"; SecurityGroup "security-group";
    }
    "instance.create", "instance", CreateInstance, mutates: true, Id<Instance>, |r| {
        let mut asks = vec![("instance.create", r.project.object())];
        asks.extend(r.spec.references());
        asks.extend(r.volumes.iter().map(|v| ("volume.attach", v.object())));
        for nic in &r.nics {
            match nic {
                Nic::New(spec) => {
                    asks.push(("port.create", r.project.object()));
                    asks.extend(spec.references());
                }
                Nic::Port(port) => asks.push(("port.attach", port.object())),
            }
        }
        asks.sort();
        asks.dedup();
        asks
    };
    "instance.start", "instance", Start, mutates: true, Id<Instance>, |r| vec![("instance.start", r.id.object())];
    "instance.stop", "instance", Stop, mutates: true, Id<Instance>, |r| vec![("instance.stop", r.id.object())];
    "instance.reboot", "instance", Reboot, mutates: true, Id<Instance>, |r| vec![("instance.reboot", r.id.object())];
    "instance.console", "instance", Console, mutates: false, (), |r| vec![("instance.console", r.id.object())];
    "instance.console-input", "instance", ConsoleInput, mutates: true, Id<Instance>, |r| {
        vec![("instance.console-input", r.id.object())]
    };
    "project.bill", "project", ReadBill, mutates: false, (), |r| vec![("project.bill", r.project.object())];
    "audit.read", "cloud", ReadAudit, mutates: false, (), |r| vec![("audit.read", r.cloud.object())];
    "object.explain", "object", Explain, mutates: false, (), |r| vec![("object.explain", r.object.clone())];
    "port.explain-packet", "port", ExplainPacket, mutates: false, (), |r| {
        vec![("port.explain-packet", r.packet.from.object())]
    };
}

/// Actions on objects that other requests refer to; they have no request of their own.
pub const REFERRED: &[Row] = &[
    Row { name: "volume.attach", noun: "volume", mutates: true },
    Row { name: "port.attach", noun: "port", mutates: true },
    Row { name: "instance.attach", noun: "instance", mutates: true },
];

/// The object that an owner is. The cloud has the nil UUID here, whatever its id: there is one.
pub fn owner_object(owner: Owner) -> ObjectRef {
    match owner {
        Owner::Cloud => cloud_object(),
        Owner::Organization(id) => id.object(),
        Owner::Project(id) => id.object(),
    }
}

/// The nouns that everybody may choose from when the cloud owns them.
pub const CATALOG: [&str; 6] = ["region", "zone", "instance-type", "image", "price-book", "role"];

/// The cloud's own catalog as an object of decisions: the parent of what everybody may choose from.
pub fn catalog_object() -> ObjectRef {
    ObjectRef { kind: "catalog".to_owned(), id: uuid::Uuid::nil() }
}

/// The object that listing `noun` of `owner` is asked about.
fn list_object(noun: &str, owner: Owner) -> ObjectRef {
    if owner == Owner::Cloud && CATALOG.contains(&noun) { catalog_object() } else { owner_object(owner) }
}

/// The cloud as an object of decisions.
pub fn cloud_object() -> ObjectRef {
    Id::<Cloud>::from_uuid(uuid::Uuid::nil()).object()
}

impl References for Empty {}
impl References for PriceBookSpec {}
impl References for QuotaSpec {}
impl References for RoleSpec {}
impl References for ImageSpec {}
impl References for InstanceTypeSpec {}
impl References for KeyPairSpec {}
impl References for VolumeSpec {}
impl References for NetworkSpec {}

impl References for ProjectSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        vec![("project.create", self.organization.object())]
    }
}

impl References for ZoneSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        vec![("region.get", self.region.object())]
    }
}

impl References for HostSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        vec![("zone.get", self.zone.object())]
    }
}

impl References for BindingSpec {
    // Who gives a role somewhere must be allowed to do so there.
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        vec![("role.get", self.role.object()), ("binding.create", self.on.clone())]
    }
}

impl References for InstanceSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        let mut refs =
            vec![("instance-type.get", self.instance_type.object()), ("image.get", self.image.object())];
        refs.extend(self.key_pairs.iter().map(|k| ("key-pair.get", k.object())));
        refs.extend(self.zone.iter().map(|z| ("zone.get", z.object())));
        refs
    }
}

impl References for AttachmentSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        let what = match self.what {
            Attached::Volume { volume, .. } => ("volume.attach", volume.object()),
            Attached::Port(port) => ("port.attach", port.object()),
        };
        vec![("instance.attach", self.instance.object()), what]
    }
}

impl References for SubnetSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        vec![("network.get", self.network().object())]
    }
}

impl References for PortSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        let mut refs = vec![("subnet.get", self.subnet.object())];
        refs.extend(self.groups.iter().map(|g| ("security-group.get", g.object())));
        refs
    }
}

impl References for SecurityGroupSpec {
    fn references(&self) -> Vec<(&'static str, ObjectRef)> {
        let group = |r: &security_group::Rule| match r.remote {
            security_group::Remote::Group(id) => Some(("security-group.get", id.object())),
            _ => None,
        };
        self.rules().iter().filter_map(group).collect()
    }
}
