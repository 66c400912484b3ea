//! Which resources of the API server are followed, and in which of their versions.

use kube::core::{ApiResource, GroupVersionKind};

use crate::model::Kind;

/// A kind as the API server has it.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) kind: Kind,
    pub(super) group: &'static str,
    /// Its name in URLs and RBAC rules.
    pub(super) plural: &'static str,
    /// Versions that we can read, the best first.
    pub(super) versions: &'static [&'static str],
    /// Nothing but its metadata is read.
    pub(super) metadata_only: bool,
    /// What is not even to be sent.
    pub(super) fields: Option<&'static str>,
    /// May be left unpermitted.
    pub(super) optional: bool,
}

const GATEWAY: &str = "gateway.networking.k8s.io";
const SECURITY: &str = "security.istio.io";

/// Everything that compiling reads. ServiceAccounts, VirtualServices and ServiceEntries are
/// for `adit analyze` alone.
pub(super) const FOLLOWED: [Resource; 20] = [
    builtin(Kind::Namespace, "", "namespaces").only_metadata(),
    builtin(Kind::Node, "", "nodes").only_metadata(),
    builtin(Kind::Pod, "", "pods"),
    builtin(Kind::Service, "", "services"),
    builtin(Kind::EndpointSlice, "discovery.k8s.io", "endpointslices"),
    builtin(Kind::ConfigMap, "", "configmaps"),
    // Certificates of authorities may be in them (BackendTLSPolicy, DestinationRule); nobody
    // has to let us read all Secrets for that. A release of Helm is a megabyte, and there are
    // many.
    Resource {
        optional: true,
        fields: Some("type!=helm.sh/release.v1,type!=kubernetes.io/service-account-token"),
        ..builtin(Kind::Secret, "", "secrets")
    },
    custom(
        Kind::AuthorizationPolicy,
        SECURITY,
        "authorizationpolicies",
        &["v1", "v1beta1"],
    ),
    custom(
        Kind::PeerAuthentication,
        SECURITY,
        "peerauthentications",
        &["v1", "v1beta1"],
    ),
    custom(
        Kind::RequestAuthentication,
        SECURITY,
        "requestauthentications",
        &["v1", "v1beta1"],
    ),
    custom(
        Kind::DestinationRule,
        "networking.istio.io",
        "destinationrules",
        &["v1", "v1beta1", "v1alpha3"],
    ),
    custom(
        Kind::Telemetry,
        "telemetry.istio.io",
        "telemetries",
        &["v1", "v1alpha1"],
    ),
    custom(
        Kind::GatewayClass,
        GATEWAY,
        "gatewayclasses",
        &["v1", "v1beta1"],
    ),
    custom(Kind::Gateway, GATEWAY, "gateways", &["v1", "v1beta1"]),
    custom(Kind::HttpRoute, GATEWAY, "httproutes", &["v1", "v1beta1"]),
    custom(Kind::GrpcRoute, GATEWAY, "grpcroutes", &["v1", "v1alpha2"]),
    custom(Kind::TcpRoute, GATEWAY, "tcproutes", &["v1", "v1alpha2"]),
    custom(
        Kind::TlsRoute,
        GATEWAY,
        "tlsroutes",
        &["v1", "v1alpha3", "v1alpha2"],
    ),
    custom(
        Kind::ReferenceGrant,
        GATEWAY,
        "referencegrants",
        &["v1", "v1beta1"],
    ),
    custom(
        Kind::BackendTlsPolicy,
        GATEWAY,
        "backendtlspolicies",
        &["v1", "v1alpha3"],
    ),
];

const fn builtin(kind: Kind, group: &'static str, plural: &'static str) -> Resource {
    custom(kind, group, plural, &["v1"])
}

const fn custom(
    kind: Kind,
    group: &'static str,
    plural: &'static str,
    versions: &'static [&'static str],
) -> Resource {
    Resource {
        kind,
        group,
        plural,
        versions,
        metadata_only: false,
        fields: None,
        optional: false,
    }
}

impl Resource {
    const fn only_metadata(mut self) -> Self {
        self.metadata_only = true;
        self
    }

    /// Comes with a CRD, so that it may be absent.
    pub(super) fn is_custom(&self) -> bool {
        self.group.ends_with(".istio.io") || self.group == GATEWAY
    }

    /// As RBAC rules and messages name it.
    pub(super) fn qualified(&self) -> String {
        match self.group {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    /// `apiVersion` in `version`.
    pub(super) fn api_version(&self, version: &str) -> String {
        match self.group {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        }
    }

    pub(super) fn api_resource(&self, version: &str) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, version, self.kind.as_str());
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }
}

/// Whether a CRD of this name (`<plural>.<group>`) is one of ours.
pub(super) fn is_followed_crd(name: &str) -> bool {
    FOLLOWED
        .iter()
        .any(|resource| resource.is_custom() && resource.qualified() == name)
}

/// The groups that are not built in, each once.
pub(super) fn custom_groups() -> Vec<&'static str> {
    let mut groups: Vec<_> = FOLLOWED
        .iter()
        .filter(|resource| resource.is_custom())
        .map(|resource| resource.group)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::Deserialize as _;
    use serde_json::json;

    use super::*;
    use crate::model::Origin;
    use crate::source::decode::{Decoded, decode};

    #[test]
    fn every_version_is_one_that_can_be_decoded() {
        for resource in &FOLLOWED {
            for version in resource.versions {
                let document = json!({
                    "apiVersion": resource.api_version(version),
                    "kind": resource.kind.as_str(),
                    "metadata": {"name": "x", "namespace": "y"},
                });
                let decoded = decode(&document, &Origin::NONE).remove(0).1;
                assert!(
                    !matches!(decoded, Decoded::NotOurs | Decoded::Unknown { .. }),
                    "{document}"
                );
            }
        }
    }

    #[test]
    fn names_are_those_of_rbac() {
        let names: Vec<_> = FOLLOWED.iter().map(Resource::qualified).collect();
        assert!(names.contains(&"pods".to_owned()));
        assert!(names.contains(&"httproutes.gateway.networking.k8s.io".to_owned()));
        assert!(is_followed_crd("telemetries.telemetry.istio.io"));
        assert!(!is_followed_crd("endpointslices.discovery.k8s.io"));
        assert_eq!(custom_groups().len(), 4);
    }

    /// The rules of a template of the chart: what is filled in says nothing of kinds and verbs.
    fn rules(template: &str) -> Vec<serde_json::Value> {
        let mut text = String::new();
        for line in template.lines() {
            let line = line.trim_end();
            if line.trim_start().starts_with("{{") && line.ends_with("}}") {
                continue;
            }
            let mut line = line.to_owned();
            while let (Some(start), Some(end)) = (line.find("{{"), line.rfind("}}")) {
                line.replace_range(start..end + 2, "x");
            }
            text.push_str(&line);
            text.push('\n');
        }
        let documents = serde_yaml_ng::Deserializer::from_str(&text);
        let documents = documents.map(|of| serde_json::Value::deserialize(of).expect("YAML"));
        documents
            .flat_map(|of| of["rules"].as_array().cloned().unwrap_or_default())
            .collect()
    }

    /// `verb plural.group`, of the whole cluster unless a rule names objects.
    fn granted(rules: &[serde_json::Value]) -> BTreeSet<String> {
        let texts = |rule: &serde_json::Value, key: &str| -> Vec<String> {
            let all = rule[key].as_array().expect("a list");
            all.iter()
                .map(|of| of.as_str().expect("text").to_owned())
                .collect()
        };
        let mut all = BTreeSet::new();
        for rule in rules {
            for group in texts(rule, "apiGroups") {
                for plural in texts(rule, "resources") {
                    for verb in texts(rule, "verbs") {
                        let group = match group.as_str() {
                            "" => String::new(),
                            group => format!(".{group}"),
                        };
                        all.insert(format!("{verb} {plural}{group}"));
                    }
                }
            }
        }
        all
    }

    /// What the chart grants of the mesh's own kinds is what is followed and written, and nowhere
    /// is everything granted.
    #[test]
    fn the_chart_grants_what_is_used() {
        let cluster = rules(include_str!(
            "../../../../charts/istiod/templates/clusterrole.yaml"
        ));
        let own = rules(include_str!(
            "../../../../charts/istiod/templates/role.yaml"
        ));
        let (cluster, own) = (granted(&cluster), granted(&own));
        assert!(
            !cluster.iter().chain(&own).any(|of| of.contains('*')),
            "{cluster:?}"
        );
        for resource in &FOLLOWED {
            for verb in ["list", "watch"] {
                let needed = format!("{verb} {}", resource.qualified());
                assert!(cluster.contains(&needed), "{needed}");
            }
        }
        let custom = |of: &&String| custom_groups().iter().any(|group| of.ends_with(group));
        let read: BTreeSet<_> = cluster
            .iter()
            .filter_map(|of| of.strip_prefix("watch "))
            .map(str::to_owned)
            .collect();
        let followed = FOLLOWED.iter().filter(|resource| resource.is_custom());
        let followed: BTreeSet<_> = followed.map(Resource::qualified).collect();
        assert_eq!(
            read.iter().filter(custom).cloned().collect::<BTreeSet<_>>(),
            followed
        );

        let written = crate::status::kubernetes::kinds();
        let written: BTreeSet<_> = written
            .filter_map(|kind| FOLLOWED.iter().find(|resource| resource.kind == kind))
            .map(|resource| match resource.group {
                "" => format!("{}/status", resource.plural),
                group => format!("{}/status.{group}", resource.plural),
            })
            .collect();
        for verb in ["update ", "patch "] {
            let statuses = cluster.iter().filter_map(|of| of.strip_prefix(verb));
            let statuses = statuses.filter(|of| of.contains("/status"));
            assert_eq!(
                statuses.map(str::to_owned).collect::<BTreeSet<_>>(),
                written,
                "{verb}"
            );
        }
        // The key that signs is made once, and no replica can write another over it.
        assert!(own.contains("create secrets"));
        for rule in rules(include_str!(
            "../../../../charts/istiod/templates/role.yaml"
        )) {
            let names = rule["resourceNames"].to_string();
            let verbs = rule["verbs"].to_string();
            let writes = ["update", "patch", "delete"]
                .iter()
                .any(|of| verbs.contains(of));
            assert!(!(writes && names.contains("istio-ca-secret")), "{rule}");
        }
    }
}
