//! The parsers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use iaas_core::spi::host::CpuFacts;
use iaas_core::spi::host::DiskFacts;
use iaas_core::spi::host::HostFacts;
use iaas_core::spi::host::NicFacts;

/// Reads a machine from its `proc` and `sys`.
pub(super) fn read(proc: &Path, sys: &Path) -> HostFacts {
    let meminfo = fs::read_to_string(proc.join("meminfo")).unwrap_or_default();
    HostFacts {
        hostname: line(&proc.join("sys/kernel/hostname")),
        kernel: line(&proc.join("sys/kernel/osrelease")),
        cpu: cpu(proc, sys),
        memory: memory(&meminfo, "MemTotal"),
        memory_available: memory(&meminfo, "MemAvailable"),
        disks: names(&sys.join("block")).into_iter().filter_map(|name| disk(sys, name)).collect(),
        nics: names(&sys.join("class/net")).into_iter().filter_map(|name| nic(sys, name)).collect(),
        virtualization: None,
    }
}

/// `None` if not even the number of threads is known.
fn cpu(proc: &Path, sys: &Path) -> Option<CpuFacts> {
    let root = sys.join("devices/system/cpu");
    let cpuinfo = fs::read_to_string(proc.join("cpuinfo")).unwrap_or_default();
    let online = line(&root.join("online")).and_then(|list| ranges(&list));
    let threads = online.clone().map_or_else(
        || cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
        |online| online.len(),
    );
    if threads == 0 {
        return None;
    }
    let topology = |cpu: &u32, name: &str| line(&root.join(format!("cpu{cpu}/topology/{name}")));
    // A set of places is a count only if every thread says its own.
    let places = |of: &dyn Fn(&u32) -> Option<String>| {
        let places: Option<BTreeSet<String>> = online.as_ref()?.iter().map(of).collect();
        places.and_then(|places| u32::try_from(places.len()).ok()).filter(|count| *count > 0)
    };
    let node_list = line(&sys.join("devices/system/node/online")).and_then(|list| ranges(&list));
    Some(CpuFacts {
        model: value(&cpuinfo, "model name"),
        threads: u32::try_from(threads).ok()?,
        cores: places(&|cpu| {
            Some(format!("{}/{}", topology(cpu, "physical_package_id")?, topology(cpu, "core_id")?))
        }),
        sockets: places(&|cpu| topology(cpu, "physical_package_id")),
        nodes: node_list.and_then(|nodes| u32::try_from(nodes.len()).ok()).filter(|count| *count > 0),
    })
}

/// A disk that holds data of its own: no loop, RAM or device-mapper view, and no empty drive.
fn disk(sys: &Path, name: String) -> Option<DiskFacts> {
    let root = sys.join("block").join(&name);
    let is_view = ["loop", "ram", "dm-", "md", "zram", "nbd", "sr", "fd"].iter().any(|p| name.starts_with(p));
    if is_view {
        return None;
    }
    // `size` is in units of 512 bytes, whatever the disk's own block is.
    let sectors = line(&root.join("size")).and_then(|text| text.parse::<u64>().ok());
    Some(DiskFacts {
        size: sectors.and_then(|sectors| sectors.checked_mul(512)).filter(|size| *size > 0),
        rotational: line(&root.join("queue/rotational")).and_then(|text| flag(&text)),
        model: line(&root.join("device/model")),
        name,
    })
}

/// A NIC with a device behind it: bridges, tunnels and pairs are made by programs, among them ours.
fn nic(sys: &Path, name: String) -> Option<NicFacts> {
    let root = sys.join("class/net").join(&name);
    if !root.join("device").exists() {
        return None;
    }
    let none: &str = "00:00:00:00:00:00";
    Some(NicFacts {
        mac: line(&root.join("address")).filter(|mac| mac != none),
        // A link that is down says -1, or cannot be read.
        speed: line(&root.join("speed")).and_then(|text| text.parse().ok()).filter(|speed| *speed > 0),
        up: line(&root.join("carrier")).and_then(|text| flag(&text)),
        name,
    })
}

/// Bytes of a line in kB of `/proc/meminfo`.
fn memory(meminfo: &str, name: &str) -> Option<u64> {
    let kib: u64 = value(meminfo, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What stands behind the first `name` and its colon.
fn value(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned()).filter(|value| !value.is_empty())
    })
}

/// A list such as `0-3,8`, as the kernel prints sets; `None` if it is something else, or absurdly long.
fn ranges(list: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last.checked_sub(first)? > MOST {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// A file of one line, without its end; `None` if it is missing, unreadable or empty.
fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// More CPUs than Linux can count on x86-64.
const MOST: u32 = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn read_tree(root: &tempfile::TempDir) -> HostFacts {
        read(&root.path().join("proc"), &root.path().join("sys"))
    }

    #[test]
    fn what_is_not_there_is_missing_and_never_zero() {
        let facts = read_tree(&tree(&[]));
        assert_eq!(facts, HostFacts::default());
        let facts = read_tree(&tree(&[
            ("sys/block/vda/size", "0\n"),
            ("sys/class/net/eth0/device/x", ""),
            ("sys/class/net/eth0/speed", "-1\n"),
            ("proc/meminfo", "MemTotal: many kB\n"),
            ("sys/devices/system/cpu/online", "0-1\n"),
        ]));
        assert_eq!((facts.disks[0].size, facts.disks[0].rotational), (None, None));
        assert_eq!((facts.nics[0].speed, facts.nics[0].up, facts.nics[0].mac.as_deref()), (None, None, None));
        assert_eq!(facts.memory, None);
        let cpu = facts.cpu.unwrap();
        assert_eq!((cpu.threads, cpu.cores, cpu.sockets, cpu.nodes), (2, None, None, None));
    }

    #[test]
    fn a_machine_is_read_as_it_is() {
        let cpu = |n: u32, core: &str, package: &str| {
            let root = format!("sys/devices/system/cpu/cpu{n}/topology");
            [
                (format!("{root}/core_id"), core.to_owned()),
                (format!("{root}/physical_package_id"), package.to_owned()),
            ]
        };
        let mut files: Vec<(String, String)> = [
            ("proc/sys/kernel/hostname", "node7\n"),
            ("proc/sys/kernel/osrelease", "6.1.0-1\n"),
            ("proc/meminfo", "MemTotal:       16384 kB\nMemAvailable:    8192 kB\n"),
            ("proc/cpuinfo", "processor\t: 0\nmodel name\t: A CPU\n"),
            ("sys/devices/system/cpu/online", "0-3\n"),
            ("sys/devices/system/node/online", "0\n"),
            ("sys/block/nvme0n1/size", "2048\n"),
            ("sys/block/nvme0n1/queue/rotational", "0\n"),
            ("sys/block/loop0/size", "8\n"),
            ("sys/class/net/eno1/device/x", ""),
            ("sys/class/net/eno1/address", "02:00:00:00:00:07\n"),
            ("sys/class/net/eno1/speed", "25000\n"),
            ("sys/class/net/eno1/carrier", "1\n"),
            ("sys/class/net/br0/address", "02:00:00:00:00:08\n"),
        ]
        .map(|(path, text)| (path.to_owned(), text.to_owned()))
        .into();
        // Two packages of one core with two threads each.
        for (n, package) in [(0, "0"), (1, "0"), (2, "1"), (3, "1")] {
            files.extend(cpu(n, "0", package));
        }
        let files: Vec<(&str, &str)> =
            files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let facts = read_tree(&tree(&files));
        assert_eq!(facts.hostname.as_deref(), Some("node7"));
        assert_eq!((facts.memory, facts.memory_available), (Some(16 << 20), Some(8 << 20)));
        let cpu = facts.cpu.unwrap();
        assert_eq!((cpu.threads, cpu.cores, cpu.sockets, cpu.nodes), (4, Some(2), Some(2), Some(1)));
        assert_eq!(cpu.model.as_deref(), Some("A CPU"));
        let [disk] = facts.disks.as_slice() else { panic!("{:?}", facts.disks) };
        assert_eq!((disk.name.as_str(), disk.size, disk.rotational), ("nvme0n1", Some(1 << 20), Some(false)));
        let [nic] = facts.nics.as_slice() else { panic!("{:?}", facts.nics) };
        assert_eq!((nic.name.as_str(), nic.speed, nic.up), ("eno1", Some(25_000), Some(true)));
    }

    #[test]
    fn no_list_makes_the_reader_fail_or_swell() {
        assert_eq!(ranges("0-2,5"), Some(vec![0, 1, 2, 5]));
        for wrong in ["", "x", "3-1", "0-4294967295", "1,,2"] {
            assert_eq!(ranges(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn this_machine_has_threads_and_memory() {
        let facts = read(Path::new("/proc"), Path::new("/sys"));
        let threads = std::thread::available_parallelism().unwrap().get();
        assert!(usize::try_from(facts.cpu.unwrap().threads).unwrap() >= threads);
        assert!(facts.memory.unwrap() > facts.memory_available.unwrap());
    }
}
