//! The hypervisor of one host: a runner process per VM, which supervises QEMU and serves the VM's disks and NICs itself.

pub mod memory;
pub mod virtio;
