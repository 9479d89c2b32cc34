//! A TAP device: made for all machines, and a port on it for ours.

#![expect(unsafe_code, reason = "a TAP is set up by ioctls that nobody wraps")]

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use nix::libc;

// Linux `include/uapi/linux/if_tun.h`.
mod call {
    nix::ioctl_write_ptr_bad!(set_name, 0x4004_54ca, nix::libc::ifreq);
    nix::ioctl_write_int_bad!(set_persistent, 0x4004_54cb);
    nix::ioctl_write_int_bad!(set_offloads, 0x4004_54d0);
    nix::ioctl_write_ptr_bad!(set_header, 0x4004_54d8, nix::libc::c_int);
}

/// Makes a device that stays.
///
/// # Errors
/// Those of the kernel.
pub(crate) fn make(name: &str) -> io::Result<()> {
    let file = attach(name)?;
    // SAFETY: `TUNSETPERSIST` takes a number and touches no memory of ours.
    unsafe { call::set_persistent(file.as_raw_fd(), 1) }?;
    Ok(())
}

/// The port of a machine.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
    frame: Vec<u8>,
}

impl Tap {
    /// Takes the end of device `name` that a machine has.
    ///
    /// # Errors
    /// Those of the kernel; another machine has it.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let file = attach(name)?;
        let header = libc::c_int::try_from(VNET_HEADER).map_err(io::Error::other)?;
        // SAFETY: `TUNSETVNETHDRSZ` reads one int, which lives until the call returns.
        unsafe { call::set_header(file.as_raw_fd(), &raw const header) }?;
        Ok(Self { file, frame: vec![0; FRAME_MAX] })
    }
}

impl FramePort for Tap {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        let flags = if want.checksum { CHECKSUM } else { 0 };
        // SAFETY: `TUNSETOFFLOAD` takes a number and touches no memory of ours.
        let set = unsafe { call::set_offloads(self.file.as_raw_fd(), flags) };
        Offloads { checksum: want.checksum && set.is_ok(), ..Offloads::default() }
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let mut count = 0;
        while let (Some(buffers), Some(len)) = (into.get_mut(count), lens.get_mut(count)) {
            let got = match self.file.read(&mut self.frame) {
                Ok(got) => got,
                Err(error) if count == 0 => return Err(error),
                Err(_) => break,
            };
            if got <= buffers.len() {
                buffers.write_at(0, self.frame.get(..got).unwrap_or_default());
                *len = u32::try_from(got).unwrap_or(u32::MAX);
                count += 1;
            }
        }
        Ok(count)
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for (n, frame) in frames.iter().enumerate() {
            let len = frame.read_at(0, &mut self.frame);
            match self.file.write(self.frame.get(..len).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && n == 0 => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(n),
                // A frame that the kernel does not take is lost, as on a wire.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(frames.len())
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A descriptor of the device `name`, which is made if it is not there.
fn attach(name: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
                .map_err(io::Error::other)?,
        },
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::other(format!("`{name}` is too long for a device")));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    // SAFETY: `TUNSETIFF` reads and writes one `ifreq`, which lives until the call returns; its name ends with a zero.
    unsafe { call::set_name(file.as_raw_fd(), &raw const request) }?;
    Ok(file)
}

/// `TUN_F_CSUM`.
const CHECKSUM: libc::c_int = 1;
const FRAME_MAX: usize = VNET_HEADER + (64 << 10);
