//! What runs in the lab, and what each run must say.

/// One program of the workspace, run once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// The package that has the program, `--test` or `--bin`, and its name, which is also the run's.
    pub(super) package: &'static str,
    pub(super) kind: &'static str,
    pub(super) name: &'static str,
    /// Its arguments, which may not have a `'` in them. Test programs get the harness' own, and the filter.
    pub(super) words: &'static [&'static str],
    /// A program, by its package, that it starts itself.
    pub(super) beside: Option<(&'static str, &'static str)>,
    /// The machine that runs it.
    pub(super) part: usize,
    /// What must be in a line of its output each. An end with 0 alone shows nothing of a program that has no verdicts.
    pub(super) says: &'static [&'static str],
}

impl Run {
    const fn tests(package: &'static str, name: &'static str) -> Self {
        Self {
            package,
            kind: "--test",
            name,
            words: &["--test-threads=1", "--nocapture"],
            beside: None,
            part: 0,
            says: &[],
        }
    }

    const fn program(
        name: &'static str,
        words: &'static [&'static str],
        says: &'static [&'static str],
    ) -> Self {
        Self { package: "iaas-examples", kind: "--bin", name, words, beside: None, part: 0, says }
    }

    /// What the lab's shell runs; the filter comes as its arguments, which only tests understand.
    pub(super) fn script(&self) -> String {
        let words = self.words.iter().map(|word| format!(" '{word}'")).collect::<String>();
        let filter = if self.has_tests() { " \"$@\"" } else { "" };
        format!("exec '/lab/programs/{}'{words}{filter}\n", self.name)
    }

    pub(super) fn has_tests(&self) -> bool {
        self.says.is_empty()
    }
}

/// What runs with `filter`: all tests have their harness to leave some out, other programs go by their own names.
pub(super) fn chosen(filter: &str) -> Vec<Run> {
    let runs = RUNS.iter().filter(|run| run.has_tests() || run.name.contains(filter));
    runs.copied().collect()
}

const RUNS: [Run; 6] = [
    Run::program(
        "hello_vm",
        &[
            "/lab/guest/vmlinuz",
            "/lab/guest/initrd-tiny.cpio.gz",
            "console=ttyS0 panic=-1 guest.run=poweroff",
        ],
        &["Hypervisor detected: KVM", "GUEST-READY", "GUEST-OFF", "GuestOff after"],
    ),
    Run::tests("iaas-vmm", "kvm"),
    Run { part: 1, ..Run::tests("iaas-vmm", "linux") },
    Run::program("many_vms", &[], &["100 machines: built in"]),
    Run {
        part: 1,
        package: "xtask",
        beside: Some(("iaas-examples", "quickstart")),
        ..Run::program(
            "xtask",
            &[
                "quickstart",
                "--program",
                "/lab/programs/quickstart",
                "--kernel",
                "/lab/guest/vmlinuz",
                "--initrd",
                "/lab/guest/initrd.cpio.gz",
                "--state",
                "/state/quickstart",
            ],
            &[
                "a machine of our own in each runner; KVM works in hardware",
                "PING4 ok",
                "PING6 ok",
                "WEB-NONCE",
                "FETCH nonce=",
                "CLOSED dropped",
                "control killed: longest gap",
                "switch killed: longest gap",
                "the new web serves the old page",
                "is proved to be in it",
                "its runner counted",
                "e2fsck",
                "SCAN left=0",
                "OK",
            ],
        )
    },
    Run::tests("iaas-vmm", "vm"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_script_keeps_words_together() {
        let run = Run { words: &["a b", "c"], ..Run::tests("p", "t") };
        assert_eq!(run.script(), "exec '/lab/programs/t' 'a b' 'c' \"$@\"\n");
        let run = Run { words: &["a"], ..Run::program("p", &[], &["done"]) };
        assert_eq!(run.script(), "exec '/lab/programs/p' 'a'\n");
        assert!(RUNS.iter().all(|run| run.words.iter().all(|word| !word.contains('\''))));
    }

    #[test]
    fn every_run_has_a_machine_and_every_machine_a_run() {
        let parts = RUNS.iter().map(|run| run.part).collect::<BTreeSet<_>>();
        assert!(parts.into_iter().eq(0..super::super::PARTS));
    }

    #[test]
    fn a_filter_chooses_among_programs_and_leaves_tests_to_choose_themselves() {
        let names = |filter| chosen(filter).iter().map(|run| run.name).collect::<Vec<_>>();
        assert_eq!(names("").len(), RUNS.len());
        assert_eq!(names("hello"), ["hello_vm", "kvm", "linux", "vm"]);
        assert_eq!(names("paused"), ["kvm", "linux", "vm"]);
    }
}
