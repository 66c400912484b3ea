//! ReferenceGrants: which other namespaces may refer to objects of this one.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::field::{At, FieldError};
use super::meta::{Kind, Meta};
use super::raw::{Map, nullable, read_spec};

/// Most entries of each list.
const MAX_ENTRIES: usize = 16;

/// A ReferenceGrant. One with errors grants nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Metadata.
    pub meta: Meta,
    /// Who may refer.
    pub from: Vec<GrantFrom>,
    /// To what.
    pub to: Vec<GrantTo>,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

/// Objects that may refer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantFrom {
    /// Their API group.
    pub group: Arc<str>,
    /// Their kind.
    pub kind: Arc<str>,
    /// Their namespace.
    pub namespace: Arc<str>,
}

/// Objects that may be referred to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantTo {
    /// Their API group.
    pub group: Arc<str>,
    /// Their kind.
    pub kind: Arc<str>,
    /// The one; `None`: all.
    pub name: Option<Arc<str>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawSpec {
    #[serde(deserialize_with = "nullable")]
    from: Vec<Map<RawFrom>>,
    #[serde(deserialize_with = "nullable")]
    to: Vec<Map<RawTo>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawFrom {
    #[serde(deserialize_with = "nullable")]
    group: String,
    #[serde(deserialize_with = "nullable")]
    kind: String,
    #[serde(deserialize_with = "nullable")]
    namespace: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawTo {
    #[serde(deserialize_with = "nullable")]
    group: String,
    #[serde(deserialize_with = "nullable")]
    kind: String,
    name: Option<String>,
}

impl ReferenceGrant {
    /// Reads `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw = read_spec(spec).unwrap_or_else(|error| {
            errors.push(error);
            RawSpec::default()
        });
        let at = At::ROOT.key("spec");
        for (key, length) in [("from", raw.from.len()), ("to", raw.to.len())] {
            if length > MAX_ENTRIES {
                errors.push(
                    at.key(key)
                        .error(format!("has more than {MAX_ENTRIES} entries")),
                );
            }
        }
        let list = at.key("from");
        for (index, from) in raw.from.iter().enumerate() {
            for (key, value) in [("kind", &from.kind), ("namespace", &from.namespace)] {
                if value.is_empty() {
                    errors.push(list.index(index).key(key).error("is required"));
                }
            }
        }
        let list = at.key("to");
        for (index, to) in raw.to.iter().enumerate() {
            if to.kind.is_empty() {
                errors.push(list.index(index).key("kind").error("is required"));
            }
        }
        if !errors.is_empty() {
            return Self {
                meta,
                from: Vec::new(),
                to: Vec::new(),
                errors,
            };
        }
        let from = raw.from.iter().map(|from| GrantFrom {
            group: from.group.as_str().into(),
            kind: from.kind.as_str().into(),
            namespace: from.namespace.as_str().into(),
        });
        let to = raw.to.iter().map(|to| GrantTo {
            group: to.group.as_str().into(),
            kind: to.kind.as_str().into(),
            name: to
                .name
                .as_deref()
                .filter(|name| !name.is_empty())
                .map(Arc::from),
        });
        Self {
            meta,
            from: from.collect(),
            to: to.collect(),
            errors,
        }
    }

    /// Whether Gateway API objects of `kind` in `namespace` may refer to the core object
    /// `to` of this grant's namespace.
    pub fn admits(&self, kind: Kind, namespace: &str, to: (Kind, &str)) -> bool {
        let from = self.from.iter().any(|from| {
            &*from.group == "gateway.networking.k8s.io"
                && *from.kind == *kind.as_str()
                && *from.namespace == *namespace
        });
        from && self.to.iter().any(|granted| {
            granted.group.is_empty()
                && *granted.kind == *to.0.as_str()
                && granted.name.as_deref().is_none_or(|name| name == to.1)
        })
    }
}
