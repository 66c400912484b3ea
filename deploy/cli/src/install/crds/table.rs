//! Reading `schema.txt`.

use std::collections::BTreeMap;

/// What a field may hold.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Type {
    Text,
    Duration,
    Bool,
    Integer,
    Number,
    Any,
    Enum(Vec<String>),
    List(Box<Type>),
    Map(Box<Type>),
    Object(Vec<Field>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) kind: Type,
}

#[derive(Debug)]
pub(super) struct Version {
    pub(super) name: String,
    pub(super) stored: bool,
}

#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) path: String,
    pub(super) kind: String,
    pub(super) description: String,
}

/// One custom resource.
#[derive(Debug)]
pub(super) struct KindRow {
    pub(super) kind: String,
    pub(super) group: String,
    pub(super) short: Option<String>,
    pub(super) versions: Vec<Version>,
    pub(super) columns: Vec<Column>,
    pub(super) required: Vec<String>,
    pub(super) spec: Type,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) kinds: Vec<KindRow>,
    fragments: BTreeMap<String, Vec<Field>>,
}

struct Line<'a> {
    number: usize,
    indent: usize,
    words: Vec<&'a str>,
}

impl Line<'_> {
    fn error(&self, reason: &str) -> String {
        format!("schema.txt:{}: {reason}", self.number)
    }
}

impl Table {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let lines: Vec<Line<'_>> = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
            .map(|(index, line)| Line {
                number: index + 1,
                indent: line.len() - line.trim_start().len(),
                words: line.split_whitespace().collect(),
            })
            .collect();
        let mut table = Self::default();
        let mut rest = lines.as_slice();
        while let Some((line, after)) = rest.split_first() {
            let below = after.iter().take_while(|line| line.indent > 0).count();
            let (fields, next) = after.split_at(below);
            match (line.words.as_slice(), table.kinds.last_mut()) {
                (["def", name], _) => {
                    let fields = table.fields(fields)?;
                    table.fragments.insert((*name).to_owned(), fields);
                }
                (["kind", kind, group, short, versions @ ..], _) => {
                    table.kinds.push(KindRow {
                        kind: (*kind).to_owned(),
                        group: (*group).to_owned(),
                        short: Some((*short).to_owned()).filter(|short| short != "-"),
                        versions: versions.iter().map(|name| version(name)).collect(),
                        columns: Vec::new(),
                        required: Vec::new(),
                        spec: Type::Any,
                    });
                }
                (["column", name, path, kind, description @ ..], Some(row)) => {
                    row.columns.push(Column {
                        name: (*name).to_owned(),
                        path: (*path).to_owned(),
                        kind: (*kind).to_owned(),
                        description: description.join(" "),
                    });
                }
                (["spec", words @ ..], Some(_)) => {
                    let spec = match words {
                        ["any"] => Type::Object(Vec::new()),
                        _ => Type::Object(table.fields(fields)?),
                    };
                    let required = match words {
                        ["required", names @ ..] => names.iter().map(|n| (*n).to_owned()).collect(),
                        _ => Vec::new(),
                    };
                    // Looked at above; `fields` has borrowed the table since.
                    if let Some(row) = table.kinds.last_mut() {
                        row.spec = spec;
                        row.required = required;
                    }
                }
                _ => return Err(line.error("is not understood")),
            }
            rest = next;
        }
        Ok(table)
    }

    fn fields(&self, lines: &[Line<'_>]) -> Result<Vec<Field>, String> {
        let mut fields = Vec::new();
        let mut rest = lines;
        while let Some((line, after)) = rest.split_first() {
            let below = after
                .iter()
                .take_while(|next| next.indent > line.indent)
                .count();
            let (children, next) = after.split_at(below);
            let children = self.fields(children)?;
            let [name, words @ ..] = line.words.as_slice() else {
                return Err(line.error("has no name"));
            };
            let kind = self
                .kind(words, children)
                .map_err(|reason| line.error(&reason))?;
            fields.push(Field {
                name: (*name).to_owned(),
                kind,
            });
            rest = next;
        }
        Ok(fields)
    }

    fn kind(&self, words: &[&str], children: Vec<Field>) -> Result<Type, String> {
        let (first, more) = match words {
            [] => return Ok(Type::Object(children)),
            [first, more @ ..] => (*first, more),
        };
        let inside = |open: char, close: char| {
            first
                .strip_prefix(open)
                .and_then(|rest| rest.strip_suffix(close))
        };
        if first == "enum" {
            return Ok(Type::Enum(
                more.iter().map(|value| (*value).to_owned()).collect(),
            ));
        }
        if let Some(inner) = inside('[', ']').or_else(|| inside('{', '}')) {
            let words: Vec<&str> = inner.split_whitespace().collect();
            let inner = Box::new(self.kind(&words, children)?);
            return Ok(match first.starts_with('[') {
                true => Type::List(inner),
                false => Type::Map(inner),
            });
        }
        if let Some(name) = inside('<', '>') {
            let fragment = self
                .fragments
                .get(name)
                .ok_or("the fragment is not defined")?;
            let mut fields = fragment.clone();
            fields.extend(children);
            return Ok(Type::Object(fields));
        }
        if !children.is_empty() {
            return Err("has fields below it, and is no object".into());
        }
        match first {
            "text" => Ok(Type::Text),
            "duration" => Ok(Type::Duration),
            "bool" => Ok(Type::Bool),
            "int" => Ok(Type::Integer),
            "number" => Ok(Type::Number),
            "any" => Ok(Type::Any),
            other => Err(format!("the type {other} is not known")),
        }
    }
}

fn version(name: &str) -> Version {
    let stored = name.strip_suffix('*');
    Version {
        name: stored.unwrap_or(name).to_owned(),
        stored: stored.is_some(),
    }
}
