//! Objects from snippets of YAML, for tables.

use crate::model::{Namespace, Object, Pod};
use crate::source::decode_text;

/// A namespace with `metadata`, for example `labels: {a: b}`.
pub(crate) fn namespace(name: &str, metadata: &str) -> Namespace {
    let yaml =
        format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  {metadata}\n");
    match decode_text(&yaml).pop() {
        Some((Object::Namespace(namespace), _)) => Namespace::clone(&namespace),
        other => panic!("{other:?}"),
    }
}

/// A pod. `spec` and `status` are the insides of flow mappings.
pub(crate) fn pod(namespace: &str, name: &str, metadata: &str, spec: &str, status: &str) -> Pod {
    let yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  {metadata}\nspec: {{containers: [], {spec}}}\nstatus: {{{status}}}\n"
    );
    match decode_text(&yaml).pop() {
        Some((Object::Pod(pod), _)) => Pod::clone(&pod),
        other => panic!("{other:?}"),
    }
}
