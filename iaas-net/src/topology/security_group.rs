//! A security group: its rules, with the groups that they name as numbers. Members are never expanded.

use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::SecurityGroup;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;

use super::Build;
use super::number_of;
use crate::program::Group;
use crate::program::Peer;
use crate::program::PolicyRule;

/// Gives the group its number.
pub(super) fn declare(build: &mut Build, id: Id<SecurityGroup>) {
    // A program has at most as many groups as it has objects, which a `Vec` in memory bounds far below 2^32.
    let number = u32::try_from(build.program.groups.len()).unwrap_or(u32::MAX);
    build.groups.insert(id, number);
    build.program.groups.push(Group { id, ingress: Vec::new(), egress: Vec::new() });
}

/// Adds the rules of a declared group.
pub(super) fn compile(build: &mut Build, id: Id<SecurityGroup>, rules: &[Rule]) -> Result<()> {
    let (mut ingress, mut egress) = (Vec::new(), Vec::new());
    for rule in rules {
        let peer = match rule.remote {
            Remote::Any => Peer::Any,
            Remote::Cidr(cidr) => Peer::Cidr(cidr),
            Remote::Group(group) => Peer::Group(number_of(&build.groups, group, id)?),
        };
        let compiled = PolicyRule { protocol: rule.protocol, ports: rule.ports, peer };
        match rule.direction {
            Direction::Ingress => ingress.push(compiled),
            Direction::Egress => egress.push(compiled),
        }
    }
    let number = number_of(&build.groups, id, id)?;
    if let Some(group) = build.program.groups.get_mut(number as usize) {
        (group.ingress, group.egress) = (ingress, egress);
    }
    Ok(())
}
