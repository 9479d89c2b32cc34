//! The volumes' benchmarks on raw files. `IAAS_BENCH_DIR` names a folder on the disk to measure.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use criterion::Criterion;
use iaas_benches::BlockRig;
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
use iaas_core::spi::Provider;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::target::Mode;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// One volume of a GiB in a folder of its own.
#[derive(Debug)]
struct Reference(TempDir);

const CLOUD: Id<Cloud> = Id::from_uuid(Uuid::from_u128(1));
const POOL: Id<Pool> = Id::from_uuid(Uuid::from_u128(2));
const HOST: Id<Host> = Id::from_uuid(Uuid::from_u128(3));

impl BlockRig for Reference {
    fn open(&self) -> Box<dyn BlockDevice> {
        let (volumes, state) = (self.0.path().join("volumes"), self.0.path().join("state"));
        let pool = RawPool::open(&volumes, &state, CLOUD, POOL).expect("a pool");
        let access = RawAccess::open(&volumes, &state, CLOUD, HOST, POOL).expect("access");
        let volume = Id::from_uuid(Uuid::from_u128(4));
        let spec = PoolVolumeSpec {
            size: 1 << 30,
            from: None,
            qos: Qos::default(),
            key: None,
            passport: Bytes::new(),
        };
        let right = AccessSpec { pool: POOL, volume, term: Term(1), mode: Mode::Write };
        let seen = Runtime::new().expect("a runtime").block_on(async {
            pool.claim(&cx()).await.expect("a claim");
            access.claim(&cx()).await.expect("a claim");
            pool.ensure(&cx(), volume, Rev(1), &spec).await.expect("a volume");
            access.ensure(&cx(), Id::from_uuid(Uuid::from_u128(5)), Rev(2), &right).await.expect("access")
        });
        let target = seen.is.target.expect("a target");
        let opener = iaas_store::opener();
        let grant = opener.prepare(&target).expect("a grant");
        opener.open(&target, grant, None, &Env::default()).expect("a device")
    }
}

fn cx() -> Ctx {
    let call = Call {
        cloud: CLOUD,
        incarnation: Uuid::from_u128(6),
        epoch: Epoch(1),
        op: Id::from_uuid(Uuid::nil()),
        trace: None,
        budget: Duration::from_secs(60),
    };
    Ctx { call, cancel: Cancel::new() }
}

fn main() {
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::block(&mut criterion, &Reference(parent));
    criterion.final_summary();
}
