//! Guest memory as it crosses the data-plane seams: ranges of bytes and an owner that keeps them mapped.
//!
//! This is the only unsafe code of the crate. Memory that a guest can write at any moment must never be seen as `&[u8]`:
//! every access here is a copy through raw pointers.

#![expect(unsafe_code, reason = "raw ranges of guest memory; the safety argument is at each block")]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A range of memory in this process: `iovec` with its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoRange {
    /// The first byte.
    pub base: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// Ranges of memory, with what keeps them mapped.
pub struct IoBuffers {
    ranges: Vec<IoRange>,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the ranges are plain addresses; whoever made the buffers promised that they stay valid and may be accessed from
// any thread while `owner` lives (`from_raw`), and every access is a copy, never a reference.
unsafe impl Send for IoBuffers {}
// SAFETY: as above; `&IoBuffers` gives only copies.
unsafe impl Sync for IoBuffers {}

impl IoBuffers {
    /// Makes buffers from raw ranges.
    ///
    /// # Safety
    /// While `owner` lives, each range must be mapped readable and writable in this process, and accesses to it that race
    /// with others' (a guest's) must be harmless: no Rust reference to these bytes may exist anywhere.
    pub unsafe fn from_raw(ranges: Vec<IoRange>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { ranges, owner }
    }

    /// Buffers of `len` zeroed bytes of our own.
    pub fn zeroed(len: usize) -> Self {
        // 4 KiB alignment, so that they also serve direct I/O.
        let words = len.div_ceil(4096);
        let owned = Arc::new(Pages::new(words));
        let base = owned.base();
        Self { ranges: vec![IoRange { base, len }], owner: owned }
    }

    /// Buffers of our own with these bytes.
    pub fn copied(bytes: &[u8]) -> Self {
        let buffers = Self::zeroed(bytes.len());
        buffers.write_at(0, bytes);
        buffers
    }

    /// The ranges, for system calls such as `preadv`.
    pub fn ranges(&self) -> &[IoRange] {
        &self.ranges
    }

    /// What keeps the ranges mapped.
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(|r| r.len).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes from offset `at` into `out`; says how many there were.
    pub fn read_at(&self, at: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.walk(at, out.len(), |base, len| {
            // SAFETY: `walk` gives parts of ranges that are mapped while `self.owner` lives; `out` is ours and apart.
            unsafe { std::ptr::copy_nonoverlapping(base, out[done..].as_mut_ptr(), len) };
            done += len;
        });
        done
    }

    /// Copies `bytes` to offset `at`; says how many fit.
    pub fn write_at(&self, at: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        self.walk(at, bytes.len(), |base, len| {
            // SAFETY: as in `read_at`, with the direction turned.
            unsafe { std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), base, len) };
            done += len;
        });
        done
    }

    /// Sets every byte to zero.
    pub fn fill_zero(&self) {
        self.walk(0, self.len(), |base, len| {
            // SAFETY: as in `read_at`.
            unsafe { std::ptr::write_bytes(base, 0, len) };
        });
    }

    /// Calls `part` with the pieces of ranges from offset `at`, `want` bytes at most.
    fn walk(&self, mut at: usize, mut want: usize, mut part: impl FnMut(*mut u8, usize)) {
        for range in &self.ranges {
            if at >= range.len {
                at -= range.len;
                continue;
            }
            let len = want.min(range.len - at);
            if len == 0 {
                return;
            }
            // SAFETY: `at < range.len`, so the sum stays inside the range.
            part(unsafe { range.base.add(at) }, len);
            want -= len;
            at = 0;
        }
    }
}

impl fmt::Debug for IoBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuffers({} bytes in {} ranges)", self.len(), self.ranges.len())
    }
}

/// Page-aligned memory of our own.
struct Pages(std::cell::UnsafeCell<Box<[Page]>>);

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; 4096]);

// SAFETY: the bytes are reached only through the raw ranges of `IoBuffers`, whose accesses are copies.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(pages: usize) -> Self {
        Self(std::cell::UnsafeCell::new(vec![Page([0; 4096]); pages].into_boxed_slice()))
    }

    fn base(&self) -> *mut u8 {
        // SAFETY: called once, before any range is handed out; the reference ends here.
        unsafe { (*self.0.get()).as_mut_ptr().cast() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_cross_the_borders_of_ranges() {
        let whole = IoBuffers::copied(b"abcdef");
        let base = whole.ranges()[0].base;
        let parts = vec![IoRange { base, len: 2 }, IoRange { base: base.wrapping_add(2), len: 4 }];
        // SAFETY: the ranges lie in `whole`, whose owner is passed on.
        let split = unsafe { IoBuffers::from_raw(parts, whole.owner().clone()) };
        let mut out = [0; 4];
        assert_eq!(split.read_at(1, &mut out), 4);
        assert_eq!(&out, b"bcde");
        assert_eq!(split.write_at(5, b"xyz"), 1);
        assert_eq!(whole.read_at(5, &mut out), 1);
        assert_eq!(out[0], b'x');
    }

    #[test]
    fn our_own_buffers_are_aligned_for_direct_io() {
        assert_eq!(IoBuffers::zeroed(5000).ranges()[0].base.addr() % 4096, 0);
        assert_eq!(IoBuffers::zeroed(0).len(), 0);
    }
}
