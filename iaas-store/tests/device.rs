//! An open volume against a vector of bytes, and against itself in another process.
#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

mod support;

use std::io::BufRead;
use std::io::BufReader;
use std::io::ErrorKind;
use std::io::Write as _;
use std::process::Child;
use std::process::ChildStdin;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::spi::Converge;
use iaas_core::spi::Feed;
use iaas_core::spi::Provider;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::FreezeTicket;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_store::IoEngine;
use proptest::prelude::*;
use support::*;
use uuid::Uuid;

/// An operation of the model: places and lengths in blocks of 512 bytes.
#[derive(Clone, Debug)]
enum Op {
    Read { at: u64, blocks: u64, cut: usize },
    Write { at: u64, blocks: u64, byte: u8, cut: usize },
    Discard { at: u64, blocks: u64 },
    Zeroes { at: u64, blocks: u64, unmap: bool },
    Flush,
    Reopen,
}

const BLOCKS: u64 = SIZE / 512;

fn op() -> impl Strategy<Value = Op> {
    let place = (0..BLOCKS, 0_u64..40, 0_usize..2000);
    prop_oneof![
        3 => place.clone().prop_map(|(at, blocks, cut)| Op::Read { at, blocks, cut }),
        4 => (place.clone(), 1..=u8::MAX)
            .prop_map(|((at, blocks, cut), byte)| Op::Write { at, blocks, byte, cut }),
        1 => place.clone().prop_map(|(at, blocks, _)| Op::Discard { at, blocks }),
        1 => (place, any::<bool>()).prop_map(|((at, blocks, _), unmap)| Op::Zeroes { at, blocks, unmap }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

/// Buffers that begin and break at odd addresses, as a guest's may.
fn odd(bytes: &[u8], cut: usize) -> IoBuffers {
    use iaas_core::spi::dataplane::buffer::IoRange;
    let whole = IoBuffers::zeroed(bytes.len() + 3);
    let base = whole.ranges()[0].base.wrapping_add(cut % 3);
    let first = cut.min(bytes.len());
    let ranges = vec![
        IoRange { base, len: first },
        IoRange { base: base.wrapping_add(first), len: bytes.len() - first },
    ];
    #[expect(unsafe_code, reason = "a guest's buffers are raw ranges")]
    // SAFETY: the ranges lie in `whole`, whose owner is passed on.
    let odd = unsafe { IoBuffers::from_raw(ranges, whole.owner().clone()) };
    odd.write_at(0, bytes);
    odd
}

fn differs_from_the_model(ops: Vec<Op>, engine: IoEngine) -> Result<(), TestCaseError> {
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut term = 1;
    let mut device = open(&runtime.block_on(place.target(term, Mode::Write)), engine).unwrap();
    let mut queue = device.open_queue(8).unwrap();
    let mut model = vec![0; SIZE as usize];
    let fits = |at: u64, blocks: u64| at + blocks <= BLOCKS;
    let span = |at: u64, blocks: u64| (at * 512) as usize..((at + blocks) * 512) as usize;
    for op in ops {
        let check = |done: std::io::Result<()>, at, blocks| {
            let as_it_should = match &done {
                Ok(()) => fits(at, blocks),
                Err(e) => e.kind() == ErrorKind::InvalidInput && !fits(at, blocks),
            };
            prop_assert!(as_it_should, "{done:?}");
            Ok(())
        };
        match op.clone() {
            Op::Read { at, blocks, cut } => {
                let into = odd(&vec![0xee; (blocks * 512) as usize], cut);
                let done = run(&mut *queue, BlockOp::Read { at: at * 512, into });
                let mut bytes = vec![0; (blocks * 512) as usize];
                done.buffers.unwrap().read_at(0, &mut bytes);
                if fits(at, blocks) {
                    prop_assert_eq!(&bytes[..], &model[span(at, blocks)]);
                }
                check(done.result, at, blocks)?;
            }
            Op::Write { at, blocks, byte, cut } => {
                let bytes: Vec<u8> = (0..blocks * 512).map(|n| byte.wrapping_add(n as u8)).collect();
                let done = run(&mut *queue, BlockOp::Write { at: at * 512, from: odd(&bytes, cut) });
                prop_assert!(done.buffers.is_some());
                if fits(at, blocks) {
                    model[span(at, blocks)].copy_from_slice(&bytes);
                }
                check(done.result, at, blocks)?;
            }
            Op::Discard { at, blocks } | Op::Zeroes { at, blocks, .. } => {
                let (at_bytes, len) = (at * 512, blocks * 512);
                let op = match op {
                    Op::Zeroes { unmap, .. } => BlockOp::WriteZeroes { at: at_bytes, len, unmap },
                    _ => BlockOp::Discard { at: at_bytes, len },
                };
                if fits(at, blocks) {
                    model[span(at, blocks)].fill(0);
                }
                check(run(&mut *queue, op).result, at, blocks)?;
            }
            Op::Flush => flush(&mut *queue).unwrap(),
            Op::Reopen => {
                drop((queue, device));
                term += 1;
                device = open(&runtime.block_on(place.target(term, Mode::Write)), engine).unwrap();
                queue = device.open_queue(8).unwrap();
            }
        }
    }
    prop_assert_eq!(read(&mut *queue, 0, SIZE as usize).unwrap(), model);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn io_uring_behaves_like_a_vector_of_bytes(ops in prop::collection::vec(op(), 1..40)) {
        differs_from_the_model(ops, IoEngine::Best)?;
    }

    #[test]
    fn threads_behave_like_a_vector_of_bytes(ops in prop::collection::vec(op(), 1..40)) {
        differs_from_the_model(ops, IoEngine::Threads)?;
    }
}

#[tokio::test]
async fn a_full_queue_gives_the_operation_back_and_a_batch_comes_whole() {
    for engine in engines() {
        let place = Place::new();
        let device = open(&place.target(1, Mode::Write).await, engine).unwrap();
        let mut queue = device.open_queue(5).unwrap();
        for round in 0..20_u64 {
            for tag in 0..5 {
                let bytes = vec![(round * 5 + tag + 1) as u8; 4096];
                queue
                    .submit(tag, BlockOp::Write { at: tag * 4096, from: IoBuffers::copied(&bytes) })
                    .unwrap();
            }
            assert!(matches!(queue.submit(9, BlockOp::Flush), Err(BlockOp::Flush)));
            queue.kick().unwrap();
            let mut done = Vec::new();
            while done.len() < 5 {
                queue.reap(&mut done);
            }
            let mut tags: Vec<u64> = done.iter().map(|d| d.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, [0, 1, 2, 3, 4]);
            assert!(done.iter().all(|d| d.result.is_ok()));
        }
        let last = read(&mut *queue, 4 * 4096, 4096).unwrap();
        assert_eq!(last, vec![100; 4096]);
    }
}

#[tokio::test]
async fn a_queue_that_is_dropped_with_work_under_way_waits_for_it() {
    for engine in engines() {
        let place = Place::new();
        let device = open(&place.target(1, Mode::Write).await, engine).unwrap();
        let mut queue = device.open_queue(64).unwrap();
        for tag in 0..64 {
            let from = IoBuffers::copied(&[tag as u8 + 1; 8192]);
            queue.submit(tag, BlockOp::Write { at: tag * 8192, from }).unwrap();
        }
        queue.kick().unwrap();
        drop(queue);
        let mut queue = device.open_queue(1).unwrap();
        for tag in 0..64 {
            assert_eq!(read(&mut *queue, tag * 8192, 1).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(read(&mut *queue, tag * 8192, 8192).unwrap(), vec![tag as u8 + 1; 8192]);
        }
        device.release().unwrap();
    }
}

#[tokio::test]
async fn reading_and_standing_by_do_not_write_and_do_not_keep_a_writer_out() {
    let place = Place::new();
    let writer = open(&place.target(1, Mode::Write).await, IoEngine::Best).unwrap();
    let mut out = writer.open_queue(1).unwrap();
    write(&mut *out, 0, &[5; 512]).unwrap();
    flush(&mut *out).unwrap();

    let reader = open(&place.target(2, Mode::Read).await, IoEngine::Best).unwrap();
    assert!(reader.geometry().read_only);
    let mut input = reader.open_queue(1).unwrap();
    assert_eq!(read(&mut *input, 0, 512).unwrap(), [5; 512]);
    assert_eq!(write(&mut *input, 0, &[6; 512]).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);

    let standby = open(&place.target(3, Mode::Standby).await, IoEngine::Best).unwrap();
    let mut waiting = standby.open_queue(1).unwrap();
    assert_eq!(write(&mut *waiting, 0, &[6; 512]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    flush(&mut *out).unwrap();

    standby.claim(Term(3)).unwrap();
    write(&mut *waiting, 0, &[6; 512]).unwrap();
    flush(&mut *waiting).unwrap();
    assert_eq!(flush(&mut *out).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(read(&mut *input, 0, 512).unwrap(), [6; 512]);
}

#[tokio::test]
async fn a_released_volume_is_written_by_the_next_and_not_by_the_one_who_gave_it_up() {
    let place = Place::new();
    let first = open(&place.target(1, Mode::Write).await, IoEngine::Best).unwrap();
    let mut out = first.open_queue(1).unwrap();
    write(&mut *out, 0, &[1; 512]).unwrap();
    first.release().unwrap();
    first.release().unwrap();
    assert_eq!(write(&mut *out, 0, &[2; 512]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    // The same term: it is free.
    let second = open(&place.target(1, Mode::Write).await, IoEngine::Best).unwrap();
    assert_eq!(read(&mut *second.open_queue(1).unwrap(), 0, 512).unwrap(), [1; 512]);
}

#[tokio::test]
async fn an_open_device_takes_the_size_that_the_pool_gave_it_and_no_other() {
    for engine in engines() {
        let place = Place::new();
        let device: Box<dyn BlockDevice> = open(&place.target(1, Mode::Write).await, engine).unwrap();
        let mut queue = device.open_queue(1).unwrap();
        write(&mut *queue, SIZE - 512, &[1; 512]).unwrap();
        let early = device.resize(2 * SIZE).unwrap_err();
        assert_eq!(early.kind(), iaas_core::ErrorKind::Conflict);
        assert_eq!(device.geometry().size, SIZE);

        place.pool().ensure(&cx(1), VOLUME, Rev(2), &spec(2 * SIZE)).await.unwrap();
        assert_eq!(read(&mut *queue, SIZE, 512).unwrap_err().kind(), ErrorKind::InvalidInput, "not told yet");
        device.resize(2 * SIZE).unwrap();
        assert_eq!(device.geometry().size, 2 * SIZE);
        assert_eq!(read(&mut *queue, SIZE, 512).unwrap(), [0; 512], "new bytes are zero");
        write(&mut *queue, 2 * SIZE - 512, &[2; 512]).unwrap();
        flush(&mut *queue).unwrap();
        assert_eq!(read(&mut *queue, SIZE - 512, 512).unwrap(), [1; 512]);
        assert_eq!(device.resize(SIZE).unwrap_err().kind(), iaas_core::ErrorKind::Conflict, "none shrinks");
    }
}

#[tokio::test]
async fn a_raw_file_refuses_to_freeze_and_goes_on() {
    let place = Place::new();
    let device = open(&place.target(1, Mode::Write).await, IoEngine::Best).unwrap();
    let mut queue = device.open_queue(1).unwrap();
    let refused = device.freeze(&FreezeTicket(bytes::Bytes::from_static(b"ticket"))).unwrap_err();
    assert_eq!(refused.kind(), iaas_core::ErrorKind::Unsupported);
    assert_eq!(refused.outcome(), iaas_core::Outcome::NotDone, "the caller may thaw the others at once");
    write(&mut *queue, 0, &[3; 512]).unwrap();
    flush(&mut *queue).unwrap();
}

#[tokio::test]
async fn a_target_names_the_scheme_of_its_opener_and_other_schemes_are_refused() {
    let place = Place::new();
    let opener: &dyn BlockOpener = &iaas_store::opener();
    let mut target = place.target(1, Mode::Write).await;
    let (known, of) = opener.scheme();
    let Form::Opener { scheme, version, .. } = &mut target.forms[0] else { panic!("{target:?}") };
    assert_eq!((scheme.as_str(), *version), (known, of));
    *version += 1;
    assert_eq!(opener.prepare(&target).unwrap_err().kind(), iaas_core::ErrorKind::Unsupported);
    target = place.target(1, Mode::Write).await;
    let without = opener.open(&target, Grant::default(), None, &Env::default()).unwrap_err();
    assert_eq!(without.kind(), iaas_core::ErrorKind::Invalid, "stage two opens nothing by itself");
}

#[tokio::test]
async fn who_listens_hears_which_volume_and_which_access_changed() {
    let place = Place::new();
    let (pool, access) = (place.pool(), place.access());
    let mut volumes = pool.changes(&cx(1)).await.unwrap();
    let mut accesses = access.changes(&cx(1)).await.unwrap();
    pool.ensure(&cx(1), VOLUME, Rev(1), &spec(SIZE)).await.unwrap();
    assert_eq!(heard(&mut volumes).await, VOLUME.object());
    let id: Id<Access> = Id::from_uuid(Uuid::from_u128(5));
    let wish = AccessSpec { pool: POOL, volume: VOLUME, term: Term(1), mode: Mode::Read };
    access.ensure(&cx(1), id, Rev(1), &wish).await.unwrap();
    assert_eq!(heard(&mut accesses).await, id.object());
    pool.remove(&cx(1), VOLUME, Rev(1)).await.unwrap();
    assert_eq!(heard(&mut volumes).await, VOLUME.object());
}

/// What the feed says next; it must say something.
async fn heard(feed: &mut Feed<ObjectRef>) -> ObjectRef {
    let next = tokio::time::timeout(Duration::from_secs(60), feed.next()).await;
    next.expect("nothing was told within a minute").unwrap().unwrap()
}

/// Not a test of its own: the other process. It opens the volume at the term that it is told and does what it reads line by
/// line, answering each with a line.
#[test]
fn other_process() {
    let Some(folder) = std::env::var_os(PLACE) else { return };
    let place = Place::at(folder.as_ref());
    let term = std::env::var(TERM).unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let engine = if term % 2 == 0 { IoEngine::Best } else { IoEngine::Threads };
    let device = open(&runtime.block_on(place.target(term, Mode::Write)), engine).unwrap();
    let mut queue = device.open_queue(4).unwrap();
    println!("answer open");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let answer = match line.split_once(' ') {
            Some(("write", byte)) => write(&mut *queue, 0, &[byte.parse().unwrap(); 4096]),
            Some(("flush", _)) => flush(&mut *queue),
            _ => break,
        };
        println!("answer {answer:?}");
    }
}

struct Other {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Other {
    fn start(place: &Place, term: u64) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_process", "--nocapture"])
            .env(PLACE, place.folder())
            .env(TERM, term.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = process.stdin.take().unwrap();
        let from = BufReader::new(process.stdout.take().unwrap());
        let mut this = Self { process, to, from };
        assert_eq!(this.answer(), "open");
        this
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.to, "{line}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the other process ended");
            if let Some((_, answer)) = line.trim_end().split_once("answer ") {
                return answer.to_owned();
            }
        }
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[tokio::test]
async fn what_was_flushed_is_there_after_the_writer_was_killed() {
    let place = Place::new();
    for (term, byte) in [(1, 11), (2, 22)] {
        let mut writer = Other::start(&place, term);
        assert_eq!(writer.ask(&format!("write {byte}")), "Ok(())");
        assert_eq!(writer.ask("flush -"), "Ok(())");
        writer.kill();
        let device = open(&place.target(10 + term, Mode::Read).await, IoEngine::Best).unwrap();
        let mut queue = device.open_queue(1).unwrap();
        assert_eq!(read(&mut *queue, 0, 4096).unwrap(), vec![byte; 4096]);
    }
}

#[tokio::test]
async fn of_two_processes_the_newer_writes_and_the_older_hears_that_it_is_over() {
    let place = Place::new();
    for term in [1, 2] {
        let (old, new) = (term * 10, term * 10 + 1);
        let mut older = Other::start(&place, old);
        assert_eq!(older.ask("write 1"), "Ok(())");
        let mut newer = Other::start(&place, new);
        assert_eq!(newer.ask("write 2"), "Ok(())");
        // The newer one is open, so the older has let go: nothing of it reaches the file any more.
        assert!(older.ask("write 3").contains("a newer writer has claimed"));
        assert!(older.ask("flush -").contains("a newer writer has claimed"));
        assert_eq!(newer.ask("flush -"), "Ok(())");
        let device = open(&place.target(100, Mode::Read).await, IoEngine::Best).unwrap();
        assert_eq!(read(&mut *device.open_queue(1).unwrap(), 0, 4096).unwrap(), vec![2; 4096]);
        older.kill();
        newer.kill();
    }
    let stale = open(&place.target(20, Mode::Write).await, IoEngine::Best).unwrap_err();
    assert_eq!(stale.kind(), iaas_core::ErrorKind::Fenced);
}

const PLACE: &str = "IAAS_TEST_PLACE";
const TERM: &str = "IAAS_TEST_TERM";
