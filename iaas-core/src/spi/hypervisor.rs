//! The hypervisor of one host: virtual machines, their consoles and what they used.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::ByteStream;
use super::Converge;
use super::Ctx;
use super::Stamp;
use super::contract::Sealed;
use super::contract::kind;
use super::target::Target;
use crate::Boot;
use crate::Digest;
use crate::Error;
use crate::Id;
use crate::Mac;
use crate::Result;
use crate::Term;

kind!(
    /// A virtual machine on one host. It shares its UUID with the instance that it runs.
    Vm, "vm", holds_data: false, VmSpec => VmObserved
);
kind!(
    /// A checkpoint of a VM.
    VmImage, "vm-image", holds_data: true, VmImageSpec => VmImageObserved
);
kind!(
    /// The sending side of a migration.
    Handover, "handover", holds_data: false, HandoverSpec => HandoverObserved
);

/// A complete VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The placement; a higher one elsewhere makes this one stale.
    pub term: Term,
    /// Whether it runs.
    pub run: Run,
    /// Virtual CPUs, 1 to 256.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// What it starts from.
    pub origin: Origin,
    /// Disks, NICs and others by the id of their attachment.
    pub devices: BTreeMap<Uuid, Device>,
    /// Stops itself when its host has not heard from a leader for so long; `None` for never.
    pub lease: Option<Duration>,
    /// The metadata that the guest may read.
    pub metadata: Option<Sealed>,
    /// What an adopting control plane needs: at most 16 KiB, no secrets.
    pub passport: Bytes,
}

impl VmSpec {
    /// A VM that runs as boot 1 of placement 1, without devices, lease, metadata and passport.
    pub fn new(vcpus: u32, memory: u64, origin: Origin) -> Self {
        Self {
            term: Term(1),
            run: Run::On(Boot(1)),
            vcpus,
            memory,
            origin,
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Bytes::new(),
        }
    }
}

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Run {
    /// Powered off: by the power button first, by force after `grace`.
    Off {
        /// How long the guest may take.
        grace: Duration,
    },
    /// Started as this boot, with its vCPUs stopped.
    Paused(Boot),
    /// Started as this boot. A boot that has ended is not started again; the next number is.
    On(Boot),
}

/// What a VM starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A Linux kernel, loaded directly; the artifacts must be on the host.
    Kernel {
        /// The bzImage or ELF image.
        kernel: Digest,
        /// The initial RAM disk.
        initrd: Option<Digest>,
        /// The kernel's command line, at most 2047 bytes of printable ASCII.
        cmdline: String,
    },
    /// The boot sector of the first bootable disk.
    Disk,
    /// A firmware image.
    Firmware(Digest),
    /// A checkpoint.
    Image {
        /// Which.
        image: Id<VmImage>,
        /// Whether the VM gets a new identity.
        fork: bool,
    },
    /// A migration from the placement `from`.
    Incoming {
        /// The sender's placement.
        from: Term,
        /// Whether the right to run may still be taken.
        open: bool,
    },
}

/// A device of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Device {
    /// A virtio block device.
    Disk {
        /// What backs it.
        target: Target,
        /// Place in the boot order, lowest first.
        boot: Option<u8>,
    },
    /// A virtio network device.
    Nic {
        /// What backs it.
        target: Target,
        /// Its Ethernet address.
        mac: Mac,
    },
    /// A shared folder.
    Share {
        /// What backs it.
        target: Target,
        /// The guest's mount tag.
        tag: String,
    },
    /// A device of the host, passed through.
    HostDevice {
        /// The host's name for it.
        name: String,
        /// The claim.
        claim: Term,
    },
}

/// A VM as it was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmObserved {
    /// Whether it runs.
    pub life: Life,
    /// When `life` became what it is, by the host's clock at the effect: what running time is billed by.
    #[serde(default)]
    pub changed: Option<Stamp>,
    /// Whether it may run.
    pub right: Right,
    /// Its devices by attachment.
    pub devices: BTreeMap<Uuid, DeviceState>,
    /// The `(scheme, version)`s of openers that it accepts.
    #[serde(default)]
    pub accepts: Vec<(String, u16)>,
    /// Parts of the spec that need a restart to take effect.
    #[serde(default)]
    pub restart_for: Vec<String>,
}

/// The life of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// Not started yet.
    Never,
    /// The VMM is starting it.
    Booting(Boot),
    /// Its vCPUs run.
    On(Boot),
    /// Its vCPUs are stopped.
    Paused(Boot),
    /// It has ended; stays so until `remove` or a newer boot.
    Ended {
        /// Which boot.
        boot: Boot,
        /// Why.
        why: End,
    },
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest powered off.
    GuestOff,
    /// The guest asked for a reset, which ends the boot.
    GuestReset,
    /// We were asked to power it off and the guest did so in time.
    Stopped,
    /// We were asked to, and the guest did not react in time.
    Forced,
    /// The VMM died or was killed.
    Crashed(Error),
    /// The host's lease lapsed, or another placement holds the right.
    Fenced,
}

/// The right to run, which a migration moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Right {
    /// Waits for the right of that placement.
    Awaits(Term),
    /// Will not take it any more.
    Refused(Term),
    /// Has it.
    Holds(Term),
    /// Gave it away.
    Gave(Term),
}

/// A device as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// The guest has not accepted it yet.
    Plugging,
    /// The guest may use it.
    Present,
    /// The guest was asked to let go.
    Unplugging {
        /// When.
        since: Stamp,
    },
    /// It does not work.
    Failed(Error),
}

/// A checkpoint to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmImageSpec {
    /// Of which VM.
    pub vm: Id<Vm>,
    /// The disks to freeze under the same pause.
    pub disks: BTreeMap<Uuid, super::block::FreezeTicket>,
    /// Whether the guest is asked to quiesce first.
    pub quiesce: bool,
}

/// A checkpoint as it was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmImageObserved {
    /// What each disk's writer answered.
    pub receipts: BTreeMap<Uuid, super::block::FreezeReceipt>,
    /// When it was taken.
    pub taken: Option<Stamp>,
}

/// A migration to send.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverSpec {
    /// Which VM.
    pub vm: Id<Vm>,
    /// The sender's placement.
    pub from: Term,
    /// The receiver's placement.
    pub to: Term,
    /// Where the receiver listens.
    pub at: String,
    /// The longest pause that the guest may notice.
    pub max_pause: Duration,
    /// Whether to give up.
    pub cancel: bool,
}

/// A migration as it was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum HandoverObserved {
    /// Memory is being copied.
    Copying {
        /// The round.
        round: u32,
        /// Bytes left in it.
        left: u64,
    },
    /// The right was given away.
    Gave {
        /// How long the guest stood.
        pause: Duration,
    },
    /// It did not work; the VM runs on here.
    Failed(Error),
}

/// The capabilities of a [`Hypervisor`], as they stand in [`Hello::caps`](super::Hello::caps).
pub mod cap {
    /// Devices can be attached to and detached from a running VM.
    pub const HOTPLUG: &str = "hotplug";
    /// A VM can be paused.
    pub const PAUSE: &str = "pause";
    /// VMs survive a restart of the process that holds the provider.
    pub const ADOPT: &str = "adopt";
}

/// Creates and owns virtual machines on one host.
///
/// # Contract
/// The clauses of [`Provider`](super::Provider) and of [`Converge<Vm>`], and:
/// 1. `boot-at-most-once`: a VM is started at most once per [`Boot`] number, also over a crash and a repair; an ended boot
///    stays [`Life::Ended`].
/// 2. `off-stops`: after `Run::Off` the VM comes to `Ended` or `Never`; after its grace by force.
/// 3. `reboot-by-number`: a higher boot number ends the running boot and starts anew.
/// 4. `console-scrollback`: a console opened at an offset gets each kept byte from there on, in order, then the live ones.
/// 5. `death-observed`: a VM whose VMM dies is seen as `Ended { Crashed }`, never as a call that hangs.
/// 6. `devices-by-attachment`: a device in the spec is seen under its attachment's id; one that left the spec is gone. Without
///    [`cap::HOTPLUG`] this is so from the next boot on; until then `restart_for` names the attachment.
/// 7. `kinds-agree`: `images` and `handovers` are `Some` just if `Hello::kinds` names their kind.
/// 8. `final-usage-kept`: the last reading of a life stays in `Seen::final_usage`, marked `fin`, until `remove`.
///
/// Prove yours with `testing::conformance::hypervisor` (feature `conformance`).
#[async_trait]
pub trait Hypervisor: Converge<Vm> {
    /// Checkpoints, if this hypervisor has them.
    fn images(&self) -> Option<&dyn Converge<VmImage>>;

    /// Migrations, if this hypervisor has them.
    fn handovers(&self) -> Option<&dyn Converge<Handover>>;

    /// Opens the console of `vm`. `from` is an offset in bytes since the VM's first output; older bytes than are kept are
    /// skipped.
    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>>;
}

/// The names of devices by attachment that two specs do not have in common.
pub fn device_changes(
    old: &BTreeMap<Uuid, Device>,
    new: &BTreeMap<Uuid, Device>,
) -> (BTreeSet<Uuid>, BTreeSet<Uuid>) {
    let gone = old.keys().filter(|k| !new.contains_key(*k)).copied().collect();
    let come = new.keys().filter(|k| !old.contains_key(*k)).copied().collect();
    (gone, come)
}
