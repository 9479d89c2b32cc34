//! What the lab's console says: pure, so that a judgement can be tested without a machine.

use crate::failure::{Failure, Result};

use super::runs::Run;

/// What was read so far.
#[derive(Debug, Default)]
pub(crate) struct Console {
    /// What must have run.
    runs: Vec<Run>,
    /// Which of the wanted texts was in a line of which run.
    said: Vec<(String, &'static str)>,
    /// Bytes of the text that were taken.
    taken: usize,
    /// The program whose lines these are.
    inside: String,
    /// The test that runs.
    test: Option<String>,
    /// Runs and tests of them.
    passed: Vec<(String, String)>,
    failed: Vec<(String, String)>,
    begun: usize,
    ended: Vec<(String, i32)>,
    /// Whether a line of the control experiment that runs names what is missing.
    names_it: bool,
    /// How the control experiments ended: with what, and whether they named it.
    controls: Vec<(i32, bool)>,
    /// How many machines this is of.
    machines: usize,
    evidence: Vec<String>,
    figures: Vec<String>,
    done: bool,
}

impl Console {
    /// Of a lab in which all of `runs` run.
    pub(crate) fn of(runs: impl IntoIterator<Item = Run>) -> Self {
        Self { runs: runs.into_iter().collect(), machines: 1, ..Self::default() }
    }

    /// What all machines of a lab said.
    pub(super) fn all(parts: Vec<Self>) -> Self {
        let mut all = Self { done: parts.iter().all(|part| part.done), ..Self::default() };
        for part in parts {
            all.begun += part.begun;
            all.runs.extend(part.runs);
            all.said.extend(part.said);
            all.passed.extend(part.passed);
            all.failed.extend(part.failed);
            all.ended.extend(part.ended);
            all.controls.extend(part.controls);
            all.machines += part.machines;
            all.evidence.extend(part.evidence);
            all.figures.extend(part.figures);
        }
        all
    }

    /// Takes what is new in `text`, the whole console so far, and returns what a person wants to see.
    pub(crate) fn feed(&mut self, text: &str) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(line) = text.get(self.taken..).and_then(|rest| rest.split_inclusive('\n').next()) {
            if !line.ends_with('\n') {
                break;
            }
            self.taken += line.len();
            told.extend(self.take(line.trim_end()));
        }
        told
    }

    fn take(&mut self, line: &str) -> Option<String> {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("LAB-UP") => return Some(line.to_owned()),
            Some("LAB-BEGIN") => {
                self.begun += 1;
                words.next().unwrap_or_default().clone_into(&mut self.inside);
            }
            Some("LAB-END") => {
                let (name, code) = (words.next()?, words.next()?.parse().ok()?);
                if name == "control" {
                    self.controls.push((code, self.names_it));
                }
                self.ended.push((name.to_owned(), code));
                self.inside.clear();
            }
            Some("LAB-DONE") => self.done = true,
            _ if self.inside == "control" => self.names_it |= line.contains("/dev/kvm"),
            _ => {
                self.hear(line);
                return self.verdict(line);
            }
        }
        None
    }

    /// Keeps which of the texts that the current run must say are in `line`.
    fn hear(&mut self, line: &str) {
        let wanted = self.runs.iter().find(|run| run.name == self.inside).map_or(&[][..], |run| run.says);
        let heard = wanted.iter().filter(|text| line.contains(**text));
        self.said.extend(heard.map(|text| (self.inside.clone(), *text)));
    }

    /// `test NAME ... ok`. What the test itself prints may stand between the name and the verdict, on lines of its own too.
    fn verdict(&mut self, line: &str) -> Option<String> {
        let mut rest = line.trim();
        if rest.starts_with("HARNESS ") || rest.starts_with("NOTE ") {
            self.figures.push(rest.to_owned());
            return Some(rest.to_owned());
        }
        if let Some((name, after)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ...")) {
            self.test = Some(name.to_owned());
            rest = after.trim();
        }
        if let Some(at) = rest.find("EVIDENCE ") {
            self.evidence.push(rest[at..].to_owned());
            return Some(rest[at..].to_owned());
        }
        // A program without a harness says how long it took.
        let ended = match rest.split(" (").next() {
            Some("ok") => &mut self.passed,
            Some("FAILED") => &mut self.failed,
            _ => return None,
        };
        let name = self.test.take()?;
        let told = format!("test {name} ... {rest}");
        ended.push((self.inside.clone(), name));
        Some(told)
    }

    fn has_said(&self, run: &Run, text: &str) -> bool {
        self.said.iter().any(|(name, said)| name == run.name && *said == text)
    }

    /// The lines of figures that a benchmark printed.
    ///
    /// # Errors
    /// It did not come to a good end.
    pub(crate) fn figures(&self) -> Result<String> {
        match self.done && self.ended == [("bench".to_owned(), 0)] {
            true => Ok(self.figures.iter().map(|line| format!("{line}\n")).collect()),
            false => Err(Failure::new("the benchmark in the lab did not come to a good end")
                .remedy("look at the console")),
        }
    }

    /// Whether everything that ran passed, something ran, and the control experiment failed for want of KVM. `whole`: no test was
    /// left out, so the evidence must be there.
    pub(crate) fn judge(&self, nonce: &str, whole: bool) -> Result<()> {
        let bad = |what: String| Err(Failure::new(what).remedy("look at the console"));
        if !self.done || self.ended.len() != self.begun {
            return bad("the lab went silent before its end".to_owned());
        }
        if !self.failed.is_empty() {
            let names: Vec<&str> = self.failed.iter().map(|(_, test)| test.as_str()).collect();
            return bad(format!("{} of the lab's tests failed: {}", names.len(), names.join(", ")));
        }
        if let Some((name, code)) = self.ended.iter().find(|(name, code)| name != "control" && *code != 0) {
            return bad(format!("`{name}` ended with {code}"));
        }
        for run in &self.runs {
            if !self.ended.iter().any(|(name, _)| name == run.name) {
                return bad(format!("`{}` did not run", run.name));
            }
            if let Some(text) = run.says.iter().find(|text| !self.has_said(run, text)) {
                return bad(format!("`{}` ended well, but did not say `{text}`", run.name));
            }
            if whole && run.has_tests() && !self.passed.iter().any(|(name, _)| name == run.name) {
                return bad(format!("no test of `{}` ran", run.name));
            }
        }
        let programs = self.runs.iter().filter(|run| !run.has_tests()).count();
        if self.passed.len() + programs == 0 {
            return bad("no test ran in the lab".to_owned());
        }
        let as_it_must = |(code, names_it): &(i32, bool)| *code != 0 && *names_it;
        if self.controls.len() != self.machines || !self.controls.iter().all(as_it_must) {
            return bad("without KVM the control test did not fail, or did not name /dev/kvm".to_owned());
        }
        if whole {
            for part in [format!("nonce={nonce}"), "Hypervisor detected: KVM".to_owned()] {
                if !self.evidence.iter().any(|line| line.contains(&part)) {
                    return bad(format!("no guest printed `{part}` on its console"));
                }
            }
        }
        let passed = self.passed.len();
        crate::report::line(&format!("LAB passed={passed} programs={programs} control=failed-as-it-must OK"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "LAB-UP 4.2\nLAB-BEGIN lab\ntest a ... EVIDENCE x\nok\ntest b ... ok (1.5 s)\nEVIDENCE nonce=abc\n\
        EVIDENCE Hypervisor detected: KVM\nLAB-END lab 0\n\
        LAB-BEGIN hello\nhello, world\nLAB-END hello 0\nLAB-BEGIN control\nno /dev/kvm here\nLAB-END control 101\nLAB-DONE 9\n";

    const LAB: Run =
        Run { package: "p", kind: "--test", name: "lab", words: &[], beside: None, part: 0, says: &[] };
    const HELLO: Run = Run { kind: "--bin", name: "hello", says: &["world"], ..LAB };

    fn judged(text: &str) -> Result<()> {
        let mut console = Console::of([LAB, HELLO]);
        console.feed(text);
        console.judge("abc", true)
    }

    #[test]
    fn a_whole_run_passes_and_each_missing_part_fails_it() {
        judged(GOOD).unwrap();
        for missing in [
            "LAB-END lab 0\n",
            "EVIDENCE nonce=abc\n",
            "EVIDENCE Hypervisor detected: KVM\n",
            "LAB-DONE 9\n",
            "no /dev/kvm here\n",
            "LAB-END control 101\n",
            "world",
            "LAB-BEGIN hello\nhello, world\nLAB-END hello 0\n",
        ] {
            assert!(GOOD.contains(missing));
            judged(&GOOD.replace(missing, "")).unwrap_err();
        }
        judged(&GOOD.replace("test ", "tested ")).unwrap_err();
        judged(&GOOD.replace("control 101", "control 0")).unwrap_err();
        judged(&GOOD.replace("LAB-END lab 0", "LAB-END lab 101")).unwrap_err();
        judged(&GOOD.replace("LAB-END hello 0", "LAB-END hello 1")).unwrap_err();
        // What another run says does not count.
        judged(&GOOD.replace("world", "").replace("LAB-BEGIN lab\n", "LAB-BEGIN lab\nworld\n")).unwrap_err();
        judged(&GOOD.replace("test b ... ok (1.5 s)", "test b ... FAILED")).unwrap_err();
    }

    #[test]
    fn of_two_machines_both_must_come_to_their_end() {
        let (one, two) = (GOOD.replace("LAB-END hello 0\n", "").replace("LAB-BEGIN hello\n", ""), GOOD);
        let judged = |texts: [&str; 2]| {
            let parts = [LAB, HELLO].into_iter().zip(texts).map(|(run, text)| {
                let mut console = Console::of([run]);
                console.feed(text);
                console
            });
            Console::all(parts.collect()).judge("abc", true)
        };
        judged([&one, two]).unwrap();
        judged([&one.replace("LAB-DONE 9\n", ""), two]).unwrap_err();
        judged([&one, &two.replace("LAB-DONE 9\n", "")]).unwrap_err();
        judged([&one, &two.replace("control 101", "control 0")]).unwrap_err();
        judged([&one, &two.replace("no /dev/kvm here", "another reason")]).unwrap_err();
        let without = two.replace("LAB-BEGIN control\nno /dev/kvm here\nLAB-END control 101\n", "");
        judged([&one, &without]).unwrap_err();
        judged([&one, ""]).unwrap_err();
        judged(["", two]).unwrap_err();
    }

    #[test]
    fn a_benchmark_gives_its_figures_only_if_it_ended_well() {
        let good =
            "LAB-UP 4\nLAB-BEGIN bench\nnoise\nHARNESS a ours=1\nNOTE b\nLAB-END bench 0\nLAB-DONE 9\n";
        let figures = |text: &str| {
            let mut console = Console::default();
            console.feed(text);
            console.figures()
        };
        assert_eq!(figures(good).unwrap(), "HARNESS a ours=1\nNOTE b\n");
        figures(&good.replace("LAB-DONE 9\n", "")).unwrap_err();
        figures(&good.replace("bench 0", "bench 1")).unwrap_err();
        figures(&good.replace("LAB-END bench 0\n", "")).unwrap_err();
    }

    #[test]
    fn a_console_is_read_as_it_grows() {
        let mut console = Console::default();
        assert!(console.feed("LAB-BEGIN lab\ntest a ..").is_empty());
        assert_eq!(console.feed("LAB-BEGIN lab\ntest a ... ok\ntest"), ["test a ... ok"]);
        assert!(console.feed("LAB-BEGIN lab\ntest a ... ok\ntest").is_empty());
    }
}
