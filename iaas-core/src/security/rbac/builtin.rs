//! What the roles that exist in every cloud allow, by name and patterns of actions.

/// Reads everything but consoles; changes nothing.
pub const VIEWER: &[&str] =
    &["*.get", "*.list", "*.read", "project.bill", "object.explain", "port.explain-packet"];

/// A viewer who also runs machines: makes, changes and removes compute, network and volumes, and uses consoles. Gives no
/// rights, sets no quota or price, makes no project.
pub const OPERATOR: &[&str] = &[
    "*.get",
    "*.list",
    "*.read",
    "project.bill",
    "object.explain",
    "instance.*",
    "image.*",
    "key-pair.*",
    "volume.*",
    "attachment.*",
    "network.*",
    "subnet.*",
    "port.*",
    "security-group.*",
    "operation.*",
];

/// Everything.
pub const ADMIN: &[&str] = &["*"];

/// The names of the roles with their patterns.
pub const ALL: [(&str, &[&str]); 3] = [("viewer", VIEWER), ("operator", OPERATOR), ("admin", ADMIN)];
