//! What the kernel holds beside processes: links, rules, cgroups, mounts, unix sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Watch;
use super::process::{Process, mentions};
use crate::command::Cmd;
use crate::workspace::which;

/// One section of a snapshot.
type Things = BTreeMap<String, String>;

/// Network links of this namespace and of each named one.
pub(super) fn links() -> Things {
    let mut things = Things::new();
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let read =
            |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default().trim().to_owned();
        let id = format!("{} index={}", entry.file_name().to_string_lossy(), read("ifindex"));
        let tun = if entry.path().join("tun_flags").exists() { "tun " } else { "" };
        things.insert(id, format!("{tun}address={}", read("address")));
    }
    for namespace in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = namespace.file_name().to_string_lossy().into_owned();
        things.extend(parse_links(&name, &ip_links(&name)));
        things.insert(format!("netns {name}"), String::new());
    }
    things
}

fn ip_links(namespace: &str) -> String {
    let Some(ip) = which("ip") else { return String::new() };
    Cmd::new(ip).args(["-n", namespace, "-o", "link"]).output().unwrap_or_default()
}

fn parse_links(namespace: &str, text: &str) -> Things {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.split(": ");
            let (index, name) = (parts.next()?, parts.next()?);
            Some((
                format!("netns {namespace} {} index={}", name.split('@').next()?, index.trim()),
                String::new(),
            ))
        })
        .collect()
}

/// The packet filter's rules, without their counters, each line under the blocks that hold it.
pub(super) fn nft() -> Things {
    let Some(nft) = which("nft") else { return note("nft is missing: cargo xtask setup") };
    match Cmd::new(nft).args(["-s", "list", "ruleset"]).output() {
        Ok(text) => parse_nft(&text),
        Err(_) => note("not readable: needs root"),
    }
}

fn parse_nft(text: &str) -> Things {
    let mut things = Things::new();
    let mut blocks: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "}" {
            blocks.pop();
            continue;
        }
        let block = line.strip_suffix('{').map(str::trim);
        let path = blocks.iter().chain([&block.unwrap_or(line)]).copied().collect::<Vec<_>>().join(" / ");
        things.insert(path, String::new());
        blocks.extend(block);
    }
    things
}

/// Every cgroup of every hierarchy.
pub(super) fn cgroups() -> Things {
    let mut things = Things::new();
    let mut open = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = open.pop() {
        let below = fs::read_dir(&dir).into_iter().flatten().flatten();
        open.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        things.insert(dir.display().to_string(), String::new());
    }
    things
}

/// Every mount of this namespace.
pub(super) fn mounts() -> Things {
    parse_mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

// proc(5): the mount point is field 5; after a lone hyphen come type and source.
fn parse_mounts(text: &str) -> Things {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let (point, mut right) = (left.split(' ').nth(4)?, right.split(' '));
            Some((format!("{point} type={} source={}", right.next()?, right.next()?), String::new()))
        })
        .collect()
}

/// Unix sockets that have a path below a watched folder or that one of our processes named. Unnamed ones end with their process.
pub(super) fn unix_sockets(watch: &Watch, ours: &[Process]) -> Things {
    let held: BTreeSet<&str> = ours.iter().flat_map(Process::socket_inodes).collect();
    parse_unix(&fs::read_to_string("/proc/net/unix").unwrap_or_default(), &watch.roots, &held)
}

// proc(5): Num RefCount Protocol Flags Type St Inode Path. Only listeners and datagram sockets have a path of their own making;
// connections show the listener's, so the inode, which is unique, is part of the identity.
fn parse_unix(text: &str, roots: &[PathBuf], held: &BTreeSet<&str>) -> Things {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (inode, path) = (fields.get(6)?, fields.get(7)?);
            let below = roots.iter().any(|root| mentions(path, &path_text(root)));
            (below || held.contains(inode))
                .then(|| (format!("{path} inode={inode}"), format!("type={}", fields[4])))
        })
        .collect()
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A section that cannot be read says so; the note is equal before and after, so it is no leak.
fn note(text: &str) -> Things {
    Things::from([(format!("({text})"), String::new())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_with_the_table_and_chain_that_hold_it() {
        let text = "table inet t {\n\tset s {\n\t\ttype ipv4_addr\n\t}\n\n\tchain c {\n\t\ttcp dport 22 accept\n\t}\n}\n";
        let things: Vec<String> = parse_nft(text).into_keys().collect();
        let wanted = [
            "table inet t",
            "table inet t / chain c",
            "table inet t / chain c / tcp dport 22 accept",
            "table inet t / set s",
            "table inet t / set s / type ipv4_addr",
        ];
        assert_eq!(things, wanted);
    }

    #[test]
    fn a_mount_is_its_point_type_and_source() {
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n";
        assert_eq!(parse_mounts(text).into_keys().next().unwrap(), "/mnt2 type=ext3 source=/dev/root");
    }

    #[test]
    fn links_of_a_namespace_carry_its_name() {
        let text = "1: lo: <LOOPBACK> mtu 65536\n7: veth0@if8: <BROADCAST> mtu 1500\n";
        let things: Vec<String> = parse_links("n", text).into_keys().collect();
        assert_eq!(things, ["netns n lo index=1", "netns n veth0 index=7"]);
    }

    #[test]
    fn a_socket_is_ours_by_path_or_by_holder() {
        let text = "Num RefCount Protocol Flags Type St Inode Path\n\
                    0: 2 0 10000 0001 01 11 /s/a.sock\n0: 2 0 10000 0001 01 12 /other\n0: 3 0 0 0001 03 13\n0: 2 0 0 0002 01 14 @abstract\n";
        let things: Vec<String> =
            parse_unix(text, &[PathBuf::from("/s")], &BTreeSet::from(["14"])).into_keys().collect();
        assert_eq!(things, ["/s/a.sock inode=11", "@abstract inode=14"]);
    }

    #[test]
    fn the_loopback_link_is_seen() {
        assert!(links().keys().any(|id| id.starts_with("lo index=")));
    }
}
