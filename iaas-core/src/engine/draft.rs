//! A change being drawn up: everything that one commit will hold, over the state as it is.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::audit::Leaf;
use super::codec;
use super::state::State;
use super::state::Stored;
use super::state::encode_record;
use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Labels;
use crate::Name;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::clock::Clock;
use crate::id::Pool;
use crate::model::*;
use crate::security::gate::not_found;
use crate::spi::meter::UsageEvent;
use crate::spi::placement::Placement;
use crate::spi::state_store::Check;
use crate::spi::state_store::Write;

/// What a change would do: the answer to a dry run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Objects that it would make.
    pub creates: Vec<ObjectRef>,
    /// Objects that it would change.
    pub changes: Vec<ObjectRef>,
    /// Objects that would go at once.
    pub deletes: Vec<ObjectRef>,
    /// What is then left to do, in order.
    pub steps: Vec<String>,
    /// Where it would be placed, and why not elsewhere.
    pub placement: Vec<String>,
    /// Which policies allowed it.
    pub policy: Rev,
    /// Writes and bytes of the commit.
    pub writes: (usize, usize),
}

/// What the sites are, as far as decisions need it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteFacts {
    /// The pools, the preferred one first.
    pub pools: Vec<Id<Pool>>,
    /// The pools that each host reaches.
    pub reach: BTreeMap<Id<Host>, BTreeSet<Id<Pool>>>,
    /// The installation of each host: an absence counts only where the object was put.
    pub installs: BTreeMap<Id<Host>, Uuid>,
}

/// What a change is drawn up from.
#[derive(Clone, Copy, Debug)]
pub struct Basis<'s> {
    /// The state before.
    pub state: &'s State,
    /// Time and ids.
    pub clock: &'s dyn Clock,
    /// How instances are placed.
    pub placement: &'s dyn Placement,
    /// The sites.
    pub sites: &'s SiteFacts,
}

/// A change over a state. Pure: the clock gives time and ids.
#[derive(Debug)]
pub struct Draft<'s> {
    state: &'s State,
    clock: &'s dyn Clock,
    now: Timestamp,
    placement: &'s dyn Placement,
    sites: &'s SiteFacts,
    operation: Id<Operation>,
    by: String,
    writes: BTreeMap<Bytes, Option<Bytes>>,
    overlay: State,
    gone: Vec<ObjectRef>,
    checks: BTreeMap<Bytes, Rev>,
    outbox: u32,
    /// What it would do.
    pub plan: Plan,
}

impl<'s> Draft<'s> {
    /// Begins a change on behalf of `by`.
    pub fn new(basis: Basis<'s>, by: &str) -> Self {
        let Basis { state, clock, placement, sites } = basis;
        Self {
            sites,
            state,
            clock,
            now: clock.now(),
            placement,
            operation: Id::from_uuid(clock.uuid()),
            by: by.to_owned(),
            writes: BTreeMap::new(),
            overlay: State::default(),
            gone: Vec::new(),
            checks: BTreeMap::new(),
            outbox: 0,
            plan: Plan::default(),
        }
    }

    /// The moment of the change.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// The operation that the change belongs to.
    pub fn operation(&self) -> Id<Operation> {
        self.operation
    }

    /// The state before the change.
    pub fn state(&self) -> &'s State {
        self.state
    }

    /// How instances are placed.
    pub fn placement(&self) -> &'s dyn Placement {
        self.placement
    }

    /// The sites that the cloud is made of.
    pub fn sites(&self) -> &'s SiteFacts {
        self.sites
    }

    /// A fresh UUID.
    pub fn uuid(&self) -> Uuid {
        self.clock.uuid()
    }

    /// A record as the change leaves it.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn record<R: Stored>(&self, id: Id<R>) -> Result<Record<R>> {
        self.find(id).ok_or_else(|| not_found(&id.object()))
    }

    /// A record as the change leaves it, if there is one.
    pub fn find<R: Stored>(&self, id: Id<R>) -> Option<Record<R>> {
        if self.gone.contains(&id.object()) {
            return None;
        }
        let found = R::table(&self.overlay).get(&id).or_else(|| self.state.get(id));
        found.map(|record| (**record).clone())
    }

    /// A record that is not going.
    ///
    /// # Errors
    /// `NotFound` if there is none, `Conflict` if it is being removed.
    pub fn present<R: Stored>(&self, id: Id<R>) -> Result<Record<R>> {
        let record = self.record(id)?;
        if record.meta.absent.is_some() {
            return Err(Error::conflict(format!("the {} `{}` is being removed", R::NAME, record.meta.name))
                .about(id.object()));
        }
        Ok(record)
    }

    /// All records of a type as the change leaves them.
    pub fn all<R: Stored>(&self) -> Vec<Arc<Record<R>>> {
        let mut merged = R::table(self.state).clone();
        merged.extend(R::table(&self.overlay).iter().map(|(id, record)| (*id, Arc::clone(record))));
        merged.into_values().filter(|r| !self.gone.contains(&r.meta.id.object())).collect()
    }

    /// Adds a new record with the given owner, name and wish.
    ///
    /// # Errors
    /// `AlreadyExists` if the owner has one of that name.
    pub fn create<R: Stored>(
        &mut self,
        id: Id<R>,
        owner: Owner,
        name: Name,
        labels: Labels,
        spec: R::Spec,
        bind: R::Bind,
    ) -> Result<()> {
        let taken = self.state.named::<R>(owner, &name).or_else(|| self.overlay.named::<R>(owner, &name));
        if let Some(other) = taken.filter(|id| !self.gone.contains(&id.object())) {
            return Err(Error::already_exists(format!("there is a {} named `{name}`", R::NAME))
                .about(other.object())
                .remedy("choose another name, or use the one that exists"));
        }
        let meta = Meta {
            id,
            owner,
            name,
            labels,
            created: self.now,
            version: Rev(0),
            effect: Rev(0),
            absent: None,
            trouble: None,
            schema: 0,
        };
        self.plan.creates.push(id.object());
        self.write(Record { meta, spec, bind, status: R::Status::default() })
    }

    /// Changes a record in a way that providers must see.
    ///
    /// # Errors
    /// `Internal` if it cannot be encoded.
    pub fn change<R: Stored>(&mut self, mut record: Record<R>) -> Result<()> {
        record.meta.effect = Rev(0);
        self.keep(record)
    }

    /// Changes a record in a way that no provider needs to see.
    ///
    /// # Errors
    /// `Internal` if it cannot be encoded.
    pub fn keep<R: Stored>(&mut self, record: Record<R>) -> Result<()> {
        let object = record.meta.id.object();
        if !self.plan.creates.contains(&object) && !self.plan.changes.contains(&object) {
            self.plan.changes.push(object);
        }
        self.write(record)
    }

    fn write<R: Stored>(&mut self, record: Record<R>) -> Result<()> {
        let key = codec::record_key(R::NAME, record.meta.id.uuid());
        self.depend::<R>(record.meta.id);
        self.writes.insert(key, Some(encode_record(&record)?));
        self.overlay.put(record);
        Ok(())
    }

    /// Deletes a record.
    pub fn delete<R: Stored>(&mut self, id: Id<R>) {
        self.depend::<R>(id);
        self.writes.insert(codec::record_key(R::NAME, id.uuid()), None);
        self.gone.push(id.object());
        self.plan.deletes.push(id.object());
    }

    /// Makes the commit fail if the record changes meanwhile.
    pub fn depend<R: Stored>(&mut self, id: Id<R>) {
        let rev = self.state.get(id).map_or(Rev(0), |r| r.meta.version);
        self.checks.insert(codec::record_key(R::NAME, id.uuid()), rev);
    }

    /// Makes the commit fail if the object is not at this version any more.
    pub fn depend_on(&mut self, object: &ObjectRef, rev: Rev) {
        if rev != Rev(0) {
            self.checks.insert(codec::record_key(&object.kind, object.id), rev);
        }
    }

    /// Writes a value that is not a record.
    pub fn put_raw(&mut self, key: Bytes, value: Bytes) {
        self.writes.insert(key, Some(value));
    }

    /// Writes a value that is not a record, if there is none under its key.
    pub fn put_new(&mut self, key: Bytes, value: Bytes) {
        self.checks.insert(key.clone(), Rev(0));
        self.put_raw(key, value);
    }

    /// Deletes a value that is not a record.
    pub fn delete_raw(&mut self, key: Bytes) {
        self.writes.insert(key, None);
    }

    /// Records the operation that the change belongs to.
    ///
    /// # Errors
    /// `Internal` if it cannot be encoded.
    pub fn operate(&mut self, action: &str, target: ObjectRef, open: bool) -> Result<()> {
        let status = OperationStatus {
            state: if open { OperationState::Open } else { OperationState::Done },
            ended: (!open).then_some(self.now),
        };
        if open {
            for old in self.state.open_operations(&target) {
                let mut old = (*old).clone();
                old.status = OperationStatus { state: OperationState::Superseded, ended: Some(self.now) };
                self.keep(old)?;
            }
        }
        let owner = self.owner_of(&target);
        let id = self.operation;
        let name = Name::new(format!("{}", id.uuid().simple()))?;
        let spec = OperationSpec { action: action.to_owned(), target, by: self.by.clone() };
        let meta = Meta {
            id,
            owner,
            name,
            labels: Labels::default(),
            created: self.now,
            version: Rev(0),
            effect: Rev(0),
            absent: None,
            trouble: None,
            schema: 0,
        };
        self.write(Record { meta, spec, bind: Empty {}, status })
    }

    fn owner_of(&self, target: &ObjectRef) -> Owner {
        let brief = self.overlay.brief(target).or_else(|| self.state.brief(target));
        brief.map_or(Owner::Cloud, |b| b.owner)
    }

    /// Ends the operations on `target` that are open.
    ///
    /// # Errors
    /// `Internal` if one cannot be encoded.
    pub fn end_operations(&mut self, target: &ObjectRef, how: &OperationState) -> Result<()> {
        for open in self.state.open_operations(target) {
            let mut open = (*open).clone();
            open.status = OperationStatus { state: how.clone(), ended: Some(self.now) };
            self.keep(open)?;
        }
        Ok(())
    }

    /// Adds an audit leaf.
    ///
    /// # Errors
    /// `Internal` if it cannot be encoded.
    pub fn audit(&mut self, action: &str, object: &ObjectRef, request: Bytes) -> Result<()> {
        let leaf = Leaf {
            at: self.now,
            by: self.by.clone(),
            action: action.to_owned(),
            object: object.clone(),
            operation: self.operation,
            request: crate::Digest::of(&request),
        };
        let key = Bytes::from(format!("{}{}", codec::LEAVES, self.uuid()));
        self.put_raw(key, codec::encode(&leaf)?);
        Ok(())
    }

    /// Sends usage on its way to the meter.
    ///
    /// # Errors
    /// `Internal` if it cannot be encoded.
    pub fn meter(&mut self, event: &UsageEvent) -> Result<()> {
        let key = Bytes::from(format!("{}{}-{:04}", codec::OUTBOX, self.uuid(), self.outbox));
        self.outbox += 1;
        self.put_raw(key, codec::encode(event)?);
        Ok(())
    }

    /// How many outbox entries it has so far: the index of the next one.
    pub fn outbox_index(&self) -> u32 {
        self.outbox
    }

    /// Refuses if the project would exceed a limit with `charge` on top of what it uses.
    ///
    /// # Errors
    /// `QuotaExceeded` with the limit, what is used, and what was asked for.
    pub fn check_quota(&self, owner: Owner, charge: &Charge) -> Result<()> {
        let Some(project) = owner.project() else { return Ok(()) };
        let mut used = self.state.used(project);
        for (name, amount) in self.overlay_use(project) {
            *used.entry(name).or_insert(0) += amount;
        }
        let quotas = self.state.quotas.values().filter(|q| q.meta.owner == owner);
        for quota in quotas {
            for (name, limit) in &quota.spec.limits {
                let (has, more) =
                    (used.get(name).copied().unwrap_or(0), charge.0.get(name).copied().unwrap_or(0));
                if more > 0 && has.saturating_add(more) > *limit {
                    return Err(Error::new(
                        ErrorKind::QuotaExceeded,
                        format!("{name}: {has} used and {more} more exceed the limit of {limit}"),
                    )
                    .about(project.object())
                    .remedy("delete something, or ask the operator for a higher quota"));
                }
            }
        }
        Ok(())
    }

    /// What the records that this change creates count for.
    fn overlay_use(&self, project: Id<Project>) -> BTreeMap<String, u64> {
        let mut fresh = self.overlay.clone();
        fresh.instances.retain(|id, _| self.state.get(*id).is_none());
        fresh.volumes.retain(|id, _| self.state.get(*id).is_none());
        fresh.networks.retain(|id, _| self.state.get(*id).is_none());
        fresh.subnets.retain(|id, _| self.state.get(*id).is_none());
        fresh.ports.retain(|id, _| self.state.get(*id).is_none());
        fresh.security_groups.retain(|id, _| self.state.get(*id).is_none());
        fresh.used(project)
    }

    /// The checks and writes of the commit.
    pub fn finish(mut self) -> (Vec<Check>, Vec<Write>, Plan) {
        let bytes = self.writes.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, Bytes::len)).sum();
        self.plan.writes = (self.writes.len(), bytes);
        let check = |(key, rev): (Bytes, Rev)| {
            if rev == Rev(0) { Check::Absent(key) } else { Check::At(key, rev) }
        };
        let write = |(key, value): (Bytes, Option<Bytes>)| match value {
            Some(value) => Write::Put(key, value),
            None => Write::Delete(key),
        };
        (
            self.checks.into_iter().map(check).collect(),
            self.writes.into_iter().map(write).collect(),
            self.plan,
        )
    }
}
