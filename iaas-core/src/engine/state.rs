//! Every record in memory: what the leader reads, and the ledgers that follow from it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::codec;
use crate::Entity;
use crate::Error;
use crate::Id;
use crate::Name;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::model::*;
use crate::security::actions;

/// The records of one type.
pub type Table<R> = BTreeMap<Id<R>, Arc<Record<R>>>;

/// A resource that the state has a table for.
pub trait Stored: Resource {
    /// Its table.
    fn table(state: &State) -> &Table<Self>;
    /// Its table, to change.
    fn table_mut(state: &mut State) -> &mut Table<Self>;
}

macro_rules! tables {
    ($($field:ident: $res:ident),+ $(,)?) => {
        /// All records, and the newest revision.
        #[derive(Clone, Debug, Default)]
        pub struct State {
            /// The newest commit.
            pub rev: Rev,
            /// The newest commit that changed the network program.
            pub net_rev: Rev,
            /// The newest commit that changed roles or bindings.
            pub policy_rev: Rev,
            names: BTreeMap<(&'static str, Owner, Name), Uuid>,
            $(
                #[doc = concat!("The `", stringify!($res), "` records.")]
                pub $field: Table<$res>,
            )+
        }

        $(impl Stored for $res {
            fn table(state: &State) -> &Table<Self> {
                &state.$field
            }
            fn table_mut(state: &mut State) -> &mut Table<Self> {
                &mut state.$field
            }
        })+

        impl State {
            /// Takes a stored entry.
            ///
            /// # Errors
            /// `Unsupported` if its noun or its bytes are not known to this version.
            pub fn load(&mut self, noun: &str, id: Uuid, value: &[u8], rev: Rev) -> Result<()> {
                match noun {
                    $(<$res as Entity>::NAME => {
                        let record = decode_record::<$res>(value, rev)?;
                        if record.meta.id.uuid() != id {
                            return Err(Error::unsupported("a stored record lies under another id"));
                        }
                        self.put(record);
                        Ok(())
                    })+
                    _ => Err(Error::unsupported(format!("the store has a `{noun}`"))
                        .remedy("open it with the newer version of this program that wrote it")),
                }
            }

            /// Forgets a record.
            pub fn forget(&mut self, noun: &str, id: Uuid, rev: Rev) {
                match noun {
                    $(<$res as Entity>::NAME => self.remove::<$res>(Id::from_uuid(id), rev),)+
                    _ => {}
                }
            }

            /// The version, owner and inner parents of an object.
            fn place(&self, object: &ObjectRef) -> Option<(Rev, Owner, Vec<ObjectRef>)> {
                match object.kind.as_str() {
                    $(<$res as Entity>::NAME => {
                        let record = self.$field.get(&Id::from_uuid(object.id))?;
                        let inner = inner_parents(self, object);
                        Some((record.meta.version, record.meta.owner, inner))
                    })+
                    _ => None,
                }
            }

            /// The name, trouble and removal of an object.
            pub fn brief(&self, object: &ObjectRef) -> Option<Brief> {
                match object.kind.as_str() {
                    $(<$res as Entity>::NAME => {
                        let m = &self.$field.get(&Id::from_uuid(object.id))?.meta;
                        Some(Brief {
                            name: m.name.clone(),
                            owner: m.owner,
                            version: m.version,
                            absent: m.absent,
                            trouble: m.trouble.clone(),
                        })
                    })+
                    _ => None,
                }
            }

            /// Every object that an owner owns.
            pub fn owned_by(&self, owner: Owner) -> Vec<ObjectRef> {
                let mut all = Vec::new();
                $(all.extend(self.$field.values().filter(|r| r.meta.owner == owner).map(|r| r.meta.id.object()));)+
                all
            }
        }
    };
}

tables! {
    regions: Region, zones: Zone, hosts: Host, instance_types: InstanceType, organizations: Organization,
    projects: Project, roles: Role, bindings: Binding, quotas: Quota, price_books: PriceBook, images: Image,
    instances: Instance, volumes: Volume, attachments: Attachment, networks: Network, subnets: Subnet, ports: Port,
    security_groups: SecurityGroup, key_pairs: KeyPair, operations: Operation,
}

/// What every type of record can say of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Brief {
    /// Its name.
    pub name: Name,
    /// Its owner.
    pub owner: Owner,
    /// Its etag.
    pub version: Rev,
    /// Whether it is going.
    pub absent: Option<Id<Operation>>,
    /// Why it does not converge.
    pub trouble: Option<Trouble>,
}

/// Reads a record; `rev` is the commit that wrote it.
///
/// # Errors
/// As [`codec::decode`].
pub fn decode_record<R: Resource>(value: &[u8], rev: Rev) -> Result<Record<R>> {
    let mut record: Record<R> = codec::decode(value)?;
    record.meta.version = rev;
    // Zero stands for "the commit that wrote this", whose number was not known when it was encoded.
    if record.meta.effect == Rev(0) {
        record.meta.effect = rev;
    }
    Ok(record)
}

/// Writes a record; an effect that lies in this very commit is written as zero.
///
/// # Errors
/// As [`codec::encode`].
pub fn encode_record<R: Resource>(record: &Record<R>) -> Result<Bytes> {
    codec::encode(record)
}

impl State {
    /// A record.
    pub fn get<R: Stored>(&self, id: Id<R>) -> Option<&Arc<Record<R>>> {
        R::table(self).get(&id)
    }

    /// Whether the owner has a resource of that type and name.
    pub fn named<R: Stored>(&self, owner: Owner, name: &Name) -> Option<Id<R>> {
        self.names.get(&(R::NAME, owner, name.clone())).map(|id| Id::from_uuid(*id))
    }

    /// Puts a record, with the names and revisions that follow.
    pub fn put<R: Stored>(&mut self, record: Record<R>) {
        let (id, rev) = (record.meta.id, record.meta.version);
        if let Some(old) = R::table(self).get(&id) {
            let key = (R::NAME, old.meta.owner, old.meta.name.clone());
            self.names.remove(&key);
        }
        self.names.insert((R::NAME, record.meta.owner, record.meta.name.clone()), id.uuid());
        let effect = record.meta.effect;
        let new = R::table_mut(self).insert(id, Arc::new(record)).is_none();
        self.moved::<R>(rev, new || effect == rev);
    }

    fn remove<R: Stored>(&mut self, id: Id<R>, rev: Rev) {
        if let Some(old) = R::table_mut(self).remove(&id) {
            self.names.remove(&(R::NAME, old.meta.owner, old.meta.name.clone()));
            self.moved::<R>(rev, true);
        }
    }

    fn moved<R: Stored>(&mut self, rev: Rev, effect: bool) {
        self.rev = self.rev.max(rev);
        if effect && NET.contains(&R::NAME) {
            self.net_rev = self.net_rev.max(rev);
        }
        if effect && [Role::NAME, Binding::NAME].contains(&R::NAME) {
            self.policy_rev = self.policy_rev.max(rev);
        }
    }

    /// The version of an object and the objects that it lies in, nearest first, up to the cloud.
    pub fn lineage(&self, object: &ObjectRef) -> Option<(Rev, Vec<ObjectRef>)> {
        if *object == actions::cloud_object() {
            return Some((Rev(0), Vec::new()));
        }
        if *object == actions::catalog_object() {
            return Some((Rev(0), vec![actions::cloud_object()]));
        }
        let (rev, owner, mut line) = self.place(object)?;
        match owner {
            Owner::Project(id) => {
                line.push(id.object());
                line.extend(self.projects.get(&id).map(|p| p.spec.organization.object()));
            }
            Owner::Organization(id) => line.push(id.object()),
            Owner::Cloud if actions::CATALOG.contains(&object.kind.as_str()) => {
                line.push(actions::catalog_object())
            }
            Owner::Cloud => {}
        }
        line.push(actions::cloud_object());
        Some((rev, line))
    }

    /// What the owner's records count for: the quota ledger, derived.
    pub fn used(&self, project: Id<Project>) -> BTreeMap<String, u64> {
        let owner = Owner::Project(project);
        let mut sums = BTreeMap::new();
        let mut add = |charge: &Charge| {
            for (name, amount) in &charge.0 {
                *sums.entry(name.clone()).or_insert(0u64) += amount;
            }
        };
        self.instances.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        self.volumes.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        self.networks.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        self.subnets.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        self.ports.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        self.security_groups.values().filter(|r| r.meta.owner == owner).for_each(|r| add(&r.bind.charge));
        sums
    }

    /// Virtual CPUs and bytes of memory given out on a host: the capacity ledger, derived.
    pub fn given(&self, host: Id<Host>) -> (u64, u64) {
        let here = |r: &&Arc<Record<Instance>>| {
            r.bind.host.is_some_and(|(h, _)| h == host) || r.bind.leaving.iter().any(|(h, _)| *h == host)
        };
        let amount = |r: &Arc<Record<Instance>>, name: &str| r.bind.charge.0.get(name).copied().unwrap_or(0);
        self.instances.values().filter(here).fold((0, 0), |(cpus, memory), r| {
            (cpus + amount(r, tenancy::limit::VCPUS), memory + amount(r, tenancy::limit::MEMORY))
        })
    }

    /// The attachments of an instance, in the order in which they were made.
    pub fn attachments_of(&self, instance: Id<Instance>) -> Vec<Arc<Record<Attachment>>> {
        self.attachments.values().filter(|a| a.spec.instance == instance).cloned().collect()
    }

    /// The attachment of a volume or port, if it has one.
    pub fn attachment_to(&self, object: &ObjectRef) -> Option<&Arc<Record<Attachment>>> {
        self.attachments.values().find(|a| attached_object(&a.spec.what) == *object)
    }

    /// The operations on an object that are under way.
    pub fn open_operations(&self, object: &ObjectRef) -> Vec<Arc<Record<Operation>>> {
        let open =
            |o: &&Arc<Record<Operation>>| o.status.state == OperationState::Open && o.spec.target == *object;
        self.operations.values().filter(open).cloned().collect()
    }

    /// The nouns of objects that lie in others besides their owner have these children.
    pub fn ports_of(&self, subnet: Id<Subnet>) -> BTreeSet<Id<Port>> {
        self.ports.values().filter(|p| p.spec.subnet == subnet).map(|p| p.meta.id).collect()
    }
}

/// The object at the far end of an attachment.
pub fn attached_object(what: &Attached) -> ObjectRef {
    match what {
        Attached::Volume { volume, .. } => volume.object(),
        Attached::Port(port) => port.object(),
    }
}

/// The resource that an object lies in besides its owner: an attachment in its instance, a subnet in its network.
fn inner_parents(state: &State, object: &ObjectRef) -> Vec<ObjectRef> {
    if let Some(id) = object.typed::<Attachment>() {
        return state.get(id).map(|a| vec![a.spec.instance.object()]).unwrap_or_default();
    }
    if let Some(id) = object.typed::<Subnet>() {
        return state.get(id).map(|s| vec![s.spec.network().object()]).unwrap_or_default();
    }
    // An operation can be read by whoever can read its target, as long as that exists.
    if let Some(id) = object.typed::<Operation>() {
        let target = state.get(id).map(|o| o.spec.target.clone());
        return target.filter(|t| t.kind != Operation::NAME).into_iter().collect();
    }
    Vec::new()
}

/// The nouns that make up the network program.
const NET: [&str; 4] = [Network::NAME, Subnet::NAME, Port::NAME, SecurityGroup::NAME];
