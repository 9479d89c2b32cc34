//! Small files that are replaced as a whole: after a crash they hold the old bytes or the new.

use std::io;

use iaas_core::Result;

use crate::raw::trouble;
use crate::rawio::RawFolder;

/// Replaces `name`, durably.
pub(crate) fn write(folder: &dyn RawFolder, name: &str, bytes: &[u8]) -> Result<()> {
    let draft = draft(name);
    let write = || {
        gone(folder.remove(&draft))?;
        let file = folder.create(&draft)?;
        file.write_at(bytes, 0)?;
        file.sync()?;
        folder.rename(&draft, name)?;
        folder.sync()
    };
    write().map_err(|e: io::Error| {
        // What is left of it is in the way of nobody, but it takes space.
        let _ = folder.remove(&draft);
        trouble(&format!("write {name}"), &e)
    })
}

/// The bytes of `name`, at most 64 KiB of them; `None` if it is not there.
pub(crate) fn read(folder: &dyn RawFolder, name: &str) -> Result<Option<Vec<u8>>> {
    let file = match folder.open(name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| trouble(&format!("open {name}"), &e))?,
    };
    let mut bytes = vec![0; MAX];
    let count = file.read_at(&mut bytes, 0).map_err(|e| trouble(&format!("read {name}"), &e))?;
    bytes.truncate(count);
    Ok(Some(bytes))
}

/// The name under which `name` is written before it is complete.
pub(crate) fn draft(name: &str) -> String {
    format!("{name}.new")
}

/// Takes the absence of a file for success.
pub(crate) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

const MAX: usize = 64 << 10;
