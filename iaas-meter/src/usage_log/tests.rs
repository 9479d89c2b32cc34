//! The log under torn tails, changed bytes, full disks and second writers.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

use iaas_core::ErrorKind;
use iaas_core::ObjectRef;
use iaas_core::Outcome;
use iaas_core::Rev;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageKey;
use jiff::Timestamp;
use tempfile::TempDir;
use uuid::Uuid;

use super::format::BLOCK_HEADER;
use super::format::FORMAT;
use super::format::SEGMENT_HEADER;
use super::*;

const PROJECT: Id<Project> = Id::from_uuid(Uuid::from_u128(1));

fn event(rev: u64) -> UsageEvent {
    let of = ObjectRef { kind: "instance".to_owned(), id: Uuid::from_u128(9) };
    let key = UsageKey::Commit { incarnation: Uuid::nil(), rev: Rev(rev), index: 0 };
    let at = Timestamp::UNIX_EPOCH;
    UsageEvent {
        project: PROJECT,
        key,
        what: Usage::Allocated { of, meter: "vcpu".to_owned(), quantity: rev, order: rev, at },
    }
}

fn open(folder: &Path) -> Result<UsageLog> {
    UsageLog::open(folder, Options::default())
}

async fn all(log: &UsageLog) -> Vec<UsageEvent> {
    log.visit(PROJECT, Vec::new(), |all, _, event| all.push(event)).await.unwrap()
}

/// A log with one block for each of `revs`.
async fn log_of(revs: impl IntoIterator<Item = u64>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path()).unwrap();
    for rev in revs {
        log.append(&[event(rev)]).await.unwrap();
    }
    folder
}

fn events(revs: impl IntoIterator<Item = u64>) -> Vec<UsageEvent> {
    revs.into_iter().map(event).collect()
}

#[tokio::test]
async fn what_was_appended_is_there_after_a_reopen_once() {
    let folder = log_of([]).await;
    let log = open(folder.path()).unwrap();
    log.append(&[event(1), event(2), event(1)]).await.unwrap();
    log.append(&[event(2), event(3)]).await.unwrap();
    log.append(&[]).await.unwrap();
    assert_eq!(all(&log).await, events(1..=3));
    let head = log.head();
    drop(log);
    let log = open(folder.path()).unwrap();
    assert_eq!((log.head(), log.opening().head), (head, head));
    log.append(&events(1..=4)).await.unwrap();
    assert_eq!(all(&log).await, events(1..=4));
    assert_eq!(log.head().records, 4);
}

#[tokio::test]
async fn segments_follow_each_other_and_the_chain_runs_through_them() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes: 4096 };
    let log = UsageLog::open(folder.path(), options).unwrap();
    for rev in 0..100 {
        log.append(&[event(rev)]).await.unwrap();
    }
    drop(log);
    let log = UsageLog::open(folder.path(), options).unwrap();
    assert!(log.opening().segments > 3, "{:?}", log.opening());
    assert_eq!(all(&log).await, events(0..100));
    // Two logs with the same events have the same chain, however they are cut.
    let other = log_of([]).await;
    let whole = open(other.path()).unwrap();
    whole.append(&events(0..100)).await.unwrap();
    assert_eq!(whole.head(), log.head());
}

#[tokio::test]
async fn the_chain_is_what_anybody_can_compute_from_the_events() {
    let folder = log_of(1..=3).await;
    let mut chain = [0; 32];
    for event in events(1..=3) {
        let mut both = chain.to_vec();
        ciborium::into_writer(&event, &mut both).unwrap();
        chain = Digest::of(&both).0;
    }
    assert_eq!(open(folder.path()).unwrap().head(), Head { records: 3, chain: Digest(chain) });
}

#[tokio::test]
async fn folder_and_files_are_for_our_eyes_only() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("usage");
    let log = open(&folder).unwrap();
    log.append(&[event(1)]).await.unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for file in fs::read_dir(&folder).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    // Somebody else's folder is not taken over.
    let shared = parent.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(shared.join("theirs"), "").unwrap();
    assert_eq!(open(&shared).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(mode(&shared), 0o755);
}

#[tokio::test]
async fn a_second_writer_is_locked_out_until_the_first_has_gone() {
    let folder = log_of([1]).await;
    let log = open(folder.path()).unwrap();
    assert_eq!(open(folder.path()).unwrap_err().kind(), ErrorKind::Conflict);
    drop(log);
    open(folder.path()).unwrap();
}

#[tokio::test]
async fn a_newer_format_and_a_foreign_file_are_refused_and_left_alone() {
    let folder = log_of([1]).await;
    let path = segment_path(folder.path(), 1);
    let ours = fs::read(&path).unwrap();
    let mut newer = ours.clone();
    newer[8..12].copy_from_slice(&(FORMAT + 1).to_le_bytes());
    fs::write(&path, &newer).unwrap();
    let error = open(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("format 2"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), newer);
    let mut foreign = ours;
    foreign[0] ^= 1;
    fs::write(&path, &foreign).unwrap();
    assert_eq!(open(folder.path()).unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_tail_torn_at_any_byte_is_set_aside_and_the_rest_stays() {
    let folder = log_of([1, 2]).await;
    let path = segment_path(folder.path(), 1);
    let two = fs::read(&path).unwrap();
    let log = open(folder.path()).unwrap();
    log.append(&[event(3), event(4)]).await.unwrap();
    drop(log);
    let four = fs::read(&path).unwrap();
    for length in two.len() + 1..four.len() {
        // Cut short, and as long as it was going to be but with the rest still zeros.
        for torn in [four[..length].to_vec(), [&four[..length], &vec![0; four.len() - length]].concat()] {
            if torn == four {
                continue;
            }
            fs::write(&path, &torn).unwrap();
            assert!(verify(folder.path()).unwrap().unwrap().torn.is_some());
            assert_eq!(fs::read(&path).unwrap(), torn, "verify changes nothing");
            let log = open(folder.path()).unwrap();
            let report = log.opening().torn.clone().unwrap();
            let size = torn.len() - two.len();
            assert_eq!((report.offset, report.bytes), (two.len() as u64, size as u64));
            assert_eq!(fs::read(report.kept.unwrap()).unwrap(), torn[two.len()..]);
            assert_eq!(all(&log).await, events([1, 2]));
            log.append(&events([3, 4])).await.unwrap();
            drop(log);
            assert_eq!(fs::read(&path).unwrap(), four);
        }
    }
    assert_eq!(open(folder.path()).unwrap().opening().torn, None);
}

#[tokio::test]
async fn a_changed_byte_in_the_middle_is_named_and_nothing_is_skipped() {
    let folder = log_of([1, 2, 3]).await;
    let path = segment_path(folder.path(), 1);
    let whole = fs::read(&path).unwrap();
    let block = (whole.len() - SEGMENT_HEADER) / 3;
    for at in 0..SEGMENT_HEADER + 2 * block {
        let mut bad = whole.clone();
        bad[at] ^= 0x40;
        fs::write(&path, &bad).unwrap();
        let starts = at.checked_sub(SEGMENT_HEADER).map_or(0, |n| SEGMENT_HEADER + n / block * block);
        let error = open(folder.path()).unwrap_err();
        if at >= 12 {
            // Before that it is a foreign file or another format.
            assert_eq!(error.kind(), ErrorKind::Unavailable, "byte {at}: {error}");
            let damage = verify(folder.path()).unwrap().unwrap_err();
            assert_eq!((damage.segment, damage.offset), (1, starts as u64), "byte {at}: {damage}");
            assert!(
                error
                    .to_string()
                    .contains(&format!("segment 1 of the usage log is damaged at byte {starts}"))
            );
        }
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
}

#[tokio::test]
async fn a_missing_or_swapped_segment_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes: 4096 };
    let log = UsageLog::open(folder.path(), options).unwrap();
    for rev in 0..60 {
        log.append(&[event(rev)]).await.unwrap();
    }
    drop(log);
    let (two, three) = (segment_path(folder.path(), 2), segment_path(folder.path(), 3));
    let aside = folder.path().join("aside");
    fs::rename(&two, &aside).unwrap();
    assert_eq!(verify(folder.path()).unwrap().unwrap_err().segment, 2);
    fs::copy(&three, &two).unwrap();
    let swapped = verify(folder.path()).unwrap().unwrap_err();
    assert_eq!((swapped.segment, swapped.offset), (2, 0));
    // A segment that is not the last has no tail to tear.
    let whole = fs::read(&aside).unwrap();
    fs::write(&two, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(verify(folder.path()).unwrap().unwrap_err().segment, 2);
    fs::write(&two, &whole).unwrap();
    assert!(verify(folder.path()).unwrap().is_ok());
}

#[tokio::test]
async fn a_record_that_changes_under_an_open_log_is_not_billed() {
    let folder = log_of([1, 2]).await;
    let log = open(folder.path()).unwrap();
    let path = segment_path(folder.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[SEGMENT_HEADER + BLOCK_HEADER + 20] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = log.visit(PROJECT, (), |(), _, _| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn an_event_that_is_too_large_or_misnamed_is_refused_and_costs_nothing() {
    let folder = log_of([]).await;
    let log = open(folder.path()).unwrap();
    let before = log.head();
    let mut long = event(1);
    if let Usage::Allocated { meter, .. } = &mut long.what {
        *meter = "m".repeat(65);
    }
    assert_eq!(log.append(&[event(2), long]).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(log.head(), before);
}

/// A disk that fails as it is told, once.
#[derive(Clone, Debug, Default)]
struct FaultyDisk(Arc<Mutex<Option<Fault>>>);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Full,
    FullAndStuck,
    Sync,
}

impl FaultyDisk {
    fn set(&self, fault: Fault) {
        *self.0.lock().unwrap() = Some(fault);
    }
}

impl Disk for FaultyDisk {
    fn append(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        if matches!(*self.0.lock().unwrap(), Some(Fault::Full | Fault::FullAndStuck)) {
            file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        file.write_all(bytes)
    }
    fn sync(&mut self, _file: &File) -> io::Result<()> {
        let fault = self.0.lock().unwrap().take_if(|f| *f == Fault::Sync);
        fault.map_or(Ok(()), |_| Err(io::Error::other("a bad sector")))
    }
    fn cut(&mut self, file: &File, length: u64) -> io::Result<()> {
        let fault = self.0.lock().unwrap().take();
        if fault == Some(Fault::FullAndStuck) {
            return Err(io::Error::other("the disk is gone"));
        }
        file.set_len(length)
    }
}

#[tokio::test]
async fn a_full_disk_refuses_whole_batches_and_takes_them_when_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let disk = FaultyDisk::default();
    let log = UsageLog::open_on(folder.path(), Options::default(), Box::new(disk.clone())).unwrap();
    log.append(&[event(1)]).await.unwrap();
    disk.set(Fault::Full);
    let error = log.append(&events([2, 3])).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::NoCapacity, Outcome::NotDone));
    assert_eq!(all(&log).await, events([1]));
    log.append(&events([2, 3])).await.unwrap();
    drop(log);
    let log = open(folder.path()).unwrap();
    assert_eq!((all(&log).await, &log.opening().torn), (events(1..=3), &None));
}

#[tokio::test]
async fn after_a_failed_fsync_nothing_is_promised_until_a_reopen() {
    for fault in [Fault::Sync, Fault::FullAndStuck] {
        let folder = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::default();
        let log = UsageLog::open_on(folder.path(), Options::default(), Box::new(disk.clone())).unwrap();
        log.append(&[event(1)]).await.unwrap();
        disk.set(fault);
        let error = log.append(&[event(2)]).await.unwrap_err();
        assert_eq!(error.outcome(), Outcome::Unknown);
        // Also what would be a repetition is refused: whether it is there is not known.
        assert_eq!(log.append(&[event(2)]).await.unwrap_err().outcome(), Outcome::Unknown);
        assert_eq!(all(&log).await, events([1]));
        drop(log);
        let log = open(folder.path()).unwrap();
        log.append(&[event(2)]).await.unwrap();
        assert_eq!(all(&log).await, events([1, 2]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_wait_together_share_fsyncs() {
    /// Counts syncs, and holds the first one until many appends wait.
    #[derive(Debug)]
    struct CountingDisk(Arc<Mutex<u32>>, Option<std::sync::mpsc::Receiver<()>>);
    impl Disk for CountingDisk {
        fn append(&mut self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
            file.write_all(bytes)
        }
        fn sync(&mut self, file: &File) -> io::Result<()> {
            *self.0.lock().unwrap() += 1;
            if let Some(gate) = self.1.take() {
                gate.recv().unwrap();
            }
            file.sync_data()
        }
        fn cut(&mut self, file: &File, length: u64) -> io::Result<()> {
            file.set_len(length)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (open_gate, gate) = std::sync::mpsc::channel();
    let syncs = Arc::new(Mutex::new(0));
    let disk = CountingDisk(Arc::clone(&syncs), Some(gate));
    let log = Arc::new(UsageLog::open_on(folder.path(), Options::default(), Box::new(disk)).unwrap());
    let append = |rev| {
        let log = Arc::clone(&log);
        async move { log.append(&[event(rev)]).await }
    };
    let first = tokio::spawn(append(0));
    let mut waiting = tokio::task::JoinSet::new();
    // The first append's fsync does not return, so these 200 are in the queue when it does.
    while *syncs.lock().unwrap() == 0 {
        tokio::task::yield_now().await;
    }
    (1..=200).for_each(|rev| drop(waiting.spawn(append(rev))));
    while log.jobs.as_ref().unwrap().capacity() > 1024 - 200 {
        tokio::task::yield_now().await;
    }
    open_gate.send(()).unwrap();
    first.await.unwrap().unwrap();
    while let Some(done) = waiting.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(*syncs.lock().unwrap(), 2);
    assert_eq!(log.head().records, 201);
}

#[test]
fn a_key_of_each_kind_is_known_again() {
    let mut seen = dedup::Seen::default();
    let of = ObjectRef { kind: "port".to_owned(), id: Uuid::nil() };
    let reading = |term, life, seq| UsageKey::Reading { of: of.clone(), term, life, seq };
    let keys = [reading(1, 0, 1), reading(1, 1, 1), reading(2, 0, 1), reading(1, 0, 0), event(1).key];
    let counts: BTreeMap<bool, usize> = keys.iter().chain(&keys).fold(BTreeMap::new(), |mut counts, key| {
        *counts.entry(seen.insert(key)).or_default() += 1;
        counts
    });
    assert_eq!(counts, BTreeMap::from([(true, 5), (false, 5)]));
}
