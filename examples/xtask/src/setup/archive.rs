//! A cpio archive in memory, in the `newc` format that the kernel unpacks as its initramfs.
//!
//! Written here because it lets an ordinary user pack a root-owned tree with a device node in it, the same bytes each time.

/// An archive that grows by [`dir`](Self::dir), [`file`](Self::file), [`symlink`](Self::symlink) and [`device`](Self::device).
/// A folder must be added before what it holds.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder, mode 0755.
    pub(crate) fn dir(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[], (0, 0));
    }

    /// Adds a file with the given permission bits.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | permissions, content, (0, 0));
    }

    /// Adds a symbolic link at `path` to `target`.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, 0o120_777, target.as_bytes(), (0, 0));
    }

    /// Adds a character device, mode 0600.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, 0o020_600, &[], (major, minor));
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    // Linux Documentation/driver-api/early-userspace/buffer-format.rst: magic, then 13 fields of 8 hexadecimal digits, the
    // name with its NUL, padding to 4 bytes, the content, padding to 4 bytes.
    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let (size, name_size) = (narrow(content.len()), narrow(path.len() + 1));
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Sizes here are of files that we pack, far below 4 GiB; a larger one gives an archive that the kernel refuses.
fn narrow(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_layout_that_the_kernel_reads() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, b"hello");
        let bytes = archive.finish();
        let header = String::from_utf8_lossy(&bytes[..110]).into_owned();
        assert_eq!(&header[..6], "070701");
        assert_eq!(&header[14..22], "000081a4", "regular file, mode 0644");
        assert_eq!(&header[54..62], "00000005", "five bytes");
        assert_eq!(&header[94..102], "00000002", "name and its NUL");
        // 110 + 2 is a multiple of 4 already: the content follows the name at once, padded to 120.
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn device_nodes_carry_their_numbers() {
        let mut archive = Archive::default();
        archive.device("dev/console", 5, 1);
        let header = String::from_utf8_lossy(&archive.finish()[..110]).into_owned();
        assert_eq!(&header[78..94], "0000000500000001");
    }
}
