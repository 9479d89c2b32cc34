//! What each action means: the one commit that it becomes, computed without effects.

mod attach;
mod compute;
mod create;
mod delete;
mod fleet;
mod net;
mod tenancy;
mod update;

pub use compute::running;

use super::draft::Draft;
use crate::Error;
use crate::ObjectRef;
use crate::Result;
use crate::model::Owner;
use crate::security::Action;

/// What a change is about, besides its commit.
#[derive(Clone, Debug)]
pub struct Meant<T> {
    /// What the caller gets.
    pub out: T,
    /// The object that changes.
    pub target: ObjectRef,
    /// Whether something is left to do after the commit.
    pub open: bool,
}

/// An action that changes something.
pub trait Intent: Action {
    /// Draws the change up. On an error nothing of the draft is used.
    ///
    /// # Errors
    /// Those of the action; `NotDone`, because nothing was committed.
    fn intend(&self, draft: &mut Draft<'_>) -> Result<Meant<Self::Out>>;
}

/// Which owners a type of resource may have.
fn owned_by(noun: &str, owner: Owner, allowed: &[&str]) -> Result<()> {
    let is = match owner {
        Owner::Cloud => "cloud",
        Owner::Organization(_) => "organization",
        Owner::Project(_) => "project",
    };
    if allowed.contains(&is) {
        return Ok(());
    }
    Err(Error::invalid(format!("a {noun} cannot belong to a {is}"))
        .remedy(format!("make it in a {}", allowed.join(" or "))))
}
