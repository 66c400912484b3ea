//! ConfigMaps, and of Secrets what TLS needs.

use std::collections::BTreeMap;
use std::fmt;
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

/// A Secret. Of its values only those are kept that TLS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Metadata.
    pub meta: Meta,
    /// The PEM text under [`CA_KEY`], or Istio's `cacert`.
    pub certificates: Option<Arc<str>>,
    /// What a client shows to a server.
    pub client: Option<ClientCertificate>,
}

/// A certificate with its key (`kubernetes.io/tls`: `tls.crt` and `tls.key`, or Istio's `cert`
/// and `key`).
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// PEM.
    pub chain: Arc<str>,
    /// PEM. It is shown nowhere.
    pub key: Arc<str>,
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCertificate(..)")
    }
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
    /// Keeps what TLS needs of a secret.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(secret: core::Secret, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let meta =
            Meta::parse(Kind::Secret, secret.metadata, origin).map_err(|error| vec![error])?;
        let mut texts = secret.string_data.unwrap_or_default();
        let mut data = secret.data.unwrap_or_default();
        let mut take = |key: &str| -> Result<Option<Arc<str>>, Vec<FieldError>> {
            match (texts.remove(key), data.remove(key)) {
                (Some(text), _) => Ok(Some(text.into())),
                (None, Some(bytes)) => match String::from_utf8(bytes.0) {
                    Ok(text) => Ok(Some(text.into())),
                    Err(_) => {
                        let data = At::ROOT.key("data");
                        Err(vec![data.key(key).error("is not text")])
                    }
                },
                (None, None) => Ok(None),
            }
        };
        let certificates = match take(CA_KEY)? {
            Some(certificates) => Some(certificates),
            None => take("cacert")?,
        };
        let mut pair = |chain: &str, key: &str| -> Result<_, Vec<FieldError>> {
            let pair = (take(chain)?, take(key)?);
            Ok(match pair {
                (Some(chain), Some(key)) => Some(ClientCertificate { chain, key }),
                _ => None,
            })
        };
        let client = match pair("tls.crt", "tls.key")? {
            Some(client) => Some(client),
            None => pair("cert", "key")?,
        };
        Ok(Self {
            meta,
            certificates,
            client,
        })
    }
}
