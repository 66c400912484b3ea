//! Istio's mesh configuration: the text under the key `mesh` of a ConfigMap.
//!
//! Of its fields those are read that mean something here. What is wrong with one is told
//! and leaves that field at its default; a provider that cannot be used becomes one that
//! is invalid, and whatever refers to it fails.

use adit_shared::identity::TrustDomain;
use adit_shared::proto::waypoint as wire;
use serde_json::Value;

use super::duration::duration;
use super::field::{At, FieldError};
use super::mesh_provider::provider;

/// The key of the text.
pub const MESH_KEY: &str = "mesh";

/// A mesh configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MeshMap {
    /// `trustDomainAliases`.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// What waypoints are told; without what only the control plane knows.
    pub settings: wire::Settings,
    /// `extensionProviders`.
    pub providers: Vec<wire::Provider>,
    /// What is wrong with it, below `data.mesh`.
    pub errors: Vec<FieldError>,
}

impl MeshMap {
    /// Reads the text.
    pub fn parse(text: &str) -> Self {
        let mut map = Self::default();
        let data = At::ROOT.key("data");
        let at = data.key(MESH_KEY);
        let document: Value = match serde_yaml_ng::from_str(text) {
            Ok(Value::Null) => return map,
            Ok(document @ Value::Object(_)) => document,
            Ok(_) => {
                map.errors.push(at.error("is not a mapping"));
                return map;
            }
            Err(error) => {
                map.errors.push(at.error(error.to_string()));
                return map;
            }
        };
        let mut reader = Reader {
            errors: &mut map.errors,
        };
        map.settings = reader.settings(&document, at);
        map.trust_domain_aliases = reader.aliases(&document, at);
        let list = at.key("extensionProviders");
        for (index, raw) in reader
            .list(&document, list, "extensionProviders")
            .enumerate()
        {
            let at = list.index(index);
            let name = raw.get("name").and_then(Value::as_str).unwrap_or_default();
            if name.is_empty() {
                reader.errors.push(at.key("name").error("is required"));
            } else if map.providers.iter().any(|known| known.name == name) {
                let message = format!("{name:?} is there twice; the first is in force");
                reader.errors.push(at.key("name").error(message));
            } else {
                let provider = provider(name, raw, at, reader.errors);
                map.providers.push(provider);
            }
        }
        map
    }
}

struct Reader<'a> {
    errors: &'a mut Vec<FieldError>,
}

impl Reader<'_> {
    fn list<'v>(
        &mut self,
        of: &'v Value,
        at: At<'_>,
        key: &str,
    ) -> impl Iterator<Item = &'v Value> + use<'v> {
        let list = match of.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::Array(list)) => Some(list),
            Some(_) => {
                self.errors.push(at.error("is not a list"));
                None
            }
        };
        list.into_iter().flatten()
    }

    fn text<'v>(&mut self, of: &'v Value, at: At<'_>, key: &str) -> &'v str {
        match of.get(key) {
            None | Some(Value::Null) => "",
            Some(Value::String(text)) => text,
            Some(_) => {
                self.errors.push(at.key(key).error("is not text"));
                ""
            }
        }
    }

    fn settings(&mut self, document: &Value, at: At<'_>) -> wire::Settings {
        use wire::settings::{AccessLogEncoding, PathNormalization};
        let null = Value::Null;
        let normalization = document.get("pathNormalization").unwrap_or(&null);
        let below = at.key("pathNormalization");
        let path = match self.text(normalization, below, "normalization") {
            "" | "DEFAULT" | "BASE" => PathNormalization::Base,
            "NONE" => PathNormalization::None,
            "MERGE_SLASHES" => PathNormalization::MergeSlashes,
            "DECODE_AND_MERGE_SLASHES" => PathNormalization::DecodeAndMergeSlashes,
            other => {
                let message = format!(
                    "{other:?} is not DEFAULT, NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES; the strictest is in force"
                );
                let error = below.key("normalization").error(message);
                self.errors.push(error);
                PathNormalization::DecodeAndMergeSlashes
            }
        };
        let encoding = match self.text(document, at, "accessLogEncoding") {
            "" | "TEXT" => AccessLogEncoding::Text,
            "JSON" => AccessLogEncoding::Json,
            other => {
                let error = at
                    .key("accessLogEncoding")
                    .error(format!("{other:?} is not TEXT or JSON"));
                self.errors.push(error);
                AccessLogEncoding::Text
            }
        };
        let defaults = document.get("defaultConfig").unwrap_or(&null);
        let tracing = defaults.get("tracing").unwrap_or(&null);
        let sampling = tracing.get("sampling").filter(|of| !of.is_null());
        let share = sampling.and_then(Value::as_f64);
        let share = share.filter(|share| (0.0..=100.0).contains(share));
        if sampling.is_some() && share.is_none() {
            let below = at.key("defaultConfig");
            let below = below.key("tracing");
            let error = below.key("sampling").error("is not between 0 and 100");
            self.errors.push(error);
        }
        let topology = defaults.get("gatewayTopology").unwrap_or(&null);
        let trusted = topology.get("numTrustedProxies").and_then(Value::as_u64);
        let providers = document.get("defaultProviders").unwrap_or(&null);
        let below = at.key("defaultProviders");
        let mut named = |key: &str| -> Vec<String> {
            let names = self.list(providers, below.key(key), key);
            let names = names.filter_map(Value::as_str);
            names.map(ToOwned::to_owned).collect()
        };
        let default_tracing_providers = named("tracing");
        let default_access_log_providers = named("accessLogging");
        let access_log = !self.text(document, at, "accessLogFile").is_empty();
        wire::Settings {
            path_normalization: path.into(),
            access_log: access_log || !default_access_log_providers.is_empty(),
            access_log_encoding: encoding.into(),
            access_log_format: self.text(document, at, "accessLogFormat").to_owned(),
            trace_sampling: share.unwrap_or_default(),
            trace_sampling_set: share.is_some(),
            default_retry: self.retry(document, at),
            default_tracing_providers,
            default_access_log_providers,
            trusted_proxies: trusted.map_or(0, |of| u32::try_from(of).unwrap_or(u32::MAX)),
            ..wire::Settings::default()
        }
    }

    /// `defaultHttpRetryPolicy`, in the form of VirtualService's retries.
    fn retry(&mut self, document: &Value, at: At<'_>) -> Option<wire::Retry> {
        let raw = document
            .get("defaultHttpRetryPolicy")
            .filter(|of| of.is_object())?;
        let at = at.key("defaultHttpRetryPolicy");
        let attempts = raw.get("attempts").and_then(Value::as_u64);
        let mut codes = Vec::new();
        let mut conditions = Vec::new();
        for word in self.text(raw, at, "retryOn").split(',').map(str::trim) {
            match word.parse::<u32>() {
                Ok(code) if (100..600).contains(&code) => codes.push(code),
                Ok(_) => {
                    let message = format!("{word:?} is not a status code");
                    self.errors.push(at.key("retryOn").error(message));
                }
                Err(_) if word.is_empty() => {}
                Err(_) => conditions.push(word.to_owned()),
            }
        }
        if !codes.is_empty() && !conditions.is_empty() {
            conditions.push("retriable-status-codes".into());
        }
        let mut length = |key: &str| {
            let text = raw.get(key).and_then(Value::as_str)?;
            duration(text, at.key(key), self.errors)
        };
        Some(wire::Retry {
            attempts: attempts.map_or(2, |of| u32::try_from(of).unwrap_or(u32::MAX)),
            codes,
            backoff: length("backoff"),
            per_try_timeout: length("perTryTimeout"),
            conditions,
        })
    }

    fn aliases(&mut self, document: &Value, at: At<'_>) -> Vec<TrustDomain> {
        let list = at.key("trustDomainAliases");
        let mut found = Vec::new();
        for (index, alias) in self.list(document, list, "trustDomainAliases").enumerate() {
            match alias.as_str().map(TrustDomain::new) {
                Some(Ok(domain)) => found.push(domain),
                _ => {
                    let message = format!("{alias} is not a trust domain");
                    self.errors.push(list.index(index).error(message));
                }
            }
        }
        found
    }
}
