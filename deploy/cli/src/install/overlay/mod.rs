//! `components.X.k8s.overlays` of an IstioOperator: single fields of what a component consists
//! of, set or removed (Istio's `operator/pkg/patch`).
//!
//! A value takes the place of what stands at its path, and maps on the way are made; one that
//! is no list is added to a list. Without a value, what stands at the path is removed. A text
//! that reads as a map in YAML is that map, unless a text belongs there.

mod path;

use serde_json::{Map, Value};

use self::path::{Path, Select, Step, text, written};

/// Maps and lists of texts: what is put there is a text, however it reads.
const TEXTS: [&str; 9] = [
    "args",
    "command",
    "annotations",
    "labels",
    "matchLabels",
    "nodeSelector",
    "selector",
    "data",
    "stringData",
];
/// How many names of what is there an error gives.
const NAMES: usize = 12;

/// What is changed in one object.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// The object's kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    patches: Vec<Patch>,
}

#[derive(Debug, Clone)]
struct Patch {
    path: Path,
    /// Null: what is there goes.
    value: Value,
}

impl Overlay {
    /// Reads an entry of the list. `apiVersion` may stand there and, as for Istio, says
    /// nothing: files outlive versions.
    ///
    /// # Errors
    /// What is wrong, behind the field's path within the entry.
    pub fn read(entry: &Value) -> Result<Self, String> {
        let map = entry.as_object().ok_or(": is no map")?;
        known(map, &["apiVersion", "kind", "name", "patches"], "")?;
        let field = |key: &str| {
            let text = entry[key].as_str().filter(|text| !text.is_empty());
            text.map(str::to_owned).ok_or_else(|| {
                format!(
                    ".{key}: is missing: an overlay has kind and name of its object, and patches"
                )
            })
        };
        let (kind, name) = (field("kind")?, field("name")?);
        let patches = match &entry["patches"] {
            Value::Array(patches) if !patches.is_empty() => patches,
            _ => return Err(".patches: is no list of path and value".into()),
        };
        let patches = patches.iter().enumerate().map(|(index, patch)| {
            let at = format!(".patches[{index}]");
            let map = patch
                .as_object()
                .ok_or_else(|| format!("{at}: is no map"))?;
            known(map, &["path", "value"], &at)?;
            let path = patch["path"]
                .as_str()
                .ok_or_else(|| format!("{at}.path: is missing"))?;
            let value = patch["value"].clone();
            let path = Path::parse(path)
                .map_err(|reason| format!("{at}.path: {path:?} is no path: {reason}"))?;
            Ok(Patch { path, value })
        });
        Ok(Self {
            kind,
            name,
            patches: patches.collect::<Result<_, String>>()?,
        })
    }

    /// Changes the object.
    ///
    /// # Errors
    /// Which path does not fit, and why.
    pub fn apply(&self, object: &mut Value) -> Result<(), String> {
        for Patch { path, value } in &self.patches {
            let changed = match value {
                Value::Null => remove(object, &path.0),
                value => set(object, &path.0, value),
            };
            changed.map_err(|reason| format!("path {path}: {reason}"))?;
        }
        Ok(())
    }
}

fn known(map: &Map<String, Value>, known: &[&str], at: &str) -> Result<(), String> {
    let unknown = map.keys().find(|key| !known.contains(&key.as_str()));
    unknown.map_or(Ok(()), |key| {
        Err(format!(
            "{at}.{key}: is not known; there is {}",
            known.join(", ")
        ))
    })
}

/// Puts a value at a path.
fn set(root: &mut Value, steps: &[Step], value: &Value) -> Result<(), String> {
    let mut node = root;
    for at in 0..steps.len() {
        node = descend(node, steps, at, true)?;
    }
    let value = meant(value, node, steps);
    match node {
        Value::Array(list) if !value.is_array() => list.push(value),
        node => *node = value,
    }
    Ok(())
}

/// Removes what stands at a path.
fn remove(root: &mut Value, steps: &[Step]) -> Result<(), String> {
    let Some((last, before)) = steps.split_last() else {
        return Ok(());
    };
    let mut node = root;
    for at in 0..before.len() {
        node = descend(node, steps, at, false)?;
    }
    // That it is there, and what it is in.
    descend(node, steps, before.len(), false)?;
    match (node, &last.select) {
        (Value::Object(map), Select::Key(key)) => {
            map.remove(key);
        }
        (Value::Array(list), select) => {
            if let Some(index) = position(list, select) {
                list.remove(index);
            }
        }
        _ => {}
    }
    Ok(())
}

/// The node that step `at` leads to. `make`: a field that is not there is made, and as the
/// last step an item at the end of a list.
fn descend<'a>(
    node: &'a mut Value,
    steps: &[Step],
    at: usize,
    make: bool,
) -> Result<&'a mut Value, String> {
    let step = &steps[at];
    let is_last = at + 1 == steps.len();
    let here = match at {
        0 => "the object".to_owned(),
        at => written(&steps[..at]),
    };
    let adds = make && is_last && matches!(step.select, Select::Index(_) | Select::End);
    if node.is_null() && make {
        *node = match &step.select {
            Select::Key(_) => Value::Object(Map::new()),
            _ if adds => Value::Array(Vec::new()),
            _ => return Err(format!("there is no {here}")),
        };
    }
    let there = match &step.select {
        Select::Key(_) => None,
        select => node
            .as_array()
            .map(|list| (position(list, select), list.len())),
    };
    match (node, &step.select, there, adds) {
        (Value::Object(map), Select::Key(key), ..) => {
            if !make && map.get(key).is_none_or(Value::is_null) {
                let names: Vec<_> = map.keys().take(NAMES).map(String::as_str).collect();
                return Err(format!(
                    "{here} has no {}, but {}",
                    step.written,
                    listed(&names)
                ));
            }
            Ok(map.entry(key.clone()).or_insert(Value::Null))
        }
        (Value::Array(list), _, Some((Some(index), _)), _) => Ok(&mut list[index]),
        (Value::Array(list), _, Some((None, length)), true) => {
            list.push(Value::Null);
            Ok(&mut list[length])
        }
        (Value::Array(list), Select::Index(_) | Select::End, ..) => Err(format!(
            "{here} has {} items, and {} is none of them",
            list.len(),
            step.written
        )),
        (Value::Array(list), select, Some(_), _) => {
            let names: Vec<_> = list
                .iter()
                .filter_map(|item| name_by(item, select))
                .collect();
            let names: Vec<_> = names.iter().take(NAMES).map(String::as_str).collect();
            Err(format!(
                "{here} has no {}, but {}",
                step.written,
                listed(&names)
            ))
        }
        (Value::Null, ..) => Err(format!("there is no {here}")),
        (Value::Array(_), ..) => Err(format!(
            "{here} is a list: an item of it is {here}.[N] or {here}.[key:value], not {}",
            step.written
        )),
        (Value::Object(_), ..) => Err(format!("{here} is a map and has no {}", step.written)),
        _ => Err(format!(
            "{here} has nothing below it, and so no {}",
            step.written
        )),
    }
}

fn listed(names: &[&str]) -> String {
    match names {
        [] => "nothing".into(),
        names => names.join(", "),
    }
}

/// What an item could have been selected by.
fn name_by(item: &Value, select: &Select) -> Option<String> {
    match select {
        Select::Field(key, ..) if item.is_object() => text(&item[key.as_str()]),
        _ => text(item),
    }
}

fn position(list: &[Value], select: &Select) -> Option<usize> {
    let matches = |item: &Value| match select {
        Select::Field(key, value, _) if item.is_object() => {
            text(&item[key.as_str()]).is_some_and(|of| of == *value)
        }
        Select::Field(.., expression) | Select::Text(expression) => {
            text(item).is_some_and(|item| expression.is_match(&item))
        }
        _ => false,
    };
    match select {
        Select::Index(index) => (*index < list.len()).then_some(*index),
        _ => list.iter().position(matches),
    }
}

/// A value as it is meant: a text over which YAML makes a map is one, except where texts are.
/// What is JSON stays a text, as for Istio.
fn meant(value: &Value, there: &Value, steps: &[Step]) -> Value {
    let Value::String(text) = value else {
        return value.clone();
    };
    // What is added to a list is named by the list's own path.
    let up = if there.is_array() { 1 } else { 2 };
    let around = steps.len().checked_sub(up).map(|at| &steps[at].select);
    let among_texts = matches!(around, Some(Select::Key(key)) if TEXTS.contains(&key.as_str()));
    let looks_like = match text.contains('\n') {
        true => text.contains(':'),
        false => text.contains(": "),
    };
    if there.is_string() || among_texts || !looks_like {
        return value.clone();
    }
    if serde_json::from_str::<Map<String, Value>>(text).is_ok() {
        return value.clone();
    }
    let map = serde_yaml_ng::from_str::<Map<String, Value>>(text);
    map.map_or_else(|_| value.clone(), Value::Object)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn overlay(path: &str, value: Value) -> Overlay {
        let entry = json!({"kind": "Deployment", "name": "istiod",
            "patches": [{"path": path, "value": value}]});
        Overlay::read(&entry).expect("an overlay")
    }

    fn base() -> Value {
        json!({"a": {
            "b": [{"name": "n1", "value": "v1"}, {"name": "n2", "list": ["v1", "v2", "v3_regex"]}],
            "c": null,
            "ports": [{"containerPort": 443}, {"containerPort": 15014}],
            "labels": {},
        }})
    }

    /// The cases of Istio's own tests, and those that its documentation names.
    #[test]
    fn values_are_set_added_and_removed() {
        let cases = [
            // Path, value, where to look, what is there then.
            (
                "a.b.[name:n1].value",
                json!("v2"),
                "/a/b/0/value",
                json!("v2"),
            ),
            (
                "a.b.[name:n2].list.[v2]",
                json!("v3"),
                "/a/b/1/list",
                json!(["v1", "v3", "v3_regex"]),
            ),
            (
                "a.b.[name:n2].list.[:v2]",
                json!("v3"),
                "/a/b/1/list",
                json!(["v1", "v3", "v3_regex"]),
            ),
            (
                "a.b.[1].list.[2]",
                json!("x"),
                "/a/b/1/list",
                json!(["v1", "v2", "x"]),
            ),
            (
                "a.b.[name:n2].list.[v3]",
                Value::Null,
                "/a/b/1/list",
                json!(["v1", "v2"]),
            ),
            (
                "a.b.[name:n2].list.[3]",
                json!("v4"),
                "/a/b/1/list/3",
                json!("v4"),
            ),
            (
                "a.b.[name:n2].list.[1000]",
                json!("v4"),
                "/a/b/1/list/3",
                json!("v4"),
            ),
            ("a.b[1].list[-1]", json!("v4"), "/a/b/1/list/3", json!("v4")),
            (
                "a.b.[name:n2].list",
                json!("v4"),
                "/a/b/1/list/3",
                json!("v4"),
            ),
            (
                "a.b.[name:n2].list",
                json!(["only"]),
                "/a/b/1/list",
                json!(["only"]),
            ),
            (
                "a.b",
                json!({"name": "n3"}),
                "/a/b/2",
                json!({"name": "n3"}),
            ),
            ("a.b.[name:n1]", Value::Null, "/a/b/0/name", json!("n2")),
            ("a.c", json!({"d": "n3"}), "/a/c", json!({"d": "n3"})),
            ("a.c.[0]", json!("first"), "/a/c", json!(["first"])),
            (
                "a.new.deep.er",
                json!(5),
                "/a/new",
                json!({"deep": {"er": 5}}),
            ),
            (
                "a.ports.[containerPort:15014].containerPort",
                json!(22222),
                "/a/ports/1",
                json!({"containerPort": 22222}),
            ),
            (
                "a.ports.[containerPort:15014]",
                json!({"fooPort": 1}),
                "/a/ports/1",
                json!({"fooPort": 1}),
            ),
            ("a.ports", Value::Null, "/a/ports", Value::Null),
            // Texts that are maps.
            (
                "a.c",
                json!("fieldRef:\n  fieldPath: p\n"),
                "/a/c",
                json!({"fieldRef": {"fieldPath": "p"}}),
            ),
            ("a.c", json!("x: y"), "/a/c", json!({"x": "y"})),
            ("a.c", json!("{\"x\": 1}"), "/a/c", json!("{\"x\": 1}")),
            ("a.c", json!("http://x"), "/a/c", json!("http://x")),
            ("a.c", json!("a: b: c"), "/a/c", json!("a: b: c")),
            // And such as are none.
            (
                "a.b.[name:n1].value",
                json!("x: y"),
                "/a/b/0/value",
                json!("x: y"),
            ),
            (
                "a.labels.note",
                json!("x: y"),
                "/a/labels/note",
                json!("x: y"),
            ),
        ];
        for (path, value, place, expected) in cases {
            let mut object = base();
            overlay(path, value.clone()).apply(&mut object).expect(path);
            let found = object.pointer(place).cloned().unwrap_or_default();
            assert_eq!(found, expected, "{path} {value}");
        }
    }

    #[test]
    fn what_is_not_there_is_told() {
        for (path, value, expected) in [
            (
                "a.b.[name:n9].value",
                json!(1),
                "a.b has no [name:n9], but n1, n2",
            ),
            (
                "a.b.[5].value",
                json!(1),
                "a.b has 2 items, and [5] is none of them",
            ),
            (
                "a.b.[-1].value",
                json!(1),
                "a.b has 2 items, and [-1] is none of them",
            ),
            (
                "a.b.[2]",
                Value::Null,
                "a.b has 2 items, and [2] is none of them",
            ),
            (
                "a.b.[name:n2].list.[v9]",
                Value::Null,
                "a.b.[name:n2].list has no [v9], but v1, v2, v3_regex",
            ),
            (
                "a.b.name",
                json!(1),
                "a.b is a list: an item of it is a.b.[N] or a.b.[key:value], not name",
            ),
            ("a.[0]", json!(1), "a is a map and has no [0]"),
            (
                "a.b.[0].value.x",
                json!(1),
                "a.b.[0].value has nothing below it, and so no x",
            ),
            ("a.x.y", Value::Null, "a has no x, but b, c, labels, ports"),
            ("a.labels.x", Value::Null, "a.labels has no x, but nothing"),
            ("a.c.[name:x]", json!(1), "there is no a.c"),
            ("a.z.[name:x].y", json!(1), "there is no a.z"),
        ] {
            let mut object = base();
            let error = overlay(path, value.clone())
                .apply(&mut object)
                .expect_err(path);
            assert_eq!(error, format!("path {path}: {expected}"), "{value}");
        }
    }

    #[test]
    fn an_entry_that_is_none_is_told() {
        for (entry, expected) in [
            (json!(5), ": is no map"),
            (
                json!({"name": "x", "patches": []}),
                ".kind: is missing: an overlay has kind and name of its object, and patches",
            ),
            (
                json!({"kind": "x", "name": "x"}),
                ".patches: is no list of path and value",
            ),
            (
                json!({"kind": "x", "name": "x", "patch": []}),
                ".patch: is not known; there is apiVersion, kind, name, patches",
            ),
            (
                json!({"kind": "x", "name": "x", "patches": [{"path": "a.[", "value": 1}]}),
                ".patches[0].path: \"a.[\" is no path: \"[\" has no closing bracket",
            ),
            (
                json!({"kind": "x", "name": "x", "patches": [{"path": "a", "vlaue": 1}]}),
                ".patches[0].vlaue: is not known; there is path, value",
            ),
        ] {
            let error = Overlay::read(&entry).map(|_| ()).expect_err("no overlay");
            assert_eq!(error, expected, "{entry}");
        }
    }
}
