//! Operations: what was asked for, and how far it is.

use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::record::Empty;
use super::record::resource;
use crate::Error;
use crate::ObjectRef;

resource!(
    /// A change that was asked for.
    Operation, "operation", OperationSpec, Empty, OperationStatus
);

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationSpec {
    /// The action's name.
    pub action: String,
    /// On what.
    pub target: ObjectRef,
    /// By whom.
    pub by: String,
}

/// How far an operation is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationStatus {
    /// Open or how it ended.
    pub state: OperationState,
    /// When it ended.
    pub ended: Option<Timestamp>,
}

/// Open or how an operation ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationState {
    /// Under way; the target's record says how far.
    #[default]
    Open,
    /// The target was seen as wanted.
    Done,
    /// It cannot be done; what it made is being removed.
    Failed(Error),
    /// A later operation on the same target replaced it.
    Superseded,
}
