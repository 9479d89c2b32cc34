//! Instances, and what they are made from.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::fleet::Host;
use super::fleet::Zone;
use super::record::Charge;
use super::record::Empty;
use super::record::resource;
use crate::Boot;
use crate::ByteSize;
use crate::Digest;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::spi::Phase;
use crate::spi::hypervisor::Life;
use crate::spi::hypervisor::VmObserved;

resource!(
    /// The size of an instance.
    InstanceType, "instance-type", InstanceTypeSpec, Empty, Empty
);
resource!(
    /// What an instance starts from.
    Image, "image", ImageSpec, Empty, Empty
);
resource!(
    /// A virtual machine of a tenant.
    Instance, "instance", InstanceSpec, InstanceBind, InstanceStatus
);
resource!(
    /// A public SSH key.
    KeyPair, "key-pair", KeyPairSpec, Empty, Empty
);

/// The size of an instance: 1–256 vCPUs, and memory in whole MiB up to 16 TiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawType", into = "RawType")]
pub struct InstanceTypeSpec {
    vcpus: u32,
    memory: ByteSize,
}

#[derive(Serialize, Deserialize)]
struct RawType {
    vcpus: u32,
    memory: ByteSize,
}

impl InstanceTypeSpec {
    /// Checks a size.
    ///
    /// # Errors
    /// `Invalid` if a number is out of range.
    pub fn new(vcpus: u32, memory: ByteSize) -> Result<Self> {
        let whole = memory.0.is_multiple_of(1 << 20) && (1..=1 << 24).contains(&(memory.0 >> 20));
        if !(1..=256).contains(&vcpus) || !whole {
            return Err(Error::invalid(format!("{vcpus} vCPUs with {memory} is not an instance type"))
                .remedy("use 1 to 256 vCPUs and whole MiB of memory, at most 16 TiB"));
        }
        Ok(Self { vcpus, memory })
    }

    /// Virtual CPUs.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Memory.
    pub fn memory(&self) -> ByteSize {
        self.memory
    }
}

impl TryFrom<RawType> for InstanceTypeSpec {
    type Error = Error;
    fn try_from(raw: RawType) -> Result<Self> {
        Self::new(raw.vcpus, raw.memory)
    }
}
impl From<InstanceTypeSpec> for RawType {
    fn from(spec: InstanceTypeSpec) -> Self {
        Self { vcpus: spec.vcpus, memory: spec.memory }
    }
}

/// What an instance starts from. Its format is stored, never guessed.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageSpec {
    /// A Linux kernel with an initial RAM disk.
    Kernel {
        /// The kernel.
        kernel: Digest,
        /// The initial RAM disk.
        initrd: Option<Digest>,
        /// The kernel's command line; an instance may add to it.
        cmdline: String,
    },
}

/// An instance's wish. Volumes and ports are attached by [`Attachment`](super::Attachment)s.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Its size.
    pub instance_type: Id<InstanceType>,
    /// What it starts from.
    pub image: Id<Image>,
    /// Added to the image's kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Keys that may log in.
    #[serde(default)]
    pub key_pairs: Vec<Id<KeyPair>>,
    /// Only in this zone, if named.
    #[serde(default)]
    pub zone: Option<Id<Zone>>,
    /// Whether it shall run.
    pub power: Power,
}

/// Whether an instance shall run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// It shall run.
    On,
    /// It shall be off.
    Off,
}

/// What was decided for an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceBind {
    /// The host, with the installation that it had.
    pub host: Option<(Id<Host>, Uuid)>,
    /// The placement.
    pub term: Term,
    /// The start that is wanted.
    pub boot: Boot,
    /// How long the guest may take to power off.
    #[serde(default)]
    pub grace: Duration,
    /// Earlier placements that have not been seen gone.
    #[serde(default)]
    pub leaving: Vec<(Id<Host>, Term)>,
    /// What it counts for.
    pub charge: Charge,
}

/// An instance as it was seen, by placement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// What each placement's hypervisor says.
    pub vms: BTreeMap<u64, VmStatus>,
    /// No placement has anything left: seen after the record was wished absent.
    #[serde(default)]
    pub gone: bool,
}

/// A VM as it was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The revision that it follows.
    pub applied: Rev,
    /// How far it is.
    pub phase: Phase,
    /// What it is.
    pub is: VmObserved,
}

/// The state of an instance: derived from wish, decision and observation, never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Nothing has been seen of it yet.
    Pending,
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It is being stopped.
    Stopping,
    /// It is off.
    Stopped,
    /// It has ended by itself and shall run.
    Ended,
    /// It is being removed.
    Deleting,
    /// It does not converge; see the record's trouble.
    Degraded,
}

impl super::Record<Instance> {
    /// The state, derived.
    pub fn state(&self) -> InstanceState {
        if self.meta.absent.is_some() {
            return InstanceState::Deleting;
        }
        if self.meta.trouble.is_some() {
            return InstanceState::Degraded;
        }
        let life = self.status.vms.get(&self.bind.term.0).map(|vm| &vm.is.life);
        match (self.spec.power, life) {
            (Power::On, None) => InstanceState::Pending,
            (Power::On, Some(Life::On(boot))) if *boot == self.bind.boot => InstanceState::Running,
            (Power::On, Some(Life::Ended { boot, .. })) if *boot == self.bind.boot => InstanceState::Ended,
            (Power::On, Some(_)) => InstanceState::Starting,
            (Power::Off, None | Some(Life::Never | Life::Ended { .. })) => InstanceState::Stopped,
            (Power::Off, Some(_)) => InstanceState::Stopping,
        }
    }
}

/// A public key in OpenSSH's format, one line of at most 16 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyPairSpec(String);

impl KeyPairSpec {
    /// The key as OpenSSH writes it.
    pub fn public_key(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyPairSpec {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        let mut words = text.split_ascii_whitespace();
        let kind = words.next().unwrap_or_default();
        let known = kind.starts_with("ssh-") || kind.starts_with("ecdsa-") || kind.starts_with("sk-");
        let one_line = text.len() <= 16 << 10 && !text.contains(['\n', '\r', '\0']);
        if known && one_line && words.next().is_some() {
            return Ok(Self(text));
        }
        Err(Error::invalid("this is not an OpenSSH public key").remedy("give the one line of a `.pub` file"))
    }
}
impl From<KeyPairSpec> for String {
    fn from(spec: KeyPairSpec) -> Self {
        spec.0
    }
}
