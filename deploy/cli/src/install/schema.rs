//! `values.schema.json` of a chart: checked here as Helm checks it, and made from
//! `values.yaml`, so that a value cannot be documented and refused.

use serde_json::Value;

/// Checks values against a schema, of the sort that is generated here. `path` is where the
/// values stand in what the user wrote.
///
/// # Errors
/// A sentence with the value's path.
pub fn check(schema: &Value, value: &Value, path: &str) -> Result<(), String> {
    let of = |key: &str| match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    };
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<_> = allowed.iter().filter_map(Value::as_str).collect();
        let allowed = allowed.iter().map(|name| match *name {
            "" => "\"\"",
            name => name,
        });
        let allowed: Vec<_> = allowed.collect();
        return Err(format!("{path}: {value} is none of {}", allowed.join(", ")));
    }
    if let Some(types) = schema["type"].as_array() {
        let kind = kind(value);
        if !types.iter().any(|allowed| allowed == kind) {
            let first = types.first().and_then(Value::as_str).unwrap_or_default();
            return Err(format!(
                "{path}: {value} is {}, and {} is expected",
                with_article(kind),
                with_article(first)
            ));
        }
    }
    let (Some(map), Some(properties)) = (value.as_object(), schema["properties"].as_object())
    else {
        return Ok(());
    };
    for (key, value) in map {
        match properties.get(key) {
            Some(schema) => check(schema, value, &of(key))?,
            None if schema["additionalProperties"] == false => {
                let known = properties.keys().map(String::as_str);
                let hint = match nearest(key, known) {
                    Some(near) => format!("; did you mean {}?", of(near)),
                    None => String::new(),
                };
                return Err(format!("{} is not a known value{hint}", of(key)));
            }
            None => {}
        }
    }
    Ok(())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn with_article(kind: &str) -> String {
    match kind {
        "null" => "nothing".into(),
        "array" => "a list".into(),
        "object" => "a map".into(),
        "string" => "a text".into(),
        other => format!("a {other}"),
    }
}

/// The known name that a mistyped one may have been meant to be.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let best = known.map(|other| (distance(name, other), other)).min()?;
    (best.0 <= 2 && best.0 < name.len()).then_some(best.1)
}

/// Edits between two names; two neighbours that have changed places are two.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Map, json};

    use super::*;

    /// Values that have a fixed set of answers.
    fn choices(path: &str) -> Option<Value> {
        match path.rsplit('.').next()? {
            "profile" => Some(json!([
                "", "ambient", "default", "demo", "minimal", "empty", null
            ])),
            "platform" => Some(json!([
                "",
                "openshift",
                "gke",
                "k3d",
                "k3s",
                "microk8s",
                "minikube",
                null
            ])),
            "imagePullPolicy" | "pullPolicy" => {
                Some(json!(["", "Always", "IfNotPresent", "Never", null]))
            }
            "failurePolicy" => Some(json!(["Fail", "Ignore"])),
            _ => None,
        }
    }

    fn schema_of(default: &Value, path: &str) -> Value {
        if let Some(choices) = choices(path) {
            return json!({"enum": choices});
        }
        match default {
            Value::Null => json!({}),
            Value::Bool(_) => json!({"type": ["boolean", "null"]}),
            Value::Number(_) => json!({"type": ["number", "null"]}),
            // Tags like 1.10, and numbers where percentages may stand too.
            Value::String(_) => json!({"type": ["string", "number", "null"]}),
            Value::Array(_) => json!({"type": ["array", "null"]}),
            // What the user is to fill.
            Value::Object(map) if map.is_empty() => json!({"type": ["object", "null"]}),
            // Whatever Kubernetes takes.
            Value::Object(_)
                if path.ends_with("esources")
                    || path.ends_with("updateStrategy")
                    || path.ends_with("seccompProfile") =>
            {
                json!({"type": ["object", "null"]})
            }
            Value::Object(map) => {
                let properties: Map<_, _> = map
                    .iter()
                    .map(|(key, value)| (key.clone(), schema_of(value, &format!("{path}.{key}"))))
                    .collect();
                json!({
                    "type": ["object", "null"],
                    "properties": properties,
                    "additionalProperties": false,
                })
            }
        }
    }

    #[test]
    fn the_committed_schemas_are_those_of_the_values() {
        let charts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts");
        for chart in ["base", "istiod", "cni", "ztunnel", "gateway"] {
            let values = std::fs::read_to_string(charts.join(chart).join("values.yaml"));
            let values: Value = serde_yaml_ng::from_str(&values.expect("values.yaml"))
                .unwrap_or_else(|error| panic!("{chart}: {error}"));
            let defaults = &values["_internal_defaults_do_not_set"];
            let mut schema = schema_of(defaults, "");
            schema["type"] = json!(["object"]);
            schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
            // Helm's own: the defaults, and the condition of the umbrella chart.
            schema["properties"]["_internal_defaults_do_not_set"] = json!({"type": ["object"]});
            schema["properties"]["enabled"] = json!({"type": ["boolean"]});
            let mut made = serde_json::to_string_pretty(&schema).expect("JSON");
            made.push('\n');
            let path = charts.join(chart).join("values.schema.json");
            if std::env::var_os("ADIT_UPDATE").is_some() {
                std::fs::write(&path, &made).expect("the chart can be written");
            }
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                made == committed,
                "{chart}/values.schema.json is out of date: ADIT_UPDATE=1 writes it"
            );
        }
    }

    #[test]
    fn names_that_are_near_are_proposed() {
        let known = ["replicaCount", "resources", "env"];
        assert_eq!(
            nearest("replicaCuont", known.into_iter()),
            Some("replicaCount")
        );
        assert_eq!(nearest("resource", known.into_iter()), Some("resources"));
        assert_eq!(nearest("affinity", known.into_iter()), None);
    }

    #[test]
    fn types_are_checked() {
        let schema = json!({"properties": {"n": {"type": ["number", "null"]}}});
        assert_eq!(check(&schema, &json!({"n": 1}), ""), Ok(()));
        assert_eq!(
            check(&schema, &json!({"n": "x"}), ""),
            Err("n: \"x\" is a text, and a number is expected".into())
        );
    }
}
