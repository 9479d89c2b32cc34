//! A run of named stages, each bounded and timed, told one line each and summed up at the end.

use std::time::{Duration, Instant};

use crate::failure::{Failure, Result};
use crate::report::{line, seconds};

/// What has run so far.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    done: Vec<(String, Duration, Option<Failure>)>,
}

impl Stages {
    /// Runs one stage; a failure is kept and the next stage still runs, so that one run tells everything.
    pub(crate) fn stage(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        line(&format!("STAGE {name}"));
        let started = Instant::now();
        let failure = work().err();
        if let Some(failure) = &failure {
            line(&failure.to_string());
        }
        let verdict = verdict(failure.as_ref());
        line(&format!("STAGE {name}: {verdict} ({})", seconds(started.elapsed())));
        self.done.push((name.to_owned(), started.elapsed(), failure));
    }

    /// Prints every stage's time; fails when one failed.
    pub(crate) fn finish(self) -> Result<()> {
        line("");
        for (name, time, failure) in &self.done {
            line(&format!("{:>9}  {:6}  {name}", seconds(*time), verdict(failure.as_ref())));
        }
        let total: Duration = self.done.iter().map(|(_, time, _)| *time).sum();
        line(&format!("{:>9}  in all", seconds(total)));
        let failed: Vec<&str> =
            self.done.iter().filter(|(.., f)| f.is_some()).map(|(name, ..)| name.as_str()).collect();
        match failed.as_slice() {
            [] => Ok(()),
            names => Err(Failure::new(format!(
                "{} of {} stages failed: {}",
                names.len(),
                self.done.len(),
                names.join(", ")
            ))
            .remedy("read the first failing stage's output above")),
        }
    }
}

fn verdict(failure: Option<&Failure>) -> &'static str {
    if failure.is_none() { "ok" } else { "FAILED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_after_a_failing_one_still_run_and_the_end_names_it() {
        let (mut stages, mut ran) = (Stages::default(), false);
        stages.stage("first", || Err(Failure::new("broken")));
        stages.stage("second", || {
            ran = true;
            Ok(())
        });
        assert!(ran);
        assert_eq!(stages.finish().unwrap_err().what(), "1 of 2 stages failed: first");
        assert!(Stages::default().finish().is_ok());
    }
}
