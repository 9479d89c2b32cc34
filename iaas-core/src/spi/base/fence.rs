//! Who may change things on a site: the newest epoch of each cloud, and the calls that are inside.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use nix::time::ClockId;
use nix::time::clock_gettime;
use serde::Deserialize;
use serde::Serialize;
use tokio::sync::OwnedRwLockReadGuard;
use tokio::sync::OwnedRwLockWriteGuard;
use tokio::sync::RwLock;
use uuid::Uuid;

use super::notes::Notes;
use crate::Epoch;
use crate::Error;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::id::Cloud;
use crate::spi::Call;
use crate::spi::Stamp;

/// The newest (incarnation, epoch, revision) of a cloud.
pub(crate) type Newest = (Uuid, Epoch, Rev);

/// The leaders that a site has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leaders {
    newest: BTreeMap<Id<Cloud>, Newest>,
    /// Who claimed last: `hello` answers for it.
    last: Option<Id<Cloud>>,
}

impl Leaders {
    /// What `hello` says of the cloud that claimed last.
    pub(crate) fn newest(&self) -> Option<Newest> {
        self.last.and_then(|cloud| self.newest.get(&cloud).copied())
    }

    /// Refuses an older epoch and keeps a newer one.
    pub(crate) fn admit(&mut self, call: &Call) -> Result<()> {
        let newest = self.newest.entry(call.cloud).or_insert((call.incarnation, call.epoch, Rev(0)));
        if call.epoch < newest.1 {
            return Err(Error::fenced(format!("epoch {} is over: {} leads now", call.epoch, newest.1))
                .remedy("stop; another control plane has taken the lead")
                .outcome_is(Outcome::NotDone));
        }
        if newest.0 != call.incarnation {
            newest.2 = Rev(0);
        }
        (newest.0, newest.1) = (call.incarnation, call.epoch);
        Ok(())
    }

    /// As [`admit`](Self::admit), by the call that claims the site.
    pub(crate) fn claim(&mut self, call: &Call) -> Result<()> {
        self.admit(call)?;
        self.last = Some(call.cloud);
        Ok(())
    }

    /// Remembers the newest revision that was applied.
    pub(crate) fn applied(&mut self, call: &Call, rev: Rev) {
        if let Some(newest) = self.newest.get_mut(&call.cloud) {
            newest.2 = newest.2.max(rev);
        }
    }
}

/// Admits the calls of the newest leader.
#[derive(Debug)]
pub(super) struct Fence {
    notes: Arc<Notes>,
    install: Uuid,
    leaders: Mutex<Leaders>,
    /// Held shared by each changing call, and alone by a claim.
    gate: Arc<RwLock<()>>,
}

impl Fence {
    /// Reads what the notes know; notes that know nothing are a new installation.
    pub(super) fn open(notes: Arc<Notes>) -> Result<Self> {
        let install = match notes.get(INSTALL)? {
            Some(install) => install,
            None => {
                let install = Uuid::now_v7();
                notes.put(INSTALL, Some(&install))?;
                install
            }
        };
        let leaders = Mutex::new(notes.get(LEADERS)?.unwrap_or_default());
        Ok(Self { notes, install, leaders, gate: Arc::default() })
    }

    /// The installation, and what `hello` says of the cloud that claimed last.
    pub(super) fn card(&self) -> (Uuid, Option<Newest>) {
        (self.install, self.leaders().newest())
    }

    /// Waits for claims. While the guard is held none goes on; the call itself is not admitted yet.
    pub(super) async fn inside(&self) -> OwnedRwLockReadGuard<()> {
        Arc::clone(&self.gate).read_owned().await
    }

    /// Waits until nobody is inside.
    pub(super) async fn alone(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.gate).write_owned().await
    }

    /// Changes what is known of the leaders, durably, or not at all.
    pub(super) fn learn(&self, change: impl FnOnce(&mut Leaders) -> Result<()>) -> Result<()> {
        let mut leaders = self.leaders();
        let mut next = leaders.clone();
        change(&mut next)?;
        if next != *leaders {
            self.notes.put(LEADERS, Some(&next)).map_err(|e| e.outcome_is(Outcome::NotDone))?;
            *leaders = next;
        }
        Ok(())
    }

    fn leaders(&self) -> MutexGuard<'_, Leaders> {
        self.leaders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This moment on this host's clocks. The monotonic one also counts while the host sleeps.
pub(super) fn stamp() -> Result<Stamp> {
    let broken = |e: &dyn std::error::Error| Error::internal("the host's clock cannot be read").because(e);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|e| broken(&e))?;
    let boot_id = Uuid::parse_str(boot.trim()).map_err(|e| broken(&e))?;
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|e| broken(&e))?;
    let nanos = std::time::Duration::from(time).as_nanos();
    Ok(Stamp { wall: jiff::Timestamp::now(), boot_id, mono_ns: u64::try_from(nanos).unwrap_or(u64::MAX) })
}

const INSTALL: &str = "install";
const LEADERS: &str = "leaders";
