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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use uuid::Uuid;

    use super::*;
    use crate::Id;
    use crate::id::Pool;

    fn id<K>(n: u128) -> Id<K> {
        Id::from_uuid(Uuid::from_u128(n))
    }

    fn pools(of: &[u128]) -> BTreeSet<Id<Pool>> {
        of.iter().map(|n| id(*n)).collect()
    }

    /// Host `n` in zone 1 with 4 vCPUs, 8 bytes and pool 7.
    fn host(n: u128) -> Candidate {
        Candidate {
            id: id(n),
            zone: id(1),
            cordoned: false,
            free_vcpus: 4,
            free_memory: 8,
            pools: pools(&[7]),
        }
    }

    #[test]
    fn hosts_with_room_come_in_the_order_of_the_fleet_and_each_other_one_says_why_not() {
        let want = PlaceRequest { vcpus: 4, memory: 8, zone: Some(id(1)), pools: pools(&[7]) };
        let fleet = Fleet {
            hosts: vec![
                host(1),
                Candidate { cordoned: true, ..host(2) },
                Candidate { zone: id(2), ..host(3) },
                Candidate { pools: pools(&[8]), ..host(4) },
                Candidate { free_vcpus: 3, ..host(5) },
                Candidate { free_memory: 7, ..host(6) },
                host(7),
            ],
        };
        let placement: &dyn Placement = &FirstFit;
        let placed = placement.rank(&want, &fleet, 0);
        assert_eq!(placed.ranked, [id(1), id(7)]);
        let refused: Vec<(u128, &str)> =
            placed.refused.iter().map(|(id, why)| (id.uuid().as_u128(), why.as_str())).collect();
        let pool: Id<Pool> = id(7);
        let no_pool = format!("does not reach pool {pool}");
        assert_eq!(
            refused,
            [
                (2, "takes nothing new"),
                (3, "lies in another zone"),
                (4, no_pool.as_str()),
                (5, "has 3 vCPUs free of the 4 wanted"),
                (6, "has 7 bytes of memory free of the 8 wanted"),
            ]
        );
        let anywhere = PlaceRequest { zone: None, pools: BTreeSet::new(), ..want };
        assert_eq!(placement.rank(&anywhere, &fleet, 9).ranked, [id(1), id(3), id(4), id(7)]);
    }
}
