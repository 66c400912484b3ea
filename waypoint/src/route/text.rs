//! Tests of one text value: exact, prefix, suffix, regular expression, presence.

use regex::bytes::{Regex, RegexBuilder};

/// Compiled size of one regular expression, and of the cache of its lazy automaton.
const REGEX_SIZE: usize = 1 << 20;

/// A test of a value.
#[derive(Debug, Clone)]
pub(super) enum TextMatch {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Regex(Regex),
    Present,
    /// Could not be understood; counts as holding, for the rule to answer 500.
    Invalid,
}

impl TextMatch {
    pub(super) fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => value == text.as_bytes(),
            Self::Prefix(text) => value.starts_with(text.as_bytes()),
            Self::Suffix(text) => value.ends_with(text.as_bytes()),
            Self::Regex(regex) => regex.is_match(value),
            Self::Present | Self::Invalid => true,
        }
    }
}

/// Compiles a pattern that must match the whole value (RE2: linear time).
pub(super) fn compile_regex(pattern: &str) -> Result<Regex, String> {
    let build = |pattern: &str| {
        RegexBuilder::new(pattern)
            .size_limit(REGEX_SIZE)
            .dfa_size_limit(REGEX_SIZE)
            .build()
            .map_err(|error| last_line(&error.to_string()))
    };
    // By itself first: `a)|(b` is no pattern, though it would be one between parentheses.
    build(pattern)?;
    build(&format!(r"\A(?:{pattern})\z"))
}

/// What is wrong; the lines before draw the pattern.
fn last_line(error: &str) -> String {
    let line = error.lines().rfind(|line| !line.trim().is_empty());
    line.unwrap_or("not a regular expression").trim().to_owned()
}

/// Text with which every value that a pattern matches begins: as much as is certain, often
/// nothing. It narrows where a pattern has to be tried.
pub(super) fn literal_prefix(pattern: &str) -> String {
    let mut prefix = String::new();
    if pattern.contains('|') {
        return prefix;
    }
    let mut characters = pattern.strip_prefix('^').unwrap_or(pattern).chars();
    while let Some(character) = characters.next() {
        match character {
            // The character before may be absent.
            '?' | '*' | '{' => {
                prefix.pop();
                break;
            }
            '\\' => match characters.next() {
                Some(escaped) if escaped.is_ascii_punctuation() => prefix.push(escaped),
                _ => break,
            },
            '.' | '+' | '(' | ')' | '[' | ']' | '^' | '$' | '}' => break,
            literal => prefix.push(literal),
        }
    }
    prefix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_values() {
        let regex = compile_regex("a|bc").expect("compiles");
        assert!(regex.is_match(b"a") && regex.is_match(b"bc"));
        assert!(!regex.is_match(b"ab") && !regex.is_match(b"xbc") && !regex.is_match(b"a\n"));
        for bad in ["(", "a)|(?:b", "[", r"\C", "(?x)a #"] {
            assert!(compile_regex(bad).is_err(), "{bad}");
        }
        assert!(compile_regex(&"(a{1000}){1000}".repeat(9)).is_err(), "size");
    }

    #[test]
    fn what_is_certain_of_a_pattern() {
        for (pattern, prefix) in [
            ("/api/v1/[0-9]+", "/api/v1/"),
            ("^/api/.*", "/api/"),
            ("/ab?c", "/a"),
            ("/ab*", "/a"),
            ("/ab{0,2}", "/a"),
            ("/ab+c", "/ab"),
            (r"/a\.b\d", "/a.b"),
            ("/a|/b", ""),
            ("(?i)/a", ""),
            ("/a[", "/a"),
            ("", ""),
        ] {
            assert_eq!(literal_prefix(pattern), prefix, "{pattern}");
        }
    }
}
