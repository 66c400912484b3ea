//! A ztunnel's configuration dump, read as `istioctl ztunnel-config` reads it: fields that
//! are absent, null or unknown do no harm, so that dumps of Istio's ztunnel and of other
//! versions of ours can be read too. Every entry keeps all that it came with, for JSON.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::target::PodName;

/// A dump, in parts.
#[derive(Debug, Clone, Default)]
pub struct Dump {
    pub workloads: Vec<Entry<Workload>>,
    pub services: Vec<Entry<Service>>,
    pub policies: Vec<Entry<Policy>>,
    pub certificates: Vec<Entry<Certificates>>,
    /// By uid: the pods on the node and their connections.
    pub pods: Vec<Entry<PodState>>,
    /// What else it holds: version, config and the like.
    pub rest: Map<String, Value>,
}

/// An entry of the dump.
#[derive(Debug, Clone)]
pub struct Entry<T> {
    /// Its key, where the dump has a map; else empty.
    pub key: String,
    /// What tables show.
    pub view: T,
    /// All of it.
    pub raw: Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Workload {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub workload_ips: Vec<String>,
    pub protocol: String,
    pub trust_domain: String,
    pub service_account: String,
    pub waypoint: Option<Gateway>,
    pub node: String,
    pub authorization_policies: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Gateway {
    /// `namespace/hostname` or `network/address`.
    pub destination: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    /// `network/address`.
    #[serde(alias = "addresses")]
    pub vips: Vec<String>,
    pub waypoint: Option<Gateway>,
    /// By workload uid.
    pub endpoints: BTreeMap<String, Endpoint>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    pub workload_uid: String,
    /// Absent from old dumps, which held healthy ones only.
    pub status: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Policy {
    pub name: String,
    pub namespace: String,
    pub scope: String,
    pub action: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Certificates {
    pub identity: String,
    /// A word, or `{"Unavailable": reason}`.
    pub state: Value,
    pub cert_chain: Vec<Certificate>,
    pub root_certs: Vec<Certificate>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Certificate {
    /// Decimal.
    pub serial_number: String,
    pub valid_from: String,
    pub expiration_time: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct PodState {
    pub connections: Connections,
    pub info: PodInfo,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Connections {
    pub inbound: Vec<Connection>,
    pub outbound: Vec<Connection>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Connection {
    pub src: String,
    pub original_dst: String,
    pub actual_dst: String,
    pub protocol: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct PodInfo {
    pub name: String,
    pub namespace: String,
}

impl Dump {
    /// Reads a dump.
    ///
    /// # Errors
    /// What is no dump, with the entry that cannot be read.
    pub fn parse(text: &[u8]) -> anyhow::Result<Self> {
        let value: Value = serde_json::from_slice(text).context("it is no JSON")?;
        let Value::Object(mut rest) = value else {
            bail!("it is no JSON object");
        };
        if !["workloads", "services", "certificates", "workloadState"]
            .iter()
            .any(|key| rest.contains_key(*key))
        {
            bail!("it has neither workloads nor services nor certificates");
        }
        Ok(Self {
            workloads: entries(&mut rest, "workloads")?,
            services: entries(&mut rest, "services")?,
            policies: entries(&mut rest, "policies")?,
            certificates: entries(&mut rest, "certificates")?,
            pods: entries(&mut rest, "workloadState")?,
            rest,
        })
    }

    /// The dump as one value again.
    pub fn to_value(&self) -> Value {
        let mut all = Map::new();
        all.insert("workloads".into(), list(&self.workloads));
        all.insert("services".into(), list(&self.services));
        all.insert("policies".into(), list(&self.policies));
        all.insert("certificates".into(), list(&self.certificates));
        let pods = self
            .pods
            .iter()
            .map(|pod| (pod.key.clone(), pod.raw.clone()));
        all.insert("workloadState".into(), Value::Object(pods.collect()));
        all.extend(self.rest.clone());
        Value::Object(all)
    }

    /// Leaves only what concerns one pod: itself, the services it is an endpoint of, the
    /// policies that hold for it, its certificate, its connections.
    pub fn confine(&mut self, pod: &PodName) -> anyhow::Result<()> {
        let all = &self.workloads;
        let is_it =
            |w: &&Entry<Workload>| w.view.name == pod.name && w.view.namespace == pod.namespace;
        let Some(it) = all.iter().find(is_it).map(|w| w.view.clone()) else {
            bail!("ztunnel does not know the workload {pod}");
        };
        self.workloads.retain(|w| w.view.uid == it.uid);
        self.services.retain(|s| {
            let mut endpoints = s.view.endpoints.iter();
            endpoints.any(|(key, e)| *key == it.uid || e.workload_uid == it.uid)
        });
        self.policies.retain(|p| match p.view.scope.as_str() {
            "Global" => true,
            "Namespace" => p.view.namespace == it.namespace,
            _ => {
                let key = format!("{}/{}", p.view.namespace, p.view.name);
                it.authorization_policies.contains(&key)
            }
        });
        let identity = format!(
            "spiffe://{}/ns/{}/sa/{}",
            it.trust_domain, it.namespace, it.service_account
        );
        self.certificates.retain(|c| c.view.identity == identity);
        let info = |p: &Entry<PodState>| {
            p.view.info.name == pod.name && p.view.info.namespace == pod.namespace
        };
        self.pods.retain(info);
        Ok(())
    }
}

/// Whether an endpoint takes traffic. Old dumps held healthy ones only, without status.
pub fn is_healthy(status: &str) -> bool {
    matches!(status, "" | "Healthy")
}

/// All that the entries came with.
pub fn list<'a, T: 'a>(entries: impl IntoIterator<Item = &'a Entry<T>>) -> Value {
    entries.into_iter().map(|entry| entry.raw.clone()).collect()
}

/// The entries of a list, or of a map by its keys, which older dumps have.
fn entries<T: DeserializeOwned>(
    dump: &mut Map<String, Value>,
    name: &str,
) -> anyhow::Result<Vec<Entry<T>>> {
    let keyed: Vec<(String, Value)> = match dump.remove(name) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list.into_iter().map(|v| (String::new(), v)).collect(),
        Some(Value::Object(map)) => map.into_iter().collect(),
        Some(_) => bail!("{name} is neither a list nor a map"),
    };
    keyed
        .into_iter()
        .enumerate()
        .map(|(index, (key, raw))| {
            let view = serde_json::from_value(without_nulls(&raw)).with_context(|| {
                match key.as_str() {
                    "" => format!("{name}[{index}] cannot be understood"),
                    key => format!("{name}[{key:?}] cannot be understood"),
                }
            })?;
            Ok(Entry { key, view, raw })
        })
        .collect()
}

/// A null says the same as nothing.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key.clone(), without_nulls(value)))
                .collect(),
        ),
        Value::Array(list) => list.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_dump_is_refused_with_its_place() {
        for (text, expected) in [
            ("", "no JSON"),
            ("[]", "no JSON object"),
            ("{}", "neither workloads"),
            (
                r#"{"workloads": 7}"#,
                "workloads is neither a list nor a map",
            ),
            (r#"{"workloads": [{}, {"name": 7}]}"#, "workloads[1]"),
            (
                r#"{"workloads": {"a/b": {"name": []}}}"#,
                "workloads[\"a/b\"]",
            ),
        ] {
            let error = Dump::parse(text.as_bytes()).expect_err(text);
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }

    #[test]
    fn nulls_and_maps_of_other_versions_are_read() {
        let text = r#"{"workloads": {"/10.0.0.1": {"name": "a", "node": null, "new": 1}}, "services": null}"#;
        let dump = Dump::parse(text.as_bytes()).expect("a dump");
        assert_eq!(dump.workloads[0].key, "/10.0.0.1");
        assert_eq!(dump.workloads[0].view.name, "a");
        assert_eq!(dump.workloads[0].raw["new"], 1);
    }
}
