//! ARP: the pipeline answers for the router and for the other ports of the subnet, so no broadcast is ever flooded.

use super::Answer;
use super::Asker;
use crate::pipeline::Reason;
use crate::pipeline::parse::Arp;
use crate::topology::mapped;
use crate::wire;

/// Answers a request; announcements and replies are noted by nobody.
///
/// # Source
/// RFC 826; RFC 5227 §1.1: a probe for an address that nobody has must stay unanswered.
pub(crate) fn answer(asker: &Asker<'_>, arp: &Arp, out: &mut Vec<u8>) -> Result<Answer, Reason> {
    if !arp.request || arp.target == arp.sender {
        return Ok(Answer::Absorb("an announcement needs no answer"));
    }
    let (mac, _) = asker.neighbour(mapped(arp.target.into())).ok_or(Reason::NoAnswer)?;
    wire::begin(out, asker.port.mac, mac, wire::ARP);
    out.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    out.extend_from_slice(&mac.0);
    out.extend_from_slice(&arp.target);
    out.extend_from_slice(&asker.port.mac.0);
    out.extend_from_slice(&arp.sender);
    Ok(Answer::Reply("the Ethernet address of a neighbour"))
}
