//! From `schema.txt` to definitions.

use serde_json::{Map, Value, json};

use super::table::{Field, KindRow, Table, Type};
use super::{EDITION, EDITION_ANNOTATION};

const TABLE: &str = include_str!("schema.txt");

/// All definitions as YAML documents, in the order of the table.
///
/// # Errors
/// What is wrong with the table, and on which line.
pub fn generate() -> Result<String, String> {
    let table = Table::parse(TABLE)?;
    let mut text = String::from(
        "# Made from deploy/cli/src/install/crds/schema.txt by\n\
         # ADIT_UPDATE=1 cargo test -p adit-cli the_committed_definitions. Do not edit.\n",
    );
    for kind in &table.kinds {
        text += "---\n";
        text += &super::super::template::to_yaml(&definition(kind)?);
        text.push('\n');
    }
    Ok(text)
}

fn definition(row: &KindRow) -> Result<Value, String> {
    let singular = row.kind.to_lowercase();
    let plural = plural(&singular);
    let mut names = json!({
        "kind": row.kind,
        "listKind": format!("{}List", row.kind),
        "singular": singular,
        "plural": plural,
        "categories": ["istio-io", row.group.replace('.', "-")],
    });
    if let Some(short) = &row.short {
        names["shortNames"] = json!([short]);
    }
    let schema = json!({"openAPIV3Schema": {
        "type": "object",
        "properties": {"spec": spec(row), "status": status()},
    }});
    let columns: Vec<_> = row
        .columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name,
                "jsonPath": column.path,
                "type": column.kind,
                "description": column.description,
            })
        })
        .collect();
    let versions = row.versions.iter().map(|version| {
        let mut value = json!({
            "name": version.name,
            "served": true,
            "storage": version.stored,
            "subresources": {"status": {}},
            "schema": schema,
        });
        if !columns.is_empty() {
            value["additionalPrinterColumns"] = json!(columns);
        }
        value
    });
    Ok(json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{}", row.group),
            "labels": {
                "app": "istio-pilot",
                "app.kubernetes.io/part-of": "istio",
                "operator.istio.io/component": "Base",
            },
            "annotations": {
                // Deleting a definition deletes every user's object of the kind.
                "helm.sh/resource-policy": "keep",
                EDITION_ANNOTATION: EDITION.to_string(),
            },
        },
        "spec": {
            "group": row.group,
            "names": names,
            "scope": "Namespaced",
            "versions": versions.collect::<Vec<_>>(),
        },
    }))
}

fn plural(singular: &str) -> String {
    match singular.strip_suffix('y') {
        // gateway keeps its y.
        Some(stem) if !stem.ends_with(['a', 'e', 'o']) => format!("{stem}ies"),
        _ => format!("{singular}s"),
    }
}

fn spec(row: &KindRow) -> Value {
    let mut schema = schema_of(&row.spec);
    if !row.required.is_empty() {
        schema["required"] = json!(row.required);
    }
    schema
}

fn schema_of(kind: &Type) -> Value {
    match kind {
        Type::Text => json!({"type": "string"}),
        // The reader says what a duration may be; all of them are texts.
        Type::Duration => json!({"type": "string"}),
        Type::Bool => json!({"type": "boolean"}),
        Type::Integer => json!({"type": "integer"}),
        Type::Number => json!({"type": "number"}),
        Type::Any => json!({"x-kubernetes-preserve-unknown-fields": true}),
        Type::Enum(values) => json!({"type": "string", "enum": values}),
        Type::List(items) => json!({"type": "array", "items": schema_of(items)}),
        Type::Map(values) => json!({"type": "object", "additionalProperties": schema_of(values)}),
        Type::Object(fields) => {
            let mut object = json!({
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": true,
            });
            // The API server drops an empty map: Helm would write it anew at each upgrade.
            if !fields.is_empty() {
                let properties: Map<_, _> = fields.iter().map(property).collect();
                object["properties"] = properties.into();
            }
            object
        }
    }
}

fn property(field: &Field) -> (String, Value) {
    (field.name.clone(), schema_of(&field.kind))
}

/// Conditions, as the control plane writes them; Istio's messages are kept.
fn status() -> Value {
    json!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "conditions": {
                "type": "array",
                "items": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": true,
                    "properties": {
                        "type": {"type": "string"},
                        "status": {"type": "string"},
                        "reason": {"type": "string"},
                        "message": {"type": "string"},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "observedGeneration": {
                            "anyOf": [{"type": "integer"}, {"type": "string"}],
                            "x-kubernetes-int-or-string": true,
                        },
                    },
                },
            },
            "observedGeneration": {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": true,
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_committed_definitions_are_those_of_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/base/files/crds.gen.yaml");
        let made = generate().expect("the table can be read");
        if std::env::var_os("ADIT_UPDATE").is_some() {
            std::fs::write(&path, &made).expect("the chart can be written");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            made == committed,
            "crds.gen.yaml is out of date: ADIT_UPDATE=1 writes it"
        );
    }

    #[test]
    fn plurals_are_istios() {
        for (singular, expected) in [
            ("authorizationpolicy", "authorizationpolicies"),
            ("gateway", "gateways"),
            ("serviceentry", "serviceentries"),
            ("telemetry", "telemetries"),
            ("proxyconfig", "proxyconfigs"),
        ] {
            assert_eq!(plural(singular), expected);
        }
    }

    /// An object with every typed field.
    fn full(kind: &Type) -> Value {
        match kind {
            Type::Text => json!("x"),
            Type::Duration => json!("5s"),
            Type::Bool => json!(true),
            Type::Integer => json!(1),
            Type::Number => json!(1.5),
            Type::Any => json!({}),
            Type::Enum(values) => json!(values.first()),
            Type::List(items) => json!([full(items)]),
            Type::Map(values) => json!({"1": full(values)}),
            Type::Object(fields) => fields
                .iter()
                .map(|f| (f.name.clone(), full(&f.kind)))
                .collect(),
        }
    }

    #[test]
    fn the_control_plane_knows_every_field_that_is_typed() {
        let table = Table::parse(TABLE).expect("the table can be read");
        // Those that it does not read have no readers to disagree with.
        let unread = [
            "ServiceEntry",
            "WorkloadEntry",
            "VirtualService",
            "Gateway",
            "Sidecar",
            "WorkloadGroup",
            "EnvoyFilter",
            "ProxyConfig",
            "WasmPlugin",
            "TrafficExtension",
        ];
        for row in table
            .kinds
            .iter()
            .filter(|row| !unread.contains(&row.kind.as_str()))
        {
            let document = json!({
                "apiVersion": format!("{}/{}", row.group, row.versions[0].name),
                "kind": row.kind,
                "metadata": {"name": "full", "namespace": "shop"},
                "spec": full(&row.spec),
            });
            let mesh = adit_controlplane::compile::MeshConfig::default();
            let findings = adit_controlplane::analyze::analyze_over(&[document], Vec::new(), &mesh);
            // Both spellings at once, which nobody writes.
            let unknown = findings.iter().map(|finding| format!("{finding:?}"));
            let unknown: Vec<_> = unknown
                .filter(|text| text.contains("unknown field") && !text.contains("duplicate field"))
                .collect();
            assert!(unknown.is_empty(), "{}: {unknown:?}", row.kind);
        }
    }

    /// The path of the first field of a spec that has no type.
    fn untyped(value: &Value, kind: &Type, path: &str) -> Option<String> {
        match (value, kind) {
            (Value::Object(map), Type::Object(fields)) => map.iter().find_map(|(key, value)| {
                let path = format!("{path}.{key}");
                match fields.iter().find(|field| field.name == *key) {
                    Some(field) => untyped(value, &field.kind, &path),
                    None => Some(path),
                }
            }),
            (Value::Object(map), Type::Map(values)) => map
                .iter()
                .find_map(|(key, value)| untyped(value, values, &format!("{path}.{key}"))),
            (Value::Array(list), Type::List(items)) => {
                list.iter().find_map(|item| untyped(item, items, path))
            }
            _ => None,
        }
    }

    #[test]
    fn whatever_the_samples_use_is_typed() {
        let table = Table::parse(TABLE).expect("the table can be read");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples");
        let mut checked = 0;
        for directory in ["mesh", "waypoint"] {
            for entry in std::fs::read_dir(root.join(directory)).expect("samples") {
                let path = entry.expect("a sample").path();
                if path.extension().is_none_or(|extension| extension != "yaml") {
                    continue;
                }
                let text = std::fs::read_to_string(&path).expect("a sample");
                for document in serde_yaml_ng::Deserializer::from_str(&text) {
                    let document: Value = serde::Deserialize::deserialize(document).expect("YAML");
                    let group = document["apiVersion"].as_str().unwrap_or_default();
                    let row = table.kinds.iter().find(|row| {
                        document["kind"] == row.kind.as_str() && group.starts_with(&row.group)
                    });
                    if let Some(row) = row {
                        checked += 1;
                        let found = untyped(&document["spec"], &row.spec, "spec");
                        assert_eq!(found, None, "{}", path.display());
                    }
                }
            }
        }
        assert!(checked > 3, "only {checked} samples were checked");
    }
}
