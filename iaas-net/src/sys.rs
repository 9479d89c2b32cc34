//! Memory shared with another process: the only unsafe code of the crate.
//!
//! Whoever is at the other end may change any byte at any moment. So no Rust reference to the mapped bytes ever exists:
//! numbers are read and written as atomics, and everything else is copied.

#![expect(unsafe_code, reason = "mmap and raw copies; the safety argument is at each block")]

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use iaas_core::spi::dataplane::IoBuffers;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;

/// A shared, writable mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain shared memory that lives until `drop`; every access goes through the methods below, which
// are atomic or copy, so threads are no worse than the process at the other end.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`.
    ///
    /// The caller has made sure that the file cannot become shorter while it is mapped: a sealed memfd, or a file that only
    /// this crate writes. Else an access could end the process with SIGBUS; it could do nothing worse.
    pub(crate) fn new(file: impl AsFd, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Reads the number at `at`. Acts as a full barrier together with [`store`](Self::store).
    pub(crate) fn load(&self, at: usize) -> u64 {
        self.number(at).map_or(0, |n| n.load(Ordering::SeqCst))
    }

    /// Writes the number at `at`.
    pub(crate) fn store(&self, at: usize, value: u64) {
        if let Some(n) = self.number(at) {
            n.store(value, Ordering::SeqCst);
        }
    }

    /// Adds to the number at `at` and returns what it was.
    pub(crate) fn add(&self, at: usize, more: u64) -> u64 {
        self.number(at).map_or(0, |n| n.fetch_add(more, Ordering::SeqCst))
    }

    /// Copies from `at` into `out`; says whether all of it lies in the mapping.
    #[cfg(test)]
    fn read(&self, at: usize, out: &mut [u8]) -> bool {
        let Some(from) = self.place(at, out.len()) else { return false };
        // SAFETY: `place` checked that the bytes are mapped; `out` is ours and apart from any mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        true
    }

    /// Appends `len` bytes from `at` to `out`; says whether all of them lie in the mapping.
    pub(crate) fn append(&self, at: usize, len: usize, out: &mut Vec<u8>) -> bool {
        let Some(from) = self.place(at, len) else { return false };
        out.reserve(len);
        let end = out.len();
        // SAFETY: `place` checked the source; `reserve` made room for `len` bytes behind `end`, which the copy fills
        // before `set_len` counts them.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr().add(end), len);
            out.set_len(end + len);
        }
        true
    }

    /// Copies `bytes` to `at`; says whether all of it lies in the mapping.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> bool {
        let Some(to) = self.place(at, bytes.len()) else { return false };
        // SAFETY: as in `read`, with the direction turned.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        true
    }

    /// Copies `len` bytes from `at` to offset `offset` of `buffers`; says whether they lie in the mapping and fitted.
    pub(crate) fn read_to(&self, at: usize, len: usize, buffers: &IoBuffers, offset: usize) -> bool {
        let Some(from) = self.place(at, len) else { return false };
        let mut done = 0;
        each(buffers, offset, len, |guest, part| {
            // SAFETY: `from` has `len` mapped bytes and `done + part <= len`; the guest's range is mapped while `buffers`
            // keeps its owner. Both may race with foreign writers, which changes the bytes and nothing else. `copy`, not
            // `copy_nonoverlapping`: a port of this very process may lend its own ring.
            unsafe { std::ptr::copy(from.as_ptr().add(done), guest, part) };
            done += part;
        });
        done == len
    }

    /// Copies `len` bytes from offset `offset` of `buffers` to `at`; says whether they lie in the mapping and were there.
    pub(crate) fn write_from(&self, at: usize, len: usize, buffers: &IoBuffers, offset: usize) -> bool {
        let Some(to) = self.place(at, len) else { return false };
        let mut done = 0;
        each(buffers, offset, len, |guest, part| {
            // SAFETY: as in `read_to`, with the direction turned.
            unsafe { std::ptr::copy(guest, to.as_ptr().add(done), part) };
            done += part;
        });
        done == len
    }

    fn number(&self, at: usize) -> Option<&AtomicU64> {
        let place = self.place(at, 8).filter(|_| at.is_multiple_of(8))?;
        // SAFETY: mapped while `self` lives and aligned, for the mapping begins at a page. An atomic may be shared with
        // other processes, and no plain access to it exists.
        Some(unsafe { AtomicU64::from_ptr(place.as_ptr().cast()) })
    }

    /// The address of `at`, if `len` bytes from there are mapped.
    fn place(&self, at: usize, len: usize) -> Option<NonNull<u8>> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        // SAFETY: `at` is at most `self.len`, so the sum stays inside the mapping or one past its end.
        inside.then(|| unsafe { self.base.add(at) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Calls `part` with the pieces of `buffers` from offset `at`, `want` bytes at most.
fn each(buffers: &IoBuffers, mut at: usize, mut want: usize, mut part: impl FnMut(*mut u8, usize)) {
    for range in buffers.ranges() {
        if at >= range.len {
            at -= range.len;
            continue;
        }
        let len = want.min(range.len - at);
        if len == 0 {
            return;
        }
        part(range.base.wrapping_add(at), len);
        want -= len;
        at = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping() -> Mapping {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Mapping::new(&file, 4096).unwrap()
    }

    #[test]
    fn nothing_outside_the_mapping_is_touched() {
        let map = mapping();
        let mut out = [0; 16];
        assert!(map.read(4080, &mut out) && !map.read(4081, &mut out) && !map.read(usize::MAX, &mut out));
        assert!(!map.write(4090, &[0; 8]) && !map.append(4096, 1, &mut Vec::new()));
        assert!(!map.read_to(4090, 8, &IoBuffers::zeroed(8), 0));
        map.store(4092, 7);
        map.store(4096, 7);
        assert_eq!((map.load(4088), map.load(4096)), (0, 0));
    }

    #[test]
    fn copies_cross_the_borders_of_guest_ranges() {
        let map = mapping();
        let whole = IoBuffers::copied(b"abcdefgh");
        let base = whole.ranges()[0].base;
        let range =
            |at: usize, len| iaas_core::spi::dataplane::buffer::IoRange { base: base.wrapping_add(at), len };
        // SAFETY: the ranges lie in `whole`, whose owner is passed on.
        let parts = unsafe { IoBuffers::from_raw(vec![range(5, 3), range(0, 4)], whole.owner().clone()) };
        assert!(map.write_from(8, 5, &parts, 1));
        let mut out = [0; 5];
        assert!(map.read(8, &mut out));
        assert_eq!(&out, b"ghabc");
        assert!(!map.write_from(8, 7, &parts, 1), "there are only six bytes behind the first");
        map.write(100, b"XYZ");
        assert!(map.read_to(100, 3, &parts, 2));
        assert_eq!(whole.read_at(0, &mut out), 5);
        assert_eq!(&out, b"YZcde");
    }
}
