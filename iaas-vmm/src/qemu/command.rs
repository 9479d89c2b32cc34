//! The command line of QEMU, from a complete spec and the numbers of descriptors. Pure.

use std::os::fd::RawFd;

use iaas_core::Mac;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::VmSpec;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// The processor, through KVM.
    Kvm,
    /// QEMU's translator: works everywhere, ten to twenty times slower.
    Tcg,
}

/// Everything that the command line depends on.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The VM.
    pub id: Uuid,
    /// Its spec.
    pub spec: &'a VmSpec,
    /// What runs it.
    pub accel: Accel,
    /// The monitor's socket.
    pub monitor: RawFd,
    /// The console's socket.
    pub console: RawFd,
    /// The kernel's file.
    pub kernel: Option<RawFd>,
    /// The initrd's file.
    pub initrd: Option<RawFd>,
    /// Disks and NICs in the order in which the guest shall find them.
    pub slots: Vec<Slot>,
}

/// A disk or NIC with its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The attachment.
    pub id: Uuid,
    /// Its place on the bus of its kind, 1 to [`PLACES`].
    pub place: u8,
    /// The socket's number.
    pub fd: RawFd,
    /// Which device.
    pub what: SlotKind,
}

/// A device of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// A disk over vhost-user, with its place in the boot order.
    Disk(Option<u8>),
    /// A NIC whose frames are datagrams.
    Nic(Mac),
}

/// Devices of one kind that a VM may have.
pub const PLACES: u8 = 31;

/// The arguments of QEMU.
pub fn arguments(machine: &Machine<'_>) -> Vec<String> {
    let mut args = Arguments::default();
    args.base(machine);
    args.origin(machine);
    // Devices come and go behind conventional bridges, by ACPI: with PCIe root ports a Linux guest boots 3 s later. Firmware
    // gives an empty bridge room for devices only if it has a hot-plug controller.
    args.two("-device", format!("pci-bridge,id={DISK_BUS},chassis_nr=1,bus=pcie.0,addr=0x3,shpc=on"));
    args.two("-device", format!("pci-bridge,id={NIC_BUS},chassis_nr=2,bus=pcie.0,addr=0x4,shpc=on"));
    for slot in &machine.slots {
        args.slot(slot);
    }
    args.two("-device", "virtio-rng-pci,bus=pcie.0,addr=0x2");
    args.0
}

/// The device id by which QEMU knows an attachment.
pub fn device_id(attachment: Uuid) -> String {
    format!("dev-{}", attachment.simple())
}

/// The attachment that QEMU knows by a device id.
pub fn attachment(device_id: &str) -> Option<Uuid> {
    Uuid::try_parse(device_id.strip_prefix("dev-")?).ok()
}

/// The id of the chardev or netdev behind it.
pub fn backend_id(attachment: Uuid) -> String {
    format!("back-{}", attachment.simple())
}

/// The driver and the properties by which QEMU makes the device of `slot`, whose backend exists.
pub fn device(slot: &Slot) -> Vec<(&'static str, String)> {
    let mut properties = vec![("id", device_id(slot.id)), ("addr", format!("{:#x}", slot.place))];
    match slot.what {
        SlotKind::Disk(boot) => {
            properties.extend([
                ("driver", "vhost-user-blk-pci".to_owned()),
                ("bus", DISK_BUS.to_owned()),
                ("chardev", backend_id(slot.id)),
                ("num-queues", "1".to_owned()),
            ]);
            properties.extend(boot.map(|n| ("bootindex", n.to_string())));
        }
        SlotKind::Nic(mac) => properties.extend([
            ("driver", "virtio-net-pci".to_owned()),
            ("bus", NIC_BUS.to_owned()),
            ("netdev", backend_id(slot.id)),
            ("mac", mac.to_string()),
            ("romfile", String::new()),
        ]),
    }
    // Modern only: no I/O ports, and nothing of the protocol's drafts.
    properties.push(("disable-legacy", "on".to_owned()));
    properties
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn one(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn two(&mut self, flag: &str, value: impl Into<String>) {
        self.0.extend([flag.to_owned(), value.into()]);
    }

    fn base(&mut self, machine: &Machine<'_>) {
        let spec = machine.spec;
        self.two("-name", format!("guest={},debug-threads=on", machine.id));
        self.two("-uuid", machine.id.to_string());
        self.two("-machine", "q35,memory-backend=mem,vmport=off,usb=off");
        let (accel, cpu) = match machine.accel {
            Accel::Kvm => ("kvm", "host"),
            Accel::Tcg => ("tcg,thread=multi", "max"),
        };
        self.two("-accel", accel);
        self.two("-cpu", cpu);
        self.two("-smp", spec.vcpus.to_string());
        self.two("-m", format!("size={}M", spec.memory >> 20));
        self.two("-object", format!("memory-backend-memfd,id=mem,size={},share=on", spec.memory));
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            self.one(flag);
        }
        self.two("-display", "none");
        self.two("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        self.two("-chardev", format!("socket,id=monitor,fd={}", machine.monitor));
        self.two("-mon", "chardev=monitor,mode=control");
        self.two("-chardev", format!("socket,id=console,fd={}", machine.console));
        self.two("-serial", "chardev:console");
        if matches!(spec.run, Run::Paused(_)) {
            self.one("-S");
        }
    }

    fn origin(&mut self, machine: &Machine<'_>) {
        let Origin::Kernel { cmdline, .. } = &machine.spec.origin else { return };
        // A descriptor's path opens the same file, read only, without a name in the file system.
        if let Some(fd) = machine.kernel {
            self.two("-kernel", format!("/proc/self/fd/{fd}"));
        }
        if let Some(fd) = machine.initrd {
            self.two("-initrd", format!("/proc/self/fd/{fd}"));
        }
        self.two("-append", cmdline.clone());
    }

    fn slot(&mut self, slot: &Slot) {
        let back = backend_id(slot.id);
        match slot.what {
            SlotKind::Disk(_) => self.two("-chardev", format!("socket,id={back},fd={}", slot.fd)),
            SlotKind::Nic(_) => {
                self.two("-netdev", format!("dgram,id={back},local.type=fd,local.str={}", slot.fd));
            }
        }
        let properties: Vec<String> =
            device(slot).into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        self.two("-device", properties.join(","));
    }
}

const DISK_BUS: &str = "disks";
const NIC_BUS: &str = "nics";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use iaas_core::Boot;
    use iaas_core::Digest;
    use iaas_core::Term;

    use super::*;

    #[test]
    fn qemu_opens_nothing_by_name() {
        let spec = VmSpec {
            term: Term(1),
            run: Run::On(Boot(1)),
            vcpus: 2,
            memory: 256 << 20,
            origin: Origin::Kernel { kernel: Digest([0; 32]), initrd: None, cmdline: "console=ttyS0".into() },
            devices: BTreeMap::new(),
            lease: None,
            metadata: None,
            passport: Bytes::new(),
        };
        let slots = vec![
            Slot { id: Uuid::from_u128(1), place: 1, fd: 20, what: SlotKind::Disk(Some(0)) },
            Slot { id: Uuid::from_u128(2), place: 1, fd: 21, what: SlotKind::Nic(Mac([2, 0, 0, 0, 0, 1])) },
        ];
        let machine = Machine {
            id: Uuid::nil(),
            spec: &spec,
            accel: Accel::Tcg,
            monitor: 10,
            console: 11,
            kernel: Some(12),
            initrd: None,
            slots,
        };
        let line = arguments(&machine).join(" ");
        for path in line.split([' ', ',', '=']).filter(|word| word.contains('/')) {
            assert!(path.starts_with("/proc/self/fd/"), "{path}");
        }
        for want in ["socket,id=monitor,fd=10", "fd=20", "local.str=21", "mac=02:00:00:00:00:01", "size=256M"]
        {
            assert!(line.contains(want), "{want} in {line}");
        }
        assert!(!line.contains("-initrd"));
        assert!(!line.contains("-S"));
    }
}
