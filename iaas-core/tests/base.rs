//! What `spi::base` promises to whoever writes a storage or a hypervisor with it.
//!
//! A crash is a copy of the base's folder, taken inside one of the integrator's methods and opened as a restart would.

#![allow(clippy::unwrap_used, reason = "a test program")]

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Digest;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Outcome;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Pool;
use iaas_core::model::Host;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Ctx;
use iaas_core::spi::Phase;
use iaas_core::spi::Seen;
use iaas_core::spi::base::Disk;
use iaas_core::spi::base::Disks;
use iaas_core::spi::base::Machines;
use iaas_core::spi::base::Power;
use iaas_core::spi::base::Storage;
use iaas_core::spi::base::hypervisor;
use iaas_core::spi::base::storage;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::Fenced;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::block::VolumePool;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::target::Mode;
use uuid::Uuid;

// ---- a storage ----------------------------------------------------------------------------------------------------

type Volume = Arc<RamDisk>;
type Hook = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Disks in RAM, with a hook in front of and behind each change.
#[derive(Default)]
struct Ram {
    disks: Mutex<BTreeMap<Id<PoolVolume>, Volume>>,
    before: Mutex<Option<Hook>>,
    after: Mutex<Option<Hook>>,
    inside: AtomicUsize,
    together: AtomicUsize,
    makes: AtomicUsize,
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ram({:?})", self.disks)
    }
}

#[derive(Debug, Default)]
struct RamDisk {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicUsize,
}

impl Ram {
    fn change(&self, act: impl FnOnce()) -> io::Result<()> {
        let inside = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.together.fetch_max(inside, Ordering::SeqCst);
        let run = |hook: &Mutex<Option<Hook>>| {
            let hook = hook.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            hook.map_or(Ok(()), |hook| hook())
        };
        let ended = run(&self.before).and_then(|()| {
            act();
            run(&self.after)
        });
        self.inside.fetch_sub(1, Ordering::SeqCst);
        ended
    }

    fn before(&self, hook: impl Fn() -> io::Result<()> + Send + Sync + 'static) {
        *self.before.lock().unwrap() = Some(Box::new(hook));
    }

    fn after(&self, hook: impl Fn() -> io::Result<()> + Send + Sync + 'static) {
        *self.after.lock().unwrap() = Some(Box::new(hook));
    }

    fn count(&self) -> usize {
        self.disks.lock().unwrap().len()
    }
}

impl Disks for Ram {
    fn name(&self) -> &'static str {
        "test-ram"
    }
    fn check(&self, spec: &PoolVolumeSpec) -> Result<()> {
        match spec.size <= 1 << 20 {
            true => Ok(()),
            false => Err(iaas_core::Error::invalid("too large for this pool")),
        }
    }
    fn make(&self, id: Id<PoolVolume>, size: u64) -> io::Result<()> {
        self.change(|| {
            self.makes.fetch_add(1, Ordering::SeqCst);
            let mut disks = self.disks.lock().unwrap();
            disks.entry(id).or_default().bytes.lock().unwrap().resize(usize::try_from(size).unwrap(), 0);
        })
    }
    fn remove(&self, id: Id<PoolVolume>) -> io::Result<()> {
        self.change(|| {
            self.disks.lock().unwrap().remove(&id);
        })
    }
    fn open(&self, id: Id<PoolVolume>) -> io::Result<Arc<dyn Disk>> {
        let disk = self.disks.lock().unwrap().get(&id).cloned();
        Ok(disk.ok_or(io::ErrorKind::NotFound)?)
    }
}

impl Disk for RamDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A storage in a folder, and a place for copies of the folder.
struct Site {
    folder: tempfile::TempDir,
    ram: Arc<Ram>,
}

impl Site {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), ram: Arc::default() }
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    fn copy(&self) -> PathBuf {
        self.folder.path().join("copy")
    }

    async fn open(&self) -> Storage {
        storage(pool_id(), self.home(), self.ram.clone()).await.unwrap()
    }

    /// What a restart finds after a crash at the moment of the copy.
    async fn after_crash(&self) -> Storage {
        storage(pool_id(), self.copy(), self.ram.clone()).await.unwrap()
    }

    /// Crashes: copies what lies in the folder now, and lets nothing more happen.
    fn crash(&self) -> impl Fn() -> io::Result<()> + use<> {
        let (from, to) = (self.home(), self.copy());
        move || {
            copy(&from, &to);
            Err(io::Error::other("the process is gone"))
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn pool_id() -> Id<Pool> {
    Id::from_uuid(Uuid::from_u128(7))
}

fn host() -> Id<Host> {
    Id::from_uuid(Uuid::from_u128(1))
}

fn spec(size: u64) -> PoolVolumeSpec {
    PoolVolumeSpec {
        size,
        from: None,
        qos: Qos::default(),
        key: None,
        passport: Bytes::from_static(b"passport"),
    }
}

fn leader(epoch: u64) -> Ctx {
    caller(0xa, epoch)
}

fn caller(cloud: u128, epoch: u64) -> Ctx {
    let call = Call {
        cloud: Id::from_uuid(Uuid::from_u128(cloud)),
        incarnation: Uuid::from_u128(cloud << 8),
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::from_u128(0x0b)),
        trace: None,
        budget: Duration::from_secs(30),
    };
    Ctx { call, cancel: Cancel::new() }
}

fn fresh<K>() -> Id<K> {
    Id::from_uuid(Uuid::now_v7())
}

async fn observe(pool: &dyn VolumePool, id: Id<PoolVolume>) -> Option<Seen<PoolVolume>> {
    pool.observe(&leader(1), id).await.unwrap()
}

fn broken(seen: Option<Seen<PoolVolume>>) -> bool {
    matches!(seen.unwrap().phase, Phase::Broken(_))
}

// surface: Disks::make
#[tokio::test]
async fn after_a_crash_in_the_midst_of_a_creation_it_is_seen_and_can_be_finished_or_removed() {
    for landed in [false, true] {
        for finish in [false, true] {
            let site = Site::new();
            let storage = site.open().await;
            let id = fresh();
            if landed {
                site.ram.after(site.crash())
            } else {
                site.ram.before(site.crash())
            }
            storage.pool().ensure(&leader(1), id, Rev(3), &spec(4096)).await.unwrap_err();

            let pool = site.after_crash().await.pool();
            assert!(broken(observe(&*pool, id).await), "half-made things are seen");
            let listed = pool.inventory(&leader(1), None, 9).await.unwrap();
            assert_eq!(
                listed.iter().map(|found| (found.id, found.tag.rev)).collect::<Vec<_>>(),
                [(id, Rev(3))]
            );
            if finish {
                let seen = pool.ensure(&leader(1), id, Rev(3), &spec(4096)).await.unwrap();
                assert_eq!((seen.phase, seen.is.size, site.ram.count()), (Phase::Settled, 4096, 1));
            } else {
                pool.remove(&leader(1), id, Rev(3)).await.unwrap();
                assert!(observe(&*pool, id).await.is_none());
                assert_eq!(site.ram.count(), 0);
            }
        }
    }
}

// surface: Disks::remove
#[tokio::test]
async fn after_a_crash_in_the_midst_of_a_removal_it_is_leaving_until_it_is_removed_again() {
    for landed in [false, true] {
        let site = Site::new();
        let storage = site.open().await;
        let id = fresh();
        storage.pool().ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
        if landed {
            site.ram.after(site.crash())
        } else {
            site.ram.before(site.crash())
        }
        storage.pool().remove(&leader(1), id, Rev(1)).await.unwrap_err();

        let pool = site.after_crash().await.pool();
        assert_eq!(observe(&*pool, id).await.unwrap().phase, Phase::Leaving);
        let again = pool.ensure(&leader(1), id, Rev(2), &spec(4096)).await.unwrap_err();
        assert_eq!((again.kind(), again.outcome()), (ErrorKind::Conflict, Outcome::NotDone));
        pool.remove(&leader(1), id, Rev(1)).await.unwrap();
        assert!(observe(&*pool, id).await.is_none());
        assert_eq!(site.ram.count(), 0);
        pool.ensure(&leader(1), id, Rev(2), &spec(4096)).await.unwrap();
    }
}

#[tokio::test]
async fn a_crash_while_a_volume_grows_keeps_its_bytes() {
    let site = Site::new();
    let storage = site.open().await;
    let id = fresh();
    storage.pool().ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
    let device = open(&storage, id, 1, Mode::Write).await.unwrap();
    run(&*device, write(b'x')).unwrap();
    site.ram.before(site.crash());
    storage.pool().ensure(&leader(1), id, Rev(2), &spec(8192)).await.unwrap_err();
    let storage = site.after_crash().await;
    assert!(broken(observe(&*storage.pool(), id).await));
    let seen = storage.pool().ensure(&leader(1), id, Rev(2), &spec(8192)).await.unwrap();
    assert_eq!((seen.is.size, site.ram.open(id).unwrap().size()), (8192, 8192));
    let mut bytes = [0];
    site.ram.open(id).unwrap().read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"x");
}

#[tokio::test]
async fn an_older_leader_is_refused_without_effect_also_after_a_restart() {
    let site = Site::new();
    let (old, new) = (fresh(), fresh());
    let storage = site.open().await;
    storage.pool().ensure(&leader(1), old, Rev(1), &spec(4096)).await.unwrap();
    storage.pool().claim(&leader(5)).await.unwrap();
    drop(storage);
    let storage = site.open().await;
    let pool = storage.pool();
    let fenced = |ended: ErrorKind, outcome: Outcome| {
        assert_eq!((ended, outcome), (ErrorKind::Fenced, Outcome::NotDone));
    };
    let error = pool.ensure(&leader(4), new, Rev(2), &spec(4096)).await.unwrap_err();
    fenced(error.kind(), error.outcome());
    let error = pool.remove(&leader(4), old, Rev(9)).await.unwrap_err();
    fenced(error.kind(), error.outcome());
    let error = pool.fence(&leader(4), old, Term(9)).await.unwrap_err();
    fenced(error.kind(), error.outcome());
    let error = pool.claim(&leader(4)).await.unwrap_err();
    fenced(error.kind(), error.outcome());
    assert_eq!((site.ram.count(), observe(&*pool, old).await.unwrap().is.writer), (1, Term(0)));
    // A read of a leader to come raises nothing.
    pool.observe(&leader(9), old).await.unwrap();
    pool.ensure(&leader(5), new, Rev(2), &spec(4096)).await.unwrap();
}

// surface: Disks::name
#[tokio::test]
async fn a_restart_remembers_everything() {
    let site = Site::new();
    let id = fresh();
    let storage = site.open().await;
    storage.pool().claim(&leader(3)).await.unwrap();
    storage.pool().ensure(&leader(3), id, Rev(8), &spec(8192)).await.unwrap();
    assert_eq!(storage.pool().fence(&leader(3), id, Term(4)).await.unwrap(), Fenced::Done(Term(4)));
    let before = storage.pool().hello().await.unwrap();
    drop(storage);

    let storage = site.open().await;
    let pool = storage.pool();
    assert_eq!(pool.hello().await.unwrap(), before);
    assert_eq!(
        (before.product.as_str(), before.newest.unwrap().1, before.newest.unwrap().2),
        ("test-ram", Epoch(3), Rev(8))
    );
    let seen = observe(&*pool, id).await.unwrap();
    assert_eq!(
        (seen.applied, seen.phase, seen.is.size, seen.is.writer),
        (Rev(8), Phase::Settled, 8192, Term(4))
    );
    let found = pool.inventory(&leader(3), None, 9).await.unwrap();
    assert_eq!(found[0].passport.as_deref(), Some(b"passport".as_slice()));
    assert_eq!(open(&storage, id, 3, Mode::Write).await.unwrap_err().kind(), ErrorKind::Fenced);
    let older = pool.ensure(&leader(3), id, Rev(7), &spec(8192)).await.unwrap_err();
    assert_eq!(older.kind(), ErrorKind::Conflict);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_wish_at_once_makes_one_thing_one_call_at_a_time() {
    let site = Site::new();
    let storage = site.open().await;
    let id = fresh();
    let racing: Vec<_> = (0..8)
        .map(|_| {
            let pool = storage.pool();
            tokio::spawn(async move { pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await })
        })
        .collect();
    for one in racing {
        assert_eq!(one.await.unwrap().unwrap().phase, Phase::Settled);
    }
    let together = site.ram.together.load(Ordering::SeqCst);
    assert_eq!((site.ram.count(), together, site.ram.makes.load(Ordering::SeqCst)), (1, 1, 8));
}

#[tokio::test]
async fn each_cloud_lists_and_touches_its_own_in_pages() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let (ours, theirs) = (leader(1), caller(0xb, 1));
    let mut made = Vec::new();
    for rev in 1..=5 {
        let id = fresh();
        pool.ensure(&ours, id, Rev(rev), &spec(4096)).await.unwrap();
        pool.ensure(&theirs, fresh(), Rev(rev), &spec(4096)).await.unwrap();
        made.push(id);
    }
    let mut listed: Vec<Id<PoolVolume>> = Vec::new();
    loop {
        let page = pool.inventory(&ours, listed.last().copied(), 2).await.unwrap();
        assert!(page.len() <= 2 && page.iter().all(|found| found.tag.cloud == ours.call.cloud));
        if page.is_empty() {
            break;
        }
        listed.extend(page.iter().map(|found| found.id));
    }
    assert_eq!(listed, made);
    assert!(pool.observe(&theirs, made[0]).await.unwrap().is_none());
    assert_eq!(
        pool.ensure(&theirs, made[0], Rev(9), &spec(4096)).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );
    assert_eq!(pool.remove(&theirs, made[0], Rev(9)).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(pool.fence(&theirs, made[0], Term(9)).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(pool.remove(&ours, made[4], Rev(4)).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(site.ram.count(), 10);
}

#[tokio::test]
async fn a_change_goes_on_when_its_caller_goes_away_and_a_claim_waits_for_it() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let (reached, at) = mpsc::channel();
    let (go, going) = mpsc::channel::<()>();
    let (reached, going) = (Mutex::new(reached), Mutex::new(going));
    site.ram.before(move || {
        reached.lock().unwrap().send(()).unwrap();
        going.lock().unwrap().recv().map_err(io::Error::other)
    });
    let (id, cx, wish) = (fresh(), leader(1), spec(4096));
    let mut change = pool.ensure(&cx, id, Rev(1), &wish);
    poll_once(&mut change).await;
    let at = tokio::task::spawn_blocking(move || at.recv().map(|()| at)).await.unwrap().unwrap();
    drop(change);
    let newer = leader(2);
    let mut claim = pool.claim(&newer);
    assert!(!poll_once(&mut claim).await, "the older change has not ended");
    go.send(()).unwrap();
    claim.await.unwrap();
    assert_eq!((site.ram.count(), observe(&*pool, id).await.unwrap().phase), (1, Phase::Settled));
    drop(at);
}

/// Lets a future run as far as it can; says whether it has ended.
async fn poll_once<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_ready()))
        .await
}

#[tokio::test]
async fn a_panic_of_the_integrators_is_an_error_of_that_call_only() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    site.ram.before(|| panic!("a defect of the integrator's"));
    let id = fresh();
    let error = pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Internal, Outcome::Unknown));
    assert!(broken(observe(&*pool, id).await));
    pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
    pool.ensure(&leader(1), fresh(), Rev(2), &spec(4096)).await.unwrap();
}

// surface: Disks::check
#[tokio::test]
async fn what_can_never_be_kept_is_refused_before_anything_is_done() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let large = PoolVolumeSpec { passport: vec![0; (16 << 10) + 1].into(), ..spec(4096) };
    for bad in [spec(0), spec(4097), spec(2 << 20), large] {
        let error = pool.ensure(&leader(1), fresh(), Rev(1), &bad).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Invalid, Outcome::NotDone));
    }
    let id = fresh();
    pool.ensure(&leader(1), id, Rev(1), &spec(8192)).await.unwrap();
    let shrunk = pool.ensure(&leader(1), id, Rev(2), &spec(4096)).await.unwrap_err();
    assert_eq!(shrunk.kind(), ErrorKind::Invalid);
    assert_eq!((site.ram.count(), observe(&*pool, id).await.unwrap().applied), (1, Rev(1)));
}

#[tokio::test]
async fn no_room_is_said_and_what_is_left_can_be_removed() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    site.ram.before(|| Err(io::ErrorKind::StorageFull.into()));
    let id = fresh();
    let error = pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::NoCapacity, Outcome::Unknown));
    assert_eq!(error.object(), Some(&id.object()));
    pool.remove(&leader(1), id, Rev(1)).await.unwrap();
    assert!(observe(&*pool, id).await.is_none());
}

#[tokio::test]
async fn bytes_that_were_lost_are_told_and_never_replaced_by_zeroes() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let id = fresh();
    pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
    site.ram.disks.lock().unwrap().clear();
    assert!(broken(observe(&*pool, id).await));
    for rev in [1, 2] {
        pool.ensure(&leader(1), id, Rev(rev), &spec(4096)).await.unwrap_err();
    }
    assert_eq!(site.ram.count(), 0);
    pool.remove(&leader(1), id, Rev(2)).await.unwrap();
    assert!(observe(&*pool, id).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_folder_is_open_once() {
    let site = Site::new();
    let first = site.open().await;
    let second = storage(pool_id(), site.home(), site.ram.clone()).await.unwrap_err();
    assert_eq!((second.kind(), second.outcome()), (ErrorKind::Conflict, Outcome::NotDone));
    drop(first);
    site.open().await;
}

#[tokio::test]
async fn who_listens_is_woken() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let mut changes = pool.changes(&leader(1)).await.unwrap();
    let id = fresh();
    pool.ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
    pool.remove(&leader(1), id, Rev(1)).await.unwrap();
    for _ in 0..2 {
        assert_eq!(changes.next().await.unwrap().unwrap(), id.object());
    }
}

/// Opens a volume as a guest's process does.
async fn open(
    storage: &Storage,
    volume: Id<PoolVolume>,
    term: u64,
    mode: Mode,
) -> Result<Box<dyn BlockDevice>> {
    let access = storage.access(host()).await?;
    let (id, wish) = (fresh(), AccessSpec { pool: pool_id(), volume, term: Term(term), mode });
    let target = access.ensure(&leader(9), id, Rev(1), &wish).await?.is.target.unwrap();
    let opener = storage.opener();
    opener.open(&target, opener.prepare(&target)?, None, &Env::default())
}

fn run(device: &dyn BlockDevice, op: BlockOp) -> io::Result<Option<IoBuffers>> {
    let mut queue = device.open_queue(1).unwrap();
    queue.submit(1, op).unwrap();
    queue.kick().unwrap();
    let mut done = Vec::new();
    assert_eq!(queue.reap(&mut done), 1);
    let done = done.pop().unwrap();
    done.result.map(|()| done.buffers)
}

fn write(byte: u8) -> BlockOp {
    BlockOp::Write { at: 0, from: IoBuffers::copied(&[byte; 512]) }
}

// surface: Disks::open
// surface: Disk::size
// surface: Disk::read
// surface: Disk::write
// surface: Disk::flush
#[tokio::test]
async fn only_the_newest_writer_writes_and_only_to_what_is_there() {
    let site = Site::new();
    let storage = site.open().await;
    let pool = storage.pool();
    let id = fresh();
    pool.ensure(&leader(1), id, Rev(1), &spec(256 << 10)).await.unwrap();
    let first = open(&storage, id, 1, Mode::Write).await.unwrap();
    assert_eq!(first.geometry().size, 256 << 10);
    // Larger than what is copied at once.
    let all: Vec<u8> = (0..256 << 10).map(|i: u32| (i / 512).to_le_bytes()[0]).collect();
    run(&*first, BlockOp::Write { at: 0, from: IoBuffers::copied(&all) }).unwrap();
    run(&*first, BlockOp::Flush).unwrap();
    let disk = site.ram.disks.lock().unwrap()[&id].clone();
    assert_eq!((disk.flushes.load(Ordering::SeqCst), *disk.bytes.lock().unwrap() == all), (1, true));
    for (at, len) in [(0, 511), (256, 512), (256 << 10, 512), (u64::MAX - 511, 512)] {
        let error = run(&*first, BlockOp::Discard { at, len }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    let standby = open(&storage, id, 2, Mode::Standby).await.unwrap();
    assert_eq!(run(&*standby, write(2)).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    standby.claim(Term(2)).unwrap();
    run(&*standby, write(2)).unwrap();
    for op in [write(1), BlockOp::Flush, BlockOp::WriteZeroes { at: 0, len: 512, unmap: false }] {
        assert_eq!(run(&*first, op).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    assert_eq!(first.claim(Term(1)).unwrap_err().kind(), ErrorKind::Fenced);

    let reader = open(&storage, id, 2, Mode::Read).await.unwrap();
    assert_eq!(run(&*reader, write(3)).unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(reader.claim(Term(9)).unwrap_err().kind(), ErrorKind::Invalid);
    let into = IoBuffers::zeroed(1024);
    let read = run(&*reader, BlockOp::Read { at: 0, into }).unwrap().unwrap();
    let mut bytes = [0; 1024];
    read.read_at(0, &mut bytes);
    assert_eq!((bytes[0], bytes[511], bytes[512]), (2, 2, 1));

    standby.release().unwrap();
    assert_eq!(run(&*standby, write(4)).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    standby.claim(Term(2)).unwrap();
    pool.remove(&leader(1), id, Rev(1)).await.unwrap();
    assert_eq!(run(&*standby, write(4)).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(disk.bytes.lock().unwrap()[0], 2);
}

#[tokio::test]
async fn an_opener_opens_the_targets_of_its_own_pool() {
    let (here, there) = (Site::new(), Site::new());
    let (ours, theirs) = (here.open().await, there.open().await);
    let id = fresh();
    ours.pool().ensure(&leader(1), id, Rev(1), &spec(4096)).await.unwrap();
    let access = ours.access(host()).await.unwrap();
    let wish = AccessSpec { pool: pool_id(), volume: id, term: Term(1), mode: Mode::Read };
    let mut target = access.ensure(&leader(1), fresh(), Rev(1), &wish).await.unwrap().is.target.unwrap();
    assert_eq!(theirs.opener().prepare(&target).unwrap_err().kind(), ErrorKind::NotFound);
    target.forms.clear();
    assert_eq!(ours.opener().prepare(&target).unwrap_err().kind(), ErrorKind::Unsupported);
    let elsewhere = AccessSpec { pool: Id::from_uuid(Uuid::from_u128(8)), ..wish };
    let error = access.ensure(&leader(1), fresh(), Rev(2), &elsewhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

// ---- a hypervisor -------------------------------------------------------------------------------------------------

/// Machines that are entries of a table, by the name of their folder.
#[derive(Debug, Default)]
struct Table {
    vms: Mutex<BTreeMap<String, Power>>,
    starts: AtomicUsize,
    deaf: std::sync::atomic::AtomicBool,
    log: Mutex<Vec<&'static str>>,
    /// Copied in the midst of the next start, which then fails.
    crash: Mutex<Option<(PathBuf, PathBuf)>>,
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

impl Table {
    fn set(&self, vm: Id<Vm>, power: Power) {
        self.vms.lock().unwrap().insert(vm.to_string(), power);
    }
}

impl Machines for Table {
    fn name(&self) -> &str {
        "table 1.0"
    }
    fn check(&self, spec: &VmSpec) -> Result<()> {
        match spec.origin {
            Origin::Kernel { .. } => Ok(()),
            _ => Err(iaas_core::Error::unsupported("not this origin")),
        }
    }
    fn start(&self, folder: &Path, _: &VmSpec, mut console: File) -> io::Result<()> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        if let Some((from, to)) = self.crash.lock().unwrap().take() {
            copy(&from, &to);
            return Err(io::Error::other("the process is gone"));
        }
        io::Write::write_all(&mut console, b"hello\n")?;
        self.vms.lock().unwrap().insert(name(folder), Power::On);
        Ok(())
    }
    fn stop(&self, folder: &Path) -> io::Result<()> {
        self.log.lock().unwrap().push("stop");
        if !self.deaf.load(Ordering::SeqCst) {
            self.vms.lock().unwrap().insert(name(folder), Power::Off);
        }
        Ok(())
    }
    fn kill(&self, folder: &Path) -> io::Result<()> {
        self.log.lock().unwrap().push("kill");
        self.vms.lock().unwrap().insert(name(folder), Power::Died("killed".into()));
        Ok(())
    }
    fn look(&self, folder: &Path) -> io::Result<Power> {
        Ok(self.vms.lock().unwrap().get(&name(folder)).cloned().unwrap_or(Power::Off))
    }
}

fn vm(boot: u64) -> VmSpec {
    let origin = Origin::Kernel { kernel: Digest::of(b"k"), initrd: None, cmdline: "quiet".into() };
    VmSpec { run: Run::On(Boot(boot)), ..VmSpec::new(2, 1 << 20, origin) }
}

async fn vms(folder: &Path, table: &Arc<Table>) -> Arc<dyn Hypervisor> {
    hypervisor(host(), folder, table.clone()).await.unwrap()
}

async fn life(vms: &dyn Hypervisor, id: Id<Vm>) -> Life {
    vms.observe(&leader(1), id).await.unwrap().unwrap().is.life
}

// surface: Machines::start
// surface: Machines::look
#[tokio::test]
async fn a_boot_is_started_once_whatever_happens_to_it_or_to_us() {
    let folder = tempfile::tempdir().unwrap();
    let (home, copied) = (folder.path().join("home"), folder.path().join("copy"));
    let table = Arc::new(Table::default());
    let id = fresh();
    let here = vms(&home, &table).await;
    *table.crash.lock().unwrap() = Some((home.clone(), copied.clone()));
    here.ensure(&leader(1), id, Rev(1), &vm(1)).await.unwrap_err();
    let here = vms(&copied, &table).await;
    for rev in [1, 2] {
        here.ensure(&leader(1), id, Rev(rev), &vm(1)).await.unwrap();
        assert_eq!(life(&*here, id).await, Life::Ended { boot: Boot(1), why: End::GuestOff });
    }
    here.ensure(&leader(1), id, Rev(3), &vm(2)).await.unwrap();
    assert_eq!((life(&*here, id).await, table.starts.load(Ordering::SeqCst)), (Life::On(Boot(2)), 2));
    table.set(id, Power::Died("a defect".into()));
    let Life::Ended { boot: Boot(2), why: End::Crashed(why) } = life(&*here, id).await else { panic!() };
    assert!(why.operator().iter().any(|line| line == "a defect"), "{why:?}");
    drop(here);
    let here = vms(&copied, &table).await;
    here.ensure(&leader(1), id, Rev(4), &vm(2)).await.unwrap();
    let older = here.ensure(&leader(1), id, Rev(5), &vm(1)).await.unwrap_err();
    assert_eq!((older.kind(), table.starts.load(Ordering::SeqCst)), (ErrorKind::Conflict, 2));
}

// surface: Machines::stop
// surface: Machines::kill
#[tokio::test]
async fn off_asks_first_and_kills_who_does_not_listen() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(Table::default());
    let here = vms(folder.path(), &table).await;
    for (deaf, grace, why, log) in [
        (false, Duration::from_secs(600), End::Stopped, vec!["stop"]),
        (true, Duration::ZERO, End::Forced, vec!["stop", "kill"]),
    ] {
        table.deaf.store(deaf, Ordering::SeqCst);
        table.log.lock().unwrap().clear();
        let id = fresh();
        here.ensure(&leader(1), id, Rev(1), &vm(1)).await.unwrap();
        let off = VmSpec { run: Run::Off { grace }, ..vm(1) };
        here.ensure(&leader(1), id, Rev(2), &off).await.unwrap();
        assert_eq!(life(&*here, id).await, Life::Ended { boot: Boot(1), why });
        assert_eq!(*table.log.lock().unwrap(), log);
        let seen = here.observe(&leader(1), id).await.unwrap().unwrap();
        assert_eq!((seen.final_usage.len(), seen.final_usage[0].fin), (1, true));
    }
}

#[tokio::test]
async fn a_higher_boot_ends_the_running_one_and_each_life_keeps_its_last_reading() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(Table::default());
    let here = vms(folder.path(), &table).await;
    let id = fresh();
    for boot in 1..=3 {
        here.ensure(&leader(1), id, Rev(boot), &vm(boot)).await.unwrap();
        assert_eq!(life(&*here, id).await, Life::On(Boot(boot)));
    }
    let readings = here.usage(&leader(1), None, 9).await.unwrap();
    assert_eq!((readings.len(), readings[0].life, readings[0].fin), (1, 3, false));
    assert!(here.usage(&leader(1), Some(id.object()), 9).await.unwrap().is_empty());
    assert!(here.usage(&caller(0xb, 1), None, 9).await.unwrap().is_empty());
    let seen = here.observe(&leader(1), id).await.unwrap().unwrap();
    assert_eq!(seen.final_usage.iter().map(|r| r.life).collect::<Vec<_>>(), [1, 2]);
}

#[tokio::test]
async fn removing_a_vm_kills_it_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(Table::default());
    let here = vms(folder.path(), &table).await;
    let id = fresh();
    here.ensure(&leader(1), id, Rev(1), &vm(1)).await.unwrap();
    let left = |of: &str| {
        let names = std::fs::read_dir(folder.path().join(of)).unwrap().map(|e| e.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().contains(&id.uuid().to_string())).count()
    };
    assert_eq!((left(""), left("notes")), (1, 2));
    here.remove(&leader(1), id, Rev(1)).await.unwrap();
    assert_eq!(*table.log.lock().unwrap(), ["kill"]);
    assert_eq!((left(""), left("notes")), (0, 0));
    assert!(here.observe(&leader(1), id).await.unwrap().is_none());
    assert_eq!(here.console(&leader(1), id, 0).await.err().unwrap().kind(), ErrorKind::NotFound);
    here.remove(&leader(1), id, Rev(1)).await.unwrap();
}

// surface: Machines::name
// surface: Machines::check
#[tokio::test]
async fn what_no_machine_of_the_base_does_never_reaches_it() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(Table::default());
    let here = vms(folder.path(), &table).await;
    assert_eq!(here.hello().await.unwrap().product, "table 1.0");
    let kernel =
        |cmdline: &str| Origin::Kernel { kernel: Digest::of(b"k"), initrd: None, cmdline: cmdline.into() };
    let bad = [
        (VmSpec { vcpus: 0, ..vm(1) }, ErrorKind::Invalid),
        (VmSpec { memory: 4096, ..vm(1) }, ErrorKind::Invalid),
        (VmSpec { origin: kernel("a\nb"), ..vm(1) }, ErrorKind::Invalid),
        (VmSpec { passport: vec![0; (16 << 10) + 1].into(), ..vm(1) }, ErrorKind::Invalid),
        (VmSpec { origin: Origin::Disk, ..vm(1) }, ErrorKind::Unsupported),
        (VmSpec { lease: Some(Duration::from_secs(9)), ..vm(1) }, ErrorKind::Unsupported),
        (VmSpec { run: Run::Paused(Boot(1)), ..vm(1) }, ErrorKind::Unsupported),
    ];
    for (spec, kind) in bad {
        let error = here.ensure(&leader(1), fresh(), Rev(1), &spec).await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (kind, Outcome::NotDone), "{spec:?}");
    }
    assert_eq!(table.starts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_console_gives_what_was_printed_from_an_offset_on_and_ends_with_the_vm() {
    let folder = tempfile::tempdir().unwrap();
    let table = Arc::new(Table::default());
    let here = vms(folder.path(), &table).await;
    let id = fresh();
    here.ensure(&leader(1), id, Rev(1), &vm(1)).await.unwrap();
    let mut console = here.console(&leader(1), id, 2).await.unwrap();
    assert_eq!(console.read().await.unwrap().unwrap(), "llo\n");
    table.set(id, Power::Off);
    assert!(console.read().await.unwrap().is_none());
    assert_eq!(console.write(Bytes::new()).await.unwrap_err().kind(), ErrorKind::Unsupported);
}
