//! The memory of a VMM beside its guest's.
//!
//! The proportional set size (`Pss`, Linux `Documentation/filesystems/proc.rst` §1.1) of every mapping in every process of the
//! VMM's process group, but for the mapping that holds the guest's memory: the one that is at least as large. The kernel joins
//! neighbours of one kind, so it may be larger; all that it is larger counts as the VMM's, as if it were resident. A VMM without
//! such a mapping cannot be measured so, and is an error.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::Result;

/// KiB of what lies beside the guest's memory, by what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Of the guest.
    guest: u64,
    processes: usize,
    beside: BTreeMap<&'static str, u64>,
    /// The page tables of the VMM's processes, which no set size has in it; for the reader, and not in the figure.
    page_tables: u64,
}

impl Parts {
    /// The figure.
    pub(crate) fn overhead_mib(&self) -> f64 {
        let kib: u64 = self.beside.values().sum();
        // Far below 2^53.
        #[expect(clippy::cast_precision_loss, reason = "KiB of a process")]
        let kib = kib as f64;
        kib / 1024.0
    }

    fn add(&mut self, smaps: &str, guest: u64) -> Result<()> {
        let mut mapping = ("", 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            match (first, words.next()) {
                ("Size:", Some(size)) => mapping.1 = size.parse()?,
                ("Pss:", Some(pss)) => self.count(mapping, pss.parse()?, guest),
                // `from-to rights offset device inode name`
                _ if !first.ends_with(':') => mapping = (words.nth(3).unwrap_or_default(), 0),
                _ => {}
            }
        }
        Ok(())
    }

    fn count(&mut self, (name, size): (&str, u64), pss: u64, guest: u64) {
        // An empty one of that size is only a range of addresses.
        if size >= guest >> 10 && pss > 0 {
            let joined = (size - (guest >> 10)).min(pss);
            self.guest += pss - joined;
            *self.beside.entry("joined to the guest's").or_default() += joined;
            return;
        }
        let kind = match name {
            "" => "anonymous",
            "[heap]" => "heap",
            "[stack]" => "stack",
            _ if name.starts_with('[') => "kernel's",
            _ if name.contains(".so") => "libraries",
            _ if name.starts_with("anon_inode:") => "kernel's",
            _ => "program and files",
        };
        *self.beside.entry(kind).or_default() += pss;
    }
}

/// Measures the process group `group`, whose guest has `guest` bytes.
///
/// # Errors
/// No process of it can be read, or none maps the guest's memory.
pub(crate) fn beside(group: u32, guest: u64) -> Result<Parts> {
    let mut parts = Parts::default();
    for process in processes(group) {
        parts.processes += 1;
        parts.add(&fs::read_to_string(process.join("smaps"))?, guest)?;
        let status = fs::read_to_string(process.join("status"))?;
        let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
        parts.page_tables += tables.and_then(|t| t.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    }
    match parts.guest {
        0 => Err("no process has a mapping as large as the guest's memory".into()),
        _ => Ok(parts),
    }
}

/// Where the threads of a process group stand in the kernel, for a reader who wonders why one does not move.
pub(crate) fn standing(group: u32) -> String {
    let tasks = processes(group).into_iter().filter_map(|process| fs::read_dir(process.join("task")).ok());
    let tell = |task: PathBuf| {
        let of = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
        format!("{}{}", of("comm"), of("stack"))
    };
    tasks.flatten().flatten().map(|task| tell(task.path())).collect()
}

/// The folders of a process group's processes. One that ends meanwhile is none of them.
fn processes(group: u32) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let stat = |process: &PathBuf| fs::read_to_string(process.join("stat")).ok();
    all.filter(|process| stat(process).is_some_and(|stat| group_of(&stat) == Some(group))).collect()
}

/// The process group in `/proc/PID/stat`, whose second field may have anything in its parentheses.
fn group_of(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 r-xp 00000000 fe:00 12                         /bin/vmm
Size:               1024 kB
Rss:                1024 kB
Pss:                 512 kB
Pss_Dirty:             9 kB
VmFlags: rd ex mr mw me
55d0c1000000-55d0c1100000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Pss:                 256 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262276 kB
Pss:               65536 kB
7f0014000000-7f0034000000 ---p 00000000 00:00 0
Size:             524288 kB
Pss:                   0 kB
7f0020000000-7f0020021000 rw-p 00000000 00:00 0
Size:                132 kB
Pss:                   8 kB
";

    #[test]
    fn the_guest_is_left_out_and_everything_else_counts() {
        let mut parts = Parts::default();
        parts.add(SMAPS, 256 << 20).unwrap();
        // The mapping is 132 KiB larger than the guest.
        assert_eq!(parts.guest, 65536 - 132);
        let kinds =
            [("anonymous", 8), ("heap", 256), ("joined to the guest's", 132), ("program and files", 512)];
        assert_eq!(parts.beside, BTreeMap::from(kinds));
        // 512 + 256 + 8 + 132 KiB.
        assert!((parts.overhead_mib() - 908.0 / 1024.0).abs() < 1e-9);
    }

    #[test]
    fn a_process_belongs_to_its_group_whatever_its_name() {
        assert_eq!(group_of("12 (a) b) S 1 77 77 0 -1"), Some(77));
        assert_eq!(group_of("12"), None);
    }

    #[test]
    fn a_group_that_maps_no_guest_is_not_measured() {
        let own = nix::unistd::getpgrp().as_raw();
        beside(own.try_into().unwrap(), (1 << 40) + 4096).unwrap_err();
    }
}
