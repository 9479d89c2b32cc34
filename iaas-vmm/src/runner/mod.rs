//! The role `runner`: one process per boot of a VM. It opens the VM's disks and ports and runs the guest, on a machine of our
//! own or in a QEMU that it supervises and serves them to; it keeps the console and the counters, and says in a file what it
//! sees.
//!
//! Nobody has to ask a runner how its VM is: everything that `observe` needs is in the VM's folder, so looking never hangs
//! and works as well when the runner is dead. Control asks it only to change something.

pub mod console;
pub mod devices;
mod guest;
#[cfg(feature = "kvm")]
mod kvm;
mod machine;
pub mod nic;
#[cfg(feature = "qemu")]
pub mod pump;
#[cfg(feature = "qemu")]
mod qemu;
pub mod record;
pub mod usage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;

use iaas_core::Boot;
use iaas_core::Result;
use iaas_core::process::Role;
use iaas_core::process::RoleStart;
use iaas_core::process::Roles;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::VmSpec;
use serde::Deserialize;
use serde::Serialize;

use self::guest::Input;
use self::machine::Machine;
use crate::files;

/// The name of the role.
pub const ROLE: &str = "runner";

/// The role `runner`, for [`Roles::with_role`].
pub fn runner() -> Runner {
    Runner(())
}

/// Runs one VM.
#[derive(Debug)]
pub struct Runner(());

/// What a runner is started with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunnerArgs {
    /// The VM's folder.
    pub folder: PathBuf,
    /// What to run; its `run` names the boot.
    pub spec: VmSpec,
    /// What runs it.
    pub on: RunsOn,
}

/// What runs a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunsOn {
    /// A machine of our own on KVM, in the runner itself.
    #[cfg(feature = "kvm")]
    Kvm,
    /// A QEMU under the runner.
    #[cfg(feature = "qemu")]
    Qemu {
        /// Its binary.
        binary: PathBuf,
        /// What runs the guest's instructions.
        accel: crate::qemu::command::Accel,
    },
}

/// The boot that a spec wants, if it wants one.
pub fn wanted(run: Run) -> Option<Boot> {
    match run {
        Run::Off { .. } => None,
        Run::Paused(boot) | Run::On(boot) => Some(boot),
    }
}

/// The verb that brings a running VM to a new spec; its body is the spec, its descriptors those of new devices.
pub const APPLY: &str = "apply";
/// The verb that types bytes into the console and answers how many were taken.
pub const CONSOLE_WRITE: &str = "console-write";
/// The verb that answers which devices of a spec, its body, must come with descriptors when it is applied; while the VM is
/// starting, once it has started.
pub const NEEDS: &str = "needs";
/// The verb that answers each NIC's counters: packets and bytes sent, packets and bytes received, frames refused.
pub const NICS: &str = "nics";
/// The verb that takes a reading of the VM's counters now, and answers it.
pub const USAGE: &str = "usage";
/// The name of the kernel's descriptor.
pub const KERNEL_FD: &str = "kernel";
/// The name of the initrd's descriptor.
pub const INITRD_FD: &str = "initrd";

impl Role for Runner {
    fn name(&self) -> &'static str {
        ROLE
    }

    fn main(&self, start: RoleStart, roles: &Roles) -> ExitCode {
        match run(start, roles) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("the runner could not start: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}

fn run(start: RoleStart, roles: &Roles) -> Result<()> {
    let args: RunnerArgs = files::decode(&start.args)?;
    // To the role's log. A program that has brought a subscriber of its own keeps it.
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr);
    let _ = log.with_env_filter(tracing_subscriber::EnvFilter::new("info")).try_init();
    let span = tracing::info_span!("runner", vm = %start.id, run = ?args.spec.run, trace = start.trace);
    let _inside = span.enter();
    let machine = Machine::claim(&args, start.id, roles)?;
    let (tell, hear) = mpsc::channel();
    let stopper = start.server.stopper();
    let asks = tell.clone();
    let serve = move || {
        start.server.serve_deferred(|request, responder| {
            // A responder that nobody took answers by itself that the runner is ending.
            let _ = asks.send(Input::Ask(request, responder));
        })
    };
    let server = std::thread::Builder::new().name("control".into()).spawn(serve);
    let server = server
        .map_err(|e| iaas_core::Error::unavailable("a runner could not listen to control").because(&e))?;
    machine.run(&args, start.fds, (tell, hear));
    stopper.stop();
    match server.join() {
        Ok(result) => result,
        Err(_) => Err(iaas_core::Error::internal("the runner's control server failed")),
    }
}
