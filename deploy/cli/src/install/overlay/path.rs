//! Paths into an object, as Istio's operator writes them.
//!
//! `spec.template.spec.containers.[name:discovery].args.[30m]`: keys are parted by dots, an
//! item of a list stands in brackets, after a dot or without one. `\` takes away what the next
//! character means.

use std::fmt;

use regex::Regex;
use serde_json::Value;

/// One step down.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// As the user wrote it.
    pub(super) written: String,
    pub(super) select: Select,
}

/// What a step leads to.
#[derive(Debug, Clone)]
pub(super) enum Select {
    /// The field of a map.
    Key(String),
    /// `[N]`: the item at that place. One beyond the last is a new one.
    Index(usize),
    /// `[-1]`: a new item at the end.
    End,
    /// `[key:value]`: the first item that has this, and of a list of texts what `[value]` is.
    Field(String, String, Regex),
    /// `[value]`, `[:value]`: the first text that has a match of this expression.
    Text(Regex),
}

/// A path.
#[derive(Debug, Clone)]
pub(super) struct Path(pub(super) Vec<Step>);

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&written(&self.0))
    }
}

/// Steps as the user wrote them.
pub(super) fn written(steps: &[Step]) -> String {
    let steps: Vec<_> = steps.iter().map(|step| step.written.as_str()).collect();
    steps.join(".")
}

impl Path {
    /// Reads a path.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut steps = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let Some(end) = find(inner, ']') else {
                    return Err(format!("{rest:?} has no closing bracket"));
                };
                steps.push(Step {
                    written: format!("[{}]", &inner[..end]),
                    select: item(&inner[..end])?,
                });
                rest = &inner[end + 1..];
                continue;
            }
            let ends = [find(rest, '.'), find(rest, '[')];
            let end = ends.into_iter().flatten().min().unwrap_or(rest.len());
            if end > 0 {
                steps.push(Step {
                    written: rest[..end].to_owned(),
                    select: Select::Key(plain(&rest[..end])),
                });
            }
            rest = &rest[end..];
            rest = rest.strip_prefix('.').unwrap_or(rest);
        }
        match steps.is_empty() {
            true => Err("it is empty".into()),
            false => Ok(Self(steps)),
        }
    }
}

/// What stands between brackets.
fn item(text: &str) -> Result<Select, String> {
    if text.is_empty() {
        return Err("[] selects nothing".into());
    }
    if let Ok(index) = text.parse::<i64>() {
        return match usize::try_from(index) {
            Ok(index) => Ok(Select::Index(index)),
            Err(_) if index == -1 => Ok(Select::End),
            Err(_) => Err(format!("[{index}] is no place in a list")),
        };
    }
    let expression =
        |text: &str| Regex::new(text).map_err(|_| format!("{text:?} is not a regular expression"));
    if let Some(value) = text.strip_prefix(':') {
        return Ok(Select::Text(expression(value)?));
    }
    let parts = find(text, ':').map(|at| (&text[..at], &text[at + 1..]));
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    match parts {
        Some((key, value))
            if key.chars().all(is_name) && !value.is_empty() && find(value, ':').is_none() =>
        {
            // That it could be an expression matters in a list of texts only.
            let whole = expression(text).or_else(|_| expression(&regex::escape(&plain(text))))?;
            Ok(Select::Field(plain(key), plain(value), whole))
        }
        _ => Ok(Select::Text(expression(text)?)),
    }
}

/// Where `wanted` stands without a backslash before it.
fn find(text: &str, wanted: char) -> Option<usize> {
    let mut escaped = false;
    text.char_indices().find_map(|(at, c)| {
        let found = c == wanted && !escaped;
        escaped = c == '\\' && !escaped;
        found.then_some(at)
    })
}

/// Without the backslashes.
fn plain(text: &str) -> String {
    let mut chars = text.chars();
    let mut out = String::new();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.extend(chars.next()),
            c => out.push(c),
        }
    }
    out
}

/// A leaf as text; what is none has no text.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(path: &str) -> Result<Vec<String>, String> {
        let steps = Path::parse(path)?
            .0
            .into_iter()
            .map(|step| match step.select {
                Select::Key(key) => key,
                Select::Index(at) => format!("#{at}"),
                Select::End => "#end".into(),
                Select::Field(key, value, _) => format!("{key}={value}"),
                Select::Text(expression) => format!("~{expression}"),
            });
        Ok(steps.collect())
    }

    #[test]
    fn paths_are_istios() {
        for (path, expected) in [
            ("a.b.c", &["a", "b", "c"][..]),
            ("a.b.[name:n1].value", &["a", "b", "name=n1", "value"]),
            ("a.b[name:n1].value", &["a", "b", "name=n1", "value"]),
            ("a.[0].b", &["a", "#0", "b"]),
            ("a[0][1].b", &["a", "#0", "#1", "b"]),
            ("a.[-1]", &["a", "#end"]),
            ("args.[30m]", &["args", "~30m"]),
            ("args.[:v2]", &["args", "~v2"]),
            (
                "args.[--log=default:info]",
                &["args", "~--log=default:info"],
            ),
            (
                "ports.[containerPort:8080]",
                &["ports", "containerPort=8080"],
            ),
            (
                r"metadata.annotations.example\.com/x",
                &["metadata", "annotations", "example.com/x"],
            ),
            (r"a.example\.com\/x", &["a", "example.com/x"]),
            (r"a.[name:x\.y]", &["a", "name=x.y"]),
            ("a.[name:x.y].b", &["a", "name=x.y", "b"]),
            (r"a.[url:http\://x]", &["a", "url=http://x"]),
            (".a..b.", &["a", "b"]),
        ] {
            let expected = expected.iter().map(|step| (*step).to_owned()).collect();
            assert_eq!(shown(path), Ok(expected), "{path}");
        }
    }

    #[test]
    fn what_is_no_path_is_told() {
        for (path, expected) in [
            ("", "it is empty"),
            (" . ", "it is empty"),
            ("a.[name:x", "\"[name:x\" has no closing bracket"),
            ("a.[]", "[] selects nothing"),
            ("a.[-2]", "[-2] is no place in a list"),
            ("a.[(]", "\"(\" is not a regular expression"),
        ] {
            assert_eq!(shown(path), Err(expected.to_owned()), "{path}");
        }
    }
}
