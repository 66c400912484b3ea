//! Which object a document is about.

use std::fmt;

use serde_json::Value;

/// Group, kind, namespace and name: two documents with the same are one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// API group; empty for Kubernetes' core.
    pub group: String,
    /// Kind, as written in manifests.
    pub kind: String,
    /// Namespace; empty for what has none.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Identity {
    /// The identity of a manifest; `None` for what is no object, or a list of objects.
    pub fn of(object: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
        let version = object["apiVersion"].as_str()?;
        if kind.is_empty() || name.is_empty() {
            return None;
        }
        let namespace = match (is_cluster_scoped(&kind), &object["metadata"]["namespace"]) {
            (true, _) => String::new(),
            (false, Value::String(namespace)) => namespace.clone(),
            (false, _) => "default".into(),
        };
        Some(Self {
            group: version
                .split_once('/')
                .map_or("", |(group, _)| group)
                .into(),
            kind,
            namespace,
            name,
        })
    }

    /// `namespace/name`, or the name alone.
    pub fn path(&self) -> String {
        match self.namespace.as_str() {
            "" => self.name.clone(),
            namespace => format!("{namespace}/{}", self.name),
        }
    }
}

/// As `kubectl` names what it has done: `gateway.gateway.networking.k8s.io/waypoint`.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind.to_ascii_lowercase())?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        write!(f, "/{}", self.name)
    }
}

fn is_cluster_scoped(kind: &str) -> bool {
    let plain = matches!(
        kind,
        "Namespace" | "Node" | "GatewayClass" | "PersistentVolume" | "CustomResourceDefinition"
    );
    plain || kind.starts_with("Cluster")
}

/// Whether `wanted`, as a user types it, means this kind: any case, singular or plural,
/// with its group behind a dot or without, or one of `kubectl`'s short names.
pub fn is_kind(wanted: &str, group: &str, kind: &str) -> bool {
    let wanted = wanted.to_ascii_lowercase();
    let (wanted, wanted_group) = match wanted.split_once('.') {
        Some((kind, group)) => (kind.to_owned(), Some(group.to_owned())),
        None => (wanted, None),
    };
    if wanted_group.is_some_and(|wanted| wanted != group) {
        return false;
    }
    let kind = kind.to_ascii_lowercase();
    let plural = plural(&kind);
    let short = match wanted.as_str() {
        "ns" => "namespace",
        "po" => "pod",
        "svc" => "service",
        "sa" => "serviceaccount",
        "deploy" => "deployment",
        "gtw" => "gateway",
        "ap" => "authorizationpolicy",
        "pa" => "peerauthentication",
        "ra" => "requestauthentication",
        other => other,
    };
    short == kind || short == plural
}

/// The plural of a kind in lower case, as in the paths of an API server.
pub(crate) fn plural(kind: &str) -> String {
    match kind.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
        _ if kind.ends_with('s') => format!("{kind}es"),
        _ => format!("{kind}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn identities_of_documents() {
        let gateway = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "waypoint", "namespace": "shop"}});
        let identity = Identity::of(&gateway).map(|i| (i.to_string(), i.path()));
        let expected = (
            "gateway.gateway.networking.k8s.io/waypoint".to_owned(),
            "shop/waypoint".to_owned(),
        );
        assert_eq!(identity, Some(expected));
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "namespace": "ignored"}});
        let identity = Identity::of(&namespace).map(|i| (i.to_string(), i.path()));
        assert_eq!(identity, Some(("namespace/shop".into(), "shop".into())));
        for no_object in [json!(null), json!([]), json!({"kind": "Pod"}), json!({})] {
            assert_eq!(Identity::of(&no_object), None, "{no_object}");
        }
    }

    #[test]
    fn kinds_as_users_type_them() {
        let gateway = ("gateway.networking.k8s.io", "Gateway");
        let policy = ("security.istio.io", "AuthorizationPolicy");
        for (wanted, (group, kind), expected) in [
            ("gateway", gateway, true),
            ("Gateways", gateway, true),
            ("gtw", gateway, true),
            ("gateway.gateway.networking.k8s.io", gateway, true),
            ("gateway.networking.istio.io", gateway, false),
            ("authorizationpolicies", policy, true),
            ("ap", policy, true),
            ("svc", ("", "Service"), true),
            ("service", gateway, false),
        ] {
            assert_eq!(is_kind(wanted, group, kind), expected, "{wanted} {kind}");
        }
    }
}
