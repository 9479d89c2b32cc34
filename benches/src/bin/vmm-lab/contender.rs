//! Who is measured: a name and a command with placeholders.

use std::path::Path;

use crate::Result;
use crate::ours;

/// A VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contender {
    pub(crate) name: String,
    /// The program and its arguments, with `{kernel}`, `{initrd}`, `{cmdline}`, `{mem}` (MiB), `{disk}` and `{tap}` in them.
    words: Vec<String>,
}

/// What every machine is made of.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) initrd: String,
    pub(crate) cmdline: String,
    /// MiB.
    pub(crate) memory: u64,
    pub(crate) disk: String,
    pub(crate) tap: String,
}

impl Contender {
    /// Our own VMM, in a process of the program `us`. It opens its volume as a runner does, by what `target` says.
    pub(crate) fn ours(us: &Path, target: &Path) -> Self {
        let (us, target) = (us.display(), target.display());
        let verb = ours::VERB;
        let command = format!("{us} {verb} {{kernel}} {{initrd}} {{cmdline}} {{mem}} {target} {{tap}}");
        Self { name: OURS.to_owned(), words: command.split(' ').map(str::to_owned).collect() }
    }

    /// Those of a list, `NAME COMMAND` on a line each.
    ///
    /// # Errors
    /// A line without a command, or a name twice.
    pub(crate) fn read(list: &str) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        for line in list.lines().filter(|line| !line.trim().is_empty()) {
            let mut words = line.split_whitespace().map(str::to_owned);
            let name = words.next().unwrap_or_default();
            if name == OURS || all.iter().any(|other| other.name == name) {
                return Err(format!("there are two contenders `{name}`").into());
            }
            let words: Vec<String> = words.collect();
            if words.is_empty() {
                return Err(format!("contender `{name}` has no command").into());
            }
            all.push(Self { name, words });
        }
        Ok(all)
    }

    /// The command for `machine`. A placeholder stays one word, whatever it stands for.
    pub(crate) fn command(&self, machine: &Machine) -> Vec<String> {
        let memory = machine.memory.to_string();
        let known = [
            ("{kernel}", &machine.kernel),
            ("{initrd}", &machine.initrd),
            ("{cmdline}", &machine.cmdline),
            ("{mem}", &memory),
            ("{disk}", &machine.disk),
            ("{tap}", &machine.tap),
        ];
        let fill =
            |word: &String| known.iter().fold(word.clone(), |word, (name, value)| word.replace(name, value));
        self.words.iter().map(fill).collect()
    }
}

/// The name of our own.
pub(crate) const OURS: &str = "ours";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_command_is_filled_in_word_by_word() {
        let machine = Machine {
            kernel: "/k".into(),
            initrd: "/i".into(),
            cmdline: "quiet a=b".into(),
            memory: 256,
            disk: "/d".into(),
            tap: "t0".into(),
        };
        let list = "q -kernel {kernel} -append {cmdline} -m {mem}M -drive file={disk},x=y\n";
        let all = Contender::read(&format!("one {list}")).unwrap();
        assert_eq!(all[0].name, "one");
        let words = ["q", "-kernel", "/k", "-append", "quiet a=b", "-m", "256M", "-drive", "file=/d,x=y"];
        assert_eq!(all[0].command(&machine), words);
    }

    #[test]
    fn a_list_names_each_once_and_with_a_command() {
        for bad in ["one", "one a\none b", "ours a"] {
            Contender::read(bad).unwrap_err();
        }
        assert_eq!(Contender::read("\n").unwrap(), []);
    }
}
