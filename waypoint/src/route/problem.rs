//! What could not be understood in a user's object. It never vanishes: the part that holds it
//! answers 500 for the same reason, and the list goes to the log and to the control plane.

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
        let told = format!("{}: {reason}", self.path).into();
        self.found.push(Problem {
            field: self.path.clone(),
            reason,
        });
        told
    }

    pub(super) fn into_found(self) -> Vec<Problem> {
        self.found
    }
}
