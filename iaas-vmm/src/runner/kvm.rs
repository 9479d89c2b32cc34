//! A guest on a machine of our own, inside the runner.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::VmSpec;
use uuid::Uuid;

use super::console::ConsoleWriter;
use super::devices::Attached;
use super::devices::serial;
use super::guest::Guest;
use super::guest::HotPlug;
use super::guest::Input;
use super::guest::Start;
use super::nic::Counted;
use super::nic::NicCounters;
use super::record::VmFolder;
use crate::vm::Boot;
use crate::vm::Vm;
use crate::vm::VmBuilder;

/// A machine with the threads that look after it.
#[derive(Debug)]
pub(super) struct Kvm {
    // The threads have it too, until it ends.
    vm: Arc<Vm>,
    /// The attachments in the order of the machine's devices.
    order: Vec<Uuid>,
    nics: BTreeMap<Uuid, Arc<NicCounters>>,
    runs: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Kvm {
    pub(super) fn start(start: Start<'_>, devices: &mut BTreeMap<Uuid, Attached>) -> Result<Self> {
        let (builder, nics) = describe(start.spec, devices)?;
        let boot = boot(start.spec, start.kernel.map(File::from), start.initrd.map(File::from))?;
        let vm = Arc::new(builder.with_entropy().with_boot(boot).build()?);
        let order = devices.keys().copied().collect();
        let mut guest = Self { vm, order, nics, runs: false, threads: Vec::new() };
        guest.threads.push(keep_console(guest.vm.clone(), start.folder)?);
        guest.threads.push(watch(guest.vm.clone(), start.tell.clone())?);
        if matches!(start.spec.run, Run::On(_)) {
            guest.resume()?;
        }
        Ok(guest)
    }

    /// Waits until nothing of the machine is left but what it has said.
    fn end(&mut self) -> End {
        let end = self.vm.kill();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread beside the machine panicked");
            }
        }
        end
    }
}

impl Guest for Kvm {
    fn is_running(&mut self) -> Result<bool> {
        Ok(self.runs)
    }

    fn pause(&mut self) -> Result<()> {
        self.vm.pause()?;
        self.runs = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.vm.start()?;
        self.runs = true;
        Ok(())
    }

    fn press(&mut self) -> Result<()> {
        self.vm.press_power_button()
    }

    fn kill(&mut self) {
        self.vm.pull_plug();
    }

    fn hot_plug(&mut self) -> Option<&mut dyn HotPlug> {
        None
    }

    fn fault(&self, id: Uuid) -> Option<String> {
        let at = self.order.iter().position(|known| *known == id)?;
        self.vm.device_faults().into_iter().find(|(n, _)| *n == at).map(|(_, fault)| fault)
    }

    fn nics(&self) -> Vec<(Uuid, &NicCounters)> {
        self.nics.iter().map(|(id, counters)| (*id, counters.as_ref())).collect()
    }

    fn type_in(&mut self, bytes: &[u8]) -> Result<usize> {
        Ok(self.vm.write_console(bytes))
    }

    fn cpu_ns(&self) -> u64 {
        u64::try_from(self.vm.usage().total().as_nanos()).unwrap_or(u64::MAX)
    }

    fn finish(&mut self, _: bool) -> End {
        self.end()
    }
}

/// A machine that could not be started, or a runner that gives up: the volumes are closed after this.
impl Drop for Kvm {
    fn drop(&mut self) {
        self.end();
    }
}

/// The machine with its devices, and what counts its NICs.
fn describe(
    spec: &VmSpec,
    devices: &mut BTreeMap<Uuid, Attached>,
) -> Result<(VmBuilder, BTreeMap<Uuid, Arc<NicCounters>>)> {
    let vcpus = u8::try_from(spec.vcpus).map_err(|e| Error::invalid("too many vCPUs").because(&e))?;
    let mut builder = Vm::builder().with_vcpus(vcpus).with_memory(spec.memory);
    let mut nics = BTreeMap::new();
    for (id, attached) in devices {
        match attached.device {
            Device::Nic { mac, .. } => {
                let port = Counted::new(attached.take_port()?);
                nics.insert(*id, port.counters());
                builder = builder.with_nic(Box::new(port), mac.0);
            }
            _ => builder = builder.with_disk(attached.volume()?, &serial(*id)),
        }
    }
    Ok((builder, nics))
}

fn boot(spec: &VmSpec, kernel: Option<File>, initrd: Option<File>) -> Result<Boot> {
    let (Origin::Kernel { cmdline, .. }, Some(kernel)) = (&spec.origin, kernel) else {
        return Err(Error::unsupported("this hypervisor starts kernels only"));
    };
    let boot = Boot::kernel(kernel).with_command_line(cmdline.as_str());
    Ok(match initrd {
        Some(initrd) => boot.with_initrd(initrd),
        None => boot,
    })
}

/// Moves what the guest writes into the scroll-back until the machine has ended.
fn keep_console(vm: Arc<Vm>, folder: &VmFolder) -> Result<JoinHandle<()>> {
    let path = folder.console();
    let cannot = |e: io::Error| crate::files::cannot("opened", &path, &e);
    let mut to = ConsoleWriter::open(&path).map_err(cannot)?;
    let copy = move || {
        let mut from = 0;
        loop {
            // Asked before the read: what was said before the end is read after it.
            let ended = vm.wait(Duration::ZERO).is_some();
            let output = vm.read_console(from, PIECE, if ended { Duration::ZERO } else { LOOK });
            from = output.next;
            if output.bytes.is_empty() && ended {
                return;
            }
            // A full disk must not stop the guest: what cannot be kept is lost.
            if let Err(error) = to.append(&output.bytes) {
                tracing::warn!(%error, "a piece of the console was lost");
            }
        }
    };
    std::thread::Builder::new().name("console".into()).spawn(copy).map_err(cannot)
}

/// Tells the loop when the machine has ended.
fn watch(vm: Arc<Vm>, tell: mpsc::Sender<Input>) -> Result<JoinHandle<()>> {
    let wait = move || {
        while vm.wait(Duration::MAX).is_none() {}
        // Nobody hears any more when the runner is about to end.
        let _ = tell.send(Input::Exited);
    };
    let thread = std::thread::Builder::new().name("wait".into()).spawn(wait);
    thread.map_err(|e| Error::unavailable("the machine could not be watched").because(&e))
}

/// Bytes of the console that are moved at once.
const PIECE: usize = 64 << 10;
/// How long a silent console is waited for before the end is looked for.
const LOOK: Duration = Duration::from_millis(500);
