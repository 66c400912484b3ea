//! What users lay over generated objects: Kubernetes' strategic merge, as far as the
//! objects of a waypoint need it.
//!
//! Maps are merged field by field, `null` removes a field. Lists whose items have a key are
//! merged item by item, other lists are replaced. `$patch: delete` in an item removes it,
//! `$patch: replace` in a map or as an item of a list replaces all that was there.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The keys of a ConfigMap that are overlays.
const FIELDS: [&str; 5] = [
    "deployment",
    "service",
    "serviceAccount",
    "horizontalPodAutoscaler",
    "podDisruptionBudget",
];
/// Largest overlay; a ConfigMap is at most 1 MiB.
const MAX_BYTES: usize = 1 << 20;

/// An overlay that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverlayError {
    /// It is not YAML, or not a map.
    #[error("{field} is not an object in YAML: {reason}")]
    Unreadable {
        /// The key of the ConfigMap.
        field: String,
        /// Why.
        reason: String,
    },
    /// A key that means nothing.
    #[error("there is no {field:?} to overlay: it is one of {}", FIELDS.join(", "))]
    Unknown {
        /// The key of the ConfigMap.
        field: String,
    },
    /// A part of it has another form than what it is laid over.
    #[error("{field}: {reason}")]
    Misfit {
        /// The key of the ConfigMap, and the path in it.
        field: String,
        /// Why.
        reason: String,
    },
}

impl OverlayError {
    /// Names what was changed: the key of the ConfigMap.
    pub fn of(self, key: &str) -> Self {
        match self {
            Self::Misfit { field, reason } => Self::Misfit {
                field: format!("{key}{field}"),
                reason,
            },
            other => other,
        }
    }
}

/// The overlays of one ConfigMap.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overlay(BTreeMap<&'static str, Value>);

impl Overlay {
    /// Reads the data of a ConfigMap.
    ///
    /// # Errors
    /// A key that is none of ours, and a value that is no object.
    pub fn read(data: &BTreeMap<String, String>) -> Result<Self, OverlayError> {
        let mut found = BTreeMap::new();
        for (key, text) in data {
            let Some(field) = FIELDS.into_iter().find(|field| field == key) else {
                return Err(OverlayError::Unknown { field: key.clone() });
            };
            let unreadable = |reason: String| OverlayError::Unreadable {
                field: key.clone(),
                reason,
            };
            if text.len() > MAX_BYTES {
                return Err(unreadable(format!("is longer than {MAX_BYTES} bytes")));
            }
            let value: Value =
                serde_yaml_ng::from_str(text).map_err(|error| unreadable(error.to_string()))?;
            match value {
                Value::Null => {}
                Value::Object(_) => {
                    found.insert(field, value);
                }
                _ => return Err(unreadable("it is not a map".into())),
            }
        }
        Ok(Self(found))
    }

    /// What is laid over an object.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field)
    }
}

/// Lays `patch` over `base`.
///
/// # Errors
/// [`OverlayError::Misfit`].
pub fn merge(base: &mut Value, patch: &Value) -> Result<(), OverlayError> {
    merge_at(base, patch, &mut Vec::new())
}

fn merge_at(base: &mut Value, patch: &Value, path: &mut Vec<String>) -> Result<(), OverlayError> {
    let Value::Object(fields) = patch else {
        stays_an_object(base, path)?;
        *base = patch.clone();
        return Ok(());
    };
    let replaces = match fields.get("$patch").map(Value::as_str) {
        None | Some(Some("merge")) => !base.is_object(),
        Some(Some("replace")) => true,
        Some(other) => {
            return Err(misfit(path, format!("$patch cannot be {other:?} here")));
        }
    };
    if replaces {
        *base = Value::Object(Map::new());
    }
    // It is an object by now.
    let Value::Object(target) = base else {
        return Ok(());
    };
    for (name, value) in fields.iter().filter(|(name, _)| *name != "$patch") {
        path.push(name.clone());
        match value {
            Value::Null => {
                target.remove(name);
            }
            Value::Array(items) => {
                let slot = target
                    .entry(name.clone())
                    .or_insert(Value::Array(Vec::new()));
                stays_an_object(slot, path)?;
                match (keys(name), slot.as_array_mut()) {
                    ([], _) => *slot = without_directives(items),
                    (keys, Some(list)) => merge_list(name, list, items, keys, path)?,
                    (_, None) => return Err(misfit(path, "is not a list in the object".into())),
                }
            }
            Value::Object(_) => {
                merge_at(
                    target.entry(name.clone()).or_insert(Value::Null),
                    value,
                    path,
                )?;
            }
            value => {
                let slot = target.entry(name.clone()).or_insert(Value::Null);
                stays_an_object(slot, path)?;
                *slot = value.clone();
            }
        }
        path.pop();
    }
    Ok(())
}

/// What is an object in Kubernetes' types is nothing else: the API server would refuse it, and
/// what is put back afterwards (names, selectors) would have no place.
fn stays_an_object(base: &Value, path: &[String]) -> Result<(), OverlayError> {
    match base.is_object() {
        true => Err(misfit(path, "is an object, so it needs a map".into())),
        false => Ok(()),
    }
}

/// The fields that tell the items of a list apart, the first that an item has; none: the
/// list is replaced.
fn keys(list: &str) -> &'static [&'static str] {
    match list {
        "containers" | "initContainers" | "env" | "volumes" | "imagePullSecrets" | "secrets" => {
            &["name"]
        }
        "volumeMounts" => &["mountPath"],
        "volumeDevices" => &["devicePath"],
        "ports" => &["containerPort", "port"],
        "hostAliases" => &["ip"],
        "topologySpreadConstraints" => &["topologyKey"],
        _ => &[],
    }
}

fn merge_list(
    name: &str,
    list: &mut Vec<Value>,
    items: &[Value],
    keys: &[&str],
    path: &mut Vec<String>,
) -> Result<(), OverlayError> {
    let directive = |item: &Value| {
        item.get("$patch")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let is_replacing = |item: &&Value| {
        item.as_object().is_some_and(|of| of.len() == 1)
            && directive(item).as_deref() == Some("replace")
    };
    if items.iter().any(|item| is_replacing(&item)) {
        list.clear();
    }
    for (index, item) in items
        .iter()
        .enumerate()
        .filter(|(_, item)| !is_replacing(item))
    {
        let key = keys.iter().find_map(|key| Some((*key, item.get(*key)?)));
        let Some((key, value)) = key else {
            path.push(index.to_string());
            return Err(misfit(path, format!("an item needs {}", keys.join(" or "))));
        };
        let known = list.iter().position(|known| known.get(key) == Some(value));
        match (known, directive(item).as_deref()) {
            (Some(known), Some("delete")) => {
                list.remove(known);
            }
            (None, Some("delete")) => {}
            (Some(known), _) => {
                // Of the two one may be there.
                for (one, other) in [("value", "valueFrom"), ("valueFrom", "value")] {
                    if name == "env"
                        && item.get(one).is_some()
                        && let Some(known) = list[known].as_object_mut()
                    {
                        known.remove(other);
                    }
                }
                path.push(index.to_string());
                merge_at(&mut list[known], item, path)?;
                path.pop();
            }
            (None, _) => {
                let mut new = Value::Null;
                merge_at(&mut new, item, path)?;
                list.push(new);
            }
        }
    }
    Ok(())
}

fn without_directives(items: &[Value]) -> Value {
    items
        .iter()
        .filter(|item| item.get("$patch").is_none())
        .cloned()
        .collect()
}

fn misfit(path: &[String], reason: String) -> OverlayError {
    let path: String = path.iter().map(|step| format!(".{step}")).collect();
    OverlayError::Misfit {
        field: path,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn merges_as_kubernetes_does() {
        let table = [
            (
                json!({"a": 1, "b": {"c": 2}}),
                json!({"b": {"d": 3}}),
                json!({"a": 1, "b": {"c": 2, "d": 3}}),
            ),
            (
                json!({"a": 1, "b": 2}),
                json!({"a": null, "z": null}),
                json!({"b": 2}),
            ),
            (
                json!({"b": {"c": 2}}),
                json!({"b": {"$patch": "replace", "d": 3}}),
                json!({"b": {"d": 3}}),
            ),
            (
                json!({"b": 1}),
                json!({"b": {"d": 3}}),
                json!({"b": {"d": 3}}),
            ),
            // Lists without a key are replaced.
            (
                json!({"args": ["a", "b"]}),
                json!({"args": ["c"]}),
                json!({"args": ["c"]}),
            ),
            (
                json!({"tolerations": [{"key": "a"}]}),
                json!({"tolerations": [{"key": "b"}]}),
                json!({"tolerations": [{"key": "b"}]}),
            ),
            // Lists with a key are merged.
            (
                json!({"containers": [{"name": "p", "image": "x"}]}),
                json!({"containers": [{"name": "q"}, {"name": "p", "tty": true}]}),
                json!({"containers": [{"name": "p", "image": "x", "tty": true}, {"name": "q"}]}),
            ),
            (
                json!({"ports": [{"port": 1, "name": "a"}]}),
                json!({"ports": [{"port": 2}, {"port": 1, "name": "b"}]}),
                json!({"ports": [{"port": 1, "name": "b"}, {"port": 2}]}),
            ),
            (
                json!({"volumes": [{"name": "a"}, {"name": "b"}]}),
                json!({"volumes": [{"name": "a", "$patch": "delete"}, {"name": "z", "$patch": "delete"}]}),
                json!({"volumes": [{"name": "b"}]}),
            ),
            (
                json!({"volumes": [{"name": "a"}]}),
                json!({"volumes": [{"$patch": "replace"}, {"name": "b"}]}),
                json!({"volumes": [{"name": "b"}]}),
            ),
            (
                json!({"env": [{"name": "A", "value": "x"}]}),
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "p"}}}]}),
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "p"}}}]}),
            ),
        ];
        for (base, patch, expected) in table {
            let mut merged = base.clone();
            merge(&mut merged, &patch).expect("merges");
            assert_eq!(merged, expected, "{base} {patch}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |base: Value, patch: Value| {
            let mut base = base;
            merge(&mut base, &patch)
                .expect_err("a misfit")
                .of("deployment")
                .to_string()
        };
        let text = error(
            json!({"spec": {}}),
            json!({"spec": {"containers": [{"image": "x"}]}}),
        );
        assert_eq!(text, "deployment.spec.containers.0: an item needs name");
        let text = error(
            json!({"containers": 1}),
            json!({"containers": [{"name": "x"}]}),
        );
        assert!(text.starts_with("deployment.containers: "), "{text}");
        for patch in [
            json!(5),
            json!("x"),
            json!(true),
            json!([]),
            json!([{"a": 1}]),
        ] {
            let text = error(json!({"spec": {"a": {}}}), json!({"spec": {"a": patch}}));
            assert_eq!(text, "deployment.spec.a: is an object, so it needs a map");
        }
        let text = error(json!({}), json!({"a": {"$patch": "delete"}}));
        assert!(text.contains("$patch"), "{text}");
    }

    #[test]
    fn a_config_map_is_read_by_its_keys() {
        let read = |key: &str, text: &str| {
            Overlay::read(&BTreeMap::from([(key.to_owned(), text.to_owned())]))
        };
        assert!(
            read("deployment", "spec: {replicas: 2}")
                .is_ok_and(|of| of.get("deployment").is_some())
        );
        assert!(read("service", "").is_ok_and(|of| of.get("service").is_none()));
        assert!(matches!(
            read("deployment", "[1]"),
            Err(OverlayError::Unreadable { .. })
        ));
        assert!(matches!(
            read("deployment", "a: [1"),
            Err(OverlayError::Unreadable { .. })
        ));
        assert!(matches!(
            read("deploymnet", "a: 1"),
            Err(OverlayError::Unknown { .. })
        ));
    }
}
