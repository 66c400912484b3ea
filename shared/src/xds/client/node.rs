//! Who the client says it is: the `Node` of the first request, as istiod reads it.

use std::collections::BTreeMap;

use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};

use crate::proto::xds::Node;

/// What kind of proxy asks: the first part of its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodeType {
    /// The tunnel of a node.
    #[default]
    Ztunnel,
    /// A waypoint.
    Waypoint,
}

impl NodeType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ztunnel => "ztunnel",
            Self::Waypoint => "waypoint",
        }
    }
}

/// What a proxy tells the control plane about itself. The control plane compares the
/// namespace, the service account and the node's name with the bearer token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NodeMetadata {
    /// What kind of proxy it is.
    pub node_type: NodeType,
    /// The pod's name (`POD_NAME`).
    pub pod_name: String,
    /// The pod's namespace (`POD_NAMESPACE`).
    pub namespace: String,
    /// The pod's service account (`SERVICE_ACCOUNT`).
    pub service_account: String,
    /// The pod's address (`INSTANCE_IP`); unknown is written as `1.1.1.1`, as Istio does.
    pub instance_ip: Option<String>,
    /// The name of the Kubernetes node (`NODE_NAME`).
    pub node_name: String,
    /// The cluster (`CLUSTER_ID`).
    pub cluster_id: String,
    /// The network (`NETWORK`); empty is the default network.
    pub network: String,
    /// More metadata, by key: `ISTIO_META_X` as a string, `ISTIO_METAJSON_X` as JSON.
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl NodeMetadata {
    /// Reads Istio's environment variables. A value of `ISTIO_METAJSON_*` that is not JSON is
    /// an error that names the variable.
    ///
    /// # Errors
    /// The variable and what JSON says about its value.
    pub fn from_vars(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, NodeMetadataError> {
        let mut node = Self::default();
        for (name, value) in vars {
            match name.as_str() {
                "POD_NAME" => node.pod_name = value,
                "POD_NAMESPACE" => node.namespace = value,
                "SERVICE_ACCOUNT" => node.service_account = value,
                "INSTANCE_IP" => node.instance_ip = Some(value).filter(|ip| !ip.is_empty()),
                "NODE_NAME" => node.node_name = value,
                "CLUSTER_ID" => node.cluster_id = value,
                "NETWORK" => node.network = value,
                _ => {
                    if let Some(key) = name.strip_prefix("ISTIO_META_") {
                        node.extra.insert(key.to_owned(), value.into());
                    } else if let Some(key) = name.strip_prefix("ISTIO_METAJSON_") {
                        let value =
                            serde_json::from_str(&value).map_err(|source| NodeMetadataError {
                                variable: name.clone(),
                                source,
                            })?;
                        node.extra.insert(key.to_owned(), value);
                    }
                }
            }
        }
        Ok(node)
    }

    /// The `Node` of a request: id `<type>~<ip>~<pod>.<namespace>~<namespace>.svc.cluster.local`.
    pub fn to_node(&self) -> Node {
        let ip = self.instance_ip.as_deref().unwrap_or("1.1.1.1");
        let mut fields: BTreeMap<String, Value> = self
            .extra
            .iter()
            .map(|(key, value)| (key.clone(), from_json(value)))
            .collect();
        let list = Value {
            kind: Some(Kind::ListValue(ListValue {
                values: vec![string(ip)],
            })),
        };
        fields.insert("NAME".into(), string(&self.pod_name));
        fields.insert("NAMESPACE".into(), string(&self.namespace));
        fields.insert("INSTANCE_IPS".into(), list);
        fields.insert("NODE_NAME".into(), string(&self.node_name));
        fields.insert("ISTIO_VERSION".into(), string(env!("CARGO_PKG_VERSION")));
        for (key, value) in [
            ("SERVICE_ACCOUNT", &self.service_account),
            ("CLUSTER_ID", &self.cluster_id),
            ("NETWORK", &self.network),
        ] {
            if !value.is_empty() {
                fields.insert(key.into(), string(value));
            }
        }
        let Self {
            pod_name,
            namespace,
            ..
        } = self;
        let kind = self.node_type.as_str();
        Node {
            id: format!("{kind}~{ip}~{pod_name}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct { fields }),
            ..Node::default()
        }
    }
}

/// A variable `ISTIO_METAJSON_*` that is not JSON.
#[derive(Debug, thiserror::Error)]
#[error("{variable} is not JSON: {source}")]
pub struct NodeMetadataError {
    variable: String,
    source: serde_json::Error,
}

/// A string field of the metadata of a node, as the server reads it.
pub fn metadata_string<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    match &node.metadata.as_ref()?.fields.get(key)?.kind {
        Some(Kind::StringValue(text)) => Some(text),
        _ => None,
    }
}

fn string(text: &str) -> Value {
    Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    }
}

/// serde_json bounds the depth of what it parses (128), so this recursion is bounded too.
fn from_json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Json::String(value) => Kind::StringValue(value.clone()),
        Json::Array(values) => Kind::ListValue(ListValue {
            values: values.iter().map(from_json).collect(),
        }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields
                .iter()
                .map(|(key, value)| (key.clone(), from_json(value)))
                .collect(),
        }),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(vars: &[(&str, &str)]) -> Vec<(String, String)> {
        vars.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn the_node_is_istios() {
        let metadata = NodeMetadata::from_vars(vars(&[
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
            ("INSTANCE_IP", "10.0.0.7"),
            ("NODE_NAME", "n1"),
            ("CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_DNS_CAPTURE", "true"),
            ("ISTIO_METAJSON_LABELS", r#"{"app":"ztunnel","n":1}"#),
            ("PATH", "/bin"),
        ]))
        .expect("legal");
        let node = metadata.to_node();
        assert_eq!(
            node.id,
            "ztunnel~10.0.0.7~ztunnel-x.istio-system~istio-system.svc.cluster.local"
        );
        let text = |key| metadata_string(&node, key);
        assert_eq!(text("NAME"), Some("ztunnel-x"));
        assert_eq!(text("NAMESPACE"), Some("istio-system"));
        assert_eq!(text("NODE_NAME"), Some("n1"));
        assert_eq!(text("CLUSTER_ID"), Some("Kubernetes"));
        assert_eq!(text("NETWORK"), None);
        assert_eq!(text("DNS_CAPTURE"), Some("true"));
        assert_eq!(text("LABELS"), None, "not a string");
        let fields = &node.metadata.as_ref().expect("set").fields;
        let Some(Kind::StructValue(labels)) = &fields["LABELS"].kind else {
            panic!("{fields:?}");
        };
        assert_eq!(labels.fields["app"], string("ztunnel"));
        assert!(!fields.contains_key("PATH"));
    }

    #[test]
    fn bad_json_names_the_variable() {
        let error = NodeMetadata::from_vars(vars(&[("ISTIO_METAJSON_LABELS", "{")]))
            .expect_err("not JSON")
            .to_string();
        assert!(
            error.starts_with("ISTIO_METAJSON_LABELS is not JSON"),
            "{error}"
        );
    }
}
