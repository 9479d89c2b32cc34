//! Who may do what: roles and where they are given.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde::Serialize;

use super::record::Empty;
use super::record::resource;
use crate::Id;
use crate::ObjectRef;

resource!(
    /// A named set of actions. `viewer`, `operator` and `admin` exist in every cloud.
    Role, "role", RoleSpec, Empty, Empty
);
resource!(
    /// A role, given to somebody on an entity and everything below it.
    Binding, "binding", BindingSpec, Empty, Empty
);

/// What a role allows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleSpec {
    /// Actions: `instance.create`, `instance.*`, `*.list`, `*`.
    pub actions: BTreeSet<String>,
}

/// Who gets which role where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingSpec {
    /// A principal's name, or `group:NAME`.
    pub to: String,
    /// The role.
    pub role: Id<Role>,
    /// The cloud, an organization, a project or a resource.
    pub on: ObjectRef,
}
