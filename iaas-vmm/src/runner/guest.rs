//! What the runner's loop needs of whatever runs the guest: a QEMU under it, or a machine of our own inside it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use iaas_core::Result;
use iaas_core::process::Request;
use iaas_core::process::Responder;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::VmSpec;
use uuid::Uuid;

use super::RunnerArgs;
use super::RunsOn;
use super::devices::Attached;
use super::nic::NicCounters;
use super::record::VmFolder;

/// What the loop hears.
#[derive(Debug)]
#[cfg_attr(not(feature = "qemu"), expect(dead_code, reason = "only a QEMU tells such things by itself"))]
pub(super) enum Input {
    /// The guest's vCPUs run, or stand.
    Runs(bool),
    /// The guest has let a device go.
    Unplugged(Uuid),
    /// The guest can no longer be steered, only ended.
    Lost,
    /// The guest has ended.
    Exited,
    /// Control asks for something.
    Ask(Request, Responder),
}

/// A guest that was started.
///
/// No call waits for the guest itself, and none for a volume except [`finish`](Self::finish).
pub(super) trait Guest: Debug {
    /// Whether its vCPUs run.
    fn is_running(&mut self) -> Result<bool>;

    /// Halts the vCPUs.
    fn pause(&mut self) -> Result<()>;

    /// Lets them go on.
    fn resume(&mut self) -> Result<()>;

    /// Presses the power button. The guest may not notice.
    fn press(&mut self) -> Result<()>;

    /// Ends it; [`Input::Exited`] follows. Harmless if it has ended.
    fn kill(&mut self);

    /// How it takes and gives devices while it runs; `None` if it does so only when it starts.
    fn hot_plug(&mut self) -> Option<&mut dyn HotPlug>;

    /// Why a device stands still, if its driver broke the protocol.
    fn fault(&self, id: Uuid) -> Option<String>;

    /// What each NIC has moved.
    fn nics(&self) -> Vec<(Uuid, &NicCounters)>;

    /// Types into the console; says how many bytes there was room for.
    fn type_in(&mut self, bytes: &[u8]) -> Result<usize>;

    /// Processor time of the guest and of what runs it, in nanoseconds.
    fn cpu_ns(&self) -> u64;

    /// Waits for the end of a guest that has ended or was killed, and closes what stood between it and its devices. Says why
    /// it ended, as far as that can be seen from here. `forced`: it was killed because it was to end.
    fn finish(&mut self, forced: bool) -> End;
}

/// A guest that takes and gives devices while it runs.
pub(super) trait HotPlug {
    /// Brings a device to it. Where that fails it does not have it.
    fn plug(&mut self, id: Uuid, attached: &mut Attached) -> Result<()>;

    /// Asks it to let a device go; [`Input::Unplugged`] follows when it has.
    fn unplug(&mut self, id: Uuid) -> Result<()>;

    /// Ends what stood between it and a device that it has let go.
    fn forget(&mut self, id: Uuid);
}

/// What a guest starts with.
pub(super) struct Start<'a> {
    #[cfg_attr(not(feature = "qemu"), expect(dead_code, reason = "only a QEMU has a name"))]
    pub(super) id: Uuid,
    pub(super) spec: &'a VmSpec,
    pub(super) kernel: Option<OwnedFd>,
    pub(super) initrd: Option<OwnedFd>,
    pub(super) folder: &'a VmFolder,
    pub(super) tell: &'a mpsc::Sender<Input>,
}

/// Starts what `args` names. Where that fails nothing is left of it, and the devices may be closed.
pub(super) fn start(
    args: &RunnerArgs,
    start: Start<'_>,
    devices: &mut BTreeMap<Uuid, Attached>,
) -> Result<Box<dyn Guest>> {
    match &args.on {
        #[cfg(feature = "qemu")]
        RunsOn::Qemu { binary, accel } => {
            Ok(Box::new(super::qemu::Qemu::start(binary, *accel, start, devices)?))
        }
        #[cfg(feature = "kvm")]
        RunsOn::Kvm => Ok(Box::new(super::kvm::Kvm::start(start, devices)?)),
    }
}
