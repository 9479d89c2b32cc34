//! Typed identifiers, and the numbers that order events: revisions, epochs, terms and boots.

use std::cmp::Ordering;
use std::fmt;
use std::hash::Hash;
use std::hash::Hasher;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use uuid::Uuid;

use crate::Error;

/// Something that has an [`Id`]: a resource of the model or a kind of object that a provider makes.
pub trait Entity: 'static {
    /// The singular noun, lower case with dashes: `instance`, `instance-type`, `vm`.
    const NAME: &'static str;
}

/// The identifier of a `K`: a UUIDv7 whose type keeps a volume's id from being passed for an instance's.
pub struct Id<K> {
    raw: Uuid,
    kind: PhantomData<fn() -> K>,
}

impl<K> Id<K> {
    /// Makes an id from its UUID.
    pub const fn from_uuid(raw: Uuid) -> Self {
        Self { raw, kind: PhantomData }
    }

    /// Returns the UUID.
    pub const fn uuid(self) -> Uuid {
        self.raw
    }

    /// The same UUID as the id of another kind: an instance and the VM that a hypervisor makes for it share one.
    pub const fn cast<L>(self) -> Id<L> {
        Id::from_uuid(self.raw)
    }
}

impl<K: Entity> Id<K> {
    /// The untyped name of the same object.
    pub fn object(self) -> ObjectRef {
        ObjectRef { kind: K::NAME.to_owned(), id: self.raw }
    }
}

impl<K> Clone for Id<K> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<K> Copy for Id<K> {}
impl<K> PartialEq for Id<K> {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}
impl<K> Eq for Id<K> {}
impl<K> PartialOrd for Id<K> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<K> Ord for Id<K> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.raw.cmp(&other.raw)
    }
}
impl<K> Hash for Id<K> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.raw.hash(state);
    }
}
impl<K: Entity> fmt::Debug for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", K::NAME, self.raw)
    }
}
impl<K> fmt::Display for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw.fmt(f)
    }
}
impl<K: Entity> FromStr for Id<K> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let raw = Uuid::parse_str(text)
            .map_err(|e| Error::invalid(format!("`{text}` is not the id of a {}", K::NAME)).because(&e))?;
        Ok(Self::from_uuid(raw))
    }
}
impl<K> Serialize for Id<K> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.raw.serialize(to)
    }
}
impl<'de, K> Deserialize<'de> for Id<K> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Uuid::deserialize(from).map(Self::from_uuid)
    }
}

/// An object of any kind, by name and UUID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// The kind's [`Entity::NAME`].
    pub kind: String,
    /// The object's UUID.
    pub id: Uuid,
}

impl ObjectRef {
    /// The typed id, if this names a `K`.
    pub fn typed<K: Entity>(&self) -> Option<Id<K>> {
        (self.kind == K::NAME).then(|| Id::from_uuid(self.id))
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.id)
    }
}

macro_rules! number {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one; stays at the end of the range.
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )+};
}

number! {
    /// A revision of the state store: the version of a record and the order of effects.
    Rev,
    /// The fencing number of the control plane's leader; grows with each take-over.
    Epoch,
    /// The number of a placement (of an instance) or of a writer (of a volume).
    Term,
    /// The n-th start of an instance. A hypervisor starts at most once per number.
    Boot,
}

/// Marks the cloud as a whole.
#[derive(Debug)]
pub enum Cloud {}
/// Marks a pool of storage.
#[derive(Debug)]
pub enum Pool {}
/// Marks a network fabric: the hosts that one network program reaches.
#[derive(Debug)]
pub enum Fabric {}

impl Entity for Cloud {
    const NAME: &'static str = "cloud";
}
impl Entity for Pool {
    const NAME: &'static str = "pool";
}
impl Entity for Fabric {
    const NAME: &'static str = "fabric";
}
