//! Our own VMM as a program: one machine with a disk of a pool and a NIC on a TAP, its console on our output.

use std::fs::File;
use std::io;
use std::io::Write;
use std::time::Duration;
use std::time::Instant;

use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::target::Target;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;

use crate::Result;
use crate::tap::Tap;

/// Runs a machine to its end; says on its standard error when it had reached which state.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let started = Instant::now();
    let tell = |what: &str| eprintln!("OURS {:.3} ms {what}", started.elapsed().as_secs_f64() * 1e3);
    let [kernel, initrd, line, memory, target, tap] = words else {
        return Err("KERNEL INITRD COMMAND-LINE MIB TARGET TAP".into());
    };
    let target: Target = ciborium::from_reader(File::open(target)?)?;
    let opener = iaas_store::opener();
    let grant = opener.prepare(&target)?;
    let volume = opener.open(&target, grant, None, &Env::default())?;
    let port = Tap::open(tap)?;
    tell("disk and TAP are open");
    let boot = Boot::kernel(File::open(kernel)?).with_initrd(File::open(initrd)?).with_command_line(*line);
    let vm = Vm::builder()
        .with_memory(memory.parse::<u64>()? << 20)
        .with_boot(boot)
        .with_disk(&*volume, "bench")
        .with_nic(Box::new(port), MAC)
        .build()?;
    tell("built");
    vm.start()?;
    tell("started");
    let mut next = 0;
    while vm.wait(Duration::ZERO).is_none() {
        let output = vm.read_console(next, 1 << 16, Duration::from_secs(1));
        next = output.next;
        let mut out = io::stdout().lock();
        out.write_all(&output.bytes)?;
        out.flush()?;
    }
    Ok(())
}

pub(crate) const VERB: &str = "run-ours";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
