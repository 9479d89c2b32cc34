//! A hundred virtual machines in one process, each with its own memory, processor and console.
//!
//! Their guests are a few instructions long, so that this runs on any KVM: each prints its number and powers off.

use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::End;
use iaas_vmm::vm::Boot;
use iaas_vmm::vm::Vm;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}; {}", error.what_to_do().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let begin = Instant::now();
    let machines = (0..COUNT).map(|n| {
        let boot = Boot::flat(guest(&format!("guest {n}")), 0x10_0000);
        Vm::builder().with_memory(4 << 20).with_boot(boot).build()
    });
    let machines = machines.collect::<Result<Vec<Vm>>>()?;
    let built = begin.elapsed();
    machines.iter().try_for_each(Vm::start)?;
    for (n, vm) in machines.iter().enumerate() {
        let end = vm.wait(Duration::from_secs(60));
        let said = vm.read_console(0, 100, Duration::ZERO).bytes;
        if end != Some(End::GuestOff) || said != format!("guest {n}").into_bytes() {
            return Err(Error::internal(format!("guest {n} ended with {end:?}, having said {said:?}")));
        }
    }
    println!("{COUNT} machines: built in {built:?}, all done after {:?}", begin.elapsed());
    Ok(())
}

/// Code that prints `text` on the serial port and sleeps in the state "off".
fn guest(text: &str) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    // mov al, byte · out dx, al
    code.extend(text.bytes().flat_map(|byte| [0xb0, byte, 0xee]));
    // mov dx, 0x604 · mov ax, 0x3400 · out dx, ax · jmp $
    code.extend([0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe]);
    code
}

const COUNT: usize = 100;
