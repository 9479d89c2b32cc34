//! Trees of folders.

use std::collections::BTreeMap;
use std::fs::{self, FileType};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// Everything at and below each root: path and type are the identity, mode and size the details.
pub(super) fn trees(roots: &[PathBuf]) -> BTreeMap<String, String> {
    let mut things = BTreeMap::new();
    let mut open = roots.to_vec();
    while let Some(path) = open.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let details = format!("mode={:o} size={}", meta.mode() & 0o7777, meta.size());
        things.insert(format!("{} {}", kind(meta.file_type()), path.display()), details);
        if meta.is_dir() {
            open.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
        }
    }
    things
}

fn kind(file_type: FileType) -> &'static str {
    match file_type {
        t if t.is_dir() => "dir",
        t if t.is_symlink() => "link",
        t if t.is_socket() => "socket",
        t if t.is_fifo() => "fifo",
        t if t.is_file() => "file",
        _ => "device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_became_a_socket_is_another_thing() {
        let dir = std::env::temp_dir().join(format!("xtask-files-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("x"), "abc").unwrap();
        let id = |kind: &str| format!("{kind} {}", dir.join("x").display());
        let before = trees(std::slice::from_ref(&dir));
        assert!(before[&id("file")].ends_with("size=3"));
        fs::remove_file(dir.join("x")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(dir.join("x")).unwrap();
        let after = trees(std::slice::from_ref(&dir));
        assert!(after.contains_key(&id("socket")) && !after.contains_key(&id("file")));
        fs::remove_dir_all(&dir).unwrap();
    }
}
