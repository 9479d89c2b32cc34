//! The permit: proof that one request was allowed.

use std::sync::Arc;

use super::Action;
use crate::ObjectRef;
use crate::Rev;
use crate::spi::authorizer::Principal;

/// Proof that `who` may do what `request` asks; consumed by the call that acts.
///
/// Not `Clone`, and without a public constructor: only [`Gate::check`](super::Gate::check) makes one.
#[must_use = "a permit does nothing until the engine runs it"]
#[derive(Debug)]
pub struct Permit<A: Action> {
    request: A,
    who: Arc<Principal>,
    basis: Vec<(ObjectRef, Rev)>,
    policy: Rev,
}

impl<A: Action> Permit<A> {
    pub(super) fn new(request: A, who: Arc<Principal>, basis: Vec<(ObjectRef, Rev)>, policy: Rev) -> Self {
        Self { request, who, basis, policy }
    }

    pub(super) fn into_parts(self) -> (Arc<Principal>, A) {
        (self.who, self.request)
    }

    /// What was allowed.
    pub fn request(&self) -> &A {
        &self.request
    }

    /// To whom.
    pub fn who(&self) -> &Arc<Principal> {
        &self.who
    }

    /// The objects that the decision was about, with the versions that it read: they become checks of the commit.
    pub fn basis(&self) -> &[(ObjectRef, Rev)] {
        &self.basis
    }

    /// The revision of the policies that decided.
    pub fn policy(&self) -> Rev {
        self.policy
    }
}
