//! A virtual machine inside this program: no control plane, no other process, no files but the kernel's.
//!
//! `hello_vm KERNEL [INITRD [COMMAND LINE]]` boots a kernel on this host's KVM and shows its console until it ends.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::End;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;

fn main() -> ExitCode {
    match run() {
        Ok(End::GuestOff | End::GuestReset) => ExitCode::SUCCESS,
        Ok(end) => {
            eprintln!("it ended otherwise: {end:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}; {}", error.what_to_do().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<End> {
    let mut words = std::env::args().skip(1);
    let kernel = words.next().ok_or_else(|| Error::invalid("hello_vm KERNEL [INITRD [COMMAND LINE]]"))?;
    let mut boot = Boot::kernel(open(&kernel)?);
    if let Some(initrd) = words.next() {
        boot = boot.with_initrd(open(&initrd)?);
    }
    let line = words.next().unwrap_or_else(|| "console=ttyS0 panic=-1 quiet".to_owned());
    let vm = Vm::builder()
        .with_vcpus(2)
        .with_memory(256 << 20)
        .with_boot(boot.with_command_line(line))
        .with_entropy()
        .build()?;
    vm.start()?;
    let end = show(&vm);
    eprintln!("\n{end:?} after {:?} of processor time", vm.usage().total());
    Ok(end)
}

/// Copies the console to our output until the machine has ended.
fn show(vm: &Vm) -> End {
    let mut next = 0;
    loop {
        // Asked first: what was printed before the end is then read after it.
        let end = vm.wait(Duration::ZERO);
        let output = vm.read_console(next, 1 << 16, Duration::from_millis(200));
        next = output.next;
        let mut out = std::io::stdout().lock();
        let shown = out.write_all(&output.bytes).and_then(|()| out.flush());
        match end {
            Some(end) if output.bytes.is_empty() || shown.is_err() => return end,
            _ => {}
        }
    }
}

fn open(path: &str) -> Result<File> {
    File::open(path).map_err(|e| Error::invalid(format!("`{path}` cannot be opened")).because(&e))
}
