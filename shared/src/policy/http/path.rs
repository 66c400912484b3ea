//! Sets of paths: exact, prefix, suffix, presence and templates, over both readings of a
//! path.

use super::fields::{Readings, Set};
use super::normalize::{NormalizedPath, generous, generous_piece};
use crate::policy::matching::Pattern;

/// Values of `paths` or `notPaths`.
#[derive(Debug, Default)]
pub(super) struct PathSet {
    /// As the user wrote them, for the path as it is sent.
    written: Patterns,
    /// For the other reading.
    generous: Patterns,
}

#[derive(Debug, Default)]
struct Patterns {
    exact: Vec<Box<[u8]>>,
    other: Vec<PathPattern>,
}

#[derive(Debug)]
enum PathPattern {
    Presence,
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    Template(Vec<Piece>),
}

/// A piece of a template (Istio Operation.paths).
#[derive(Debug, Clone)]
enum Piece {
    Literal(Box<[u8]>),
    /// `{*}`: one segment that is not empty.
    One,
    /// `{**}`: anything, or nothing.
    Many,
}

/// A value of `paths`.
#[derive(Debug)]
pub(super) enum PathValue {
    Pattern(Pattern),
    Template(Vec<(String, bool)>, String),
}

impl PathValue {
    /// # Errors
    /// What is wrong with the text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if !text.contains("{*}") && !text.contains("{**}") {
            return Pattern::parse(text).map(Self::Pattern);
        }
        if !text.starts_with('/') {
            return Err("a path template starts with a slash".to_owned());
        }
        let mut operators = Vec::new();
        let mut literal = String::new();
        let mut many = false;
        for segment in text.split('/').skip(1) {
            literal.push('/');
            match segment {
                "{*}" | "{**}" if many => {
                    return Err("{**} is not the last operator of the template".to_owned());
                }
                "{*}" | "{**}" => {
                    many = segment == "{**}";
                    operators.push((std::mem::take(&mut literal), many));
                }
                plain if plain.contains(['{', '}', '*']) => {
                    return Err(format!("{plain:?} mixes text and an operator"));
                }
                plain => literal.push_str(plain),
            }
        }
        Ok(Self::Template(operators, literal))
    }
}

fn template(
    operators: &[(String, bool)],
    tail: &str,
    literal: impl Fn(&str) -> Vec<u8>,
) -> PathPattern {
    let mut pieces = Vec::new();
    for (text, many) in operators {
        pieces.push(Piece::Literal(literal(text).into()));
        pieces.push(if *many { Piece::Many } else { Piece::One });
    }
    if !tail.is_empty() {
        pieces.push(Piece::Literal(literal(tail).into()));
    }
    PathPattern::Template(pieces)
}

impl PathSet {
    /// `opens`: that a path is in the set makes it more likely to be permitted. Only then
    /// are parameters taken off the values for the other reading, which has none.
    pub(super) fn new(values: Vec<PathValue>, opens: bool) -> Self {
        let bytes = |text: &str| text.as_bytes().to_vec();
        let without = |text: &'_ str| match text.split_once(';') {
            Some((before, _)) if opens => generous_piece(before),
            _ => generous_piece(text),
        };
        let mut set = Self::default();
        for value in values {
            match value {
                PathValue::Pattern(Pattern::Exact(text)) => {
                    set.written.exact.push(bytes(&text).into());
                    let generous = generous(text.as_bytes(), opens);
                    set.generous.exact.push(generous.into());
                }
                PathValue::Pattern(Pattern::Prefix(text)) => {
                    set.written.push(PathPattern::Prefix(bytes(&text).into()));
                    set.generous
                        .push(PathPattern::Prefix(without(&text).into()));
                }
                PathValue::Pattern(Pattern::Suffix(text)) => {
                    set.written.push(PathPattern::Suffix(bytes(&text).into()));
                    let generous = generous_piece(&text).into();
                    set.generous.push(PathPattern::Suffix(generous));
                }
                PathValue::Pattern(Pattern::Presence) => {
                    set.written.push(PathPattern::Presence);
                    set.generous.push(PathPattern::Presence);
                }
                PathValue::Template(operators, tail) => {
                    set.written.push(template(&operators, &tail, bytes));
                    let generous = template(&operators, &tail, generous_piece);
                    set.generous.push(generous);
                }
            }
        }
        for patterns in [&mut set.written, &mut set.generous] {
            patterns.exact.sort_unstable();
            patterns.exact.dedup();
        }
        set
    }

    pub(super) fn contains(&self, path: &NormalizedPath<'_>, readings: Readings) -> bool {
        let sent = || self.written.contains(path.as_str().as_bytes());
        let Some(other) = path.other_reading() else {
            return sent();
        };
        match readings {
            Readings::All => sent() && self.generous.contains(other),
            Readings::Any => sent() || self.generous.contains(other),
        }
    }

    /// The values, for both readings, if every one is exact.
    pub(super) fn only_exact(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let both = self.written.exact.iter().chain(&self.generous.exact);
        let simple = self.written.other.is_empty() && self.generous.other.is_empty();
        (simple && !self.is_empty()).then(|| both.map(|path| &**path))
    }
}

impl Set for PathSet {
    fn is_empty(&self) -> bool {
        self.written.exact.is_empty() && self.written.other.is_empty()
    }
}

impl Patterns {
    fn push(&mut self, pattern: PathPattern) {
        self.other.push(pattern);
    }

    fn contains(&self, path: &[u8]) -> bool {
        let exact = self.exact.binary_search_by(|exact| (**exact).cmp(path));
        exact.is_ok() || self.other.iter().any(|pattern| pattern.matches(path))
    }
}

impl PathPattern {
    fn matches(&self, path: &[u8]) -> bool {
        match self {
            Self::Presence => !path.is_empty(),
            Self::Prefix(prefix) => path.starts_with(prefix),
            Self::Suffix(suffix) => path.ends_with(suffix),
            Self::Template(pieces) => template_matches(pieces, path),
        }
    }
}

fn template_matches(pieces: &[Piece], mut path: &[u8]) -> bool {
    for (at, piece) in pieces.iter().enumerate() {
        match piece {
            Piece::Literal(text) => match path.strip_prefix(&**text) {
                Some(rest) => path = rest,
                None => return false,
            },
            Piece::One => {
                let end = path.iter().position(|byte| *byte == b'/');
                let end = end.unwrap_or(path.len());
                if end == 0 {
                    return false;
                }
                path = &path[end..];
            }
            // The last operator: at most one literal follows.
            Piece::Many => {
                return match &pieces[at + 1..] {
                    [Piece::Literal(text)] => path.ends_with(text),
                    rest => rest.is_empty(),
                };
            }
        }
    }
    path.is_empty()
}
