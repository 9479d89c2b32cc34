//! One error type: what the caller can do next, a text that a tenant may read, and whether the effect may have happened.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use crate::ObjectRef;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by what the caller can do about it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The object does not exist, or the caller may not know that it does.
    NotFound,
    /// An object of that name exists.
    AlreadyExists,
    /// The request is wrong; sending it again will not help.
    Invalid,
    /// Nobody vouches for the caller.
    Unauthenticated,
    /// The caller may see the object, but not do this.
    Denied,
    /// The object is not in the state that the request needs, or was changed meanwhile.
    Conflict,
    /// The project's quota does not allow it.
    QuotaExceeded,
    /// No host has room.
    NoCapacity,
    /// Too many requests; see [`Error::retry_after`].
    RateLimited,
    /// A host, disk or service does not answer.
    Unavailable,
    /// The time ran out. The effect may have happened.
    Timeout,
    /// The caller gave up.
    Cancelled,
    /// A newer leader or writer exists; this one must stop.
    Fenced,
    /// This provider cannot do it; its capabilities say so.
    Unsupported,
    /// A defect of ours.
    Internal,
}

/// Did the effect certainly not happen?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Certainly not: it is safe to try elsewhere.
    NotDone,
    /// Perhaps: observe before acting again.
    #[default]
    Unknown,
}

/// An error of any part of the cloud. It crosses process borders as a value.
///
/// One pointer wide, so that a `Result` stays small.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Error(Box<Body>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Body {
    kind: ErrorKind,
    #[serde(default)]
    outcome: Outcome,
    public: String,
    #[serde(default)]
    remedy: Option<String>,
    #[serde(default)]
    about: Option<ObjectRef>,
    #[serde(default)]
    retry_after: Option<Duration>,
    #[serde(default)]
    operator: Vec<String>,
}

impl Error {
    /// Makes an error of `kind`. `public` is safe for a tenant: no path, address or id of another tenant.
    ///
    /// The outcome is [`Outcome::NotDone`] for kinds that refuse before acting, else [`Outcome::Unknown`].
    pub fn new(kind: ErrorKind, public: impl Into<String>) -> Self {
        let outcome = match kind {
            ErrorKind::Timeout | ErrorKind::Unavailable | ErrorKind::Cancelled | ErrorKind::Internal => {
                Outcome::Unknown
            }
            _ => Outcome::NotDone,
        };
        Self(Box::new(Body {
            kind,
            outcome,
            public: public.into(),
            remedy: None,
            about: None,
            retry_after: None,
            operator: Vec::new(),
        }))
    }

    /// Says what the reader can do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Names the object that it is about.
    #[must_use]
    pub fn about(mut self, object: ObjectRef) -> Self {
        self.0.about = Some(object);
        self
    }

    /// Sets whether the effect may have happened.
    #[must_use]
    pub fn outcome_is(mut self, outcome: Outcome) -> Self {
        self.0.outcome = outcome;
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_in(mut self, after: Duration) -> Self {
        self.0.retry_after = Some(after);
        self
    }

    /// Keeps `source` and the chain below it for the operator.
    #[must_use]
    pub fn because(mut self, source: &dyn StdError) -> Self {
        let mut next = Some(source);
        while let Some(error) = next {
            self.0.operator.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Adds a line for the operator, which a tenant never sees.
    #[must_use]
    pub fn detail(mut self, line: impl Into<String>) -> Self {
        self.0.operator.push(line.into());
        self
    }

    /// What went wrong, by what to do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Did the effect certainly not happen?
    pub fn outcome(&self) -> Outcome {
        self.0.outcome
    }

    /// The text that a tenant may read.
    pub fn public(&self) -> &str {
        &self.0.public
    }

    /// What to do about it.
    pub fn what_to_do(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The object that it is about.
    pub fn object(&self) -> Option<&ObjectRef> {
        self.0.about.as_ref()
    }

    /// When to try again.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The lines for the operator: the chain of sources.
    pub fn operator(&self) -> &[String] {
        &self.0.operator
    }
}

macro_rules! shorthand {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),+ $(,)?) => {
        impl Error {$(
            $(#[$doc])*
            pub fn $name(public: impl Into<String>) -> Self {
                Self::new(ErrorKind::$kind, public)
            }
        )+}
    };
}

shorthand! {
    /// [`ErrorKind::NotFound`].
    not_found => NotFound,
    /// [`ErrorKind::AlreadyExists`].
    already_exists => AlreadyExists,
    /// [`ErrorKind::Invalid`].
    invalid => Invalid,
    /// [`ErrorKind::Denied`].
    denied => Denied,
    /// [`ErrorKind::Conflict`].
    conflict => Conflict,
    /// [`ErrorKind::Unavailable`].
    unavailable => Unavailable,
    /// [`ErrorKind::Timeout`].
    timeout => Timeout,
    /// [`ErrorKind::Fenced`].
    fenced => Fenced,
    /// [`ErrorKind::Unsupported`].
    unsupported => Unsupported,
    /// [`ErrorKind::Internal`].
    internal => Internal,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.public)?;
        if let Some(about) = &self.0.about {
            write!(f, " ({about})")?;
        }
        if let Some(remedy) = &self.0.remedy {
            write!(f, "; {remedy}")?;
        }
        if f.alternate() {
            for line in &self.0.operator {
                write!(f, "\n  because: {line}")?;
            }
        }
        Ok(())
    }
}

impl StdError for Error {}
