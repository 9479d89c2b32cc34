//! `cargo xtask scan`: what stands on this machine, seen from outside.
//!
//! The judge of leaks. It reads `/proc`, `/sys`, `nft` and folders, and asks no code of this project. A snapshot is a set of
//! things per section; a thing has an identity, which is compared, and details, which are only shown. Processes, sockets and
//! memfds are kept when they belong to a watched folder or program; links, rules, cgroups and mounts are kept all.

mod files;
mod kernel;
mod process;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::command::absolute;
use crate::failure::{Context, Failure, Result};
use crate::report::line;

pub(crate) use process::{Process, processes};

/// What to look at.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// Folders whose tree, sockets and processes belong to us.
    pub(crate) roots: Vec<PathBuf>,
    /// Programs whose processes belong to us wherever they run.
    pub(crate) programs: Vec<PathBuf>,
    /// The sections to keep; empty means all.
    pub(crate) only: Vec<String>,
}

/// Identity to details, per section.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    watch: Watch,
    sections: BTreeMap<String, BTreeMap<String, String>>,
}

/// What one snapshot has and another has not: (section, identity, details).
pub(crate) type Things = Vec<(String, String, String)>;

impl Watch {
    /// Takes `flag` if it is one of the scan's.
    pub(crate) fn take(&mut self, flag: &str, value: impl FnOnce() -> Result<OsString>) -> Result<bool> {
        match flag {
            "root" => self.roots.push(absolute(&value()?)?),
            "program" => self.programs.push(absolute(&value()?)?),
            "only" => self.only.extend(value()?.to_string_lossy().split(',').map(str::to_owned)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Looks at everything once.
    pub(crate) fn take_snapshot(&self) -> Result<Snapshot> {
        if let Some(unknown) = self.only.iter().find(|name| !SECTIONS.contains(&name.as_str())) {
            return Err(Failure::new(format!("there is no section `{unknown}`"))
                .remedy(format!("use {}", SECTIONS.join(", "))));
        }
        let ours = processes(self);
        let mut sections = BTreeMap::new();
        for name in
            SECTIONS.into_iter().filter(|name| self.only.is_empty() || self.only.iter().any(|o| o == name))
        {
            let things = match name {
                "processes" => ours.iter().map(Process::thing).collect(),
                "memfds" => ours.iter().flat_map(Process::memfds).collect(),
                "sockets" => kernel::unix_sockets(self, &ours),
                "links" => kernel::links(),
                "nft" => kernel::nft(),
                "cgroups" => kernel::cgroups(),
                "mounts" => kernel::mounts(),
                _ => files::trees(&self.roots),
            };
            sections.insert(name.to_owned(), things);
        }
        Ok(Snapshot { watch: self.clone(), sections })
    }
}

impl Snapshot {
    /// What is here and is not in `before`.
    pub(crate) fn since(&self, before: &Self) -> Things {
        let mut new = Vec::new();
        for (section, things) in &self.sections {
            let old = before.sections.get(section);
            let fresh = things.iter().filter(|(id, _)| old.is_none_or(|old| !old.contains_key(*id)));
            new.extend(fresh.map(|(id, details)| (section.clone(), id.clone(), details.clone())));
        }
        new
    }

    /// The snapshot for people.
    fn text(&self) -> String {
        let mut text = String::new();
        for (section, things) in &self.sections {
            let _ = writeln!(text, "{section}: {}", things.len());
            for (id, details) in things {
                let _ = writeln!(text, "  {id} {details}");
            }
        }
        text.trim_end().to_owned()
    }

    fn load(path: &Path) -> Result<Self> {
        serde_json::from_slice(&fs::read(path).at(path)?).at(path)
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Verb {
    /// Print a snapshot.
    Print,
    /// Keep one in a file.
    Save(PathBuf),
    /// Compare with one that was kept.
    Diff(PathBuf),
}

/// Runs the verb. A diff that finds something new is a failure that lists it.
pub(crate) fn run(verb: &Verb, watch: &Watch, json: bool) -> Result<()> {
    match verb {
        Verb::Print => {
            let snapshot = watch.take_snapshot()?;
            line(&if json {
                serde_json::to_string_pretty(&snapshot).context("json")?
            } else {
                snapshot.text()
            });
            Ok(())
        }
        Verb::Save(file) => {
            let snapshot = watch.take_snapshot()?;
            fs::write(file, serde_json::to_vec_pretty(&snapshot).context("json")?).at(file)?;
            line(&format!(
                "scan: saved {} things to {}",
                snapshot.sections.values().map(BTreeMap::len).sum::<usize>(),
                file.display()
            ));
            Ok(())
        }
        Verb::Diff(file) => diff(&Snapshot::load(file)?, json),
    }
}

/// Looks again at what `before` watched.
fn diff(before: &Snapshot, json: bool) -> Result<()> {
    let now = before.watch.take_snapshot()?;
    let (new, gone) = (now.since(before), before.since(&now));
    if json {
        line(
            &serde_json::to_string_pretty(&serde_json::json!({ "new": new, "gone": gone }))
                .context("json")?,
        );
    } else {
        print_things("new", &new);
        print_things("gone", &gone);
    }
    line(&format!("SCAN new={} gone={}", new.len(), gone.len()));
    match new.len() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} things are left over; they are listed above"))),
    }
}

/// Prints one line per thing.
pub(crate) fn print_things(word: &str, things: &Things) {
    for (section, id, details) in things {
        line(&format!("{word} {section}: {id} {details}"));
    }
}

const SECTIONS: [&str; 8] = ["processes", "memfds", "sockets", "links", "nft", "cgroups", "mounts", "tree"];

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xtask-scan-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn watch(root: &Path) -> Watch {
        let only = ["processes", "memfds", "sockets", "tree"].map(str::to_owned).to_vec();
        Watch { roots: vec![root.to_path_buf()], only, ..Watch::default() }
    }

    fn new_sections(before: &Snapshot) -> Vec<String> {
        before.watch.take_snapshot().unwrap().since(before).into_iter().map(|(section, ..)| section).collect()
    }

    #[test]
    fn a_new_file_is_found_and_a_grown_one_is_not_new() {
        let dir = scratch("file");
        fs::write(dir.join("old"), "1").unwrap();
        let before = watch(&dir).take_snapshot().unwrap();
        fs::write(dir.join("old"), "12345").unwrap();
        assert!(new_sections(&before).is_empty());
        fs::write(dir.join("leak"), "").unwrap();
        assert_eq!(new_sections(&before), ["tree"]);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_listening_socket_is_found_even_after_its_file_is_gone() {
        let dir = scratch("socket");
        let before = watch(&dir).take_snapshot().unwrap();
        let listener = UnixListener::bind(dir.join("s")).unwrap();
        fs::remove_file(dir.join("s")).unwrap();
        assert_eq!(new_sections(&before), ["sockets"]);
        drop(listener);
        assert!(new_sections(&before).is_empty());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_process_is_found_by_argument_by_folder_and_by_open_file_but_a_stranger_is_not() {
        let dir = scratch("process");
        fs::write(dir.join("open"), "").unwrap();
        let before = watch(&dir).take_snapshot().unwrap();
        let finds = |command: &mut Command| {
            let mut child = command.stdin(Stdio::null()).spawn().unwrap();
            // Until exec the child is still a copy of this test.
            let named = |id: u32| fs::read_to_string(format!("/proc/{id}/comm")).unwrap().trim() == "sleep";
            while !named(child.id()) {
                std::thread::yield_now();
            }
            let found = new_sections(&before).contains(&"processes".to_owned());
            child.kill().unwrap();
            child.wait().unwrap();
            found
        };
        let argument = format!("exec -a {} sleep 100", dir.join("argument").display());
        assert!(finds(Command::new("bash").args(["-c", &argument])), "by argument");
        assert!(finds(Command::new("sleep").arg("100").current_dir(&dir)), "by folder");
        let file = fs::File::open(dir.join("open")).unwrap();
        assert!(finds(Command::new("sleep").arg("100").stdout(file)), "by open file");
        assert!(!finds(Command::new("sleep").arg("100").current_dir("/")), "a stranger");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_snapshot_survives_its_file() {
        let dir = scratch("round");
        fs::write(dir.join("x"), "1").unwrap();
        let snapshot = watch(&dir).take_snapshot().unwrap();
        let file = std::env::temp_dir().join(format!("xtask-scan-{}.json", std::process::id()));
        fs::write(&file, serde_json::to_vec(&snapshot).unwrap()).unwrap();
        assert_eq!(Snapshot::load(&file).unwrap(), snapshot);
        assert!(snapshot.text().contains("tree: 2\n"), "the folder and the file: {}", snapshot.text());
        fs::remove_file(&file).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn an_unknown_section_is_refused_by_name() {
        let watch = Watch { only: vec!["procesess".to_owned()], ..Watch::default() };
        assert!(watch.take_snapshot().unwrap_err().to_string().contains("memfds"));
    }
}
