//! Documents to objects: which kind it is, whether it is ours, what is wrong with it.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{
    At, AuthorizationPolicy, BackendTlsPolicy, ConfigMap, DestinationRule, EndpointSlice,
    FieldError, FieldPath, Gateway, GatewayClass, GrpcRoute, HttpRoute, Kind, Meta, Namespace,
    Node, Object, ObjectRef, Origin, PeerAuthentication, Pod, ReferenceGrant,
    RequestAuthentication, Secret, Segment, Service, ServiceAccount, ServiceEntry, TcpRoute,
    Telemetry, TlsRoute, VirtualService,
};

/// What a document or a list item turned out to be.
#[derive(Debug)]
pub enum Decoded {
    /// An object of ours. With errors it is not what its author meant: an earlier
    /// version of it stays in force, and only where there is none this one holds,
    /// because it fails closed.
    Object {
        /// The object.
        object: Object,
        /// What is wrong with it.
        errors: Vec<FieldError>,
    },
    /// An object of ours that cannot be used.
    Invalid {
        /// Its name, as far as it could be read.
        object: Option<ObjectRef>,
        /// What is wrong with it; at least one.
        errors: Vec<FieldError>,
    },
    /// A kind that other programs read.
    NotOurs,
    /// A kind that nobody is known to read.
    Unknown {
        /// `<apiVersion> <kind>`.
        kind: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

/// Decodes one document. A `List` gives one result for each item, with its position.
pub fn decode(document: &Value, origin: &Origin) -> Vec<(Option<usize>, Decoded)> {
    let head = match head(document) {
        Ok(head) => head,
        Err(invalid) => return vec![(None, invalid)],
    };
    if head.kind.ends_with("List")
        && let Some(Value::Array(items)) = document.get("items")
    {
        let item_kind = head.kind.strip_suffix("List").unwrap_or_default();
        return items
            .iter()
            .enumerate()
            .map(|(index, item)| {
                let origin = Origin {
                    item: Some(index),
                    ..origin.clone()
                };
                // Items of a typed list need not repeat the kind.
                let decoded = match head_of_item(item, &head, item_kind) {
                    Ok(head) => decode_one(item, &head, origin),
                    Err(invalid) => invalid,
                };
                (Some(index), decoded)
            })
            .collect();
    }
    vec![(None, decode_one(document, &head, origin.clone()))]
}

fn head(document: &Value) -> Result<Head, Decoded> {
    let invalid = |error| Decoded::Invalid {
        object: None,
        errors: vec![error],
    };
    if !document.is_object() {
        return Err(invalid(At::ROOT.error("is not an object")));
    }
    let head =
        Head::deserialize(document).map_err(|error| invalid(At::ROOT.error(error.to_string())))?;
    for (key, value) in [("apiVersion", &head.api_version), ("kind", &head.kind)] {
        if value.is_empty() {
            return Err(invalid(At::ROOT.key(key).error("is required")));
        }
    }
    Ok(head)
}

fn head_of_item(item: &Value, list: &Head, kind: &str) -> Result<Head, Decoded> {
    if !kind.is_empty() && item.is_object() && item.get("kind").is_none() {
        return Ok(Head {
            api_version: list.api_version.clone(),
            kind: kind.into(),
        });
    }
    head(item)
}

fn decode_one(document: &Value, head: &Head, origin: Origin) -> Decoded {
    let (group, version) = head
        .api_version
        .split_once('/')
        .unwrap_or(("", &head.api_version));
    match (group, version, head.kind.as_str()) {
        ("", "v1", "Namespace") => meta_only(document, Kind::Namespace, origin, |meta| {
            Object::Namespace(Arc::new(Namespace { meta }))
        }),
        ("", "v1", "Node") => meta_only(document, Kind::Node, origin, |meta| {
            Object::Node(Arc::new(Node { meta }))
        }),
        ("", "v1", "ServiceAccount") => meta_only(document, Kind::ServiceAccount, origin, |meta| {
            Object::ServiceAccount(Arc::new(ServiceAccount { meta }))
        }),
        ("", "v1", "Pod") => typed(document, Kind::Pod, |raw: core::Pod| {
            Pod::parse(raw, origin).map(|pod| Object::Pod(Arc::new(pod)))
        }),
        ("", "v1", "Service") => typed(document, Kind::Service, |raw: core::Service| {
            Service::parse(raw, origin).map(|service| Object::Service(Arc::new(service)))
        }),
        ("discovery.k8s.io", "v1", "EndpointSlice") => typed(
            document,
            Kind::EndpointSlice,
            |raw: discovery::EndpointSlice| {
                EndpointSlice::parse(raw, origin)
                    .map(|slice| Object::EndpointSlice(Arc::new(slice)))
            },
        ),
        ("", "v1", "ConfigMap") => typed(document, Kind::ConfigMap, |raw: core::ConfigMap| {
            ConfigMap::parse(raw, origin).map(|map| Object::ConfigMap(Arc::new(map)))
        }),
        ("", "v1", "Secret") => typed(document, Kind::Secret, |raw: core::Secret| {
            Secret::parse(raw, origin).map(|secret| Object::Secret(Arc::new(secret)))
        }),
        ("networking.istio.io", "v1" | "v1beta1" | "v1alpha3", "VirtualService") => {
            meta_only(document, Kind::VirtualService, origin, |meta| {
                Object::VirtualService(Arc::new(VirtualService { meta }))
            })
        }
        ("networking.istio.io", "v1" | "v1beta1" | "v1alpha3", "ServiceEntry") => {
            meta_only(document, Kind::ServiceEntry, origin, |meta| {
                Object::ServiceEntry(Arc::new(ServiceEntry { meta }))
            })
        }
        (group, version, kind) => match spec_kind(group, version, kind) {
            Some(kind) => with_spec(document, kind, origin),
            None if is_known_elsewhere(group, head.kind.as_str()) => Decoded::NotOurs,
            None => Decoded::Unknown {
                kind: format!("{} {}", head.api_version, head.kind),
            },
        },
    }
}

/// Kinds that are read from their `spec`, in the versions that there are.
fn spec_kind(group: &str, version: &str, name: &str) -> Option<Kind> {
    let (known_group, versions): (_, &[&str]) = match name {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => {
            ("security.istio.io", &["v1", "v1beta1"])
        }
        "DestinationRule" => ("networking.istio.io", &["v1", "v1beta1", "v1alpha3"]),
        "Telemetry" => ("telemetry.istio.io", &["v1", "v1alpha1"]),
        "GatewayClass" | "Gateway" | "HTTPRoute" | "ReferenceGrant" => {
            ("gateway.networking.k8s.io", &["v1", "v1beta1"])
        }
        "GRPCRoute" | "TCPRoute" => ("gateway.networking.k8s.io", &["v1", "v1alpha2"]),
        "TLSRoute" => ("gateway.networking.k8s.io", &["v1", "v1alpha3", "v1alpha2"]),
        "BackendTLSPolicy" => ("gateway.networking.k8s.io", &["v1", "v1alpha3"]),
        _ => return None,
    };
    if group != known_group || !versions.contains(&version) {
        return None;
    }
    Kind::from_name(name)
}

/// Reads `spec`; gives what is wrong with it beside the object.
fn read_spec(kind: Kind, meta: Meta, spec: &Value) -> Option<(Object, Vec<FieldError>)> {
    macro_rules! read {
        ($Type:ident) => {{
            let object = $Type::parse(meta, spec);
            let errors = object.errors.clone();
            (Object::$Type(Arc::new(object)), errors)
        }};
    }
    Some(match kind {
        Kind::AuthorizationPolicy => {
            let policy = AuthorizationPolicy::parse(meta, spec);
            let errors = policy.errors().to_vec();
            (Object::AuthorizationPolicy(Arc::new(policy)), errors)
        }
        Kind::PeerAuthentication => read!(PeerAuthentication),
        Kind::RequestAuthentication => read!(RequestAuthentication),
        Kind::DestinationRule => read!(DestinationRule),
        Kind::Telemetry => read!(Telemetry),
        Kind::GatewayClass => read!(GatewayClass),
        Kind::Gateway => read!(Gateway),
        Kind::HttpRoute => read!(HttpRoute),
        Kind::GrpcRoute => read!(GrpcRoute),
        Kind::TcpRoute => read!(TcpRoute),
        Kind::TlsRoute => read!(TlsRoute),
        Kind::ReferenceGrant => read!(ReferenceGrant),
        Kind::BackendTlsPolicy => read!(BackendTlsPolicy),
        _ => return None,
    })
}

/// Kinds that mesh manifests hold and the control plane has no use for: `adit local`
/// expands workloads into pods itself.
fn is_known_elsewhere(group: &str, kind: &str) -> bool {
    match group {
        "" => !matches!(
            kind,
            "Namespace" | "Node" | "ServiceAccount" | "Pod" | "Service" | "ConfigMap" | "Secret"
        ),
        "networking.istio.io" | "telemetry.istio.io" | "extensions.istio.io" => true,
        group => {
            matches!(group, "apps" | "batch" | "autoscaling" | "policy")
                || group == "gateway.networking.k8s.io"
                || (group.ends_with(".k8s.io") && kind != "EndpointSlice")
        }
    }
}

fn parse<T: DeserializeOwned>(document: &Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(document).map_err(|error| FieldError {
        path: FieldPath::from_serde(error.path()),
        message: error.inner().to_string(),
    })
}

/// The object's name, if at least that can be read.
fn reference(document: &Value, kind: Kind) -> Option<ObjectRef> {
    let metadata = document.get("metadata")?;
    let text = |key: &str| metadata.get(key).and_then(Value::as_str);
    let meta = ObjectMeta {
        name: text("name").map(Into::into),
        namespace: text("namespace").map(Into::into),
        ..ObjectMeta::default()
    };
    Some(Meta::parse(kind, meta, Origin::NONE).ok()?.reference(kind))
}

fn invalid(document: &Value, kind: Kind, errors: Vec<FieldError>) -> Decoded {
    Decoded::Invalid {
        object: reference(document, kind),
        errors,
    }
}

fn typed<T: DeserializeOwned>(
    document: &Value,
    kind: Kind,
    read: impl FnOnce(T) -> Result<Object, Vec<FieldError>>,
) -> Decoded {
    match parse(document).map_err(|error| vec![error]).and_then(read) {
        Ok(object) => Decoded::Object {
            object,
            errors: Vec::new(),
        },
        Err(errors) => invalid(document, kind, errors),
    }
}

fn metadata(document: &Value, kind: Kind, origin: Origin) -> Result<Meta, FieldError> {
    let metadata = document.get("metadata").unwrap_or(&Value::Null);
    let prefix = [Segment::Key("metadata".into())];
    let meta: ObjectMeta = match metadata {
        Value::Null => ObjectMeta::default(),
        metadata => parse(metadata).map_err(|error: FieldError| FieldError {
            path: error.path.below(&prefix),
            message: error.message,
        })?,
    };
    Meta::parse(kind, meta, origin)
}

fn meta_only(
    document: &Value,
    kind: Kind,
    origin: Origin,
    make: impl FnOnce(Meta) -> Object,
) -> Decoded {
    match metadata(document, kind, origin) {
        Ok(meta) => Decoded::Object {
            object: make(meta),
            errors: Vec::new(),
        },
        Err(error) => invalid(document, kind, vec![error]),
    }
}

fn with_spec(document: &Value, kind: Kind, origin: Origin) -> Decoded {
    let (meta, meta_error) = match metadata(document, kind, origin.clone()) {
        Ok(meta) => (meta, None),
        // A policy whose labels or annotations cannot be read still has to hold.
        Err(error) => match reference(document, kind) {
            None => return invalid(document, kind, vec![error]),
            Some(reference) => {
                let meta = ObjectMeta {
                    name: Some(reference.name.to_string()),
                    namespace: Some(reference.namespace.to_string()),
                    ..ObjectMeta::default()
                };
                match Meta::parse(kind, meta, origin) {
                    Ok(meta) => (meta, Some(error)),
                    Err(error) => return invalid(document, kind, vec![error]),
                }
            }
        },
    };
    let spec = document.get("spec").unwrap_or(&Value::Null);
    let Some((object, mut errors)) = read_spec(kind, meta, spec) else {
        return Decoded::NotOurs;
    };
    let known = ["apiVersion", "kind", "metadata", "spec", "status"];
    for key in document.as_object().into_iter().flat_map(|map| map.keys()) {
        if !known.contains(&key.as_str()) {
            errors.push(At::ROOT.key(key).error("unknown field"));
        }
    }
    errors.extend(meta_error);
    Decoded::Object { object, errors }
}
