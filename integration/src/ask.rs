//! Single requests whose whole answer is looked at, a mesh that several tests share, and the
//! manifests of services with versions behind a waypoint.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::manifest::Manifest;
use crate::mesh::{Pod, TestMesh};

/// The answer of one request.
#[derive(Debug, Clone, Deserialize)]
pub struct Answer {
    /// HTTP status, or that of gRPC; none: no answer, see `error`.
    pub status: Option<u16>,
    /// Name of the pod that answered.
    pub server: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Why there was no answer, or what a gRPC status says.
    pub error: Option<String>,
    /// From start to end.
    pub latency_ms: f64,
    /// Headers of the answer, by lower-case name.
    #[serde(default)]
    pub headers: BTreeMap<String, Vec<String>>,
    /// What the sample server says that it saw, or the text of another answer.
    #[serde(default)]
    pub answer: Value,
    /// Metadata that a gRPC server saw.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl Answer {
    /// The values of a header of the answer, joined.
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name).map(|values| values.join(","))
    }

    /// The values of a header of the request as the server saw it, joined; of a gRPC call:
    /// of its metadata.
    pub fn received(&self, name: &str) -> Option<String> {
        if let Some(value) = self.metadata.get(name) {
            return Some(value.replace(", ", ","));
        }
        let values = self.answer["headers"][name].as_array()?.iter();
        let values: Vec<&str> = values.filter_map(Value::as_str).collect();
        Some(values.join(",").replace(", ", ","))
    }

    /// The path and query of the request as the server saw it.
    pub fn path(&self) -> &str {
        self.answer["path"].as_str().unwrap_or_default()
    }

    /// 200 by this version.
    ///
    /// # Errors
    /// Something else.
    pub fn is_of(&self, version: &str) -> anyhow::Result<()> {
        let found = (self.status, self.version.as_deref());
        ensure!(
            found == (Some(200), Some(version)),
            "not 200 by {version}: {self:?}"
        );
        Ok(())
    }

    /// This status.
    ///
    /// # Errors
    /// Another one.
    pub fn has_status(&self, status: u16) -> anyhow::Result<()> {
        ensure!(self.status == Some(status), "not {status}: {self:?}");
        Ok(())
    }
}

/// A mesh of several tests that run at the same time: it is brought up by the first of them
/// and removed after the last.
#[derive(Default)]
pub struct SharedMesh(Mutex<Shared>);

#[derive(Default)]
struct Shared {
    mesh: Weak<TestMesh>,
    /// Why it did not come up: it is not tried again by every test.
    failed: Option<String>,
}

impl SharedMesh {
    /// Not up yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Shared {
            mesh: Weak::new(),
            failed: None,
        }))
    }

    /// The mesh; `up` makes it if nobody has it.
    ///
    /// # Errors
    /// Those of `up`.
    pub fn get(
        &self,
        up: impl FnOnce() -> anyhow::Result<TestMesh>,
    ) -> anyhow::Result<Arc<TestMesh>> {
        let mut shared = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(mesh) = shared.mesh.upgrade() {
            return Ok(mesh);
        }
        if let Some(failed) = &shared.failed {
            bail!("the mesh did not come up: {failed}");
        }
        let mesh = up().inspect_err(|error| shared.failed = Some(format!("{error:#}")))?;
        let mesh = Arc::new(mesh);
        shared.mesh = Arc::downgrade(&mesh);
        Ok(mesh)
    }
}

impl TestMesh {
    /// One HTTP request with options of `adit-sample call`.
    ///
    /// # Errors
    /// The client cannot be run; a request without an answer is a value.
    pub fn ask(&self, from: Pod<'_>, url: &str, options: &[&str]) -> anyhow::Result<Answer> {
        self.answer_of(from, &[&["call", url, "--json"], options].concat())
    }

    /// One gRPC call with options of `adit-sample grpc`.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_grpc(&self, from: Pod<'_>, url: &str, options: &[&str]) -> anyhow::Result<Answer> {
        self.answer_of(from, &[&["grpc", url, "--json"], options].concat())
    }

    fn answer_of(&self, from: Pod<'_>, argv: &[&str]) -> anyhow::Result<Answer> {
        let mut lines = self.sample_lines(from, argv)?;
        let line = lines.pop().context("the client said nothing")?;
        serde_json::from_value(line.clone()).with_context(|| line.to_string())
    }

    /// Asks until the answer is as it must be: configuration arrives in its own time.
    ///
    /// # Errors
    /// What `check` said last.
    pub fn asks(
        &self,
        from: Pod<'_>,
        url: &str,
        options: &[&str],
        check: impl Fn(&Answer) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        self.eventually(&format!("GET {url} {options:?}"), || {
            let answer = self.ask(from, url, options)?;
            check(&answer)?;
            Ok(answer)
        })
    }
}

impl Manifest {
    /// A sample server with a version, which its label `version` has too.
    pub fn versioned(self, pod: Pod<'_>, node: &str, app: &str, version: &str) -> Self {
        let container = format!(
            "{{ name: server, image: adit-sample, command: [adit-sample, serve, --version, \
             {version}], ports: [{{ name: http, containerPort: 8080 }}, {{ name: tcp, \
             containerPort: 9090 }}], readinessProbe: {{ httpGet: {{ path: /healthz, port: 8080 \
             }}, periodSeconds: 1, failureThreshold: 1 }} }}"
        );
        let labels = format!("app: {app}, version: {version}");
        self.pod(pod, node, app, &labels, &container)
    }

    /// A Service with these labels of its own, selector and ports, all YAML in flow style.
    pub fn service_of(self, pod: Pod<'_>, labels: &str, selector: &str, ports: &str) -> Self {
        let Pod { namespace, name } = pod;
        self.document(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace}, \
             labels: {{ {labels} }} }}\nspec: {{ selector: {{ {selector} }}, ports: [{ports}] }}"
        ))
    }

    /// A waypoint of a namespace, for this kind of traffic (`service`, `workload`, `all`).
    pub fn waypoint(self, pod: Pod<'_>, kind: &str) -> Self {
        let Pod { namespace, name } = pod;
        self.document(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: {name}, \
             namespace: {namespace}, labels: {{ istio.io/waypoint-for: {kind} }} }}\nspec: {{ \
             gatewayClassName: istio-waypoint, listeners: [{{ name: mesh, port: 15008, protocol: \
             HBONE }}] }}"
        ))
    }

    /// A route of any kind for a Service of its own namespace; `rules` are YAML in flow style.
    pub fn route(self, kind: &str, namespace: &str, service: &str, rules: &str) -> Self {
        let parent = format!("{{ group: '', kind: Service, name: {service} }}");
        self.route_of(kind, namespace, service, &parent, rules)
    }

    /// [`Self::route`] with a name and parents of its own.
    pub fn route_of(
        self,
        kind: &str,
        namespace: &str,
        name: &str,
        parents: &str,
        rules: &str,
    ) -> Self {
        self.document(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{ name: {name}, \
             namespace: {namespace} }}\nspec: {{ parentRefs: [{parents}], rules: [{rules}] }}"
        ))
    }
}
