//! A VPC: an address space of its own.

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::Network;

use super::Build;
use super::next_number;
use crate::program::Vpc;

/// Adds a VPC.
///
/// # Source
/// RFC 7348 §5: a network identifier has 24 bits. RFC 8200 §5: no link with IPv6 has an MTU below 1280.
pub(super) fn compile(build: &mut Build, id: Id<Network>, vni: u32, mtu: u16) -> Result<()> {
    if !(1280..=9000).contains(&mtu) {
        return Err(Error::invalid(format!("{mtu} is not an MTU"))
            .remedy("use 1280 to 9000 bytes")
            .about(id.object()));
    }
    if vni >= 1 << 24 {
        return Err(
            Error::invalid(format!("network identifier {vni} has more than 24 bits")).about(id.object())
        );
    }
    if !build.vnis.insert(vni) {
        return Err(Error::invalid(format!("two networks have the identifier {vni}")).about(id.object()));
    }
    let number = next_number(&build.program.vpcs, id)?;
    build.networks.insert(id, number);
    build.program.vpcs.push(Vpc { id, mtu, subnets: Vec::new() });
    Ok(())
}
