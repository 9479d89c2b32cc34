//! Patterns of actions: `noun.verb`, `noun.*`, `*.verb` and `*`.

/// A pattern that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    /// `None` stands for every noun.
    noun: Option<String>,
    /// `None` stands for every verb.
    verb: Option<String>,
}

impl Pattern {
    /// Reads a pattern; `None` if it is none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self { noun: None, verb: None });
        }
        let (noun, verb) = text.split_once('.')?;
        Some(Self { noun: part(noun)?, verb: part(verb)? })
    }

    /// Whether it stands for `action`.
    pub(super) fn covers(&self, action: &str) -> bool {
        // An action that is no `noun.verb` is one that nobody defined: only a pattern for everything could cover it, and
        // none does.
        let Some((noun, verb)) = action.split_once('.') else { return false };
        self.noun.as_ref().is_none_or(|n| n == noun) && self.verb.as_ref().is_none_or(|v| v == verb)
    }
}

/// A noun or verb, or the star for all of them.
fn part(text: &str) -> Option<Option<String>> {
    if text == "*" {
        return Some(None);
    }
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let good = (1..=63).contains(&text.len()) && text.bytes().all(plain);
    good.then(|| Some(text.to_owned()))
}
