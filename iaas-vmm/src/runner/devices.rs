//! The disks and NICs of a VM: opened in two stages, the second of them here.

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
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use uuid::Uuid;

/// A device that is open in this process.
#[derive(Debug)]
pub struct Attached {
    /// What was asked for.
    pub device: Device,
    /// How it is.
    pub state: DeviceState,
    opened: Opened,
}

#[derive(Debug)]
enum Opened {
    Disk(Box<dyn BlockDevice>),
    /// `None` once the guest has it.
    Nic(Option<Box<dyn FramePort>>),
}

impl Attached {
    /// Opens `device`.
    ///
    /// # Errors
    /// `Unsupported`: no opener knows the target. Those of the opener.
    pub fn open(roles: &Roles, device: &Device, grant: Grant, scratch: &Path) -> Result<Self> {
        let env = Env { runtime: Some(scratch.to_owned()) };
        let opened = match device {
            Device::Disk { target, .. } => {
                Opened::Disk(block_opener(roles, target)?.open(target, grant, None, &env)?)
            }
            Device::Nic { target, .. } => {
                let port = port_opener(roles, target)?.open(target, grant, &env)?.into_iter().next();
                Opened::Nic(Some(port.ok_or_else(|| Error::internal("an opener of ports opened none"))?))
            }
            Device::Share { .. } | Device::HostDevice { .. } => return Err(unknown_device()),
        };
        Ok(Self { device: device.clone(), state: DeviceState::Plugging, opened })
    }

    /// The volume of a disk, which is open until [`close`](Self::close).
    ///
    /// # Errors
    /// `Internal`: it is no disk.
    pub fn volume(&self) -> Result<&dyn BlockDevice> {
        match &self.opened {
            Opened::Disk(volume) => Ok(volume.as_ref()),
            Opened::Nic(_) => Err(Error::internal("a NIC has no volume")),
        }
    }

    /// The port of a NIC, for the one who serves it to the guest.
    ///
    /// # Errors
    /// `Internal`: it is no NIC, or somebody has its port.
    pub fn take_port(&mut self) -> Result<Box<dyn FramePort>> {
        match &mut self.opened {
            Opened::Nic(port) => port.take().ok_or_else(|| Error::internal("a port was taken twice")),
            Opened::Disk(_) => Err(Error::internal("a disk has no port")),
        }
    }

    /// Ends the device, which nobody serves any more, and gives a volume's claim back.
    pub fn close(self) {
        if let Opened::Disk(volume) = self.opened
            && is_writer(&self.device)
            && let Err(error) = volume.release()
        {
            tracing::warn!(%error, "a volume was not given back cleanly");
        }
    }
}

/// The serial number of a disk. It has 20 bytes; the end of a UUID tells more apart than its beginning.
pub fn serial(attachment: Uuid) -> String {
    let name = attachment.simple().to_string();
    name.get(12..).unwrap_or(&name).to_owned()
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
