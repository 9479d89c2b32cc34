//! The fake placement: of the hosts that fit, the one with the most free memory first.

use crate::spi::placement::Candidate;
use crate::spi::placement::Fleet;
use crate::spi::placement::PlaceRequest;
use crate::spi::placement::Placed;
use crate::spi::placement::Placement;

/// Most free memory first; equal ones by id.
#[derive(Clone, Copy, Debug, Default)]
pub struct FakePlacement;

impl Placement for FakePlacement {
    fn rank(&self, want: &PlaceRequest, fleet: &Fleet, _: u64) -> Placed {
        let mut fits: Vec<&Candidate> = Vec::new();
        let mut placed = Placed::default();
        for host in &fleet.hosts {
            match refuse(want, host) {
                Some(why) => placed.refused.push((host.id, why)),
                None => fits.push(host),
            }
        }
        fits.sort_by_key(|h| (std::cmp::Reverse(h.free_memory), h.id));
        placed.ranked = fits.iter().map(|h| h.id).collect();
        placed
    }
}

fn refuse(want: &PlaceRequest, host: &Candidate) -> Option<String> {
    if host.cordoned {
        return Some("it is cordoned".into());
    }
    if want.zone.is_some_and(|zone| zone != host.zone) {
        return Some("it is in another zone".into());
    }
    if want.vcpus > host.free_vcpus {
        return Some(format!("{} vCPUs are free of {} wanted", host.free_vcpus, want.vcpus));
    }
    if want.memory > host.free_memory {
        return Some(format!("{} bytes are free of {} wanted", host.free_memory, want.memory));
    }
    want.pools.iter().find(|p| !host.pools.contains(p)).map(|p| format!("it does not reach the pool {p}"))
}
