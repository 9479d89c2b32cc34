//! What the common clauses are put around: how things of one kind are made on one site.

use std::fmt::Debug;
use std::io;

use bytes::Bytes;

use crate::Error;
use crate::ErrorKind;
use crate::Id;
use crate::Result;
use crate::spi::Kind;
use crate::spi::Phase;
use crate::spi::Reading;
use crate::spi::Site;

/// The wish that a maker works for.
pub(super) type Spec<M> = <<M as Maker>::Kind as Kind>::Spec;

/// How things of one kind are made. Each method may block; one runs at a time for each id.
pub(super) trait Maker: Debug + Send + Sync + 'static {
    /// What it makes.
    type Kind: Kind;

    /// For `hello`.
    fn product(&self) -> String;

    /// Where it acts.
    fn site(&self) -> Site;

    /// What it can do beyond the required.
    fn caps(&self) -> &'static [&'static str] {
        &[]
    }

    /// Refuses a spec before anything is done.
    fn check(&self, id: Id<Self::Kind>, old: Option<&Spec<Self>>, new: &Spec<Self>) -> Result<()>;

    /// Makes `id`, or brings it to `spec`; also to repair, and after a crash in its midst. `made` says whether it was whole
    /// before.
    fn make(&self, id: Id<Self::Kind>, spec: &Spec<Self>, made: bool) -> Result<()>;

    /// Lets nothing be left of `id`; also if nothing was there.
    fn unmake(&self, id: Id<Self::Kind>) -> Result<()>;

    /// Looks at what was made.
    fn look(&self, id: Id<Self::Kind>, spec: &Spec<Self>) -> Result<Look<Self::Kind>>;

    /// A reading of `id`, if it is metered.
    fn reading(&self, _id: Id<Self::Kind>, _spec: &Spec<Self>) -> Result<Option<Reading>> {
        Ok(None)
    }

    /// The passport in a spec, if the kind has one.
    fn passport(&self, _spec: &Spec<Self>) -> Option<Bytes> {
        None
    }

    /// What the notes may keep of a spec: no secrets.
    fn kept(&self, spec: &Spec<Self>) -> Spec<Self> {
        spec.clone()
    }
}

/// What a look showed.
#[derive(Debug)]
pub(super) struct Look<K: Kind> {
    pub(super) phase: Phase,
    pub(super) is: K::Observed,
    pub(super) final_usage: Vec<Reading>,
}

/// Refuses a passport that is too large for the contract.
pub(super) fn check_passport(passport: &[u8]) -> Result<()> {
    if passport.len() > 16 << 10 {
        return Err(Error::invalid("the passport is too large").remedy("use at most 16 KiB"));
    }
    Ok(())
}

/// What went wrong in the integrator's part.
pub(super) fn failed(what: &str, error: &io::Error) -> Error {
    let text = format!("{what} failed");
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => Error::new(ErrorKind::NoCapacity, text),
        io::ErrorKind::NotFound => Error::not_found(text),
        _ => Error::internal(text),
    };
    kind.because(error)
}
