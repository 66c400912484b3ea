//! Writing YAML that means the same to every reader.
//!
//! Readers disagree about what is a text: to those of YAML 1.1, as `kubectl` and Helm have
//! one, `yes`, `on`, `0644` and `1:30` are none. What is not plainly a text is quoted.

use serde_json::Value;

/// YAML with sorted keys and without a line end at the end.
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    write(value, 0, false, &mut text);
    text.truncate(text.trim_end_matches(' ').len());
    match text.strip_suffix('\n') {
        Some(line) => line.to_owned(),
        None => text,
    }
}

/// Writes a value. `inline`: after `key: ` or `- `, where a block begins on the next line.
fn write(value: &Value, indent: usize, inline: bool, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            for (index, (key, value)) in entries.into_iter().enumerate() {
                // The first key of a list's item stands beside the dash.
                if index > 0 || !inline {
                    pad(indent, out);
                }
                *out += &scalar(key);
                *out += ":";
                below(value, indent, out);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, item) in list.iter().enumerate() {
                if index > 0 || !inline {
                    pad(indent, out);
                }
                *out += "- ";
                match item {
                    Value::Object(map) if !map.is_empty() => write(item, indent + 2, true, out),
                    Value::Array(inner) if !inner.is_empty() => write(item, indent + 2, true, out),
                    Value::String(text) => {
                        string(text, indent + 2, out);
                        out.push('\n');
                    }
                    leaf => {
                        *out += &plain(leaf);
                        out.push('\n');
                    }
                }
            }
        }
        Value::String(text) => {
            string(text, indent + 2, out);
            out.push('\n');
        }
        leaf => {
            *out += &plain(leaf);
            out.push('\n');
        }
    }
}

/// What follows `key:`.
fn below(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            write(value, indent + 2, false, out);
        }
        Value::Array(list) if !list.is_empty() => {
            out.push('\n');
            write(value, indent, false, out);
        }
        leaf => {
            out.push(' ');
            write(leaf, indent, true, out);
        }
    }
}

fn pad(indent: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', indent));
}

fn plain(value: &Value) -> String {
    match value {
        Value::Object(_) => "{}".into(),
        Value::Array(_) => "[]".into(),
        // 1.0 is 1, as Go has it.
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 1e15 => {
                (float as i64).to_string()
            }
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// A text: over several lines as it is, where that can be read back.
fn string(text: &str, indent: usize, out: &mut String) {
    let lines: Vec<&str> = text.trim_end_matches('\n').split('\n').collect();
    let ends = text.len() - text.trim_end_matches('\n').len();
    let readable = lines.len() > 1
        && ends <= 1
        && !lines[0].is_empty()
        && !lines[0].starts_with(' ')
        && !text.chars().any(|c| c.is_control() && c != '\n')
        && !lines.iter().any(|line| line.ends_with(' '));
    if !readable {
        *out += &scalar(text);
        return;
    }
    *out += if ends == 0 { "|-" } else { "|" };
    for line in lines {
        out.push('\n');
        if !line.is_empty() {
            pad(indent, out);
            *out += line;
        }
    }
}

/// A text on one line, quoted where somebody could take it for something else.
fn scalar(text: &str) -> String {
    const WORDS: [&str; 13] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity",
        "none",
    ];
    let first = text
        .chars()
        .next()
        .is_some_and(|c| c.is_ascii_alphabetic() || "_/".contains(c));
    let inner = |c: char| c.is_ascii_alphanumeric() || "_./- :%@".contains(c);
    let harmless = first
        && text.chars().all(inner)
        && !text.contains(": ")
        && !text.ends_with([':', ' '])
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    match harmless {
        true => text.to_owned(),
        false => Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_reader_gets_the_same_back() {
        for (value, expected) in [
            (json!({"b": 1, "a": "x"}), "a: x\nb: 1"),
            (json!({"a": {"b": {"c": true}}}), "a:\n  b:\n    c: true"),
            (
                json!({"a": [1, {"b": 2, "c": [3]}]}),
                "a:\n- 1\n- b: 2\n  c:\n  - 3",
            ),
            (json!([[1, 2], []]), "- - 1\n  - 2\n- []"),
            (
                json!({"a": {}, "b": [], "c": null, "d": ""}),
                "a: {}\nb: []\nc: null\nd: \"\"",
            ),
            (
                json!({"yes": "yes", "on": "0644"}),
                "\"on\": \"0644\"\n\"yes\": \"yes\"",
            ),
            (
                json!({"a": "1:30", "b": "x: y", "c": "#", "d": "no"}),
                "a: \"1:30\"\nb: \"x: y\"\nc: \"#\"\nd: \"no\"",
            ),
            (
                json!({"a": "one\ntwo\n", "b": "one\n\ntwo"}),
                "a: |\n  one\n  two\nb: |-\n  one\n\n  two",
            ),
            (json!({"a": ["x\ny"]}), "a:\n- |-\n  x\n  y"),
            (
                json!({"a": " x\ny", "b": "x \ny", "c": "x\n\n"}),
                "a: \" x\\ny\"\nb: \"x \\ny\"\nc: \"x\\n\\n\"",
            ),
            (json!({"a": 1.0, "b": 1.5}), "a: 1\nb: 1.5"),
            (json!("x"), "x"),
            (json!({}), "{}"),
        ] {
            let text = to_yaml(&value);
            assert_eq!(text, expected);
            let back: Value = serde_yaml_ng::from_str(&text).expect("YAML");
            assert_eq!(to_yaml(&back), text, "{value}");
        }
    }
}
