use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::ErrorKind;

const ME: Uuid = Uuid::from_u128(1);
const TTL: Duration = Duration::from_secs(10);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }
    fn path(&self) -> PathBuf {
        self.folder.path().join("cloud").join("state.iaas")
    }
    fn open(&self) -> RedbStore {
        RedbStore::open(self.path()).unwrap()
    }
}

async fn lead(store: &RedbStore) -> Lead {
    store.lead(ME, TTL, Epoch(0)).await.unwrap().unwrap()
}

fn put(key: &str, value: &[u8]) -> Write {
    Write::Put(Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value))
}

#[tokio::test]
async fn the_file_is_private_and_is_found_again() {
    let place = Place::new();
    let id = place.open().id();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(place.path()), 0o600);
    assert_eq!(mode(place.folder.path().join("cloud")), 0o700);
    assert_eq!(place.open().id(), id);
    // Nothing but the store is left beside it.
    assert_eq!(std::fs::read_dir(place.folder.path().join("cloud")).unwrap().count(), 1);
}

#[tokio::test]
async fn the_draft_of_a_dead_maker_goes_and_what_only_looks_like_one_stays() {
    let place = Place::new();
    let folder = place.folder.path().join("cloud");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join(format!(".state.iaas.{}.new", Uuid::new_v4())), "torn").unwrap();
    for other in [".state.iaas.notes.new", ".other.new"] {
        std::fs::write(folder.join(other), "").unwrap();
    }
    place.open();
    let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [".other.new", ".state.iaas.notes.new", "state.iaas"]);
}

#[tokio::test]
async fn a_second_writer_is_told_what_to_do_until_the_first_is_gone() {
    let place = Place::new();
    let first = place.open();
    let error = RedbStore::open(place.path()).unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Conflict, Outcome::NotDone));
    assert!(error.to_string().contains("state.iaas"), "{error}");
    assert!(error.what_to_do().unwrap().contains("stop the other program"), "{error}");
    drop(first);
    place.open();
}

#[tokio::test]
async fn a_newer_format_a_foreign_file_and_damage_are_told_apart() {
    let place = Place::new();
    drop(place.open());
    let good = std::fs::read(place.path()).unwrap();
    let opened = |bytes: &[u8]| {
        std::fs::write(place.path(), bytes).unwrap();
        RedbStore::open(place.path()).unwrap_err()
    };

    let mut newer = good.clone();
    newer[8] = 2;
    let error = opened(&newer);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.what_to_do().unwrap().contains("newer version of this program"), "{error}");

    for foreign in
        [&b""[..], b"hello", &[0; 8192], b"redb\x1a\x0a\xa9\x0d\x0a and more than forty bytes of it"]
    {
        assert_eq!(opened(foreign).kind(), ErrorKind::Invalid);
    }
    let mut damaged = good.clone();
    damaged[20] ^= 1;
    assert!(opened(&damaged).to_string().contains("damaged"));
    for len in [4096, 4096 + 100, good.len() / 2] {
        assert!(opened(&good[..len]).to_string().contains("damaged"), "cut to {len}");
    }

    std::fs::write(place.path(), good).unwrap();
    place.open();
}

#[tokio::test]
async fn a_folder_in_its_place_is_refused() {
    let place = Place::new();
    std::fs::create_dir_all(place.path()).unwrap();
    assert_eq!(RedbStore::open(place.path()).unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_full_disk_refuses_whole_commits_and_the_store_goes_on_when_there_is_room() {
    let place = Place::new();
    let store = place.open();
    let lead = lead(&store).await;
    let before = store.commit(&lead, vec![], vec![put("small", b"1")]).await.unwrap();
    let size = std::fs::metadata(place.path()).unwrap().len();
    store.open.disk().set_room(size);
    let big = vec![7; 1 << 19];
    let mut refused = 0;
    // The file has some free pages; it is full before long.
    for turn in 0..32 {
        let key = format!("big{turn}");
        let writes = vec![put(&key, &big), put(&format!("{key}-too"), b"x")];
        if let Err(error) = store.commit(&lead, vec![], writes).await {
            refused += 1;
            assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
            assert!(error.to_string().contains("full"), "{error}");
            assert_eq!(store.get(key.as_bytes()).await.unwrap(), None);
            assert_eq!(store.get(format!("{key}-too").as_bytes()).await.unwrap(), None);
        }
    }
    assert!(refused > 0);
    assert_eq!(store.get(b"small").await.unwrap().unwrap().rev, before);

    store.open.disk().set_room(u64::MAX);
    store.commit(&lead, vec![], vec![put("later", &big)]).await.unwrap();
    drop(store);
    assert_eq!(&*place.open().get(b"later").await.unwrap().unwrap().value, &*big);
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_promised_any_more() {
    let place = Place::new();
    let store = place.open();
    let lead = lead(&store).await;
    store.open.disk().break_sync();
    let error = store.commit(&lead, vec![], vec![put("a", b"1")]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let again = store.commit(&lead, vec![], vec![put("b", b"1")]).await.unwrap_err();
    assert_eq!((again.kind(), again.outcome()), (ErrorKind::Unavailable, Outcome::NotDone));
}

#[tokio::test]
async fn waiting_commits_share_a_durable_write_and_keep_their_order() {
    let place = Place::new();
    let store = Arc::new(place.open());
    let lead = lead(&store).await;
    let before = store.counters();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..200 {
        let (store, lead) = (store.clone(), lead.clone());
        let write = put(&format!("{n:03}"), b"v");
        tasks.spawn(async move { store.commit(&lead, vec![], vec![write]).await.unwrap() });
    }
    let mut revs = tasks.join_all().await;
    revs.sort();
    assert_eq!(revs, (1..=200).map(Rev).collect::<Vec<_>>());
    let after = store.counters();
    assert_eq!(after.commits - before.commits, 200);
    assert!(after.batches - before.batches < 100, "{after:?}");
    assert!(after.synced_bytes > before.synced_bytes);
}

#[tokio::test]
async fn one_refused_commit_does_not_take_its_batch_with_it() {
    let place = Place::new();
    let store = place.open();
    let lead = lead(&store).await;
    let taken = || vec![Check::Absent(Bytes::from_static(b"k"))];
    let (a, b, c) = tokio::join!(
        store.commit(&lead, taken(), vec![put("k", b"1")]),
        store.commit(&lead, taken(), vec![put("k", b"2")]),
        store.commit(&lead, vec![], vec![put("l", b"3")]),
    );
    assert_eq!((a.unwrap(), c.unwrap()), (Rev(1), Rev(2)));
    assert_eq!(b.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(&*store.get(b"k").await.unwrap().unwrap().value, b"1");
}
