//! ConfigMaps, and of Secrets what is no secret: certificates of authorities.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;

use super::field::{At, FieldError};
use super::meta::{Kind, Meta, Origin};

/// The key of certificates in ConfigMaps and Secrets (Gateway API `caCertificateRefs`).
pub const CA_KEY: &str = "ca.crt";
/// What Kubernetes allows for all values together.
const MAX_BYTES: usize = 1 << 20;

/// A ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMap {
    /// Metadata.
    pub meta: Meta,
    /// Texts by key.
    pub data: BTreeMap<String, Arc<str>>,
}

/// A Secret. Of its values only [`CA_KEY`] is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Metadata.
    pub meta: Meta,
    /// The PEM text under [`CA_KEY`].
    pub certificates: Option<Arc<str>>,
}

impl ConfigMap {
    /// Checks and keeps a config map.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(map: core::ConfigMap, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let meta =
            Meta::parse(Kind::ConfigMap, map.metadata, origin).map_err(|error| vec![error])?;
        let data = map.data.unwrap_or_default();
        let bytes: usize = data.iter().map(|(key, text)| key.len() + text.len()).sum();
        if bytes > MAX_BYTES {
            let at = At::ROOT.key("data");
            return Err(vec![
                at.error(format!("has {bytes} bytes; {MAX_BYTES} are allowed")),
            ]);
        }
        let data = data.into_iter().map(|(key, text)| (key, text.into()));
        Ok(Self {
            meta,
            data: data.collect(),
        })
    }
}

impl Secret {
    /// Keeps what is no secret of a secret.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(secret: core::Secret, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let meta =
            Meta::parse(Kind::Secret, secret.metadata, origin).map_err(|error| vec![error])?;
        let text = secret.string_data.unwrap_or_default().remove(CA_KEY);
        let bytes = secret.data.unwrap_or_default().remove(CA_KEY);
        let certificates = match (text, bytes) {
            (Some(text), _) => Some(text),
            (None, Some(bytes)) => match String::from_utf8(bytes.0) {
                Ok(text) => Some(text),
                Err(_) => {
                    let data = At::ROOT.key("data");
                    return Err(vec![data.key(CA_KEY).error("is not text")]);
                }
            },
            (None, None) => None,
        };
        Ok(Self {
            meta,
            certificates: certificates.map(Into::into),
        })
    }
}
