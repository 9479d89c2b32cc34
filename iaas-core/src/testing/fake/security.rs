//! The fakes of the authorizer, the key manager and the audit sink.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;

use super::world::World;
use super::world::lock;
use crate::Digest;
use crate::Error;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::spi::audit::AuditSink;
use crate::spi::authorizer::Ask;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::Decision;
use crate::spi::authorizer::PolicyObject;
use crate::spi::authorizer::PolicyUpdate;
use crate::spi::authorizer::Principal;
use crate::spi::contract::SealKey;
use crate::spi::contract::Sealed;
use crate::spi::key::KeyManager;
use crate::spi::key::KeyName;
use crate::spi::key::WrappedKey;
use crate::spi::network::Synced;

/// Roles and bindings in memory, tried one after the other.
#[derive(Debug, Default)]
pub struct FakeAuthorizer {
    policies: Mutex<Policies>,
}

#[derive(Clone, Debug, Default)]
struct Policies {
    rev: Option<Rev>,
    objects: BTreeMap<ObjectRef, PolicyObject>,
    always: BTreeSet<String>,
}

impl FakeAuthorizer {
    /// One that allows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows everything to the principal of that name, whatever the policies say.
    #[must_use]
    pub fn allowing(self, name: &str) -> Self {
        lock(&self.policies).always.insert(name.to_owned());
        self
    }
}

#[async_trait]
impl Authorizer for FakeAuthorizer {
    async fn load(&self, up: &PolicyUpdate) -> Result<Synced> {
        let mut policies = lock(&self.policies);
        let mut next = match up.from {
            None => BTreeMap::new(),
            Some(from) if Some(from) == policies.rev => policies.objects.clone(),
            Some(_) => return Ok(Synced::NeedFull),
        };
        next.retain(|id, _| !up.drop.contains(id));
        next.extend(up.put.iter().map(|object| (policy_name(object).clone(), object.clone())));
        for object in next.values() {
            check_policy(object, &next)?;
        }
        policies.objects = next;
        policies.rev = Some(up.to);
        Ok(Synced::At(up.to))
    }

    async fn decide(&self, ask: &Ask) -> Result<Vec<Decision>> {
        let policies = lock(&self.policies).clone();
        if ask.policy > policies.rev.unwrap_or(Rev(0)) {
            return Err(Error::conflict(format!("the policies of revision {} are not loaded", ask.policy))
                .remedy("load them first"));
        }
        Ok(ask.queries.iter().map(|(action, on)| policies.decide(ask, action, on)).collect())
    }
}

impl Policies {
    fn decide(&self, ask: &Ask, action: &str, on: &ObjectRef) -> Decision {
        if self.always.contains(&ask.who.name) {
            return Decision { allowed: true, because: format!("{} may do everything", ask.who.name) };
        }
        let scopes = above(ask, on);
        let hit = self.objects.values().find(|object| match object {
            PolicyObject::Binding { to, role, on, .. } => {
                means(to, &ask.who) && scopes.contains(on) && self.role_allows(role, action)
            }
            PolicyObject::Role { .. } => false,
        });
        match hit {
            Some(binding) => {
                Decision { allowed: true, because: format!("{} allows {action}", policy_name(binding)) }
            }
            None => Decision { allowed: false, because: format!("nothing allows {action}") },
        }
    }

    fn role_allows(&self, role: &ObjectRef, action: &str) -> bool {
        let Some(PolicyObject::Role { actions, .. }) = self.objects.get(role) else { return false };
        actions.iter().any(|pattern| matches(pattern, action))
    }
}

/// `on` and everything above it.
fn above(ask: &Ask, on: &ObjectRef) -> BTreeSet<ObjectRef> {
    let mut all = BTreeSet::new();
    let mut next = vec![on.clone()];
    while let Some(object) = next.pop() {
        if all.insert(object.clone()) {
            next.extend(ask.parents.get(&object).into_iter().flatten().cloned());
        }
    }
    all
}

fn means(to: &str, who: &Principal) -> bool {
    match to.strip_prefix("group:") {
        Some(group) => who.groups.iter().any(|g| g == group),
        None => who.name == to,
    }
}

/// `*`, `noun.*`, `*.verb` or the action itself.
fn matches(pattern: &str, action: &str) -> bool {
    if pattern == "*" || pattern == action {
        return true;
    }
    let (Some((noun, verb)), Some((n, v))) = (pattern.split_once('.'), action.split_once('.')) else {
        return false;
    };
    (noun == "*" || noun == n) && (verb == "*" || verb == v)
}

fn policy_name(object: &PolicyObject) -> &ObjectRef {
    match object {
        PolicyObject::Role { id, .. } | PolicyObject::Binding { id, .. } => id,
    }
}

fn check_policy(object: &PolicyObject, all: &BTreeMap<ObjectRef, PolicyObject>) -> Result<()> {
    match object {
        PolicyObject::Role { id, actions } => {
            let bad = actions.iter().find(|a| a.is_empty() || (a.contains('*') && !pattern(a)));
            bad.map_or(Ok(()), |bad| {
                Err(Error::invalid(format!("`{bad}` is no action or pattern")).about(id.clone()))
            })
        }
        PolicyObject::Binding { id, role, .. } => match all.get(role) {
            Some(PolicyObject::Role { .. }) => Ok(()),
            _ => Err(Error::invalid(format!("the binding names {role}, which is no role")).about(id.clone())),
        },
    }
}

fn pattern(text: &str) -> bool {
    let part = |p: &str| p == "*" || (!p.is_empty() && !p.contains('*'));
    text == "*" || text.split_once('.').is_some_and(|(noun, verb)| part(noun) && part(verb))
}

/// A key manager that keeps every key itself: what it hands out are only handles, so there is nothing to break.
#[derive(Debug)]
pub struct FakeKeys {
    world: World,
    vault: Mutex<Vault>,
}

#[derive(Debug, Default)]
struct Vault {
    wrapped: BTreeMap<Bytes, (Vec<u8>, Bytes)>,
    sealed: BTreeMap<Bytes, (Bytes, Vec<u8>, Bytes)>,
}

impl FakeKeys {
    /// An empty one.
    pub fn new(world: &World) -> Self {
        Self { world: world.clone(), vault: Mutex::default() }
    }

    /// The public half of a host's `secret`.
    pub fn seal_key(secret: &[u8]) -> SealKey {
        SealKey(Bytes::copy_from_slice(&Digest::of(secret).0))
    }

    /// What the host with `secret` finds in `sealed`.
    ///
    /// # Errors
    /// `Denied` if it was sealed to another host or changed.
    pub fn open(&self, sealed: &Sealed, secret: &[u8]) -> Result<Vec<u8>> {
        let vault = lock(&self.vault);
        let found = vault.sealed.get(&sealed.body).filter(|(to, aad, _)| {
            *to == sealed.to.0 && *to == Self::seal_key(secret).0 && *aad == sealed.aad.to_vec()
        });
        found.map(|(.., key)| key.to_vec()).ok_or_else(|| Error::denied("this secret is not for this host"))
    }

    fn handle(&self) -> Bytes {
        Bytes::copy_from_slice(self.world.clock().uuid().as_bytes())
    }

    fn key(&self, wrapped: &WrappedKey, aad: &[u8]) -> Result<Bytes> {
        let vault = lock(&self.vault);
        let found = vault.wrapped.get(&wrapped.body).filter(|(bound, _)| bound == aad);
        found.map(|(_, key)| key.clone()).ok_or_else(|| {
            Error::denied("this key was not wrapped here, or for something else")
                .remedy("give the same `aad`")
        })
    }

    fn wrap(&self, by: &KeyName, aad: &[u8], key: Bytes) -> WrappedKey {
        let body = self.handle();
        lock(&self.vault).wrapped.insert(body.clone(), (aad.to_vec(), key));
        WrappedKey { by: by.clone(), body }
    }
}

#[async_trait]
impl KeyManager for FakeKeys {
    async fn generate(&self, key: &KeyName, aad: &[u8]) -> Result<WrappedKey> {
        let data = Digest::of(self.world.clock().uuid().as_bytes());
        Ok(self.wrap(key, aad, Bytes::copy_from_slice(&data.0)))
    }

    async fn rewrap(&self, wrapped: &WrappedKey, aad: &[u8]) -> Result<WrappedKey> {
        let key = self.key(wrapped, aad)?;
        Ok(self.wrap(&wrapped.by, aad, key))
    }

    async fn seal(&self, wrapped: &WrappedKey, aad: &[u8], to: &SealKey) -> Result<Sealed> {
        let key = self.key(wrapped, aad)?;
        let body = self.handle();
        lock(&self.vault).sealed.insert(body.clone(), (to.0.clone(), aad.to_vec(), key));
        Ok(Sealed { to: to.clone(), aad: Bytes::copy_from_slice(aad), body })
    }
}

/// A copy of the audit log in memory.
#[derive(Debug, Default)]
pub struct FakeAuditSink {
    taken: Mutex<(Vec<Bytes>, Option<String>)>,
}

impl FakeAuditSink {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The leaves so far.
    pub fn leaves(&self) -> Vec<Bytes> {
        lock(&self.taken).0.clone()
    }

    /// The last checkpoint.
    pub fn checkpoint(&self) -> Option<String> {
        lock(&self.taken).1.clone()
    }
}

#[async_trait]
impl AuditSink for FakeAuditSink {
    async fn append(&self, first: u64, leaves: &[Bytes], checkpoint: &str) -> Result<()> {
        let mut taken = lock(&self.taken);
        let have = taken.0.len() as u64;
        if first > have {
            return Err(Error::conflict(format!("leaf {have} is next, not {first}"))
                .remedy(format!("send from {have} on")));
        }
        let known = usize::try_from(have - first).unwrap_or(usize::MAX);
        let fresh = leaves.get(known..).unwrap_or_default();
        if !fresh.is_empty() {
            taken.0.extend_from_slice(fresh);
            taken.1 = Some(checkpoint.to_owned());
        }
        Ok(())
    }
}
