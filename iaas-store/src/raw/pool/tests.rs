use bytes::Bytes;
use iaas_core::Epoch;
use iaas_core::ErrorKind;
use iaas_core::spi::block::Qos;

use super::*;
use crate::rawio::sim::SimFolder;

const CLOUD: Id<Cloud> = Id::from_uuid(Uuid::from_u128(1));
const POOL: Id<Pool> = Id::from_uuid(Uuid::from_u128(2));
const VOLUME: Id<PoolVolume> = Id::from_uuid(Uuid::from_u128(3));
const SMALL: u64 = 4096;
const LARGE: u64 = 8192;

fn call() -> Call {
    Call {
        cloud: CLOUD,
        incarnation: Uuid::from_u128(4),
        epoch: Epoch(1),
        op: Id::from_uuid(Uuid::nil()),
        trace: None,
        budget: Duration::from_secs(10),
    }
}

fn spec(size: u64) -> PoolVolumeSpec {
    // It changes with the size in every sector, so that a torn record is a mixture.
    let passport = Bytes::from(vec![u8::try_from(size / 4096).unwrap(); 3000]);
    PoolVolumeSpec { size, from: None, qos: Qos::default(), key: None, passport }
}

fn pool(disk: &SimFolder, state: &Path) -> Result<Arc<Inner>> {
    RawPool::over(Arc::new(disk.clone()), true, state, CLOUD, POOL).map(|pool| pool.inner)
}

/// What was answered with success before the power went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    #[default]
    Nothing,
    Made,
    Written,
    Grown,
    Fenced,
    Removing,
    Removed,
}

/// The life of a volume, until something fails.
fn live(disk: &SimFolder, state: &Path, reached: &mut Reached) -> Result<()> {
    let pool = pool(disk, state)?;
    pool.ensure(&call(), VOLUME, Rev(1), &spec(SMALL))?;
    *reached = Reached::Made;
    let data = pool.data(VOLUME)?.ok_or_else(|| Error::not_found("no data"))?;
    let io = |e: io::Error| trouble("write", &e);
    data.write_at(&[9; 4096], 0).and_then(|()| data.sync()).map_err(io)?;
    *reached = Reached::Written;
    pool.ensure(&call(), VOLUME, Rev(2), &spec(LARGE))?;
    *reached = Reached::Grown;
    pool.fence(&call(), VOLUME, Term(5))?;
    *reached = Reached::Fenced;
    pool.ensure(&call(), VOLUME, Rev(3), &spec(LARGE))?;
    *reached = Reached::Removing;
    pool.remove(&call(), VOLUME, Rev(3))?;
    *reached = Reached::Removed;
    Ok(())
}

/// What must hold after the power came back, whatever survived.
fn check(disk: &SimFolder, state: &Path, reached: Reached) {
    let pool = pool(disk, state).unwrap();
    let seen = pool.observe(CLOUD, VOLUME).unwrap();
    let settled = |seen: &Seen<PoolVolume>| seen.phase == Phase::Settled;
    if (Reached::Made..Reached::Removing).contains(&reached) {
        let seen = seen.as_ref().unwrap();
        assert!(settled(seen), "{seen:?}");
        let least = if reached >= Reached::Grown { (Rev(2), LARGE) } else { (Rev(1), SMALL) };
        assert!((seen.applied, seen.is.size) >= least, "{seen:?}");
        if reached >= Reached::Fenced {
            assert_eq!(seen.is.writer, Term(5));
        }
    }
    if reached == Reached::Removed {
        assert_eq!(seen, None);
    }
    // A removal that has begun may have taken the data.
    let keeps = (Reached::Written..Reached::Removing).contains(&reached);

    let again = pool.ensure(&call(), VOLUME, Rev(9), &spec(LARGE)).unwrap();
    assert!(settled(&again), "{again:?}");
    assert_eq!((again.applied, again.is.size), (Rev(9), LARGE));
    if keeps {
        let mut bytes = [0; 4096];
        pool.data(VOLUME).unwrap().unwrap().read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [9; 4096]);
    }
    pool.remove(&call(), VOLUME, Rev(9)).unwrap();
    assert_eq!(pool.observe(CLOUD, VOLUME).unwrap(), None);
    assert_nothing_left(disk);
}

fn assert_nothing_left(disk: &SimFolder) {
    let mut names = disk.names().unwrap();
    // The identity's draft is replaced by the next one who writes it.
    names.retain(|name| name != "pool.meta" && name != "pool.meta.new");
    assert_eq!(names, Vec::<String>::new());
}

#[test]
fn whatever_a_power_cut_leaves_the_same_calls_finish_it_and_nothing_acknowledged_is_lost() {
    let state = tempfile::tempdir().unwrap();
    let whole = SimFolder::new(None);
    let mut reached = Reached::default();
    live(&whole, state.path(), &mut reached).unwrap();
    assert_eq!(reached, Reached::Removed);
    let steps = whole.steps();
    assert!(steps > 30, "{steps} steps are too few to be the whole life");
    for limit in 0..=steps {
        let mut reached = Reached::default();
        let disk = SimFolder::new(Some(limit));
        let ended = live(&disk, state.path(), &mut reached);
        assert_eq!(ended.is_ok(), limit == steps);
        for seed in 0..24 {
            check(&disk.after_power_cut(seed), state.path(), reached);
        }
    }
}

#[test]
fn a_removal_that_was_cut_off_is_finished_by_removing_again() {
    let state = tempfile::tempdir().unwrap();
    for limit in 0..60 {
        let mut reached = Reached::default();
        let disk = SimFolder::new(Some(limit));
        let _ = live(&disk, state.path(), &mut reached);
        for seed in 0..8 {
            let disk = disk.after_power_cut(seed);
            let pool = pool(&disk, state.path()).unwrap();
            pool.remove(&call(), VOLUME, Rev(3)).unwrap();
            assert_eq!(pool.observe(CLOUD, VOLUME).unwrap(), None);
            assert_nothing_left(&disk);
        }
    }
}

#[test]
fn a_full_disk_leaves_nothing_of_a_new_volume_and_takes_nothing_from_an_old_one() {
    let state = tempfile::tempdir().unwrap();
    let disk = SimFolder::new(None);
    let pool = pool(&disk, state.path()).unwrap();
    pool.ensure(&call(), VOLUME, Rev(1), &spec(SMALL)).unwrap();
    disk.set_room(Some(50_000));
    let other = Id::from_uuid(Uuid::from_u128(77));
    let error = pool.ensure(&call(), other, Rev(2), &spec(SMALL)).unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::NoCapacity, Outcome::NotDone));
    assert!(error.to_string().contains("disk is full"), "{error}");
    assert_eq!(pool.observe(CLOUD, other).unwrap(), None);
    // The record has its space since it was made.
    assert_eq!(pool.fence(&call(), VOLUME, Term(3)).unwrap(), Fenced::Done(Term(3)));
    assert_eq!(pool.ids().unwrap(), [VOLUME]);
}

#[test]
fn a_volume_whose_bytes_are_gone_is_told_and_never_made_anew() {
    let state = tempfile::tempdir().unwrap();
    let disk = SimFolder::new(None);
    let pool = pool(&disk, state.path()).unwrap();
    pool.ensure(&call(), VOLUME, Rev(1), &spec(SMALL)).unwrap();
    RawFolder::remove(&disk, &data_name(VOLUME)).unwrap();
    let seen = pool.ensure(&call(), VOLUME, Rev(2), &spec(SMALL)).unwrap();
    assert!(matches!(seen.phase, Phase::Broken(_)), "{seen:?}");
    assert_eq!(seen.is.health, Health::Damaged { bytes: SMALL });
    assert!(pool.data(VOLUME).unwrap().is_none());
    pool.remove(&call(), VOLUME, Rev(2)).unwrap();
    assert_nothing_left(&disk);
}

#[test]
fn a_data_file_without_a_record_is_nobodys_to_overwrite() {
    let state = tempfile::tempdir().unwrap();
    let disk = SimFolder::new(None);
    let pool = pool(&disk, state.path()).unwrap();
    disk.create(&data_name(VOLUME)).unwrap().write_at(b"somebody's", 0).unwrap();
    let error = pool.ensure(&call(), VOLUME, Rev(1), &spec(SMALL)).unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Conflict, Outcome::NotDone));
    pool.remove(&call(), VOLUME, Rev(1)).unwrap();
    assert_eq!(disk.open(&data_name(VOLUME)).unwrap().len().unwrap(), 10);
}

#[test]
fn a_record_that_cannot_be_read_is_listed_with_why_and_is_not_removed() {
    let state = tempfile::tempdir().unwrap();
    let disk = SimFolder::new(None);
    let pool = pool(&disk, state.path()).unwrap();
    pool.ensure(&call(), VOLUME, Rev(1), &spec(SMALL)).unwrap();
    let record = disk.open(&meta_name(VOLUME)).unwrap();
    record.write_at(&vec![0xff; 40_000], 0).unwrap();
    let found = pool.found(CLOUD, VOLUME).unwrap();
    assert_eq!(found.seen.unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(pool.found(Id::from_uuid(Uuid::from_u128(99)), VOLUME), None);
    assert!(pool.remove(&call(), VOLUME, Rev(9)).is_err());
    assert!(pool.data(VOLUME).unwrap().is_some());
    // A newer format is told apart from damage.
    record.write_at(b"IAASVOLM\x02\0\0\0", 0).unwrap();
    let error = pool.ensure(&call(), VOLUME, Rev(2), &spec(SMALL)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.what_to_do().unwrap().contains("newer version of this program"));
}

#[test]
fn the_folder_of_another_cloud_or_pool_or_of_a_newer_program_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let disk = SimFolder::new(None);
    let install = pool(&disk, state.path()).unwrap().hello(CLOUD).unwrap().install;
    assert_eq!(pool(&disk, state.path()).unwrap().hello(CLOUD).unwrap().install, install);
    let open =
        |cloud, pool| RawPool::over(Arc::new(disk.clone()), true, state.path(), cloud, pool).unwrap_err();
    let other = open(Id::from_uuid(Uuid::from_u128(9)), POOL);
    assert_eq!(other.kind(), ErrorKind::Conflict);
    assert!(other.what_to_do().unwrap().contains("a folder of its own"));
    assert_eq!(open(CLOUD, Id::from_uuid(Uuid::from_u128(9))).kind(), ErrorKind::Conflict);
    let identity = disk.open(IDENTITY).unwrap();
    identity.write_at(&[1], 20).unwrap();
    assert_eq!(open(CLOUD, POOL).kind(), ErrorKind::Invalid);
    identity.write_at(&[2], 8).unwrap();
    assert_eq!(open(CLOUD, POOL).kind(), ErrorKind::Unsupported);
}
