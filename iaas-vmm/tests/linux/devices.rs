//! Devices in the hands of the kernel's own drivers: a disk, randomness, and a cable between two guests.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::hypervisor::End;
use nix::sys::eventfd::EfdFlags;
use nix::sys::eventfd::EventFd;

use crate::rig::Console;
use crate::rig::LONG;
use crate::rig::linux;
use crate::rig::need_guest;
use crate::rig::volume;

#[test]
fn a_guest_uses_a_disk_a_nic_and_randomness_and_survives_pauses() {
    let folder = need_guest!("a_guest_uses_a_disk_a_nic_and_randomness_and_survives_pauses");
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let volume = volume(file.path());
    let (left, right) = cable();
    let line = |n: u8| format!("quiet guest.run=shell guest.ip4=10.0.0.{n}/24");
    let one = linux(&folder, "initrd.cpio.gz", &line(1))
        .with_disk(&*volume, "data")
        .with_nic(left, [2, 0, 0, 0, 0, 1])
        .with_entropy();
    let one = one.build().unwrap();
    let two = linux(&folder, "initrd.cpio.gz", &line(2)).with_nic(right, [2, 0, 0, 0, 0, 2]).build().unwrap();
    [&one, &two].into_iter().for_each(|vm| vm.start().unwrap());
    let mut first = Console::when_ready(&one);
    Console::when_ready(&two);
    assert_eq!(first.ask("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0");
    first.run("head -c 4 /dev/hwrng > /tmp/r");
    assert_eq!(first.ask("cat /sys/block/vda/serial; echo"), "data");
    first.run("seq 1 100000 > /tmp/n; dd if=/tmp/n of=/dev/vda bs=64k conv=fsync");
    let read_back = "echo 3 > /proc/sys/vm/drop_caches; head -c $(stat -c %s /tmp/n) /dev/vda";
    first.run(&format!("{read_back} | busybox cmp - /tmp/n"));
    let mut written = vec![0; 20];
    file.as_file().read_exact_at(&mut written, 0).unwrap();
    assert_eq!(written, b"1\n2\n3\n4\n5\n6\n7\n8\n9\n10"[..20]);
    first.send("ping -c 3 10.0.0.2");
    first.line("3 packets received");
    first.done();
    first.send("ping -c 20 -i 0.2 10.0.0.2");
    for _ in 0..20 {
        one.pause().unwrap();
        one.start().unwrap();
    }
    first.line("20 packets received");
    assert_eq!(two.stop(LONG), End::Stopped);
    assert_eq!((one.device_faults(), two.device_faults()), (vec![], vec![]));
    assert_eq!(one.kill(), End::Forced);
}

/// One end of a cable.
#[derive(Debug)]
struct Plug {
    inward: Arc<Lane>,
    outward: Arc<Lane>,
}

#[derive(Debug)]
struct Lane(Mutex<VecDeque<Vec<u8>>>, EventFd);

pub(crate) fn cable() -> (Box<dyn FramePort>, Box<dyn FramePort>) {
    let lane = || Arc::new(Lane(Mutex::default(), EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()));
    let (one, two) = (lane(), lane());
    let end = |inward: &Arc<Lane>, outward: &Arc<Lane>| {
        Box::new(Plug { inward: inward.clone(), outward: outward.clone() })
    };
    (end(&one, &two), end(&two, &one))
}

impl FramePort for Plug {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        want
    }
    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let _ = self.inward.1.read();
        let mut frames = self.inward.0.lock().unwrap();
        let mut count = 0;
        for (buffers, len) in into.iter().zip(lens) {
            let Some(frame) = frames.pop_front() else { break };
            *len = u32::try_from(buffers.write_at(0, &frame)).unwrap();
            count += 1;
        }
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }
    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        for frame in frames {
            let mut bytes = vec![0; frame.len()];
            frame.read_at(0, &mut bytes);
            self.outward.0.lock().unwrap().push_back(bytes);
        }
        self.outward.1.write(1).unwrap();
        Ok(frames.len())
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.inward.1.as_fd()
    }
}
