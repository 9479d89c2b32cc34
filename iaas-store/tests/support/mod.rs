//! A pool in a temporary folder, and a way to run single operations.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "test programs share it, and each uses a part"
)]

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use iaas_core::Epoch;
use iaas_core::Id;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::id::Cloud;
use iaas_core::id::Pool;
use iaas_core::model::Host;
use iaas_core::spi::Call;
use iaas_core::spi::Cancel;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use iaas_store::IoEngine;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use uuid::Uuid;

pub const CLOUD: Id<Cloud> = Id::from_uuid(Uuid::from_u128(0xc));
pub const POOL: Id<Pool> = Id::from_uuid(Uuid::from_u128(0xf));
pub const HOST: Id<Host> = Id::from_uuid(Uuid::from_u128(0x4));
pub const VOLUME: Id<PoolVolume> = Id::from_uuid(Uuid::from_u128(0x70));
pub const INCARNATION: Uuid = Uuid::from_u128(0x1);
pub const SIZE: u64 = 1 << 20;

pub struct Place {
    folder: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Place {
    pub fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        Self { folder: temporary.path().to_owned(), _temporary: Some(temporary) }
    }

    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), _temporary: None }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn volumes(&self) -> PathBuf {
        self.folder.join("volumes")
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.volumes()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn pool(&self) -> RawPool {
        RawPool::open(&self.volumes(), &self.folder.join("state"), CLOUD, POOL).unwrap()
    }

    pub fn access(&self) -> RawAccess {
        RawAccess::open(&self.volumes(), &self.folder.join("state"), CLOUD, HOST, POOL).unwrap()
    }

    /// Makes the volume, and answers a target of it.
    pub async fn target(&self, term: u64, mode: Mode) -> Target {
        self.pool().ensure(&cx(1), VOLUME, Rev(1), &spec(SIZE)).await.unwrap();
        let spec = AccessSpec { pool: POOL, volume: VOLUME, term: Term(term), mode };
        let id: Id<Access> = Id::from_uuid(Uuid::from_u128(u128::from(term)));
        self.access().ensure(&cx(1), id, Rev(1), &spec).await.unwrap().is.target.unwrap()
    }
}

pub fn cx(epoch: u64) -> Ctx {
    let call = Call {
        cloud: CLOUD,
        incarnation: INCARNATION,
        epoch: Epoch(epoch),
        op: Id::from_uuid(Uuid::nil()),
        trace: None,
        budget: Duration::from_secs(60),
    };
    Ctx { call, cancel: Cancel::new() }
}

pub fn spec(size: u64) -> PoolVolumeSpec {
    let passport = Bytes::from_static(b"the volume of a test");
    PoolVolumeSpec { size, from: None, qos: Qos::default(), key: None, passport }
}

pub fn open(target: &Target, engine: IoEngine) -> iaas_core::Result<Box<dyn BlockDevice>> {
    let opener = iaas_store::opener().with_engine(engine);
    opener.open(target, opener.prepare(target)?, None, &Env::default())
}

/// One operation, to its end.
pub fn run(queue: &mut dyn BlockQueue, op: BlockOp) -> BlockDone {
    queue.submit(7, op).unwrap();
    queue.kick().unwrap();
    let mut done = Vec::new();
    while queue.reap(&mut done) == 0 {
        let mut fds = [PollFd::new(queue.event_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000_u16)), Ok(1), "nothing ended within a minute");
    }
    assert_eq!(done.len(), 1);
    let done = done.pop().unwrap();
    assert_eq!(done.tag, 7);
    done
}

pub fn write(queue: &mut dyn BlockQueue, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    run(queue, BlockOp::Write { at, from: IoBuffers::copied(bytes) }).result
}

pub fn read(queue: &mut dyn BlockQueue, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let done = run(queue, BlockOp::Read { at, into: IoBuffers::zeroed(len) });
    done.result?;
    let mut bytes = vec![0; len];
    done.buffers.unwrap().read_at(0, &mut bytes);
    Ok(bytes)
}

pub fn flush(queue: &mut dyn BlockQueue) -> std::io::Result<()> {
    run(queue, BlockOp::Flush).result
}

/// Both engines; io_uring only where it works.
pub fn engines() -> Vec<IoEngine> {
    vec![IoEngine::Threads, IoEngine::Best]
}
