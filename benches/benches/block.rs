//! The volumes' benchmarks on raw files, beside QEMU's storage daemon on the same file. `IAAS_BENCH_DIR` names a folder on
//! the disk to measure, `IAAS_BENCH_STORAGE_DAEMON` the daemon's program.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;

use criterion::Criterion;
use iaas_benches::BlockRig;
use iaas_benches::Service;
use iaas_benches::VolumeParts;
use iaas_core::Id;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use iaas_vmm::virtio::vhost_user::DiskServer;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// One volume in a folder of its own.
#[derive(Debug)]
struct Reference(TempDir);

impl BlockRig for Reference {
    fn open(&self) -> Box<dyn BlockDevice> {
        open(self.0.path())
    }

    fn serve(&self, socket: &Path) -> io::Result<Service> {
        let us = std::env::current_exe()?;
        Service::process(Command::new(us).arg(SERVE).arg(self.0.path()).arg(socket))
    }

    fn peer(&self, socket: &Path) -> Result<Service, String> {
        let daemon = std::env::var_os("IAAS_BENCH_STORAGE_DAEMON").unwrap_or_else(|| DAEMON.into());
        let file = data_file(&self.0.path().join("volumes")).map_err(|e| e.to_string())?;
        let (file, socket) = (file.display(), socket.display());
        let mut command = Command::new(&daemon);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=disk,filename={file},cache.direct=on,aio=io_uring,discard=unmap"
        ));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues=1"
        ));
        Service::process(&mut command).map_err(|e| {
            format!(
                "`{}` cannot be run ({e}); install qemu-system-common, or name it in IAAS_BENCH_STORAGE_DAEMON",
                Path::new(&daemon).display()
            )
        })
    }
}

fn open(folder: &Path) -> Box<dyn BlockDevice> {
    let (cloud, pool) = (Id::from_uuid(Uuid::from_u128(1)), Id::from_uuid(Uuid::from_u128(2)));
    let host = Id::from_uuid(Uuid::from_u128(3));
    let (volumes, state) = (folder.join("volumes"), folder.join("state"));
    let parts = VolumeParts {
        cloud,
        id: pool,
        pool: Arc::new(RawPool::open(&volumes, &state, cloud, pool).expect("a pool")),
        access: Arc::new(RawAccess::open(&volumes, &state, cloud, host, pool).expect("access")),
        opener: Arc::new(iaas_store::opener()),
    };
    Runtime::new().expect("a runtime").block_on(parts.open(SIZE)).expect("a volume")
}

/// The one file of the pool that is as large as the volume.
fn data_file(volumes: &Path) -> io::Result<PathBuf> {
    for entry in std::fs::read_dir(volumes)? {
        let entry = entry?;
        if entry.metadata()?.len() == SIZE {
            return Ok(entry.path());
        }
    }
    Err(io::Error::other("the pool keeps no file of the volume's size"))
}

/// What a runner does with the volume, in a process of its own as a runner does.
fn serve(folder: &Path, socket: &Path) {
    let device = open(folder);
    let listener = UnixListener::bind(socket).expect("a socket");
    DiskServer::accept(device.as_ref(), "bench", listener).expect("a front-end").wait();
}

fn main() {
    let args: Vec<_> = std::env::args_os().collect();
    if let [_, verb, folder, socket] = args.as_slice()
        && verb == SERVE
    {
        return serve(folder.as_ref(), socket.as_ref());
    }
    let build = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let disk = std::env::var_os("IAAS_BENCH_DIR").map_or_else(build, PathBuf::from);
    let parent = tempfile::tempdir_in(disk).expect("a folder to write to");
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::block(&mut criterion, &Reference(parent));
    criterion.final_summary();
}

/// Bytes of the volume.
const SIZE: u64 = 1 << 30;
const SERVE: &str = "serve-volume";
const DAEMON: &str = "qemu-storage-daemon";
