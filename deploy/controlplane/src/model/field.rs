//! Where in an object something is wrong.
//!
//! Parsers walk with an [`At`] on the stack, which costs nothing until an error is
//! made; the [`FieldPath`] of an error finds its line again in the file.

use std::fmt;

/// One step into an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Segment {
    /// A key of a mapping.
    Key(String),
    /// A position in a list, from 0.
    Index(usize),
}

/// The way from an object's root to a field, for example `spec.rules[0].to`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FieldPath(pub Vec<Segment>);

impl FieldPath {
    /// The path as a deserializer saw it.
    pub fn from_serde(path: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment as Serde;
        let steps = path.iter().filter_map(|segment| match segment {
            Serde::Seq { index } => Some(Segment::Index(*index)),
            Serde::Map { key } => Some(Segment::Key(key.clone())),
            Serde::Enum { variant } => Some(Segment::Key(variant.clone())),
            Serde::Unknown => None,
        });
        Self(steps.collect())
    }

    /// This path below `prefix`.
    pub fn below(&self, prefix: &[Segment]) -> Self {
        Self(prefix.iter().chain(&self.0).cloned().collect())
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) if key.contains(['.', '[', ']']) => write!(f, "[{key:?}]")?,
                Segment::Key(key) if position == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", prefix(.path))]
pub struct FieldError {
    /// Which field; empty: the object as a whole.
    pub path: FieldPath,
    /// What is wrong with it, and what would be right.
    pub message: String,
}

fn prefix(path: &FieldPath) -> String {
    if path.0.is_empty() {
        String::new()
    } else {
        format!("{path}: ")
    }
}

/// A position in an object while it is parsed.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

impl<'a> At<'a> {
    /// The object itself.
    pub const ROOT: At<'static> = At {
        parent: None,
        step: Step::Root,
    };

    /// The field `key` of this position.
    pub fn key(&'a self, key: &'a str) -> At<'a> {
        At {
            parent: Some(self),
            step: Step::Key(key),
        }
    }

    /// The item `index` of this position.
    pub fn index(&'a self, index: usize) -> At<'a> {
        At {
            parent: Some(self),
            step: Step::Index(index),
        }
    }

    /// The path from the root.
    pub fn path(&self) -> FieldPath {
        let mut steps = Vec::new();
        let mut at = Some(self);
        while let Some(position) = at {
            match position.step {
                Step::Root => {}
                Step::Key(key) => steps.push(Segment::Key(key.into())),
                Step::Index(index) => steps.push(Segment::Index(index)),
            }
            at = position.parent;
        }
        steps.reverse();
        FieldPath(steps)
    }

    /// An error at this position.
    pub fn error(&self, message: impl Into<String>) -> FieldError {
        FieldError {
            path: self.path(),
            message: message.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_like_yaml() {
        let spec = At::ROOT.key("spec");
        let rules = spec.key("rules");
        let rule = rules.index(2);
        let error = rule.key("from").error("is empty");
        assert_eq!(error.to_string(), "spec.rules[2].from: is empty");
        let labels = At::ROOT.key("metadata");
        let labels = labels.key("labels");
        assert_eq!(
            labels.key("app.kubernetes.io/name").path().to_string(),
            r#"metadata.labels["app.kubernetes.io/name"]"#
        );
        assert_eq!(At::ROOT.error("no kind").to_string(), "no kind");
    }
}
