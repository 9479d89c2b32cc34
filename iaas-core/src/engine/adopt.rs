//! Opening: take the lead, read every record, claim every site, and find again what runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::codec;
use super::draft::Draft;
use super::policy::CATALOG_READER;
use super::policy::everyone;
use super::sites::Caller;
use super::sites::Sites;
use super::state::State;
use crate::Clock;
use crate::Epoch;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::Result;
use crate::Rev;
use crate::id::Cloud;
use crate::model::*;
use crate::security::actions;
use crate::security::rbac::builtin;
use crate::spi::host::HostFacts;
use crate::spi::state_store::Check;
use crate::spi::state_store::Lead;
use crate::spi::state_store::StateStore;
use crate::spi::state_store::Write;

/// What a store says of the cloud that it keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudRecord {
    /// The cloud.
    pub id: Id<Cloud>,
    /// The incarnation of this store.
    pub incarnation: Uuid,
    /// When it was made.
    pub created: Timestamp,
    /// The format of the records.
    pub format: u16,
}

/// The format that this version writes.
pub const FORMAT: u16 = 1;

/// Takes the lead, or says who has it.
///
/// # Errors
/// `Conflict` while another leader holds it.
pub async fn take_lead(
    store: &Arc<dyn StateStore>,
    clock: &Arc<dyn Clock>,
    ttl: Duration,
    floor: Epoch,
) -> Result<Lead> {
    let me = clock.uuid();
    store.lead(me, ttl, floor).await?.ok_or_else(|| {
        Error::new(ErrorKind::Conflict, "another control plane leads this cloud")
            .remedy("stop it, or wait until its lease has lapsed")
    })
}

/// Reads the cloud's record, or makes a new cloud; `wanted` is the id that it must have.
///
/// # Errors
/// `Unsupported` if a newer version wrote it, `Conflict` if it is another cloud's.
pub async fn cloud_record(
    store: &Arc<dyn StateStore>,
    clock: &Arc<dyn Clock>,
    lead: &Lead,
    wanted: Option<Id<Cloud>>,
) -> Result<CloudRecord> {
    if let Some(entry) = store.get(CLOUD).await? {
        let record: CloudRecord = codec::decode(&entry.value)?;
        if record.format > FORMAT {
            return Err(Error::unsupported(format!("the cloud's records have format {}", record.format))
                .remedy(format!("use a newer version of this program; this one knows format {FORMAT}")));
        }
        if let Some(wanted) = wanted.filter(|wanted| *wanted != record.id) {
            return Err(Error::conflict("the store is another cloud's")
                .about(record.id.object())
                .remedy("open it with that cloud's hosts, or give this cloud a store of its own")
                .detail(format!("wanted cloud {wanted}")));
        }
        return Ok(record);
    }
    let record = CloudRecord {
        id: wanted.unwrap_or_else(|| Id::from_uuid(clock.uuid())),
        incarnation: clock.uuid(),
        created: clock.now(),
        format: FORMAT,
    };
    let key = bytes::Bytes::from_static(CLOUD);
    let write = Write::Put(key.clone(), codec::encode(&record)?);
    store.commit(lead, vec![Check::Absent(key)], vec![write]).await?;
    Ok(record)
}

/// Reads every record.
///
/// # Errors
/// `Unsupported` names the record that this version cannot read.
pub async fn load(store: &Arc<dyn StateStore>) -> Result<State> {
    let mut state = State::default();
    let mut after: Option<bytes::Bytes> = None;
    loop {
        let (page, rev) = store.scan(codec::RECORDS.as_bytes(), after.as_deref(), 512).await?;
        for entry in &page {
            let Some((noun, id)) = codec::parse_record_key(&entry.key) else {
                return Err(Error::unsupported("the store has a record under an unknown key"));
            };
            state
                .load(noun, id, &entry.value, entry.rev)
                .map_err(|e| e.detail(format!("record {noun}/{id}")))?;
        }
        after = page.last().map(|entry| entry.key.clone());
        if page.is_empty() {
            // Deletions leave no trace in records: programs and policies get at least the store's newest revision.
            state.rev = rev;
            state.net_rev = rev.max(Rev(1));
            state.policy_rev = rev.max(Rev(1));
            return Ok(state);
        }
    }
}

/// What the sites answered to our claim.
#[derive(Clone, Debug, Default)]
pub struct Claimed {
    /// The installation of each host.
    pub installs: BTreeMap<Id<Host>, Uuid>,
    /// What each new host is made of.
    pub facts: BTreeMap<Id<Host>, HostFacts>,
}

/// Refuses if a site has seen a newer store than ours: this one was restored or copied.
///
/// # Errors
/// `Conflict` names the site.
pub async fn check_newest(sites: &Sites, record: &CloudRecord, state: &State) -> Result<Epoch> {
    let mut floor = Epoch(0);
    for provider in sites.providers() {
        let hello = provider.hello().await?;
        let Some((incarnation, epoch, rev)) = hello.newest else { continue };
        floor = floor.max(epoch);
        if incarnation != record.incarnation || rev > state.rev {
            return Err(Error::conflict("a site knows a newer state of this cloud than the store")
                .remedy("open the newest copy of the store; if it is lost, delete the site's objects by hand first")
                .detail(format!("{:?} saw incarnation {incarnation}, revision {rev}", hello.site))
                .detail(format!("the store is incarnation {}, revision {}", record.incarnation, state.rev)));
        }
    }
    Ok(floor)
}

/// Raises every site's epoch to ours. From here on no older leader has an effect.
///
/// # Errors
/// Those of the providers.
pub async fn claim(sites: &Sites, caller: &Caller) -> Result<Claimed> {
    let cx = caller.own();
    for provider in sites.providers() {
        provider.claim(&cx).await?;
    }
    let mut claimed = Claimed::default();
    for (id, host) in &sites.hosts {
        claimed.installs.insert(*id, host.hypervisor.hello().await?.install);
        claimed.facts.insert(*id, host.inventory.facts(&cx).await?);
    }
    Ok(claimed)
}

/// Draws up what every cloud has: roles, the operator's right, the open catalog, and a record per host.
///
/// # Errors
/// Those of the draft.
pub fn seed(draft: &mut Draft<'_>, operator: &str, claimed: &Claimed) -> Result<()> {
    for (name, patterns) in builtin::ALL.into_iter().chain([CATALOG_READER]) {
        let name = Name::new(name)?;
        if draft.state().named::<Role>(Owner::Cloud, &name).is_none() {
            let spec = RoleSpec { actions: patterns.iter().map(|p| (*p).to_owned()).collect() };
            let id = Id::from_uuid(draft.uuid());
            draft.create::<Role>(id, Owner::Cloud, name.clone(), Labels::default(), spec, Empty {})?;
            if name.as_str() == "admin" {
                bind(draft, "operator", operator.to_owned(), id, actions::cloud_object())?;
            }
            if name.as_str() == CATALOG_READER.0 {
                bind(draft, "catalog", everyone(), id, actions::catalog_object())?;
            }
        }
    }
    for (id, facts) in &claimed.facts {
        if draft.state().get(*id).is_none() {
            register(draft, *id, facts)?;
        }
    }
    Ok(())
}

fn bind(draft: &mut Draft<'_>, name: &str, to: String, role: Id<Role>, on: crate::ObjectRef) -> Result<()> {
    let id = Id::from_uuid(draft.uuid());
    let spec = BindingSpec { to, role, on };
    draft.create::<Binding>(id, Owner::Cloud, Name::new(name)?, Labels::default(), spec, Empty {})
}

/// A host that the program brought gets a record in the zone `local`, with eight vCPUs per hardware thread.
fn register(draft: &mut Draft<'_>, id: Id<Host>, facts: &HostFacts) -> Result<()> {
    let local = Name::new("local")?;
    let region = match find::<Region>(draft, &local) {
        Some(id) => id,
        None => make::<Region>(draft, &local, Empty {})?,
    };
    let zone = match find::<Zone>(draft, &local) {
        Some(id) => id,
        None => make::<Zone>(draft, &local, ZoneSpec { region })?,
    };
    let threads = facts.cpu.as_ref().map_or(1, |c| c.threads.max(1));
    let spec = HostSpec {
        zone,
        cordoned: false,
        vcpus: threads.saturating_mul(OVERCOMMIT),
        memory: facts.memory.unwrap_or(1 << 30),
    };
    let name = Name::new(format!("host-{}", id.uuid().simple()))?;
    draft.create(id, Owner::Cloud, name, Labels::default(), spec, Empty {})?;
    let mut record = draft.record(id)?;
    record.status.facts = Some(facts.clone());
    draft.keep(record)
}

fn find<R: super::state::Stored>(draft: &Draft<'_>, name: &Name) -> Option<Id<R>> {
    draft.all::<R>().iter().find(|r| r.meta.name == *name && r.meta.owner == Owner::Cloud).map(|r| r.meta.id)
}

fn make<R: super::state::Stored>(draft: &mut Draft<'_>, name: &Name, spec: R::Spec) -> Result<Id<R>> {
    let id = Id::from_uuid(draft.uuid());
    draft.create::<R>(id, Owner::Cloud, name.clone(), Labels::default(), spec, R::Bind::default())?;
    Ok(id)
}

/// The key of the cloud's record.
const CLOUD: &[u8] = b"cloud";
/// Virtual CPUs per hardware thread that a host gives out unless its record is changed.
const OVERCOMMIT: u32 = 8;
