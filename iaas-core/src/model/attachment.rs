//! What joins an instance and a volume or port: a record of its own, because it concerns two.

use serde::Deserialize;
use serde::Serialize;

use super::compute::Instance;
use super::network::Port;
use super::record::resource;
use super::volume::Volume;
use crate::Id;
use crate::Term;
use crate::spi::hypervisor::DeviceState;

resource!(
    /// A volume or port of an instance.
    Attachment, "attachment", AttachmentSpec, AttachmentBind, AttachmentStatus
);

/// An attachment's wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentSpec {
    /// To which instance.
    pub instance: Id<Instance>,
    /// What.
    pub what: Attached,
}

/// What is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attached {
    /// A disk.
    Volume {
        /// Which.
        volume: Id<Volume>,
        /// Place in the boot order, lowest first.
        boot: Option<u8>,
        /// Whether the instance may only read.
        read_only: bool,
    },
    /// An interface.
    Port(Id<Port>),
}

/// What was decided for an attachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentBind {
    /// The writer's number for a volume, the placement's for a port.
    pub term: Term,
    /// Whether what is attached was made for this instance and goes with it.
    #[serde(default)]
    pub cascade: bool,
}

/// An attachment as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// What the hypervisor says of the device.
    pub device: Option<DeviceState>,
}
