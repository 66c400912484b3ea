//! PeerAuthentications: whether plaintext is let in.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::authorization::check_selector;
use super::field::{At, FieldError};
use super::meta::{Labels, Meta};
use super::raw::{Map, Selector, nullable, read_spec};

/// What happens to plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MutualTls {
    /// It is refused.
    Strict,
    /// It is let in. `DISABLE` means the same: the mesh never turns encryption off
    /// between its own pods.
    Permissive,
}

/// A PeerAuthentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// Pods it covers; empty: the namespace, or the mesh in the root namespace.
    pub selector: Labels,
    /// The mode; `None`: inherited (`UNSET`).
    pub mode: Option<MutualTls>,
    /// Modes of single ports of the workload; `None`: as `mode`.
    pub ports: BTreeMap<u16, Option<MutualTls>>,
    /// What is wrong with it. One with errors counts as STRICT without ports.
    pub errors: Vec<FieldError>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSpec {
    selector: Option<Map<Selector>>,
    mtls: Option<Map<RawMode>>,
    #[serde(deserialize_with = "nullable")]
    port_level_mtls: BTreeMap<String, Option<Map<RawMode>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawMode {
    mode: Option<String>,
}

impl PeerAuthentication {
    /// Reads `spec`. Whatever is wrong with it makes it STRICT.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw = match spec {
            Value::Null => RawSpec::default(),
            spec => read_spec(spec).unwrap_or_else(|error| {
                errors.push(error);
                RawSpec::default()
            }),
        };
        let at = At::ROOT.key("spec");
        // Of a spec that cannot be read, the selector alone may be readable.
        let selector = raw.selector.or_else(|| {
            let selector = spec.get("selector")?;
            Map::<Selector>::deserialize(selector).ok()
        });
        let selector = selector.unwrap_or_default().into_inner().match_labels;
        check_selector(&selector, at, &mut errors);
        let mode = read_mode(raw.mtls.as_deref(), at.key("mtls"), &mut errors);
        let list = at.key("portLevelMtls");
        let mut ports = BTreeMap::new();
        for (port, mode) in &raw.port_level_mtls {
            let at = list.key(port);
            let mode = read_mode(mode.as_deref(), at, &mut errors);
            match port.parse::<u16>() {
                Ok(number) if number != 0 => {
                    ports.insert(number, mode);
                }
                _ => errors.push(at.error(format!("{port:?} is not a port: 1 to 65535"))),
            }
        }
        if !ports.is_empty() && selector.is_empty() {
            errors.push(list.error("needs a selector: ports belong to workloads"));
        }
        if errors.is_empty() {
            Self {
                meta,
                selector,
                mode,
                ports,
                errors,
            }
        } else {
            Self {
                meta,
                selector,
                mode: Some(MutualTls::Strict),
                ports: BTreeMap::new(),
                errors,
            }
        }
    }
}

fn read_mode(raw: Option<&RawMode>, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<MutualTls> {
    match raw?.mode.as_deref() {
        None | Some("" | "UNSET") => None,
        Some("STRICT") => Some(MutualTls::Strict),
        Some("PERMISSIVE" | "DISABLE") => Some(MutualTls::Permissive),
        Some(other) => {
            errors.push(at.key("mode").error(format!(
                "{other:?} is not a mode: UNSET, DISABLE, PERMISSIVE or STRICT"
            )));
            None
        }
    }
}
