//! What could not be understood in a user's object. It never vanishes: the part that holds it
//! answers 500 for the same reason, and the list goes to the log and to the control plane. What
//! the control plane sends as invalid answers likewise and is no problem: it was understood.

use std::fmt;
use std::sync::Arc;

/// A field and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field in the resource: `http.rules[0].matches[1].headers[0].value`.
    pub field: String,
    /// What is wrong.
    pub reason: Arc<str>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

/// Collects problems while an object is read.
#[derive(Debug, Default)]
pub(super) struct Problems {
    path: String,
    found: Vec<Problem>,
}

impl Problems {
    /// Reads a part of the object at `field`, so that its problems are named after it.
    pub(super) fn within<T>(
        &mut self,
        field: impl fmt::Display,
        read: impl FnOnce(&mut Self) -> T,
    ) -> T {
        use fmt::Write as _;
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        // Writing to a String cannot fail.
        let _ = write!(self.path, "{field}");
        let value = read(self);
        self.path.truncate(length);
        value
    }

    /// Notes a problem of the field being read, and gives back its reason with the field's name,
    /// for the answer of what cannot work without it.
    pub(super) fn add(&mut self, reason: impl Into<Arc<str>>) -> Arc<str> {
        let reason = reason.into();
        let named = self.name(&reason);
        self.found.push(Problem {
            field: self.path.clone(),
            reason,
        });
        named
    }

    /// The reason with the name of the field being read, for what the control plane itself says
    /// cannot work: to be answered with, but nothing to tell it about.
    pub(super) fn name(&self, reason: &str) -> Arc<str> {
        format!("{}: {reason}", self.path).into()
    }

    pub(super) fn into_found(self) -> Vec<Problem> {
        self.found
    }
}
