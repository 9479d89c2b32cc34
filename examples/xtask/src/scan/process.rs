//! Processes, as `/proc` shows them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::Watch;

/// A process that belongs to what is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number, which the kernel uses again later.
    pub(crate) pid: i32,
    /// When it started, in clock ticks since boot: with the number, its identity.
    pub(crate) start: u64,
    /// The program it runs.
    pub(crate) exe: PathBuf,
    /// Its arguments, the first being its name for itself.
    pub(crate) args: Vec<String>,
    /// What its file descriptors point to.
    fds: Vec<String>,
}

impl Process {
    /// Identity and details for the snapshot.
    pub(super) fn thing(&self) -> (String, String) {
        let id = format!("pid={} start={}", self.pid, self.start);
        (id, format!("exe={} args={}", self.exe.display(), self.args.join(" ")))
    }

    /// The memfds it holds.
    pub(super) fn memfds(&self) -> Vec<(String, String)> {
        let names: BTreeSet<&String> = self.fds.iter().filter(|fd| fd.starts_with("/memfd:")).collect();
        names
            .into_iter()
            .map(|name| (format!("{name} pid={} start={}", self.pid, self.start), String::new()))
            .collect()
    }

    /// The inode numbers of its sockets, as `/proc/net/unix` names them.
    pub(super) fn socket_inodes(&self) -> impl Iterator<Item = &str> {
        self.fds.iter().filter_map(|fd| fd.strip_prefix("socket:[")?.strip_suffix(']'))
    }

    /// A process with these arguments, for tests.
    #[cfg(test)]
    pub(crate) fn sample(args: &[String]) -> Self {
        Self { pid: 1, start: 1, exe: PathBuf::new(), args: args.to_vec(), fds: Vec::new() }
    }

    /// Whether it works in `folder`: it was started for it, or holds something in it open.
    pub(crate) fn works_in(&self, folder: &Path) -> bool {
        let folder = folder.to_string_lossy();
        self.args.iter().chain(&self.fds).any(|word| mentions(word, &folder))
    }

    /// Whether it still runs: not ended, not a zombie, and not another one with its number.
    pub(crate) fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(start, zombie)| start == self.start && !zombie)
    }
}

/// Every process that belongs to a watched folder or program, but for this one and those above it: their arguments name the
/// folder too.
pub(crate) fn processes(watch: &Watch) -> Vec<Process> {
    let above = ancestry();
    let pids = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid| !above.contains(pid)).filter_map(|pid| read(pid, watch)).collect()
}

/// One process, if it is ours. `None` for a kernel thread, a zombie, one that has ended meanwhile or that we may not read.
fn read(pid: i32, watch: &Watch) -> Option<Process> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let exe = fs::read_link(dir.join("exe")).ok()?;
    let cwd = fs::read_link(dir.join("cwd")).unwrap_or_default();
    let args = fs::read(dir.join("cmdline")).ok()?;
    let args: Vec<String> =
        args.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    let fds: Vec<String> = fs::read_dir(dir.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|fd| target(&fd.path()))
        .collect();
    let (start, zombie) = stat(pid)?;
    let ours = watch.programs.iter().any(|p| exe == *p || deleted(&exe) == *p)
        || watch.roots.iter().any(|root| {
            let text = root.to_string_lossy();
            let named = |words: &[String]| words.iter().any(|word| mentions(word, &text));
            exe.starts_with(root) || cwd.starts_with(root) || named(&args) || named(&fds)
        });
    let args = args.into_iter().filter(|a| !a.is_empty()).collect();
    (ours && !zombie).then_some(Process { pid, start, exe, args, fds })
}

/// Whether `text` holds the path `root` itself or one below it, and not merely a longer name that starts alike.
pub(super) fn mentions(text: &str, root: &str) -> bool {
    let ends = |rest: &str| {
        rest.chars().next().is_none_or(|c| !(c.is_alphanumeric() || matches!(c, '-' | '_' | '.')))
    };
    text.match_indices(root).any(|(at, _)| ends(&text[at + root.len()..]))
}

/// A program that was rebuilt while it ran shows as `path (deleted)`.
fn deleted(exe: &Path) -> PathBuf {
    PathBuf::from(exe.to_string_lossy().trim_end_matches(" (deleted)"))
}

fn target(fd: &Path) -> Option<String> {
    fs::read_link(fd).ok().map(|t| t.to_string_lossy().into_owned())
}

/// (start time, is a zombie). The name in the second field may hold anything, so fields count from its last parenthesis.
fn stat(pid: i32) -> Option<(u64, bool)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // proc(5): field 3 is the state, 22 the start time; the first two are cut off.
    Some((fields.get(19)?.parse().ok()?, matches!(fields.first(), Some(&"Z" | &"X"))))
}

/// This process and those that started it.
fn ancestry() -> BTreeSet<i32> {
    let mut seen = BTreeSet::new();
    let mut pid = i32::try_from(std::process::id()).unwrap_or_default();
    while pid > 1 && seen.insert(pid) {
        pid = parent(pid).unwrap_or_default();
    }
    seen
}

fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_mentioned_whole_and_not_as_the_start_of_a_longer_name() {
        assert!(mentions("--state=/tmp/a", "/tmp/a"));
        assert!(mentions("file=/tmp/a/disk,format=raw", "/tmp/a"));
        assert!(mentions("/tmp/ab,/tmp/a", "/tmp/a"));
        assert!(!mentions("/tmp/ab", "/tmp/a"));
        assert!(!mentions("/tmp/a-2/x", "/tmp/a"));
    }

    #[test]
    fn this_process_is_in_its_own_ancestry_with_its_parent() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(ancestry().contains(&me));
        assert!(ancestry().contains(&nix::unistd::getppid().as_raw()));
    }

    #[test]
    fn the_start_time_tells_a_process_from_a_later_one_with_its_number() {
        let me = i32::try_from(std::process::id()).unwrap();
        let (start, zombie) = stat(me).unwrap();
        assert!(!zombie);
        let mut process = Process { pid: me, start, exe: PathBuf::new(), args: vec![], fds: vec![] };
        assert!(process.is_alive());
        process.start += 1;
        assert!(!process.is_alive());
    }
}
