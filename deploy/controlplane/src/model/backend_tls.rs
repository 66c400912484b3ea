//! BackendTLSPolicies: TLS towards backends.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::field::{At, FieldError};
use super::meta::Meta;
use super::raw::{Map, nullable, read_spec};

/// Most targets (CRD).
const MAX_TARGETS: usize = 16;
/// Most references to certificates (CRD).
const MAX_CERTIFICATES: usize = 8;
/// Most alternative names (CRD).
const MAX_NAMES: usize = 5;

/// A BackendTLSPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendTlsPolicy {
    /// Metadata.
    pub meta: Meta,
    /// Services of its namespace.
    pub targets: Vec<BackendTlsTarget>,
    /// SNI, and the name that certificates must have.
    pub hostname: Arc<str>,
    /// Names of which certificates must have one, in place of `hostname`.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Where the certificates to verify with are.
    pub certificates: Vec<CaReference>,
    /// `wellKnownCACertificates: System`.
    pub system_roots: bool,
    /// What is wrong with it. Connections that it covers fail then.
    pub errors: Vec<FieldError>,
}

/// What a BackendTLSPolicy is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendTlsTarget {
    /// The service.
    pub name: Arc<str>,
    /// The name of its port; `None`: all ports.
    pub section: Option<Arc<str>>,
}

/// A reference to certificates of authorities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaReference {
    /// API group.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(deserialize_with = "nullable")]
    target_refs: Vec<Map<RawTarget>>,
    validation: Option<Map<RawValidation>>,
    #[serde(deserialize_with = "nullable")]
    options: serde_json::Map<String, Value>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawTarget {
    #[serde(deserialize_with = "nullable")]
    group: String,
    #[serde(deserialize_with = "nullable")]
    kind: String,
    #[serde(deserialize_with = "nullable")]
    name: String,
    section_name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawValidation {
    #[serde(rename = "caCertificateRefs", deserialize_with = "nullable")]
    certificates: Vec<Map<RawReference>>,
    #[serde(rename = "wellKnownCACertificates")]
    well_known: Option<String>,
    #[serde(deserialize_with = "nullable")]
    hostname: String,
    #[serde(deserialize_with = "nullable")]
    subject_alt_names: Vec<Map<RawName>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawReference {
    #[serde(deserialize_with = "nullable")]
    group: String,
    #[serde(deserialize_with = "nullable")]
    kind: String,
    #[serde(deserialize_with = "nullable")]
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawName {
    #[serde(deserialize_with = "nullable")]
    r#type: String,
    hostname: Option<String>,
    uri: Option<String>,
}

impl BackendTlsPolicy {
    /// Reads `spec`. Of one that cannot be read the targets may be readable.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw = read_spec(spec).unwrap_or_else(|error| {
            errors.push(error);
            let targets = spec.get("targetRefs");
            let targets = targets.map(Vec::<Map<RawTarget>>::deserialize);
            RawSpec {
                target_refs: targets.and_then(Result::ok).unwrap_or_default(),
                validation: Some(Map::default()),
                ..RawSpec::default()
            }
        });
        let readable = errors.is_empty();
        let at = At::ROOT.key("spec");
        let targets = targets(&raw.target_refs, at.key("targetRefs"), &mut errors);
        if !raw.options.is_empty() {
            errors.push(at.key("options").error("no option is known"));
        }
        let at = at.key("validation");
        let validation = raw.validation.map(Map::into_inner).unwrap_or_default();
        let mut names = Vec::new();
        let mut certificates = Vec::new();
        if readable {
            names = subject_alt_names(&validation, at, &mut errors);
            certificates = self::certificates(&validation, at, &mut errors);
            if validation.hostname.is_empty() {
                errors.push(at.key("hostname").error("is required"));
            }
        }
        let system_roots = match validation.well_known.as_deref() {
            None | Some("") => false,
            Some("System") => true,
            Some(other) => {
                let message = format!("{other:?} is not System");
                errors.push(at.key("wellKnownCACertificates").error(message));
                false
            }
        };
        if readable && system_roots != certificates.is_empty() {
            errors.push(at.error(
                "either caCertificateRefs or wellKnownCACertificates is required, and not both",
            ));
        }
        Self {
            meta,
            targets,
            hostname: validation.hostname.into(),
            subject_alt_names: names,
            certificates,
            system_roots,
            errors,
        }
    }
}

fn targets(
    raw: &[Map<RawTarget>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<BackendTlsTarget> {
    if raw.is_empty() {
        errors.push(at.error("is required"));
    }
    if raw.len() > MAX_TARGETS {
        errors.push(at.error(format!("has more than {MAX_TARGETS} entries")));
    }
    let mut found = Vec::new();
    for (index, target) in raw.iter().take(MAX_TARGETS).enumerate() {
        let at = at.index(index);
        if !matches!((&*target.group, &*target.kind), ("" | "core", "Service")) {
            let message = format!("{:?} is not Service", target.kind);
            errors.push(at.key("kind").error(message));
            continue;
        }
        if target.name.is_empty() {
            errors.push(at.key("name").error("is required"));
            continue;
        }
        let section = target.section_name.as_deref();
        found.push(BackendTlsTarget {
            name: target.name.as_str().into(),
            section: section.filter(|name| !name.is_empty()).map(Arc::from),
        });
    }
    found
}

fn subject_alt_names(
    validation: &RawValidation,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<Arc<str>> {
    let list = at.key("subjectAltNames");
    let raw = &validation.subject_alt_names;
    if raw.len() > MAX_NAMES {
        errors.push(list.error(format!("has more than {MAX_NAMES} entries")));
    }
    let mut found = Vec::new();
    for (index, name) in raw.iter().take(MAX_NAMES).enumerate() {
        let at = list.index(index);
        let (value, key, other) = match name.r#type.as_str() {
            "Hostname" => (&name.hostname, "hostname", &name.uri),
            "URI" => (&name.uri, "uri", &name.hostname),
            other => {
                let message = format!("{other:?} is not Hostname or URI");
                errors.push(at.key("type").error(message));
                continue;
            }
        };
        match value.as_deref() {
            Some(value) if !value.is_empty() && other.is_none() => found.push(value.into()),
            _ => errors.push(
                at.key(key)
                    .error("is required with this type, and nothing else"),
            ),
        }
    }
    found
}

fn certificates(
    validation: &RawValidation,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<CaReference> {
    let list = at.key("caCertificateRefs");
    let raw = &validation.certificates;
    if raw.len() > MAX_CERTIFICATES {
        errors.push(list.error(format!("has more than {MAX_CERTIFICATES} entries")));
    }
    let raw = raw.iter().take(MAX_CERTIFICATES).enumerate();
    raw.map(|(index, raw)| {
        for (key, value) in [("kind", &raw.kind), ("name", &raw.name)] {
            if value.is_empty() {
                errors.push(list.index(index).key(key).error("is required"));
            }
        }
        CaReference {
            group: raw.group.as_str().into(),
            kind: raw.kind.as_str().into(),
            name: raw.name.as_str().into(),
        }
    })
    .collect()
}
