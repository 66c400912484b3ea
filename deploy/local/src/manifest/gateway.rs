//! What a cluster's control plane generates for a waypoint Gateway (Istio: "Generated
//! objects"): a service account, a Deployment of one waypoint, and a Service before it.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::core::v1::{
    Container, ContainerPort, PodSpec, PodTemplateSpec, Service, ServiceAccount, ServicePort,
    ServiceSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use serde::Deserialize;

/// The class whose Gateways are waypoints.
pub const WAYPOINT_CLASS: &str = "istio-waypoint";
/// Names the Gateway on everything that is generated for it.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Who manages a generated object; one without it is somebody else's.
pub const MANAGED: &str = "gateway.istio.io/managed";
/// The value of [`MANAGED`] on what belongs to a waypoint.
pub const MESH_CONTROLLER: &str = "istio.io-mesh-controller";
/// Annotation of a Gateway: the node of its waypoint. Without it, the first.
pub const NODE_ANNOTATION: &str = "adit.local/node";

const STATUS_PORT: i32 = 15021;
const METRICS_PORT: i32 = 15020;
const HBONE_PORT: i32 = 15008;

/// As much of a Gateway as provisioning needs; the rest is the control plane's.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Gateway {
    /// Name, namespace, annotations.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What is asked for.
    #[serde(default)]
    pub spec: GatewaySpec,
}

/// `spec` of a [`Gateway`].
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewaySpec {
    /// The class.
    #[serde(default)]
    pub gateway_class_name: String,
    /// Fixed addresses mean that somebody else runs the gateway.
    #[serde(default)]
    pub addresses: Vec<serde_json::Value>,
    /// What generated objects carry.
    #[serde(default)]
    pub infrastructure: Option<Infrastructure>,
}

/// `spec.infrastructure` of a [`Gateway`].
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Infrastructure {
    /// Labels of every generated object.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Annotations of every generated object.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// The generated objects.
#[derive(Debug, Clone, PartialEq)]
pub struct Provisioned {
    /// The waypoint's identity.
    pub account: ServiceAccount,
    /// The waypoint's pods.
    pub deployment: Deployment,
    /// What ztunnels dial.
    pub service: Service,
}

impl Gateway {
    /// Whether a waypoint has to be run for it.
    pub fn is_provisioned(&self) -> bool {
        self.spec.gateway_class_name == WAYPOINT_CLASS && self.spec.addresses.is_empty()
    }

    /// What is generated; `first_node` is where pods go that are not sent elsewhere.
    pub fn provision(&self, first_node: &str) -> Provisioned {
        let name = self.metadata.name.clone().unwrap_or_default();
        let own = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let identity = BTreeMap::from([
            own(GATEWAY_NAME, &name),
            own(
                "gateway.networking.k8s.io/gateway-class-name",
                WAYPOINT_CLASS,
            ),
            own(MANAGED, MESH_CONTROLLER),
        ]);
        let infrastructure = self.spec.infrastructure.clone().unwrap_or_default();
        let labels = |more: BTreeMap<String, String>| {
            // What identifies the object is not the user's to change.
            let mut all = infrastructure.labels.clone();
            all.extend(identity.clone());
            all.extend(more);
            Some(all)
        };
        let metadata = || ObjectMeta {
            name: Some(name.clone()),
            namespace: self.metadata.namespace.clone(),
            labels: labels(BTreeMap::new()),
            annotations: Some(infrastructure.annotations.clone()),
            owner_references: Some(vec![self.owner()]),
            ..ObjectMeta::default()
        };
        let selector = BTreeMap::from([own(GATEWAY_NAME, &name)]);
        let pod = BTreeMap::from([
            own("istio.io/dataplane-mode", "none"),
            own("sidecar.istio.io/inject", "false"),
            own("service.istio.io/canonical-name", &name),
            own("service.istio.io/canonical-revision", "latest"),
        ]);
        let mut service_metadata = metadata();
        service_metadata
            .annotations
            .get_or_insert_default()
            .entry("networking.istio.io/traffic-distribution".into())
            .or_insert_with(|| "PreferClose".into());
        Provisioned {
            account: ServiceAccount {
                metadata: metadata(),
                ..ServiceAccount::default()
            },
            deployment: Deployment {
                metadata: metadata(),
                spec: Some(DeploymentSpec {
                    replicas: Some(1),
                    selector: LabelSelector {
                        match_labels: Some(selector.clone()),
                        ..LabelSelector::default()
                    },
                    template: PodTemplateSpec {
                        metadata: Some(ObjectMeta {
                            labels: labels(pod),
                            annotations: Some(infrastructure.annotations.clone()),
                            ..ObjectMeta::default()
                        }),
                        spec: Some(self.pod_spec(&name, first_node)),
                    },
                    ..DeploymentSpec::default()
                }),
                status: None,
            },
            service: Service {
                metadata: service_metadata,
                spec: Some(ServiceSpec {
                    ip_family_policy: Some("PreferDualStack".into()),
                    ports: Some(vec![
                        port("status-port", STATUS_PORT, "tcp"),
                        port("mesh", HBONE_PORT, "all"),
                    ]),
                    selector: Some(selector),
                    ..ServiceSpec::default()
                }),
                status: None,
            },
        }
    }

    fn owner(&self) -> OwnerReference {
        let name = self.metadata.name.clone().unwrap_or_default();
        let namespace = self.metadata.namespace.as_deref().unwrap_or("default");
        OwnerReference {
            api_version: "gateway.networking.k8s.io/v1".into(),
            kind: "Gateway".into(),
            uid: super::expand_uid(&format!("Gateway/{namespace}/{name}")),
            name,
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }

    fn pod_spec(&self, name: &str, first_node: &str) -> PodSpec {
        let annotations = self.metadata.annotations.as_ref();
        let node = annotations.and_then(|all| all.get(NODE_ANNOTATION));
        let open = |name: &str, number: i32| ContainerPort {
            name: Some(name.into()),
            container_port: number,
            ..ContainerPort::default()
        };
        PodSpec {
            node_name: Some(node.map_or(first_node, String::as_str).into()),
            service_account_name: Some(name.into()),
            // Without a command: the mesh runs the program as it runs its ztunnels.
            containers: vec![Container {
                name: "istio-proxy".into(),
                ports: Some(vec![
                    open("metrics", METRICS_PORT),
                    open("status-port", STATUS_PORT),
                    open("mesh", HBONE_PORT),
                ]),
                ..Container::default()
            }],
            ..PodSpec::default()
        }
    }
}

fn port(name: &str, number: i32, protocol: &str) -> ServicePort {
    ServicePort {
        name: Some(name.into()),
        port: number,
        protocol: Some("TCP".into()),
        app_protocol: Some(protocol.into()),
        ..ServicePort::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(spec: &str, annotations: &str) -> Gateway {
        let text = format!(
            "metadata: {{name: waypoint, namespace: shop, annotations: {{{annotations}}}}}\n\
             spec: {{{spec}}}"
        );
        serde_yaml_ng::from_str(&text).unwrap_or_default()
    }

    #[test]
    fn only_waypoints_that_nobody_else_runs_are_provisioned() {
        let table = [
            ("gatewayClassName: istio-waypoint", true),
            ("gatewayClassName: istio", false),
            (
                "gatewayClassName: istio-waypoint, addresses: [{value: 10.0.0.1}]",
                false,
            ),
        ];
        for (spec, expected) in table {
            assert_eq!(gateway(spec, "").is_provisioned(), expected, "{spec}");
        }
    }

    #[test]
    fn generated_objects_carry_what_the_control_plane_looks_for() {
        let spec = "gatewayClassName: istio-waypoint, infrastructure: {labels: {team: a, \
                    gateway.networking.k8s.io/gateway-name: other}}";
        let made = gateway(spec, "").provision("node1");
        let template = made.deployment.spec.map(|spec| spec.template);
        let labels = template
            .as_ref()
            .and_then(|t| t.metadata.as_ref()?.labels.clone());
        let labels = labels.unwrap_or_default();
        for (key, value) in [
            ("team", "a"),
            (GATEWAY_NAME, "waypoint"),
            (MANAGED, MESH_CONTROLLER),
            ("istio.io/dataplane-mode", "none"),
            ("service.istio.io/canonical-name", "waypoint"),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        let pod = template.and_then(|t| t.spec).unwrap_or_default();
        assert_eq!(pod.service_account_name.as_deref(), Some("waypoint"));
        assert_eq!(pod.node_name.as_deref(), Some("node1"));
        let ports = made.service.spec.and_then(|s| s.ports).unwrap_or_default();
        let numbers: Vec<i32> = ports.iter().map(|port| port.port).collect();
        assert_eq!(numbers, [15021, 15008]);
        assert_eq!(made.account.metadata.name.as_deref(), Some("waypoint"));
    }

    #[test]
    fn an_annotation_chooses_the_node() {
        let gateway = gateway("gatewayClassName: istio-waypoint", "adit.local/node: node2");
        let deployment = gateway.provision("node1").deployment;
        let node = deployment.spec.and_then(|s| s.template.spec?.node_name);
        assert_eq!(node.as_deref(), Some("node2"));
    }
}
