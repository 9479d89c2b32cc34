//! From runs to lines: medians, one line per figure and peer.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::Result;
use crate::contender::OURS;
use crate::turn::Seen;

/// The values of every run.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    values: BTreeMap<(String, &'static str), Vec<f64>>,
    failed: BTreeMap<String, String>,
}

impl Figures {
    pub(crate) fn add(&mut self, name: &str, seen: &Seen) {
        for (figure, value) in seen {
            self.values.entry((name.to_owned(), figure)).or_default().push(*value);
        }
    }

    /// Keeps why a run of `name` gave no figures.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        eprintln!("{name} FAILED {why}");
        self.failed.insert(name.to_owned(), why.to_owned());
    }

    /// Every figure of ours beside that of each peer among `names`.
    ///
    /// # Errors
    /// A figure of ours is missing.
    pub(crate) fn lines(&self, names: &[&str]) -> Result<String> {
        let mut lines = String::new();
        for (figure, unit) in FIGURES {
            let ours = self.median(OURS, figure).ok_or_else(|| format!("no {figure} of ours"))?;
            for peer in names.iter().filter(|name| **name != OURS) {
                let theirs = self.median(peer, figure).map_or_else(|| "-".to_owned(), |v| v.to_string());
                writeln!(lines, "HARNESS {figure}.{peer} unit={unit} ours={ours} peer={theirs}")?;
            }
            if names.len() == 1 {
                writeln!(lines, "HARNESS {figure} unit={unit} ours={ours} peer=-")?;
            }
            writeln!(lines, "NOTE {figure} ({unit}): {}", self.told(figure, names))?;
        }
        for (name, why) in &self.failed {
            writeln!(lines, "NOTE a run of {name} failed: {why}")?;
        }
        Ok(lines)
    }

    fn median(&self, name: &str, figure: &'static str) -> Option<f64> {
        let mut values = self.values.get(&(name.to_owned(), figure))?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// All values, because a median of three says little about their spread.
    fn told(&self, figure: &'static str, names: &[&str]) -> String {
        let of = |name: &&str| {
            let values = self.values.get(&((*name).to_owned(), figure)).map_or(&[][..], Vec::as_slice);
            let values: Vec<String> = values.iter().map(|value| format!("{value:.1}")).collect();
            format!("{name} {}", values.join(" "))
        };
        names.iter().map(of).collect::<Vec<_>>().join(", ")
    }
}

const FIGURES: [(&str, &str); 6] = [
    ("boot.init", "ms"),
    ("mem.overhead", "MiB"),
    ("blk.randread", "1/s"),
    ("blk.randwrite", "1/s"),
    ("net.tcp.out", "MB/s"),
    ("net.tcp.in", "MB/s"),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn seen(value: f64) -> Seen {
        FIGURES.map(|(figure, _)| (figure, value)).to_vec()
    }

    #[test]
    fn each_peer_has_a_line_with_the_medians() {
        let mut figures = Figures::default();
        for value in [3.0, 1.0, 2.0] {
            figures.add(OURS, &seen(value));
            figures.add("a", &seen(value * 10.0));
        }
        figures.fail("b", "no such program");
        let lines = figures.lines(&[OURS, "a", "b"]).unwrap();
        assert!(lines.contains("HARNESS boot.init.a unit=ms ours=2 peer=20\n"), "{lines}");
        assert!(lines.contains("HARNESS net.tcp.in.b unit=MB/s ours=2 peer=-\n"), "{lines}");
        assert!(lines.contains("NOTE a run of b failed: no such program\n"), "{lines}");
    }

    #[test]
    fn ours_has_every_figure_or_none_is_told() {
        let mut figures = Figures::default();
        figures.add(OURS, &seen(1.0)[..2].to_vec());
        figures.lines(&[OURS]).unwrap_err();
        figures.add(OURS, &seen(1.0));
        figures.lines(&[OURS]).unwrap();
    }
}
