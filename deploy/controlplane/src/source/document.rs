//! Text to documents, and a field's path back to its line.
//!
//! A stream is cut at its `---` lines before it is parsed, so that a broken document
//! spoils none of the others. Positions are not kept: when something is wrong with a
//! field, [`locate`] walks the text again.

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};
use serde_yaml_ng::Value as Yaml;

use crate::model::Segment;

/// Most brackets that may be open at once. The parser's work grows with the square of
/// their number, and no object needs a hundredth of it.
const MAX_OPEN_BRACKETS: usize = 4096;

/// A piece of a file that should hold one document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// Its text.
    pub text: &'a str,
    /// The line of the file on which the text starts, from 1.
    pub first_line: u32,
}

/// Text that is not YAML or JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct SyntaxError {
    /// Line in the file, from 1.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

/// Cuts a YAML stream into documents. `---` in the first column ends a document
/// wherever it stands (YAML 1.2, 9.1.2), also inside block scalars.
pub fn split(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let (mut offset, mut line) = (0, 1);
    for piece in text.split_inclusive('\n') {
        let marker = piece.strip_prefix("---");
        if marker.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
            && offset > start
        {
            chunks.push(Chunk {
                text: &text[start..offset],
                first_line,
            });
            (start, first_line) = (offset, line);
        }
        offset += piece.len();
        line += 1;
    }
    chunks.push(Chunk {
        text: &text[start..],
        first_line,
    });
    chunks
}

impl Chunk<'_> {
    /// The first line that is neither blank nor a comment nor the marker.
    pub fn content_line(&self) -> u32 {
        let skipped = self
            .text
            .lines()
            .take_while(|line| {
                let line = line.strip_prefix("---").unwrap_or(line).trim();
                line.is_empty() || line.starts_with(['#', '%'])
            })
            .count();
        self.first_line.saturating_add(to_line(skipped))
    }

    /// Parses the document; `None` if there is nothing in it.
    ///
    /// # Errors
    /// Text that is not YAML, a key that stands twice, or more than one document.
    pub fn parse(&self) -> Result<Option<Value>, SyntaxError> {
        if let Some(line) = too_deep(self.text) {
            return Err(SyntaxError {
                line: self.first_line.saturating_add(line),
                message: format!("more than {MAX_OPEN_BRACKETS} brackets are open"),
            });
        }
        let fail = |error: serde_yaml_ng::Error| {
            // A text that ends too early is reported on the line after its last.
            let last = self.text.lines().count().max(1);
            let line = error.location().map_or(1, |at| at.line().clamp(1, last));
            SyntaxError {
                line: self.first_line.saturating_add(to_line(line - 1)),
                // The position is in the wrong frame: it counts from the chunk's start.
                message: without_position(&error.to_string()),
            }
        };
        let mut value =
            Yaml::deserialize(serde_yaml_ng::Deserializer::from_str(self.text)).map_err(fail)?;
        value.apply_merge().map_err(fail)?;
        let value = to_json(value).map_err(|message| SyntaxError {
            line: self.content_line(),
            message,
        })?;
        Ok(Some(value).filter(|value| !value.is_null()))
    }

    /// The line of the field at `path`, or of the nearest parent that is there.
    pub fn locate(&self, path: &[Segment]) -> u32 {
        if too_deep(self.text).is_some() {
            return self.content_line();
        }
        let document = serde_yaml_ng::Deserializer::from_str(self.text);
        let line = match (Locate { path }).deserialize(document) {
            Ok(()) => None,
            Err(error) => error.location().map(|at| at.line()),
        };
        match line {
            Some(line) if line > 0 && !path.is_empty() => {
                self.first_line.saturating_add(to_line(line - 1))
            }
            _ => self.content_line(),
        }
    }
}

/// The line, from 0, on which too many brackets are open. Quotes are not looked at: no
/// honest text opens so many without closing them either.
fn too_deep(text: &str) -> Option<u32> {
    let (mut open, mut line) = (0_usize, 0_u32);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            b'\n' => line = line.saturating_add(1),
            _ => {}
        }
        if open > MAX_OPEN_BRACKETS {
            return Some(line);
        }
    }
    None
}

/// Parses a JSON file, which holds one document.
///
/// # Errors
/// Text that is not JSON.
pub fn parse_json(text: &str) -> Result<Option<Value>, SyntaxError> {
    let value: Value = serde_json::from_str(text).map_err(|error| SyntaxError {
        line: to_line(error.line()).max(1),
        message: without_position(&error.to_string()),
    })?;
    Ok(Some(value).filter(|value| !value.is_null()))
}

fn to_line(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn without_position(message: &str) -> String {
    let end = message
        .find(" at line ")
        .or_else(|| message.find(" at position "))
        .unwrap_or(message.len());
    message[..end].to_owned()
}

/// Kubernetes reads YAML as JSON: keys that are numbers or booleans become texts.
fn to_json(value: Yaml) -> Result<Value, String> {
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(value) => Value::Bool(value),
        Yaml::String(value) => Value::String(value),
        Yaml::Number(number) => {
            let json = number
                .as_i64()
                .map(Number::from)
                .or_else(|| number.as_u64().map(Number::from))
                .or_else(|| number.as_f64().and_then(Number::from_f64));
            Value::Number(json.ok_or_else(|| format!("{number} is not a JSON number"))?)
        }
        Yaml::Sequence(items) => {
            Value::Array(items.into_iter().map(to_json).collect::<Result<_, _>>()?)
        }
        Yaml::Mapping(entries) => {
            let mut map = Map::new();
            for (key, value) in entries {
                let key = match key {
                    Yaml::String(key) => key,
                    Yaml::Bool(key) => key.to_string(),
                    Yaml::Number(key) => key.to_string(),
                    _ => return Err("a key is neither a text, a number nor a boolean".into()),
                };
                if map.contains_key(&key) {
                    return Err(format!("duplicate entry with key {key:?}"));
                }
                map.insert(key, to_json(value)?);
            }
            Value::Object(map)
        }
        Yaml::Tagged(tagged) => return Err(format!("tag {} is not supported", tagged.tag)),
    })
}

/// Walks to a field and fails there: the parser's error says on which line it is.
struct Locate<'p> {
    path: &'p [Segment],
}

const FOUND: &str = "found";

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((Segment::Key(wanted), rest)) = self.path.split_first() {
            let seed = || LocateKey {
                wanted,
                last: rest.is_empty(),
            };
            while let Some(found) = map.next_key_seed(seed())? {
                if found {
                    return map.next_value_seed(Locate { path: rest });
                }
                map.next_value::<IgnoredAny>()?;
            }
        }
        Err(A::Error::custom(FOUND))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if let Some((Segment::Index(wanted), rest)) = self.path.split_first() {
            for _ in 0..*wanted {
                if seq.next_element::<IgnoredAny>()?.is_none() {
                    return Err(A::Error::custom(FOUND));
                }
            }
            seq.next_element_seed(Locate { path: rest })?;
        }
        Err(A::Error::custom(FOUND))
    }
}

/// Whether a key is the one that is looked for. Fails at the last of the path, so that
/// the line is that of the key, not that of its value.
struct LocateKey<'p> {
    wanted: &'p str,
    last: bool,
}

impl<'de> DeserializeSeed<'de> for LocateKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for LocateKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        if key == self.wanted && self.last {
            Err(E::custom(FOUND))
        } else {
            Ok(key == self.wanted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(steps: &[&str]) -> Vec<Segment> {
        let step = |step: &&str| match step.parse() {
            Ok(index) => Segment::Index(index),
            Err(_) => Segment::Key((*step).into()),
        };
        steps.iter().map(step).collect()
    }

    #[test]
    fn splits_at_markers_only() {
        let text = "# head\n---\na: 1\n--- # second\nb: |\n  ---\n  x\n----: y\n---\n";
        let lines: Vec<_> = split(text)
            .iter()
            .map(|chunk| (chunk.first_line, chunk.content_line()))
            .collect();
        assert_eq!(lines, [(1, 2), (2, 3), (4, 5), (9, 10)]);
        assert_eq!(split("").len(), 1);
    }

    #[test]
    fn finds_the_line_of_a_field() {
        let text = "a: 1\n---\nkind: X\nspec:\n  rules:\n  - from:\n    - source:\n        ipBlocks:\n        - 10.0.0.1\n        - bad\n    to: []\n  - {to: [{operation: {ports: ['x']}}]}\n";
        let chunk = split(text)[1];
        for (steps, line) in [
            (&["spec"][..], 4),
            (
                &["spec", "rules", "0", "from", "0", "source", "ipBlocks", "1"],
                10,
            ),
            (
                &["spec", "rules", "0", "from", "0", "source", "ipBlocks"],
                8,
            ),
            (&["spec", "rules", "0", "to"], 11),
            (
                &["spec", "rules", "1", "to", "0", "operation", "ports", "0"],
                12,
            ),
            // Nearest parent.
            (&["spec", "rules", "7"], 6),
            (&["spec", "rules", "1", "from"], 12),
            (&["nothing"], 3),
            (&[], 3),
        ] {
            assert_eq!(chunk.locate(&path(steps)), line, "{steps:?}");
        }
    }

    #[test]
    fn says_where_text_is_broken() {
        let text = "a: 1\n---\nb: 2\nc: [1,\nd: 3\n";
        let error = split(text)[1].parse().expect_err("an open list");
        assert_eq!(error.line, 5, "{error}");
        let error = split("x: 1\nx: 2\n")[0]
            .parse()
            .expect_err("twice the same key");
        assert!(error.message.contains("duplicate"), "{error}");
        let error = parse_json("{\n \"a\": 1,\n}").expect_err("a comma too many");
        assert_eq!(error.line, 3);
    }

    #[test]
    fn reads_yaml_as_kubernetes_does() {
        let text = "base: &b {x: 1}\nd:\n  <<: *b\n  80: yes\n  true: 2.5\n";
        let value = split(text)[0].parse().expect("valid").expect("not empty");
        assert_eq!(
            value["d"],
            serde_json::json!({"x": 1, "80": "yes", "true": 2.5})
        );
        assert_eq!(split("# nothing\n")[0].parse(), Ok(None));
        assert!(split("a: !secret x\n")[0].parse().is_err());
    }

    #[test]
    fn deep_nesting_is_refused_in_a_moment() {
        let start = std::time::Instant::now();
        for opening in ["[", "{", "- ", "? ", "{a: ", "[[],", "!x ", "&a "] {
            let text = opening.repeat(200_000);
            assert!(split(&text)[0].parse().is_err(), "{opening:?}");
            split(&text)[0].locate(&path(&["0", "0", "a"]));
        }
        assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
        let error = split("a: b\n---\n\n[[[")[1]
            .parse()
            .expect_err("not closed");
        assert_eq!(error.line, 4, "{error}");
    }

    #[test]
    fn an_alias_bomb_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let list = vec![format!("*a{}", level - 1); 10].join(", ");
            text += &format!("a{level}: &a{level} [{list}]\n");
        }
        assert!(split(&text)[0].parse().is_err());
    }
}
