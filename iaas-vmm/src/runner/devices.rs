//! The disks and NICs of a VM: two-stage opening, and what serves each to QEMU.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::process::NamedFds;
use iaas_core::process::Roles;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use uuid::Uuid;

use super::pump::Pump;
use crate::qemu::command::SlotKind;
use crate::virtio::vhost_user::DiskServer;

/// A device that is open in this process.
#[derive(Debug)]
pub struct Attached {
    /// What was asked for.
    pub device: Device,
    /// Its place on the bus of its kind.
    pub place: u8,
    /// How it is.
    pub state: DeviceState,
    opened: Opened,
}

#[derive(Debug)]
enum Opened {
    // In this order: the server gives every operation back before the volume goes.
    Disk { server: DiskServer, volume: Box<dyn BlockDevice> },
    Nic(Pump),
}

impl Attached {
    /// Opens `device` and gives QEMU's end of it.
    ///
    /// # Errors
    /// `Unsupported`: no opener knows the target. Those of the opener.
    pub fn open(
        roles: &Roles,
        (id, device, place): (Uuid, &Device, u8),
        grant: Grant,
        scratch: &Path,
    ) -> Result<(Self, OwnedFd)> {
        let env = Env { runtime: Some(scratch.to_owned()) };
        let (opened, fd) = match device {
            Device::Disk { target, .. } => {
                let volume = block_opener(roles, target)?.open(target, grant, None, &env)?;
                // A serial has 20 bytes; the end of a UUID tells more apart than its beginning.
                let name = id.simple().to_string();
                let serial = name.get(12..).unwrap_or(&name);
                let (server, fd) = DiskServer::start(volume.as_ref(), serial, scratch)?;
                (Opened::Disk { server, volume }, fd)
            }
            Device::Nic { target, .. } => {
                let ports = port_opener(roles, target)?.open(target, grant, &env)?;
                let port = ports.into_iter().next();
                let port = port.ok_or_else(|| Error::internal("an opener of ports opened none"))?;
                let (pump, fd) = Pump::start(port)?;
                (Opened::Nic(pump), fd)
            }
            Device::Share { .. } | Device::HostDevice { .. } => return Err(unknown_device()),
        };
        Ok((Self { device: device.clone(), place, state: DeviceState::Plugging, opened }, fd))
    }

    /// How the device is: a disk whose driver broke the protocol has failed.
    pub fn state(&self) -> DeviceState {
        match &self.opened {
            Opened::Disk { server, .. } => match server.fault() {
                Some(fault) => DeviceState::Failed(
                    Error::conflict("the guest's driver broke the disk's protocol").detail(fault),
                ),
                None => self.state.clone(),
            },
            Opened::Nic(_) => self.state.clone(),
        }
    }

    /// What the NIC has moved, if it is one.
    pub fn pump(&self) -> Option<&Pump> {
        match &self.opened {
            Opened::Nic(pump) => Some(pump),
            Opened::Disk { .. } => None,
        }
    }

    /// Ends the device when nobody uses it any more, and gives a volume's claim back.
    pub fn close(self) {
        match self.opened {
            Opened::Nic(pump) => drop(pump),
            Opened::Disk { server, volume } => {
                drop(server);
                if is_writer(&self.device)
                    && let Err(error) = volume.release()
                {
                    tracing::warn!(%error, "a volume was not given back cleanly");
                }
            }
        }
    }
}

/// What QEMU makes of a device.
///
/// # Errors
/// `Unsupported`: it is neither a disk nor a NIC.
pub fn slot_kind(device: &Device) -> Result<SlotKind> {
    match device {
        Device::Disk { boot, .. } => Ok(SlotKind::Disk(*boot)),
        Device::Nic { mac, .. } => Ok(SlotKind::Nic(*mac)),
        Device::Share { .. } | Device::HostDevice { .. } => Err(unknown_device()),
    }
}

/// Whether two devices are the same thing, however they are opened.
pub fn same(one: &Device, other: &Device) -> bool {
    match (one, other) {
        (Device::Disk { target: a, .. }, Device::Disk { target: b, .. }) => a.same(b),
        (Device::Nic { target: a, mac: x }, Device::Nic { target: b, mac: y }) => a.same(b) && x == y,
        _ => one == other,
    }
}

/// Stage one for every device: opens what the role needs, in the process of the provider. Names say to whom it belongs.
///
/// # Errors
/// `Unsupported`: no opener knows a target. Those of the openers.
pub fn prepare<'a>(
    roles: &Roles,
    devices: impl IntoIterator<Item = (&'a Uuid, &'a Device)>,
) -> Result<NamedFds> {
    let mut fds = NamedFds::new();
    for (id, device) in devices {
        let grant = match device {
            Device::Disk { target, .. } => block_opener(roles, target)?.prepare(target)?,
            Device::Nic { target, .. } => port_opener(roles, target)?.prepare(target)?,
            Device::Share { .. } | Device::HostDevice { .. } => return Err(unknown_device()),
        };
        fds.extend(grant.fds.into_iter().map(|(name, fd)| (format!("fd/{id}/{name}"), fd)));
        let dirs = grant.dirs.into_iter().enumerate();
        fds.extend(dirs.map(|(n, (fd, writable))| (format!("dir/{id}/{n:04}/{writable}"), fd)));
    }
    Ok(fds)
}

/// Refuses devices that no opener of ours knows, without opening anything.
///
/// # Errors
/// `Unsupported`: one of them.
pub fn check<'a>(roles: &Roles, devices: impl IntoIterator<Item = &'a Device>) -> Result<()> {
    devices.into_iter().try_for_each(|device| match device {
        Device::Disk { target, .. } => block_opener(roles, target).map(drop),
        Device::Nic { target, .. } => port_opener(roles, target).map(drop),
        Device::Share { .. } | Device::HostDevice { .. } => Err(unknown_device()),
    })
}

/// The grant of one device, out of what [`prepare`] made.
pub fn grant_of(fds: &mut BTreeMap<String, OwnedFd>, id: Uuid) -> Grant {
    let mut grant = Grant::default();
    let (file, dir) = (format!("fd/{id}/"), format!("dir/{id}/"));
    let ours: Vec<String> =
        fds.keys().filter(|n| n.starts_with(&file) || n.starts_with(&dir)).cloned().collect();
    for name in ours {
        let Some(fd) = fds.remove(&name) else { continue };
        match name.strip_prefix(&file) {
            Some(short) => drop(grant.fds.insert(short.to_owned(), fd)),
            None => grant.dirs.push((fd, name.ends_with("/true"))),
        }
    }
    grant
}

/// Schemes and versions that this binary opens.
pub fn accepts(roles: &Roles) -> Vec<(String, u16)> {
    let block = roles.block.iter().map(|opener| opener.scheme());
    let port = roles.port.iter().map(|opener| opener.scheme());
    block.chain(port).map(|(scheme, version)| (scheme.to_owned(), version)).collect()
}

fn block_opener<'a>(roles: &'a Roles, target: &Target) -> Result<&'a Arc<dyn BlockOpener>> {
    no_key(target)?;
    first_known(target, |scheme| roles.block.iter().find(|opener| opener.scheme() == scheme))
}

fn port_opener<'a>(roles: &'a Roles, target: &Target) -> Result<&'a Arc<dyn PortOpener>> {
    no_key(target)?;
    first_known(target, |scheme| roles.port.iter().find(|opener| opener.scheme() == scheme))
}

fn first_known<T>(target: &Target, know: impl Fn((&str, u16)) -> Option<T>) -> Result<T> {
    let opener = target.forms.iter().find_map(|form| match form {
        Form::Opener { scheme, version, .. } => know((scheme, *version)),
        _ => None,
    });
    opener.ok_or_else(|| {
        Error::unsupported("this host cannot open a disk or port of that kind")
            .remedy("give an opener of its scheme to the program's roles")
            .detail(format!("{:?}", target.forms.iter().map(name_of).collect::<Vec<_>>()))
    })
}

fn name_of(form: &Form) -> String {
    match form {
        Form::Opener { scheme, version, .. } => format!("{scheme}/{version}"),
        Form::RawFile(_) => "raw file".into(),
        Form::BlockNode(_) => "block node".into(),
        _ => "foreign".into(),
    }
}

fn no_key(target: &Target) -> Result<()> {
    match target.key {
        Some(_) => Err(Error::unsupported("this hypervisor does not open encrypted volumes yet")),
        None => Ok(()),
    }
}

fn is_writer(device: &Device) -> bool {
    matches!(device, Device::Disk { target, .. } if target.mode == Mode::Write)
}

fn unknown_device() -> Error {
    Error::unsupported("this hypervisor attaches disks and NICs only")
}
