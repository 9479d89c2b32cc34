//! Who may change things on a site: the newest epoch of each cloud, and the calls that are inside.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use nix::time::ClockId;
use nix::time::clock_gettime;
use serde::Deserialize;
use serde::Serialize;
use tokio::sync::OwnedRwLockReadGuard;
use tokio::sync::RwLock;
use uuid::Uuid;

use super::shelf::Shelf;
use crate::Epoch;
use crate::Error;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::id::Cloud;
use crate::spi::Call;
use crate::spi::Stamp;

const KEY: &str = "site";

/// The newest (incarnation, epoch, revision) of a cloud.
pub(super) type Newest = (Uuid, Epoch, Rev);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Seen {
    install: Uuid,
    newest: BTreeMap<Id<Cloud>, Newest>,
    /// Who claimed last: `hello` answers for it.
    last: Option<Id<Cloud>>,
}

/// Admits the calls of the newest leader.
#[derive(Debug)]
pub(super) struct Fence {
    shelf: Arc<dyn Shelf>,
    seen: Mutex<Seen>,
    /// Held shared by each changing call, and alone by a claim.
    gate: Arc<RwLock<()>>,
}

impl Fence {
    /// Reads what the shelf knows; a shelf that knows nothing is a new installation.
    pub(super) fn open(shelf: Arc<dyn Shelf>, kept: Option<&[u8]>) -> Result<Self> {
        let seen = match kept {
            Some(bytes) => super::provider::decoded(bytes)?,
            None => {
                let seen = Seen { install: Uuid::now_v7(), newest: BTreeMap::new(), last: None };
                shelf.put(KEY, Some(&super::provider::encoded(&seen)?))?;
                seen
            }
        };
        Ok(Self { shelf, seen: Mutex::new(seen), gate: Arc::default() })
    }

    pub(super) const fn key() -> &'static str {
        KEY
    }

    /// The installation, and what `hello` says of the cloud that claimed last.
    pub(super) fn card(&self) -> (Uuid, Option<Newest>) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.install, seen.last.and_then(|cloud| seen.newest.get(&cloud).copied()))
    }

    /// Lets a changing call in; the epoch stays as it is until the guard is dropped.
    pub(super) async fn enter(&self, call: &Call) -> Result<OwnedRwLockReadGuard<()>> {
        let inside = Arc::clone(&self.gate).read_owned().await;
        self.admit(call, |_| {})?;
        Ok(inside)
    }

    /// Waits until nobody is inside, and admits only this leader and newer ones from now on.
    pub(super) async fn claim(&self, call: &Call) -> Result<()> {
        let _alone = self.gate.write().await;
        self.admit(call, |seen| seen.last = Some(call.cloud))
    }

    /// Waits until every call that is inside has ended.
    pub(super) async fn drain(&self) {
        drop(self.gate.write().await);
    }

    /// Remembers the newest revision that a cloud asked for.
    pub(super) fn accepted(&self, call: &Call, rev: Rev) -> Result<()> {
        self.admit(call, |seen| {
            if let Some(newest) = seen.newest.get_mut(&call.cloud) {
                newest.2 = newest.2.max(rev);
            }
        })
    }

    fn admit(&self, call: &Call, more: impl FnOnce(&mut Seen)) -> Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = seen.clone();
        let newest = next.newest.entry(call.cloud).or_insert((call.incarnation, call.epoch, Rev(0)));
        if call.epoch < newest.1 {
            return Err(Error::fenced(format!("epoch {} is over: {} leads now", call.epoch, newest.1))
                .remedy("stop; another control plane has taken the lead")
                .outcome_is(Outcome::NotDone));
        }
        if newest.0 != call.incarnation {
            newest.2 = Rev(0);
        }
        (newest.0, newest.1) = (call.incarnation, call.epoch);
        more(&mut next);
        let changed = (&next.newest, next.last) != (&seen.newest, seen.last);
        if changed {
            let bytes = super::provider::encoded(&next)?;
            self.shelf.put(KEY, Some(&bytes)).map_err(|e| e.outcome_is(Outcome::NotDone))?;
            *seen = next;
        }
        Ok(())
    }
}

/// This moment on this host's clocks. The monotonic one also counts while the host sleeps.
pub fn stamp() -> Result<Stamp> {
    let broken = |e: &dyn std::error::Error| Error::internal("the host's clock cannot be read").because(e);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|e| broken(&e))?;
    let boot_id = Uuid::parse_str(boot.trim()).map_err(|e| broken(&e))?;
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|e| broken(&e))?;
    let nanos = std::time::Duration::from(time).as_nanos();
    Ok(Stamp { wall: jiff::Timestamp::now(), boot_id, mono_ns: u64::try_from(nanos).unwrap_or(u64::MAX) })
}
