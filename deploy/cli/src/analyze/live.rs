//! The objects of a cluster that the control plane looks at.

use adit_controlplane::model::MESH_KEY;
use adit_shared::identity::TrustDomain;
use serde_json::Value;

use crate::cluster::{name_of, namespace_of};
use crate::kubernetes::Kubernetes;
use crate::output;

/// Kinds that are read whole. ConfigMaps and Secrets are not: they are many, large and
/// nobody's business, unless something refers to them.
const KINDS: [(&str, &[&str]); 6] = [
    (
        "",
        &["Namespace", "Node", "ServiceAccount", "Pod", "Service"],
    ),
    ("discovery.k8s.io", &["EndpointSlice"]),
    (
        "security.istio.io",
        &[
            "AuthorizationPolicy",
            "PeerAuthentication",
            "RequestAuthentication",
        ],
    ),
    (
        "networking.istio.io",
        &["DestinationRule", "VirtualService", "ServiceEntry"],
    ),
    ("telemetry.istio.io", &["Telemetry"]),
    (
        "gateway.networking.k8s.io",
        &[
            "GatewayClass",
            "Gateway",
            "HTTPRoute",
            "GRPCRoute",
            "TCPRoute",
            "TLSRoute",
            "ReferenceGrant",
            "BackendTLSPolicy",
        ],
    ),
];

/// What the node agent writes on the pods that it has captured.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// Every object that findings may be about, or depend on.
///
/// # Errors
/// When a kind cannot be listed: findings would be wrong without it.
pub(super) fn objects(cluster: &Kubernetes) -> anyhow::Result<Vec<Value>> {
    let is_read = |group: &str, kind: &str| {
        let mut groups = KINDS.iter().filter(|(known, _)| *known == group);
        groups.any(|(_, kinds)| kinds.contains(&kind))
    };
    let mut all = cluster.list_kinds(is_read, None)?;
    for object in &mut all {
        // In a manifest it would be a mistake; here it is the mesh that has written it.
        if let Some(Value::Object(written)) = object.pointer_mut("/metadata/annotations") {
            written.remove(REDIRECTION);
        }
    }
    let mut wanted: Vec<Reference> = all.iter().flat_map(references).collect();
    wanted.push(Reference {
        kind: "configmaps",
        namespace: cluster.istio_namespace().to_owned(),
        name: "istio".into(),
    });
    wanted.sort();
    wanted.dedup();
    for reference in wanted {
        let Reference {
            kind,
            namespace,
            name,
        } = &reference;
        match cluster.get(kind, namespace, name) {
            Ok(found) => all.extend(found),
            Err(error) => output::complain(format_args!(
                "Warning: findings about what refers to {namespace}/{name} may be wrong: {}.",
                output::sentence(&error)
            )),
        }
    }
    Ok(all)
}

/// The trust domain that the mesh configuration names.
pub(super) fn trust_domain(documents: &[Value], root: &str) -> Option<TrustDomain> {
    let map = documents.iter().find(|object| {
        object["kind"] == "ConfigMap" && namespace_of(object) == root && name_of(object) == "istio"
    })?;
    let mesh: Value = serde_yaml_ng::from_str(map["data"][MESH_KEY].as_str()?).ok()?;
    TrustDomain::new(mesh["trustDomain"].as_str()?).ok()
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    /// As the API server names it.
    kind: &'static str,
    namespace: String,
    name: String,
}

/// The ConfigMaps and Secrets that an object cannot be judged without.
fn references(object: &Value) -> Vec<Reference> {
    let reference = |kind, name: &str| Reference {
        kind,
        namespace: namespace_of(object).to_owned(),
        name: name.to_owned(),
    };
    let mut found = Vec::new();
    match object["kind"].as_str() {
        Some("BackendTLSPolicy") => {
            let references = object["spec"]["validation"]["caCertificateRefs"].as_array();
            for to in references.into_iter().flatten() {
                let kind = match to["kind"].as_str() {
                    Some("ConfigMap") => "configmaps",
                    Some("Secret") => "secrets",
                    _ => continue,
                };
                found.extend(to["name"].as_str().map(|name| reference(kind, name)));
            }
        }
        Some("DestinationRule") => {
            let mut names = Vec::new();
            credential_names(&object["spec"], &mut names);
            for name in names {
                found.push(reference("secrets", name));
                found.push(reference("secrets", &format!("{name}-cacert")));
            }
        }
        _ => {}
    }
    found
}

/// A rule has TLS settings for all, for a port and for a subset.
fn credential_names<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("credentialName").and_then(Value::as_str));
            map.values()
                .for_each(|value| credential_names(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| credential_names(value, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_an_object_cannot_be_judged_without() {
        let metadata = json!({"name": "a", "namespace": "shop"});
        let tls = json!({"kind": "BackendTLSPolicy", "metadata": metadata, "spec": {"validation": {
            "caCertificateRefs": [{"kind": "ConfigMap", "name": "ca"}, {"kind": "Other", "name": "x"}]}}});
        let rule = json!({"kind": "DestinationRule", "metadata": metadata, "spec": {
            "trafficPolicy": {"portLevelSettings": [{"tls": {"credentialName": "client"}}]}}});
        let names = |object: &Value| -> Vec<String> {
            let found = references(object);
            let text = |r: Reference| format!("{} {}/{}", r.kind, r.namespace, r.name);
            found.into_iter().map(text).collect()
        };
        assert_eq!(names(&tls), ["configmaps shop/ca"]);
        assert_eq!(
            names(&rule),
            ["secrets shop/client", "secrets shop/client-cacert"]
        );
    }

    #[test]
    fn the_trust_domain_of_the_mesh() {
        let map = json!({"kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": "trustDomain: example.org\n"}});
        let found = trust_domain(&[map], "istio-system");
        assert_eq!(found.map(|d| d.to_string()).as_deref(), Some("example.org"));
        assert_eq!(trust_domain(&[], "istio-system"), None);
    }
}
