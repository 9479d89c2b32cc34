//! Block storage of the IaaS SDK: volumes with one fenced writer, opened in the process that uses them.
//!
//! # Core concepts
//! * [`RawPool`]: volumes as sparse raw files in one folder. [`RawAccess`]: which of them a host may open.
//! * [`opener`]: the two-stage way from a target to a [`BlockDevice`](iaas_core::spi::dataplane::BlockDevice). Stage one
//!   opens files in the host's process, stage two runs in the process that uses the volume, from descriptors alone.
//! * One writer: a higher term takes over. The older writer hears of it, ends its operations and gives the volume up; none
//!   of its later writes or flushes succeeds, in this process or another.
//!
//! Each queue of a device is used by one thread and moves a batch with one system call (io_uring), or hands it to a few
//! threads of its own where io_uring is missing. Data goes directly to the disk where the file system allows; buffers that a
//! disk cannot take are copied, at most 16 MiB at a time.
//!
//! # What it does not do
//! Snapshots, clones, encryption and limits on raw files: capabilities say so.

pub mod bench;
mod raw;
pub mod rawio;
mod sys;

pub use raw::access::RawAccess;
pub use raw::device::IoEngine;
pub use raw::opener::RawOpener;
pub use raw::pool::RawPool;

/// The opener of raw volumes, to be given to [`Roles`](iaas_core::process::Roles).
pub fn opener() -> RawOpener {
    RawOpener::default()
}
