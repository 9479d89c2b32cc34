//! Roles and bindings on their way to the authorizer.

use std::sync::Arc;

use super::state::State;
use crate::Result;
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

/// Loads the policies of the records.
///
/// # Errors
/// Those of the authorizer; the old policies stay.
pub async fn load(authorizer: &Arc<dyn Authorizer>, update: &PolicyUpdate) -> Result<()> {
    authorizer.load(update).await.map(|_| ())
}

/// The role by which everybody may read the catalog, and what it allows there.
pub const CATALOG_READER: (&str, &[&str]) = ("catalog-reader", &["*.get", "*.list"]);

/// To whom the catalog is open.
pub fn everyone() -> String {
    format!("group:{EVERYONE}")
}
