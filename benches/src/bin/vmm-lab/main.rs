//! Measures our own VMM beside others, in a machine whose KVM is real: `cargo xtask bench vmm` packs and runs it.
//!
//! `vmm-lab KERNEL INITRD CONTENDERS` starts one machine after the other, in turns: ours, then each line `NAME COMMAND` of the
//! file CONTENDERS, with the same kernel, initrd, command line, memory, disk and TAP. The guest runs its loads by itself; its
//! console and the clock of this process say what each did. The medians of all turns are printed as `HARNESS` lines.
//!
//! * `boot.init` (ms): from just before the VMM's process is started to the first line that the guest's init prints.
//! * `mem.overhead` (MiB): the [`memory`] of the VMM's processes beside the guest's, while the guest idles after its boot.
//! * `blk.randread`, `blk.randwrite` (operations a second): 4 KiB, past the guest's page cache, 16 threads in the guest.
//! * `net.tcp.out`, `net.tcp.in` (MB/s, of 10^6 bytes): one connection from the guest to the [`far_end`], and the other way.
//!
//! Our machine is this same program in a process of its own, from a copy of its file: so it shares no page with the harness.

mod contender;
mod far_end;
mod figures;
mod memory;
mod ours;
mod tap;
mod turn;

use std::fs::File;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use iaas_benches::VolumeParts;
use iaas_core::Id;
use iaas_store::RawAccess;
use iaas_store::RawPool;
use tokio::runtime::Runtime;
use uuid::Uuid;

use contender::Contender;
use contender::Machine;
use contender::OURS;
use figures::Figures;

/// What can go wrong here goes wrong for good, and is told.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [ours::VERB, words @ ..] => ours::run(words),
        [kernel, initrd, contenders] => measure(kernel, initrd, Path::new(contenders)),
        _ => Err("vmm-lab KERNEL INITRD CONTENDERS".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(kernel: &str, initrd: &str, contenders: &Path) -> Result<()> {
    let folder = tempfile::tempdir_in(std::env::current_dir()?)?;
    let target = folder.path().join("target");
    let disk = make_volume(folder.path(), &target)?;
    let us = folder.path().join("ours");
    std::fs::copy(std::env::current_exe()?, &us)?;
    let mut all = vec![Contender::ours(&us, &target)];
    all.extend(Contender::read(&std::fs::read_to_string(contenders)?)?);
    tap::make(TAP)?;
    far_end::start(TAP)?;
    let machine = Machine {
        kernel: kernel.into(),
        initrd: initrd.into(),
        cmdline: COMMAND_LINE.into(),
        memory: MEMORY_MIB,
        disk: disk.display().to_string(),
        tap: TAP.into(),
    };
    let mut figures = Figures::default();
    for round in 0..ROUNDS {
        for n in 0..all.len() {
            // Who begins changes, so that a machine that grows slower or faster favours nobody.
            let contender = &all[(n + round) % all.len()];
            match turn::take(contender, &machine) {
                Ok(seen) => figures.add(&contender.name, &seen),
                Err(error) if contender.name == OURS => return Err(error),
                Err(error) => figures.fail(&contender.name, &error.to_string()),
            }
        }
    }
    let names: Vec<&str> = all.iter().map(|contender| contender.name.as_str()).collect();
    io::stdout().write_all(figures.lines(&names)?.as_bytes())?;
    Ok(())
}

/// Makes a volume, writes all of it, and leaves what its user is told in the file `target`. Gives the file of its bytes.
fn make_volume(folder: &Path, target: &Path) -> Result<PathBuf> {
    let (cloud, pool) = (Id::from_uuid(Uuid::from_u128(1)), Id::from_uuid(Uuid::from_u128(2)));
    let host = Id::from_uuid(Uuid::from_u128(3));
    let (volumes, state) = (folder.join("volumes"), folder.join("state"));
    let parts = VolumeParts {
        cloud,
        id: pool,
        pool: Arc::new(RawPool::open(&volumes, &state, cloud, pool)?),
        access: Arc::new(RawAccess::open(&volumes, &state, cloud, host, pool)?),
        opener: Arc::new(iaas_store::opener()),
    };
    let runtime = Runtime::new()?;
    ciborium::into_writer(&runtime.block_on(parts.target(VOLUME))?, File::create(target)?)?;
    iaas_benches::fill(&*runtime.block_on(parts.open(VOLUME))?)?;
    for entry in std::fs::read_dir(&volumes)?.flatten() {
        if entry.metadata()?.len() == VOLUME {
            return Ok(entry.path());
        }
    }
    Err("the pool keeps no file of the volume's size".into())
}

/// Turns of each contender.
const ROUNDS: usize = 3;
/// Of each machine; no other mapping of a VMM is as large.
const MEMORY_MIB: u64 = 256;
/// Bytes of the disk.
const VOLUME: u64 = 256 << 20;
const TAP: &str = "bench0";
/// Every machine's. The guest's address is in the [`far_end`]'s network.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 quiet guest.run=bench guest.ip4=10.77.0.2/24 guest.peer4=10.77.0.1";
