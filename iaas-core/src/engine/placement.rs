//! First fit: the first host, in order of id, that has room.

use crate::spi::placement::Candidate;
use crate::spi::placement::Fleet;
use crate::spi::placement::PlaceRequest;
use crate::spi::placement::Placed;
use crate::spi::placement::Placement;

/// Takes hosts in the order of their ids. Cost: one pass over the fleet.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstFit;

impl Placement for FirstFit {
    fn rank(&self, want: &PlaceRequest, fleet: &Fleet, _seed: u64) -> Placed {
        let mut placed = Placed::default();
        for host in &fleet.hosts {
            match why_not(want, host) {
                None => placed.ranked.push(host.id),
                Some(why) => placed.refused.push((host.id, why)),
            }
        }
        placed
    }
}

fn why_not(want: &PlaceRequest, host: &Candidate) -> Option<String> {
    if host.cordoned {
        return Some("takes nothing new".to_owned());
    }
    if want.zone.is_some_and(|zone| zone != host.zone) {
        return Some("lies in another zone".to_owned());
    }
    if let Some(pool) = want.pools.difference(&host.pools).next() {
        return Some(format!("does not reach pool {pool}"));
    }
    if want.vcpus > host.free_vcpus {
        return Some(format!("has {} vCPUs free of the {} wanted", host.free_vcpus, want.vcpus));
    }
    (want.memory > host.free_memory)
        .then(|| format!("has {} bytes of memory free of the {} wanted", host.free_memory, want.memory))
}
