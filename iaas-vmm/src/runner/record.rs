//! What a runner leaves behind about its VM, and what it means once the runner is dead.

use std::path::Path;
use std::path::PathBuf;

use iaas_core::Boot;
use iaas_core::Error;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::process::CountersPage;
use iaas_core::spi::Reading;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Right;
use iaas_core::spi::hypervisor::VmObserved;
use serde::Deserialize;
use serde::Serialize;

use crate::files;

/// The files of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmFolder(PathBuf);

impl VmFolder {
    /// The folder at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The console's scroll-back.
    pub fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// The counters of the running or last boot.
    pub fn counters(&self) -> PathBuf {
        self.0.join("usage")
    }

    /// What the hypervisor accepted; written by it alone.
    pub fn accepted(&self) -> PathBuf {
        self.0.join("accepted.cbor")
    }

    /// What QEMU complained about.
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// What the last runner saw.
    pub fn record(&self) -> PathBuf {
        self.0.join("seen.cbor")
    }

    /// What the last runner saw; `None` if there was none.
    pub fn load(&self) -> Result<Option<VmRecord>> {
        files::load(&self.record())
    }

    /// Stores what a runner sees; durable when it returns.
    pub fn store(&self, record: &VmRecord) -> Result<()> {
        files::store(&self.record(), record)
    }

    /// The newest reading of the running or last boot.
    pub fn reading(&self) -> Result<Option<Reading>> {
        match CountersPage::open(&self.counters()) {
            Ok(page) => page.read()?.map(|(_, bytes)| files::decode(&bytes)).transpose(),
            Err(e) if e.kind() == iaas_core::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// What a runner saw of its VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The version of this record.
    pub version: u16,
    /// The VM.
    pub seen: VmObserved,
    /// The last readings of ended boots, oldest first.
    pub readings: Vec<Reading>,
}

impl VmRecord {
    /// A VM that was never started.
    pub fn never(term: Term) -> Self {
        let seen = VmObserved {
            life: Life::Never,
            changed: None,
            right: Right::Holds(term),
            devices: Default::default(),
            accepts: Vec::new(),
            restart_for: Vec::new(),
        };
        Self { version: 1, seen, readings: Vec::new() }
    }

    /// The boot that was started last.
    pub fn boot(&self) -> Option<Boot> {
        match &self.seen.life {
            Life::Never => None,
            Life::Booting(boot) | Life::On(boot) | Life::Paused(boot) | Life::Ended { boot, .. } => {
                Some(*boot)
            }
        }
    }

    /// Whether the VM had not ended when this was written.
    pub fn is_open(&self) -> bool {
        matches!(self.seen.life, Life::Booting(_) | Life::On(_) | Life::Paused(_))
    }

    /// What is true now that the runner is dead: an open life has crashed, at the moment of its last reading.
    ///
    /// Says the same each time, so whoever looks need not write it down.
    #[must_use]
    pub fn after_death(mut self, last: Option<Reading>) -> Self {
        let Some(boot) = self.boot().filter(|_| self.is_open()) else { return self };
        let last = last.filter(|reading| reading.life == boot.0);
        self.seen.changed = last.as_ref().map_or(self.seen.changed, |reading| Some(reading.at));
        self.seen.life = Life::Ended { boot, why: End::Crashed(crashed()) };
        self.seen.devices.clear();
        self.close(last);
        self
    }

    /// Keeps the last reading of a boot.
    pub fn close(&mut self, last: Option<Reading>) {
        if let Some(mut last) = last {
            last.seq += u64::from(!last.fin);
            last.fin = true;
            self.readings.retain(|old| (old.term, old.life) != (last.term, last.life));
            self.readings.push(last);
        }
        let excess = self.readings.len().saturating_sub(READINGS_MAX);
        self.readings.drain(..excess);
    }
}

fn crashed() -> Error {
    Error::unavailable("the process that ran the VM was killed or crashed").remedy("start the VM again")
}

/// Readings of ended boots that are kept; whoever bills reads them long before.
const READINGS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use iaas_core::Id;
    use iaas_core::spi::Stamp;
    use iaas_core::spi::hypervisor::Vm;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_dead_runner_leaves_a_crashed_vm_with_its_last_reading() {
        let at = Stamp { wall: jiff::Timestamp::UNIX_EPOCH, boot_id: Uuid::nil(), mono_ns: 7 };
        let of = Id::<Vm>::from_uuid(Uuid::nil()).object();
        let last = Reading { of, term: Term(1), life: 2, seq: 5, fin: false, at, totals: BTreeMap::new() };
        let mut record = VmRecord::never(Term(1));
        assert_eq!(record.clone().after_death(Some(last.clone())), record);
        record.seen.life = Life::On(Boot(2));
        let dead = record.after_death(Some(last.clone()));
        assert!(matches!(dead.seen.life, Life::Ended { boot: Boot(2), why: End::Crashed(_) }));
        assert_eq!(dead.seen.changed, Some(at));
        assert_eq!(dead.readings.len(), 1);
        assert!(dead.readings[0].fin && dead.readings[0].seq == 6);
        assert_eq!(dead.clone().after_death(Some(last)), dead);
    }
}
