//! Roles and bindings on their way to the authorizer.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use tokio::sync::Mutex;

use super::state::State;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::security::Entities;
use crate::security::gate::EVERYONE;
use crate::spi::authorizer::Authorizer;
use crate::spi::authorizer::PolicyObject;
use crate::spi::authorizer::PolicyUpdate;

/// Everything that the records allow.
pub fn policies(state: &State) -> PolicyUpdate {
    let roles = state.roles.values().map(|r| PolicyObject::Role {
        id: r.meta.id.object(),
        actions: r.spec.actions.iter().cloned().collect(),
    });
    let bindings = state.bindings.values().map(|b| PolicyObject::Binding {
        id: b.meta.id.object(),
        to: b.spec.to.clone(),
        role: b.spec.role.object(),
        on: b.spec.on.clone(),
    });
    PolicyUpdate { from: None, to: state.policy_rev, put: roles.chain(bindings).collect(), drop: Vec::new() }
}

/// Brings roles and bindings to the authorizer, and knows which it has.
#[derive(Debug)]
pub struct Policies {
    authorizer: Arc<dyn Authorizer>,
    state: Arc<RwLock<State>>,
    loaded: AtomicU64,
    one_at_a_time: Mutex<()>,
}

impl Policies {
    /// Policies of `state` for `authorizer`; none is loaded yet.
    pub fn new(authorizer: Arc<dyn Authorizer>, state: Arc<RwLock<State>>) -> Self {
        Self { authorizer, state, loaded: AtomicU64::new(0), one_at_a_time: Mutex::default() }
    }

    /// Loads the policies of the records, if they changed since.
    ///
    /// # Errors
    /// Those of the authorizer; the old policies stay.
    pub async fn load(&self) -> Result<()> {
        // One after another: else an older set could overtake a newer one.
        let _turn = self.one_at_a_time.lock().await;
        let update = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            if state.policy_rev == self.loaded() {
                return Ok(());
            }
            policies(&state)
        };
        self.authorizer.load(&update).await?;
        self.loaded.store(update.to.0, Ordering::Release);
        Ok(())
    }

    /// The revision of the policies by which the authorizer decides.
    pub fn loaded(&self) -> Rev {
        Rev(self.loaded.load(Ordering::Acquire))
    }
}

impl Entities for Policies {
    fn lineage(&self, object: &ObjectRef) -> Option<(Rev, Vec<ObjectRef>)> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).lineage(object)
    }

    fn policy(&self) -> Rev {
        self.loaded()
    }
}

/// The role by which everybody may read the catalog, and what it allows there.
pub const CATALOG_READER: (&str, &[&str]) = ("catalog-reader", &["*.get", "*.list"]);

/// To whom the catalog is open.
pub fn everyone() -> String {
    format!("group:{EVERYONE}")
}
