//! From what the API server sends to a decoded object, without what nobody reads.

use std::sync::Arc;

use kube::core::{DynamicObject, ObjectMeta};
use serde_json::{Map, Value};

use super::kinds::Resource;
use crate::model::{At, CA_KEY, Kind, MESH_KEY, ObjectRef, Origin};
use crate::source::decode::{Decoded, decode};

/// The keys of ConfigMaps that are read: certificates, the mesh configuration, and what
/// a Gateway's `parametersRef` may lay over the objects that are made for it.
const CONFIG_MAP_KEYS: [&str; 7] = [
    CA_KEY,
    MESH_KEY,
    "deployment",
    "service",
    "serviceAccount",
    "horizontalPodAutoscaler",
    "podDisruptionBudget",
];

/// An object that is there now.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) reference: ObjectRef,
    /// Tells an object from another that had its name before.
    pub(super) uid: Arc<str>,
    pub(super) decoded: Decoded,
}

/// The name of an object of `resource`; `None` without one, which the API server does not do.
pub(super) fn reference(resource: &Resource, meta: &ObjectMeta) -> Option<ObjectRef> {
    let namespace = match resource.kind.is_cluster_scoped() {
        true => "",
        false => meta.namespace.as_deref()?,
    };
    Some(ObjectRef {
        kind: resource.kind,
        namespace: namespace.into(),
        name: meta.name.as_deref()?.into(),
    })
}

/// Decodes an object by the same rules as a manifest.
pub(super) fn read(resource: &Resource, version: &str, object: DynamicObject) -> Option<Seen> {
    let DynamicObject { metadata, data, .. } = object;
    let reference = reference(resource, &metadata)?;
    let uid = metadata.uid.as_deref().unwrap_or_default().into();
    let mut document = match data {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    strip(resource.kind, &mut document);
    document.insert("apiVersion".into(), resource.api_version(version).into());
    document.insert("kind".into(), resource.kind.as_str().into());
    let decoded = match serde_json::to_value(slim(metadata)) {
        Ok(metadata) => {
            document.insert("metadata".into(), metadata);
            let document = Value::Object(document);
            // One document that is no list is one result.
            decode(&document, &Origin::NONE).pop()?.1
        }
        Err(error) => Decoded::Invalid {
            object: Some(reference.clone()),
            errors: vec![At::ROOT.key("metadata").error(error.to_string())],
        },
    };
    Some(Seen {
        reference,
        uid,
        decoded,
    })
}

/// What `Meta` keeps, and the owners for the name of a pod's workload.
fn slim(metadata: ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        managed_fields: None,
        finalizers: None,
        self_link: None,
        resource_version: None,
        ..metadata
    }
}

/// Before decoding, because values of ConfigMaps and Secrets would be copied and kept.
fn strip(kind: Kind, document: &mut Map<String, Value>) {
    let read: &[&str] = match kind {
        Kind::ConfigMap => &CONFIG_MAP_KEYS,
        Kind::Secret => &[CA_KEY],
        _ => return,
    };
    document.remove("binaryData");
    if let Some(Value::Object(data)) = document.get_mut("data") {
        data.retain(|key, _| read.contains(&key.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::kinds::FOLLOWED;
    use super::*;
    use crate::model::Object;

    fn resource(kind: Kind) -> &'static Resource {
        FOLLOWED
            .iter()
            .find(|resource| resource.kind == kind)
            .expect("followed")
    }

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).expect("an object")
    }

    #[test]
    fn values_that_nobody_reads_are_not_kept() {
        let map = object(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "m", "namespace": "n", "uid": "u",
                "managedFields": [{"manager": "x"}],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}},
            "data": {"ca.crt": "A", "big": "B".repeat(1000)},
            "binaryData": {"x": "AAAA"},
        }));
        let seen = read(resource(Kind::ConfigMap), "v1", map).expect("named");
        let Decoded::Object {
            object: Object::ConfigMap(map),
            errors,
        } = seen.decoded
        else {
            panic!("{:?}", seen.decoded)
        };
        assert!(errors.is_empty());
        assert_eq!(map.data.keys().collect::<Vec<_>>(), ["ca.crt"]);
        assert!(map.meta.annotations.is_empty());

        let secret = object(json!({
            "metadata": {"name": "s", "namespace": "n"},
            "data": {"tls.key": "bm90IHRleHQ=", "ca.crt": "QQ=="},
        }));
        let seen = read(resource(Kind::Secret), "v1", secret).expect("named");
        assert!(matches!(
            seen.decoded,
            Decoded::Object { object: Object::Secret(secret), .. }
                if secret.certificates.as_deref() == Some("A")
        ));
    }

    #[test]
    fn the_item_of_a_list_says_nothing_of_its_kind() {
        let route = object(json!({
            "metadata": {"name": "r", "namespace": "n", "uid": "1"},
            "spec": {"rules": [{"matches": 3}]},
        }));
        let seen = read(resource(Kind::HttpRoute), "v1beta1", route).expect("named");
        assert_eq!(seen.reference.to_string(), "HTTPRoute n/r");
        assert!(
            matches!(&seen.decoded, Decoded::Object { errors, .. } if !errors.is_empty()),
            "{:?}",
            seen.decoded
        );
    }
}
