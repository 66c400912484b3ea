//! Manifests in a few words, for tests whose topology is their own.

use std::fmt::Write;

use crate::mesh::Pod;

/// Manifests that are written one after the other.
#[derive(Debug, Clone, Default)]
pub struct Manifest(String);

impl Manifest {
    /// Two nodes in the zones `a` and `b` of one region.
    pub fn two_nodes() -> Self {
        let mut all = Self::default();
        for (node, zone) in [("node1", "a"), ("node2", "b")] {
            all = all.document(&format!(
                "apiVersion: v1\nkind: Node\nmetadata:\n  name: {node}\n  labels: {{ \
                 topology.kubernetes.io/region: local, topology.kubernetes.io/zone: {zone} }}"
            ));
        }
        all
    }

    /// Any document.
    pub fn document(mut self, yaml: &str) -> Self {
        let _ = write!(self.0, "---\n{}\n", yaml.trim_end());
        self
    }

    /// A namespace in the mesh.
    pub fn ambient(self, name: &str) -> Self {
        self.namespace(name, "istio.io/dataplane-mode: ambient")
    }

    /// A namespace with these labels.
    pub fn namespace(self, name: &str, labels: &str) -> Self {
        self.document(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {name}, labels: {{ {labels} }} }}"
        ))
    }

    /// A pod without a program.
    pub fn client(self, pod: Pod<'_>, node: &str, account: &str) -> Self {
        self.pod(pod, node, account, "", "{ name: pause, image: pause }")
    }

    /// A sample server: HTTP on 8080, echo on 9090, a sink on 9091, a source on 9092; label
    /// `app` is `app`.
    pub fn server(self, pod: Pod<'_>, node: &str, account: &str, app: &str) -> Self {
        let container = "{ name: server, image: adit-sample, command: [adit-sample, serve], ports: \
                         [{ name: http, containerPort: 8080 }, { name: tcp, containerPort: 9090 }], \
                         readinessProbe: { httpGet: { path: /healthz, port: 8080 }, \
                         periodSeconds: 1, failureThreshold: 1 } }";
        self.pod(pod, node, account, &format!("app: {app}"), container)
    }

    /// Any pod.
    pub fn pod(
        self,
        pod: Pod<'_>,
        node: &str,
        account: &str,
        labels: &str,
        container: &str,
    ) -> Self {
        let Pod { namespace, name } = pod;
        self.document(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, namespace: {namespace}, labels: \
             {{ {labels} }} }}\nspec: {{ nodeName: {node}, serviceAccountName: {account}, \
             containers: [{container}] }}"
        ))
    }

    /// A Service for pods with label `app`, ports 80 to 8080 and 9090 to itself; `extra` are
    /// further fields of its spec.
    pub fn service(self, pod: Pod<'_>, app: &str, extra: &str) -> Self {
        let Pod { namespace, name } = pod;
        self.document(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace} \
             }}\nspec: {{ selector: {{ app: {app} }}, ports: [{{ name: http, port: 80, targetPort: \
             8080 }}, {{ name: tcp, port: 9090, targetPort: 9090 }}], {extra} }}"
        ))
    }

    /// A security policy: `kind` is AuthorizationPolicy or PeerAuthentication, `spec` YAML in
    /// flow style, `metadata` further fields.
    pub fn policy(
        self,
        kind: &str,
        namespace: &str,
        name: &str,
        metadata: &str,
        spec: &str,
    ) -> Self {
        self.document(&format!(
            "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{ name: {name}, namespace: \
             {namespace}, {metadata} }}\nspec: {spec}"
        ))
    }

    /// The text.
    pub fn yaml(&self) -> &str {
        &self.0
    }
}
