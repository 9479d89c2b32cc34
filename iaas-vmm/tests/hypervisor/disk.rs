//! A volume in a plain file, opened like a pool's: the smallest thing that a guest can keep a file system on.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::spi::block::FreezeReceipt;
use iaas_core::spi::block::FreezeTicket;
use iaas_core::spi::dataplane::BlockDevice;
use iaas_core::spi::dataplane::BlockDone;
use iaas_core::spi::dataplane::BlockOp;
use iaas_core::spi::dataplane::BlockOpener;
use iaas_core::spi::dataplane::BlockQueue;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::Geometry;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::opener::Key;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Target;
use nix::sys::eventfd::EventFd;

pub(crate) const SCHEME: &str = "plain-file";

#[derive(Debug)]
pub(crate) struct PlainFile;

impl BlockOpener for PlainFile {
    fn scheme(&self) -> (&'static str, u16) {
        (SCHEME, 1)
    }

    fn prepare(&self, target: &Target) -> Result<Grant> {
        let path = target.forms.iter().find_map(|form| match form {
            Form::Opener { token, .. } => Some(PathBuf::from(String::from_utf8_lossy(token).into_owned())),
            _ => None,
        });
        let path = path.ok_or_else(|| Error::invalid("no token"))?;
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|e| Error::unavailable("the volume's file cannot be opened").because(&e))?;
        let mut grant = Grant::default();
        grant.fds.insert("file".into(), file.into());
        Ok(grant)
    }

    fn open(&self, _: &Target, mut grant: Grant, _: Option<Key>, _: &Env) -> Result<Box<dyn BlockDevice>> {
        let fd = grant.fds.remove("file").ok_or_else(|| Error::internal("no descriptor"))?;
        Ok(Box::new(Plain { file: Arc::new(File::from(fd)) }))
    }
}

#[derive(Debug)]
struct Plain {
    file: Arc<File>,
}

impl BlockDevice for Plain {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.file.metadata().map_or(0, |data| data.len()),
            block: 512,
            preferred: 4096,
            max_bytes: 256 << 10,
            read_only: false,
            discard: false,
            write_zeroes: true,
        }
    }

    fn open_queue(&self, _: u16) -> Result<Box<dyn BlockQueue>> {
        let event = EventFd::new().map_err(|e| Error::unavailable("no event").because(&e))?;
        Ok(Box::new(Queue { file: self.file.clone(), done: Vec::new(), event }))
    }

    fn claim(&self, _: Term) -> Result<()> {
        Ok(())
    }

    fn release(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::unavailable("not synced").because(&e))
    }

    fn resize(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn freeze(&self, _: &FreezeTicket) -> Result<FreezeReceipt> {
        Err(Error::unsupported("no snapshots"))
    }
}

#[derive(Debug)]
struct Queue {
    file: Arc<File>,
    done: Vec<BlockDone>,
    event: EventFd,
}

impl BlockQueue for Queue {
    fn submit(&mut self, tag: u64, op: BlockOp) -> std::result::Result<(), BlockOp> {
        let (result, buffers) = match op {
            BlockOp::Read { at, into } => {
                let mut bytes = vec![0; into.len()];
                let result = self.file.read_exact_at(&mut bytes, at);
                into.write_at(0, &bytes);
                (result, Some(into))
            }
            BlockOp::Write { at, from } => {
                let mut bytes = vec![0; from.len()];
                from.read_at(0, &mut bytes);
                (self.file.write_all_at(&bytes, at), Some(from))
            }
            BlockOp::Flush => (self.file.sync_data(), None),
            BlockOp::WriteZeroes { at, len, .. } => {
                (self.file.write_all_at(&vec![0; usize::try_from(len).unwrap()], at), None)
            }
            BlockOp::Discard { .. } => (Ok(()), None),
        };
        self.done.push(BlockDone { tag, result, buffers });
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<BlockDone>) -> usize {
        let count = self.done.len();
        out.append(&mut self.done);
        count
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
