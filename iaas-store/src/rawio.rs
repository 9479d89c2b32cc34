//! The file operations on which volumes' records rest, as a trait: tests put a disk behind it that loses power.
//!
//! Only what decides about consistency goes through here: names, records, sizes, syncs, locks. Guests' bytes do not.

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "a disk of a few kilobytes")]
pub(crate) mod sim;

use std::fmt::Debug;
use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::FcntlArg;
use nix::libc;

/// A folder of files. What changes names is durable after [`sync`](Self::sync).
pub trait RawFolder: Debug + Send + Sync + 'static {
    /// Opens a file to read and write.
    fn open(&self, name: &str) -> io::Result<Arc<dyn RawFile>>;

    /// Makes a file that must not exist, private to this user.
    fn create(&self, name: &str) -> io::Result<Arc<dyn RawFile>>;

    /// Gives a file another name, in place of a file that has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Takes a name away.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// The names, in no order.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;
}

/// An open file. What changes it is durable after [`sync`](Self::sync).
pub trait RawFile: Debug + Send + Sync + 'static {
    /// Reads from `at`; says how many bytes there were.
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all of `bytes` to `at`.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Bytes from the first to the last.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are none.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Bytes that it takes on the disk.
    fn used(&self) -> io::Result<u64>;

    /// Sets the length; new bytes read as zero.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes bytes and length durable.
    fn sync(&self) -> io::Result<()>;

    /// Takes the exclusive lock on the byte at `at`, which need not exist, for this open file; `false` if another open
    /// file has it. The kernel gives it back when the last descriptor of this open file is closed.
    fn try_lock_byte(&self, at: u64) -> io::Result<bool>;

    /// Gives the lock back.
    fn unlock_byte(&self, at: u64) -> io::Result<()>;
}

/// A folder of this machine.
#[derive(Debug)]
pub struct RealFolder(PathBuf);

impl RealFolder {
    /// Opens the folder at `path`, made with mode 0700 if it is not there.
    ///
    /// # Errors
    /// Those of `mkdir`.
    pub fn at(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        Ok(Self(path.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl RawFolder for RealFolder {
    fn open(&self, name: &str) -> io::Result<Arc<dyn RawFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
        Ok(Arc::new(options.open(self.0.join(name))?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn RawFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Ok(Arc::new(options.open(self.0.join(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.0.join(from), self.0.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            // A name that is no text is not one of ours.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

impl RawFile for File {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match FileExt::read_at(self, rest, at.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn used(&self) -> io::Result<u64> {
        // stat(2): st_blocks counts units of 512 bytes.
        Ok(self.metadata()?.blocks().saturating_mul(512))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Self::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn try_lock_byte(&self, at: u64) -> io::Result<bool> {
        match nix::fcntl::fcntl(self, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, at)?)) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn unlock_byte(&self, at: u64) -> io::Result<()> {
        nix::fcntl::fcntl(self, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, at)?))?;
        Ok(())
    }
}

/// One byte, for a lock that belongs to the open file and not to the process.
fn range(kind: i32, at: u64) -> io::Result<libc::flock> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(bad)?,
        l_whence: 0, // SEEK_SET
        l_start: i64::try_from(at).map_err(bad)?,
        l_len: 1,
        l_pid: 0, // fcntl(2): must be 0 for locks of an open file
    })
}
