//! Where the cloud's state is kept: in memory, or in one file of this machine.
//!
//! Both stores decide by the same pure code: `lead` says who may commit, `history` remembers what changed. A
//! cloud that spans several machines brings its own [`StateStore`](crate::spi::state_store::StateStore).

mod history;
mod lead;
mod memory;
#[cfg(feature = "redb")]
mod redb;

pub use memory::MemoryStore;
#[cfg(feature = "redb")]
pub use redb::Counters;
#[cfg(feature = "redb")]
pub use redb::RedbStore;

use crate::Error;
use crate::Result;
use crate::Rev;
use crate::spi::state_store::Check;

/// Refuses a commit one of whose checks does not hold; `rev_of` tells the revision of a key, `None` if it is absent.
fn all_hold(checks: &[Check], mut rev_of: impl FnMut(&[u8]) -> Result<Option<Rev>>) -> Result<()> {
    for check in checks {
        let (key, holds) = match check {
            Check::Absent(key) => (key, rev_of(key)?.is_none()),
            Check::At(key, rev) => (key, rev_of(key)? == Some(*rev)),
        };
        if !holds {
            return Err(Error::conflict("the state was changed meanwhile")
                .remedy("read it again and decide anew")
                .detail(format!("key {}", String::from_utf8_lossy(key))));
        }
    }
    Ok(())
}

/// The error of a store handle that was closed.
fn closed() -> Error {
    Error::unavailable("the state store is closed")
        .remedy("open it again")
        .outcome_is(crate::Outcome::NotDone)
}
