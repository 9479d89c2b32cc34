//! The one error of these commands: what went wrong, and what to do about it.

use std::fmt;
use std::path::Path;

/// Shorthand for results whose error is a [`Failure`].
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// A command that could not do its job, told to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    what: String,
    remedy: Option<String>,
}

impl Failure {
    /// States what went wrong.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: None }
    }

    /// Adds what the reader can do next.
    #[must_use]
    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// What went wrong, without the remedy.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n  what to do: {}", remedy.replace('\n', "\n  ")),
            None => Ok(()),
        }
    }
}

/// Attaches a path or a name to an [`std::io::Error`].
pub(crate) trait Context<T> {
    /// Turns the error into a [`Failure`] that starts with `what`.
    fn context(self, what: impl fmt::Display) -> Result<T>;
    /// Turns the error into a [`Failure`] about the file at `path`.
    fn at(self, path: &Path) -> Result<T>
    where
        Self: Sized,
    {
        self.context(path.display())
    }
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Failure::new(format!("{what}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_prints_its_remedy_below_what_went_wrong() {
        let failure = Failure::new("no emulator").remedy("run `cargo xtask setup`\nas root");
        assert_eq!(
            failure.to_string(),
            "error: no emulator\n  what to do: run `cargo xtask setup`\n  as root"
        );
    }
}
