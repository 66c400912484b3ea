//! A waypoint's configuration dump. Fields that are absent or unknown do no harm.

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::Value;

use crate::ztunnel::dump::Certificates;

/// A dump, in parts.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Dump {
    pub version: Value,
    pub config: Value,
    pub services: Vec<Service>,
    pub resources: Resources,
    pub certificates: Vec<Certificates>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub namespace: String,
    pub hostname: String,
    pub addresses: Vec<String>,
    /// Whether its traffic comes to the waypoint; else it may be a route's backend.
    pub bound: bool,
    pub ports: Vec<Port>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Port {
    pub port: u16,
    pub name: String,
    /// As it was declared.
    pub protocol: String,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// uid.
    pub workload: String,
    pub address: String,
    /// Empty: nothing is known against it.
    pub status: String,
    pub locality: String,
}

/// The control plane's resources, in the words of `waypoint.proto`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Resources {
    pub route: Vec<Value>,
    pub traffic_policy: Vec<Value>,
    pub authorization_policy: Vec<Value>,
    pub request_authentication: Vec<Value>,
    pub telemetry: Vec<Value>,
    pub provider: Vec<Value>,
    pub backend_tls: Vec<Value>,
    pub settings: Vec<Value>,
    pub waypoint: Vec<Value>,
}

impl Dump {
    /// Reads a dump.
    ///
    /// # Errors
    /// What is no dump of a waypoint.
    pub fn parse(text: &[u8]) -> anyhow::Result<(Self, Value)> {
        let raw: Value = serde_json::from_slice(text).context("it is no JSON")?;
        let is_one = raw["version"]["component"] == "adit-waypoint" || raw["resources"].is_object();
        anyhow::ensure!(is_one, "it is no dump of a waypoint");
        let mut dump: Self =
            serde_json::from_value(raw.clone()).context("it cannot be understood")?;
        dump.services.sort_by(|a, b| {
            let key = |service: &Service| (service.namespace.clone(), service.hostname.clone());
            key(a).cmp(&key(b))
        });
        Ok((dump, raw))
    }

    /// Routes that are attached to a port of a service, as they were written.
    pub fn routes_of(&self, service: &Service, port: u16) -> impl Iterator<Item = &Value> {
        let (namespace, hostname) = (service.namespace.clone(), service.hostname.clone());
        self.resources.route.iter().filter(move |route| {
            let parents = route["parents"].as_array();
            parents.into_iter().flatten().any(|parent| {
                let to = &parent["service"];
                let whole = parent["port"].is_null() || parent["port"] == port;
                to["namespace"] == namespace.as_str()
                    && to["hostname"] == hostname.as_str()
                    && whole
                    && parent["rejected"].is_null()
            })
        })
    }

    /// The traffic policy for a host: the most specific one.
    pub fn traffic_policy(&self, hostname: &str) -> Option<&Value> {
        let matching = self.resources.traffic_policy.iter().filter(|policy| {
            let host = policy["host"].as_str().unwrap_or_default();
            match host.strip_prefix('*') {
                Some(suffix) => hostname.ends_with(suffix),
                None => host == hostname,
            }
        });
        matching.max_by_key(|policy| policy["host"].as_str().map(str::len))
    }
}

/// `name.namespace` of the user's object that a resource was made from.
pub fn object_name(resource: &Value) -> String {
    let object = &resource["object"];
    let text = |key: &str| object[key].as_str().unwrap_or_default();
    match text("namespace") {
        "" => text("name").to_owned(),
        namespace => format!("{}.{namespace}", text("name")),
    }
}

impl Service {
    /// Envoy's name for a port of it at a waypoint.
    pub fn cluster(&self, port: &Port) -> String {
        let protocol = protocol_word(&port.protocol);
        format!("inbound-vip|{}|{protocol}|{}", port.port, self.hostname)
    }
}

/// `http`, `tcp` and the like.
pub fn protocol_word(protocol: &str) -> String {
    match protocol {
        "" | "undeclared" | "UNDECLARED" => "auto".into(),
        other => other.to_ascii_lowercase(),
    }
}

/// Whether a port is routed by what is in its requests.
pub fn is_http(protocol: &str) -> bool {
    !matches!(protocol, "TCP" | "TLS" | "UDP")
}
