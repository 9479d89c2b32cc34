//! The only unsafe code of the crate: system calls on guests' memory, one by one or through io_uring.
//!
//! A [`Job`] owns its buffers, and whoever runs it owns the job until the kernel is done with it.

#![expect(unsafe_code, reason = "raw memory handed to the kernel; the safety argument is at each block")]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;

use iaas_core::spi::dataplane::IoBuffers;
use io_uring::IoUring;
use io_uring::Probe;
use io_uring::opcode;
use io_uring::squeue;
use io_uring::types::Fd;
use io_uring::types::FsyncFlags;
use nix::fcntl::FallocateFlags;
use nix::libc;

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Reads into the buffers.
    Read,
    /// Writes the buffers.
    Write,
    /// `fdatasync`.
    Sync,
    /// Frees the space; it then reads as zeroes.
    Punch,
    /// Zeroes without freeing.
    Zero,
}

/// One operation on a file.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) verb: Verb,
    /// Where in the file.
    pub(crate) at: u64,
    /// Bytes; for a read or write at most those of the buffers after `skip`.
    pub(crate) len: u64,
    /// The memory of a read or write.
    pub(crate) buffers: Option<IoBuffers>,
    /// Where in the buffers.
    pub(crate) skip: usize,
}

impl Job {
    /// Runs it on this thread. Says how many bytes were moved, for a read or write.
    pub(crate) fn run(&self, file: &File, vectors: &mut Vectors) -> io::Result<usize> {
        let (at, len) = self.range()?;
        match self.verb {
            Verb::Read | Verb::Write => {
                vectors.fill(self);
                let count = libc::c_int::try_from(vectors.0.len()).map_err(invalid)?;
                let (fd, first) = (file.as_raw_fd(), vectors.0.as_ptr());
                // SAFETY: `first` points to `count` vectors, which name memory that `self.buffers` keeps mapped for the
                // length of the call; a guest's own accesses to it race with the kernel's copy, which `IoBuffers` allows.
                let moved = unsafe {
                    match self.verb {
                        Verb::Read => libc::preadv(fd, first, count, at),
                        _ => libc::pwritev(fd, first, count, at),
                    }
                };
                usize::try_from(moved).map_err(|_| io::Error::last_os_error())
            }
            Verb::Sync => nix::unistd::fdatasync(file).map(|()| 0).map_err(Into::into),
            Verb::Punch | Verb::Zero => {
                nix::fcntl::fallocate(file, self.verb.mode(), at, len).map(|()| 0).map_err(Into::into)
            }
        }
    }

    fn range(&self) -> io::Result<(i64, i64)> {
        Ok((i64::try_from(self.at).map_err(invalid)?, i64::try_from(self.len).map_err(invalid)?))
    }
}

impl Verb {
    fn mode(self) -> FallocateFlags {
        let how = if self == Self::Zero {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        };
        how | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }
}

/// Room for the vectors of a job, used again and again.
#[derive(Default)]
pub(crate) struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are only used by the kernel, while the job that they were made from keeps the memory mapped.
unsafe impl Send for Vectors {}

impl Vectors {
    /// The parts of the job's buffers that it moves.
    fn fill(&mut self, job: &Job) {
        self.0.clear();
        let ranges = job.buffers.as_ref().map_or(&[][..], IoBuffers::ranges);
        let mut skip = job.skip;
        let mut left = usize::try_from(job.len).unwrap_or(usize::MAX);
        for range in ranges {
            if skip >= range.len {
                skip -= range.len;
                continue;
            }
            let len = left.min(range.len - skip);
            if len == 0 {
                break;
            }
            // `skip` is below the range's length, so this stays inside it.
            self.0.push(libc::iovec { iov_base: range.base.wrapping_add(skip).cast(), iov_len: len });
            skip = 0;
            left -= len;
        }
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vectors({})", self.0.len())
    }
}

/// The most vectors of one system call.
pub(crate) const MAX_VECTORS: usize = 1024; // readv(2): IOV_MAX

/// An io_uring with the jobs that it has in hand. Dropping it waits for them.
pub(crate) struct Ring {
    ring: IoUring,
    file: Arc<File>,
    held: Vec<Held>,
    busy: usize,
    /// Pushed and not yet shown to the kernel.
    fresh: usize,
}

/// A job's place.
#[derive(Default)]
struct Held {
    job: Option<Job>,
    vectors: Vectors,
}

impl Ring {
    /// A ring for up to `depth` jobs on `file`; `event` becomes readable when one ends.
    pub(crate) fn new(depth: u16, file: Arc<File>, event: &impl AsRawFd) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(u32::from(depth).next_power_of_two())?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let held = (0..depth).map(|_| Held::default()).collect();
        Ok(Self { ring, file, held, busy: 0, fresh: 0 })
    }

    /// Takes `job` in hand at the free place `slot`.
    ///
    /// # Errors
    /// The job itself, with why it was not taken.
    pub(crate) fn push(&mut self, slot: u16, job: Job) -> Result<(), (Job, io::Error)> {
        if let Err(error) = job.range() {
            return Err((job, error));
        }
        let Some(held) = self.held.get_mut(usize::from(slot)).filter(|held| held.job.is_none()) else {
            return Err((job, io::ErrorKind::ResourceBusy.into()));
        };
        held.vectors.fill(&job);
        let entry = entry(&self.file, &job, &held.vectors).user_data(u64::from(slot));
        // SAFETY: the entry names the file, the vectors and the memory of the job. All three stay where they are, owned by
        // `self`, until its completion was seen: `held.job` is taken out only then, `vectors` are filled only when no job
        // is there, and `drop` waits for all.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err((job, io::ErrorKind::WouldBlock.into()));
        }
        held.job = Some(job);
        self.busy += 1;
        self.fresh += 1;
        Ok(())
    }

    /// Shows what was pushed to the kernel: one system call, or none.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while self.fresh > 0 {
            match self.ring.submit() {
                Ok(count) => self.fresh = self.fresh.saturating_sub(count.max(1)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Calls `ended` for each job that the kernel is done with.
    pub(crate) fn reap(&mut self, mut ended: impl FnMut(u16, Job, io::Result<usize>)) {
        for entry in self.ring.completion() {
            let Ok(slot) = u16::try_from(entry.user_data()) else { continue };
            let Some(job) = self.held.get_mut(usize::from(slot)).and_then(|held| held.job.take()) else {
                continue;
            };
            self.busy = self.busy.saturating_sub(1);
            let result = usize::try_from(entry.result());
            ended(slot, job, result.map_err(|_| io::Error::from_raw_os_error(-entry.result())));
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.busy > 0 {
            self.reap(|_, _, _| ());
            if self.busy == 0 {
                break;
            }
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => {
                    // The kernel may still use the memory: it is never given back.
                    std::mem::forget(std::mem::take(&mut self.held));
                    std::mem::forget(self.file.clone());
                    return;
                }
                _ => {}
            }
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} of {} busy)", self.busy, self.held.len())
    }
}

fn entry(file: &File, job: &Job, vectors: &Vectors) -> squeue::Entry {
    let fd = Fd(file.as_raw_fd());
    let count = u32::try_from(vectors.0.len()).unwrap_or(u32::MAX);
    match job.verb {
        Verb::Read => opcode::Readv::new(fd, vectors.0.as_ptr(), count).offset(job.at).build(),
        Verb::Write => opcode::Writev::new(fd, vectors.0.as_ptr(), count).offset(job.at).build(),
        Verb::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Verb::Punch | Verb::Zero => {
            opcode::Fallocate::new(fd, job.len).offset(job.at).mode(job.verb.mode().bits()).build()
        }
    }
}

/// Whether io_uring can be used here with all that we need of it: it may be missing, switched off or forbidden.
pub(crate) fn has_uring() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let Ok(ring) = IoUring::new(2) else { return false };
        let mut probe = Probe::new();
        let needs = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        ring.submitter().register_probe(&mut probe).is_ok()
            && needs.iter().all(|code| probe.is_supported(*code))
    })
}

fn invalid<E>(_: E) -> io::Error {
    io::ErrorKind::InvalidInput.into()
}
