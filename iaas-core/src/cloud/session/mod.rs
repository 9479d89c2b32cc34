//! A session: somebody's view of the cloud, by families of resources.

mod audit;
mod compute;
mod family;
mod insight;

use std::sync::Arc;

pub use audit::Audit;
pub use compute::ConsoleInput;
pub use compute::ConsoleOutput;
pub use compute::Images;
pub use compute::Instances;
pub use compute::NewInstance;
pub use family::Family;

use super::Cloud;
use crate::model::*;
use crate::spi::authorizer::Principal;

/// A principal's session. Every call is decided by the gate.
#[derive(Clone, Debug)]
pub struct Session {
    cloud: Cloud,
    principal: Arc<Principal>,
}

macro_rules! families {
    ($($(#[$doc:meta])* $name:ident: $res:ident),+ $(,)?) => {
        impl Session {$(
            $(#[$doc])*
            pub fn $name(&self) -> Family<$res> {
                Family::new(self)
            }
        )+}
    };
}

families! {
    /// Places with their own control plane.
    regions: Region,
    /// Parts of regions that fail as one.
    zones: Zone,
    /// Machines.
    hosts: Host,
    /// Sizes of instances.
    instance_types: InstanceType,
    /// Tenants.
    organizations: Organization,
    /// Parts of tenants.
    projects: Project,
    /// Sets of actions.
    roles: Role,
    /// Roles given to somebody.
    bindings: Binding,
    /// Limits of projects.
    quotas: Quota,
    /// Prices.
    price_books: PriceBook,
    /// Disks.
    volumes: Volume,
    /// What joins instances with disks and ports.
    attachments: Attachment,
    /// VPCs.
    networks: Network,
    /// Parts of VPCs.
    subnets: Subnet,
    /// Places of interfaces.
    ports: Port,
    /// Rules for ports.
    security_groups: SecurityGroup,
    /// SSH keys.
    key_pairs: KeyPair,
    /// What was asked for.
    operations: Operation,
}

impl Session {
    pub(crate) fn new(cloud: Cloud, principal: Arc<Principal>) -> Self {
        Self { cloud, principal }
    }

    /// The cloud.
    pub fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    /// Who acts.
    pub fn principal(&self) -> &Arc<Principal> {
        &self.principal
    }

    /// Virtual machines.
    pub fn instances(&self) -> Instances {
        Instances::new(self)
    }

    /// What instances start from.
    pub fn images(&self) -> Images {
        Images::new(self)
    }

    /// The audit log.
    pub fn audit(&self) -> Audit {
        Audit::new(self)
    }
}
