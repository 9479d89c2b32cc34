//! Keeps an older leader of a cloud from having effects on a host, across all processes of the host.
//!
//! One record and one lock file per (cloud, site). A call holds a shared lock on the byte of its epoch *during* its effect;
//! [`HostFence::claim`] stores the raised epoch first and then takes the bytes of all older epochs exclusively, which
//! succeeds when the last older call has ended. A call reads the record after it has its lock: it either sees the raised
//! epoch and refuses, or the claim waits for it.
//!
//! The record is 96 bytes, replaced by rename after a sync: magic, cloud, incarnation, epoch, revision, checksum. One that
//! cannot be read refuses everybody: guessing an epoch could let a stale leader act.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use super::folder;
use super::lock::Range;
use super::lock::RangeLock;
use crate::Epoch;
use crate::Error;
use crate::Id;
use crate::Outcome;
use crate::Result;
use crate::Rev;
use crate::id::Cloud;
use crate::spi::Call;
use crate::spi::Site;

/// The newest (incarnation, epoch, revision) that a site has seen: what a provider's `hello` answers.
pub type Newest = (Uuid, Epoch, Rev);

/// The fence of one cloud at one site of this host. Cheap to clone; every process of the host that acts for the site opens
/// its own on the same folder.
#[derive(Clone, Debug)]
pub struct HostFence {
    cloud: Id<Cloud>,
    record: PathBuf,
    lock: PathBuf,
}

/// Keeps the epoch from being raised past its call until it is dropped. Hold it while the effect happens.
#[derive(Debug)]
#[must_use = "the effect is only fenced while this is held"]
pub struct FenceGuard {
    fence: HostFence,
    epoch: Epoch,
    _lock: RangeLock,
}

impl HostFence {
    /// The fence of `cloud` at `site`, in `<state>/fence/`.
    pub fn open(state: &Path, cloud: Id<Cloud>, site: Site) -> Result<Self> {
        let dir = state.join("fence");
        folder::make_dirs(&dir)?;
        let site = match site {
            Site::Host(id) => format!("host-{}", id.uuid().simple()),
            Site::Pool(id) => format!("pool-{}", id.uuid().simple()),
            Site::Fabric(id) => format!("fabric-{}", id.uuid().simple()),
        };
        let name = format!("{}.{site}", cloud.uuid().simple());
        Ok(Self { cloud, record: dir.join(format!("{name}.record")), lock: dir.join(format!("{name}.lock")) })
    }

    /// The newest that was seen; `None` if nobody has acted here.
    ///
    /// # Errors
    /// `Unavailable`: the record cannot be read.
    pub fn newest(&self) -> Result<Option<Newest>> {
        let Some(bytes) = folder::read(&self.record)? else { return Ok(None) };
        let record = Record::decode(&bytes).filter(|record| record.cloud == self.cloud);
        let record = record.ok_or_else(|| {
            Error::unavailable("the fencing record of this host cannot be read, so nothing may act here")
                .detail(self.record.display().to_string())
                .remedy("make sure that no older leader runs, remove the record, and claim the host again")
                .outcome_is(Outcome::NotDone)
        })?;
        Ok(Some((record.incarnation, record.epoch, record.rev)))
    }

    /// Lets `call` have its effect while the guard is held. A call with a newer epoch than was seen raises it, but does not
    /// wait for older ones; a leader claims first.
    ///
    /// # Errors
    /// - `Fenced`: a newer leader has been here, or one of another incarnation with this epoch.
    /// - `Unavailable`: the record cannot be read or written.
    pub async fn enter(&self, call: &Call) -> Result<FenceGuard> {
        let (this, call) = (self.clone(), call.clone());
        blocking(move || this.enter_now(&call)).await
    }

    /// As [`enter`](Self::enter), on the calling thread: for code that may block.
    ///
    /// # Errors
    /// As [`enter`](Self::enter).
    pub fn enter_now(&self, call: &Call) -> Result<FenceGuard> {
        self.check_cloud(call)?;
        let until = Instant::now() + call.budget.max(PAUSE);
        let one = Range { start: byte(call.epoch)?, len: 1, exclusive: false };
        let lock = loop {
            // In the way is only a claim of a newer epoch, for the moment in which it has drained us.
            if let Some(lock) = RangeLock::try_take(&self.lock, one)? {
                break lock;
            }
            if Instant::now() >= until {
                return Err(Error::timeout("the host is being claimed").outcome_is(Outcome::NotDone));
            }
            std::thread::sleep(PAUSE);
        };
        match self.judge(call)? {
            Standing::Current => {}
            Standing::Newer => self.raise(call)?,
        }
        Ok(FenceGuard { fence: self.clone(), epoch: call.epoch, _lock: lock })
    }

    /// Raises the epoch to that of `call`, durably, and returns when every older call has ended: in this process and in all
    /// others of the host. Afterwards older calls are refused. Claiming again with the same epoch waits again.
    ///
    /// # Errors
    /// - `Fenced`: as for [`enter`](Self::enter).
    /// - `Timeout`: older calls have not ended within the budget. The epoch is raised; claim again.
    pub async fn claim(&self, call: &Call) -> Result<Newest> {
        let (this, raising) = (self.clone(), call.clone());
        blocking(move || {
            this.check_cloud(&raising)?;
            byte(raising.epoch)?;
            match this.judge(&raising)? {
                Standing::Current => Ok(()),
                Standing::Newer => this.raise(&raising),
            }
        })
        .await?;
        tokio::time::timeout(call.budget, self.drain(call.epoch)).await.map_err(|_| {
            Error::timeout("calls of an older leader have not ended yet")
                .remedy("claim again, or end its process")
        })??;
        self.newest()?.ok_or_else(|| Error::unavailable("the fencing record vanished"))
    }

    /// Waits until no call below `epoch` is left. Newer ones neither wait nor are waited for.
    async fn drain(&self, epoch: Epoch) -> Result<()> {
        let len = byte(epoch)?;
        if len == 0 {
            return Ok(());
        }
        while RangeLock::try_take(&self.lock, Range { start: 0, len, exclusive: true })?.is_none() {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    fn check_cloud(&self, call: &Call) -> Result<()> {
        if call.cloud == self.cloud { Ok(()) } else { Err(Error::invalid("the call is of another cloud")) }
    }

    fn judge(&self, call: &Call) -> Result<Standing> {
        let Some((incarnation, epoch, _)) = self.newest()? else { return Ok(Standing::Newer) };
        if call.epoch > epoch {
            return Ok(Standing::Newer);
        }
        if call.epoch < epoch {
            return Err(Error::fenced("a newer leader controls this host")
                .detail(format!("its epoch is {epoch}, that of the call {}", call.epoch)));
        }
        if call.incarnation != incarnation {
            return Err(Error::fenced("another copy of the store leads with the same epoch")
                .remedy("open the store in import mode, with a new incarnation and a newer epoch"));
        }
        Ok(Standing::Current)
    }

    fn raise(&self, call: &Call) -> Result<()> {
        self.update(|this| {
            // Read again: another process may have been faster.
            match this.judge(call)? {
                Standing::Current => Ok(None),
                Standing::Newer => Ok(Some(Record {
                    cloud: call.cloud,
                    incarnation: call.incarnation,
                    epoch: call.epoch,
                    // Revisions of two incarnations do not compare.
                    rev: this.newest()?.filter(|n| n.0 == call.incarnation).map_or(Rev(0), |n| n.2),
                })),
            }
        })
    }

    /// Reads and replaces the record as the only one of the host.
    fn update(&self, change: impl FnOnce(&Self) -> Result<Option<Record>>) -> Result<()> {
        let writers = Range { start: WRITERS, len: 1, exclusive: true };
        let _only = loop {
            match RangeLock::try_take(&self.lock, writers)? {
                Some(lock) => break lock,
                // The holder writes 96 bytes; the kernel gives its lock back if it dies.
                None => std::thread::sleep(PAUSE),
            }
        };
        match change(self)? {
            Some(record) => folder::write(&self.record, &record.encode()),
            None => Ok(()),
        }
    }
}

impl FenceGuard {
    /// Notes that the site has seen `rev`, durably (a sync of a small file, about 1 ms). Needed only by providers whose
    /// effects leave no tag with a revision; others take the newest from their tags.
    pub async fn saw(&self, rev: Rev) -> Result<()> {
        let (fence, epoch) = (self.fence.clone(), self.epoch);
        blocking(move || {
            fence.update(|this| {
                let newest = this.newest()?.filter(|(_, e, seen)| *e == epoch && *seen < rev);
                Ok(newest.map(|(incarnation, epoch, _)| Record {
                    cloud: this.cloud,
                    incarnation,
                    epoch,
                    rev,
                }))
            })
        })
        .await
    }
}

enum Standing {
    Current,
    Newer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    cloud: Id<Cloud>,
    incarnation: Uuid,
    epoch: Epoch,
    rev: Rev,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(self.cloud.uuid().as_bytes());
        bytes.extend_from_slice(self.incarnation.as_bytes());
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.rev.0.to_le_bytes());
        bytes.resize(RECORD - SUM, 0);
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<SUM>()?;
        if bytes.len() != RECORD || Sha256::digest(body).as_slice() != sum {
            return None;
        }
        let body = body.strip_prefix(MAGIC)?;
        let (cloud, body) = body.split_first_chunk::<16>()?;
        let (incarnation, body) = body.split_first_chunk::<16>()?;
        let (epoch, body) = body.split_first_chunk::<8>()?;
        let (rev, _) = body.split_first_chunk::<8>()?;
        Some(Self {
            cloud: Id::from_uuid(Uuid::from_bytes(*cloud)),
            incarnation: Uuid::from_bytes(*incarnation),
            epoch: Epoch(u64::from_le_bytes(*epoch)),
            rev: Rev(u64::from_le_bytes(*rev)),
        })
    }
}

/// The byte of an epoch in the lock file.
fn byte(epoch: Epoch) -> Result<u64> {
    if epoch.0 < WRITERS {
        return Ok(epoch.0);
    }
    Err(Error::invalid(format!("epoch {epoch} is beyond any that a leader reaches")))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::internal("work on the host ended abruptly").because(&e)),
    }
}

const MAGIC: &[u8] = b"iaas-fence-v1\0\0\0";
const RECORD: usize = 96;
const SUM: usize = 32;
/// The byte that writers of the record lock, above every epoch.
const WRITERS: u64 = 1 << 62;
const PAUSE: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const CLOUD: Id<Cloud> = Id::from_uuid(Uuid::from_u128(1));
    const SITE: Site = Site::Host(Id::from_uuid(Uuid::from_u128(2)));

    fn call(epoch: u64) -> Call {
        Call {
            cloud: CLOUD,
            incarnation: Uuid::from_u128(9),
            epoch: Epoch(epoch),
            op: Id::from_uuid(Uuid::nil()),
            trace: None,
            budget: Duration::from_secs(60),
        }
    }

    fn fence(dir: &tempfile::TempDir) -> HostFence {
        HostFence::open(dir.path(), CLOUD, SITE).unwrap()
    }

    #[tokio::test]
    async fn an_older_epoch_is_refused_also_over_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(fence(&dir).newest().unwrap(), None);
        let newest = fence(&dir).claim(&call(3)).await.unwrap();
        assert_eq!(newest, (call(3).incarnation, Epoch(3), Rev(0)));
        assert_eq!(fence(&dir).enter(&call(2)).await.unwrap_err().kind(), ErrorKind::Fenced);
        assert_eq!(fence(&dir).claim(&call(2)).await.unwrap_err().kind(), ErrorKind::Fenced);
        drop(fence(&dir).enter(&call(3)).await.unwrap());
        drop(fence(&dir).enter(&call(4)).await.unwrap());
        assert_eq!(fence(&dir).enter(&call(3)).await.unwrap_err().kind(), ErrorKind::Fenced);
    }

    #[tokio::test]
    async fn a_claim_waits_for_older_calls_but_refuses_new_ones_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let guard = fence(&dir).enter(&call(1)).await.unwrap();
        let impatient = Call { budget: Duration::from_millis(20), ..call(2) };
        let error = fence(&dir).claim(&impatient).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Timeout, Outcome::Unknown));
        assert_eq!(fence(&dir).enter(&call(1)).await.unwrap_err().kind(), ErrorKind::Fenced);
        let ours = fence(&dir).enter(&call(2)).await.unwrap();
        drop(guard);
        // `ours` is of the claimed epoch and is not waited for.
        fence(&dir).claim(&call(2)).await.unwrap();
        drop(ours);
    }

    #[tokio::test]
    async fn a_copy_of_the_store_with_the_same_epoch_is_refused_and_with_a_newer_one_takes_over() {
        let dir = tempfile::tempdir().unwrap();
        let guard = fence(&dir).enter(&call(5)).await.unwrap();
        guard.saw(Rev(70)).await.unwrap();
        guard.saw(Rev(60)).await.unwrap();
        drop(guard);
        assert_eq!(fence(&dir).newest().unwrap(), Some((call(5).incarnation, Epoch(5), Rev(70))));
        assert_eq!(fence(&dir).claim(&call(6)).await.unwrap().2, Rev(70));
        let copy = Uuid::from_u128(10);
        let same = Call { incarnation: copy, ..call(6) };
        assert_eq!(fence(&dir).claim(&same).await.unwrap_err().kind(), ErrorKind::Fenced);
        let newer = Call { incarnation: copy, ..call(7) };
        assert_eq!(fence(&dir).claim(&newer).await.unwrap(), (copy, Epoch(7), Rev(0)));
    }

    #[tokio::test]
    async fn a_record_with_any_bit_turned_or_cut_short_refuses_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let fence = fence(&dir);
        fence.claim(&call(3)).await.unwrap();
        let good = std::fs::read(&fence.record).unwrap();
        let turned = (0..good.len() * 8).map(|bit| {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        });
        let cut = (0..good.len()).map(|len| good[..len].to_vec());
        for bad in turned.chain(cut) {
            std::fs::write(&fence.record, &bad).unwrap();
            let error = fence.newest().unwrap_err();
            assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
        }
        assert_eq!(fence.claim(&call(9)).await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(fence.enter(&call(9)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn calls_of_another_cloud_and_impossible_epochs_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let other = Call { cloud: Id::from_uuid(Uuid::from_u128(3)), ..call(1) };
        assert_eq!(fence(&dir).enter(&other).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(fence(&dir).enter(&call(WRITERS)).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(fence(&dir).claim(&call(u64::MAX)).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(fence(&dir).newest().unwrap(), None);
    }
}
