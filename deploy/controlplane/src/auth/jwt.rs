//! Tokens that are verified with a public key from a file: Kubernetes' service-account
//! tokens (ES256) where there is no API server to ask.
//!
//! The file may hold several keys, so that one can follow another. It is looked at again when
//! a signature does not verify and the file has changed: a rotated key needs no restart.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use parking_lot::Mutex;
use serde::Deserialize;
use tracing::{info, warn};

use super::{AUDIENCE, AuthError, Authenticator, Caller};

/// The clocks of nodes differ.
const LEEWAY: Duration = Duration::from_secs(10);
/// Bad tokens must not make us read the file over and over.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
const PEM_BEGIN: &str = "-----BEGIN";

/// Verifies tokens with the keys of one file.
pub struct JwtAuthenticator {
    path: PathBuf,
    validation: Validation,
    keys: Mutex<Keys>,
}

struct Keys {
    keys: Arc<[DecodingKey]>,
    modified: Option<SystemTime>,
    looked: Instant,
}

/// Why the key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not readable.
    #[error("token key {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a public key.
    #[error("token key {path}: not a PEM file of P-256 public keys: {reason}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The claims of a token that Kubernetes projects into a pod.
#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

#[derive(Deserialize)]
struct Kubernetes {
    #[serde(default)]
    namespace: String,
    serviceaccount: Option<Object>,
    pod: Option<Object>,
    node: Option<Object>,
}

#[derive(Deserialize, Default)]
struct Object {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
}

impl JwtAuthenticator {
    /// Reads the public keys in `path` (PEM, P-256). If `issuer` is given, tokens of another
    /// are refused.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_file(path: &Path, issuer: Option<&str>) -> Result<Self, KeyError> {
        // ES256 alone: a token never chooses how it is verified (RFC 8725 3.1).
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "aud"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY.as_secs();
        if let Some(issuer) = issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        let modified = modified(path);
        Ok(Self {
            keys: Mutex::new(Keys {
                keys: read_keys(path)?.into(),
                modified,
                looked: Instant::now(),
            }),
            path: path.to_owned(),
            validation,
        })
    }

    fn verify(&self, token: &str) -> Result<Caller, AuthError> {
        // Not verified under the lock: that takes long enough to be in each other's way.
        let keys = self.keys.lock().keys.clone();
        let mut verified = self.decode(token, &keys);
        if let Err(error) = &verified
            && matches!(error.kind(), ErrorKind::InvalidSignature)
            && let Some(keys) = self.reload()
        {
            verified = self.decode(token, &keys);
        }
        let claims = verified.map_err(|error| AuthError::Invalid(error.to_string()))?;
        caller(claims)
    }

    fn decode(
        &self,
        token: &str,
        keys: &[DecodingKey],
    ) -> Result<Claims, jsonwebtoken::errors::Error> {
        let mut last = ErrorKind::InvalidSignature.into();
        for key in keys {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(data) => return Ok(data.claims),
                Err(error) if matches!(error.kind(), ErrorKind::InvalidSignature) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// The keys, if there are new ones.
    fn reload(&self) -> Option<Arc<[DecodingKey]>> {
        let mut keys = self.keys.lock();
        if keys.looked.elapsed() < RELOAD_INTERVAL {
            return None;
        }
        keys.looked = Instant::now();
        let modified = modified(&self.path);
        if modified.is_none() || modified == keys.modified {
            return None;
        }
        match read_keys(&self.path) {
            Ok(new) => {
                info!(path = %self.path.display(), keys = new.len(), "token keys read again");
                keys.keys = new.into();
                keys.modified = modified;
                Some(keys.keys.clone())
            }
            Err(error) => {
                warn!(%error, "the token keys that are known stay in force");
                None
            }
        }
    }
}

impl Authenticator for JwtAuthenticator {
    /// Costs the same whoever brings it.
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
        _peer: Option<IpAddr>,
    ) -> BoxFuture<'a, Result<Caller, AuthError>> {
        std::future::ready(self.verify(token)).boxed()
    }
}

fn caller(claims: Claims) -> Result<Caller, AuthError> {
    let kubernetes = claims.kubernetes.ok_or(AuthError::Claim("kubernetes.io"))?;
    let named = |object: Option<Object>, claim| {
        object
            .filter(|object| !object.name.is_empty())
            .ok_or(AuthError::Claim(claim))
    };
    if kubernetes.namespace.is_empty() {
        return Err(AuthError::Claim("kubernetes.io.namespace"));
    }
    let account = named(
        kubernetes.serviceaccount,
        "kubernetes.io.serviceaccount.name",
    )?;
    let pod = named(kubernetes.pod, "kubernetes.io.pod.name")?;
    // Without the node nothing of the node can be checked, so nothing is allowed.
    let node = named(kubernetes.node, "kubernetes.io.node.name")?;
    Ok(Caller {
        namespace: kubernetes.namespace,
        service_account: account.name,
        pod_name: pod.name,
        pod_uid: pod.uid,
        node: node.name,
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|meta| meta.modified())
        .ok()
}

fn read_keys(path: &Path) -> Result<Vec<DecodingKey>, KeyError> {
    let pem = std::fs::read_to_string(path).map_err(|source| KeyError::Read {
        path: path.to_owned(),
        source,
    })?;
    let wrong = |reason: String| KeyError::Parse {
        path: path.to_owned(),
        reason,
    };
    let keys = pem
        .match_indices(PEM_BEGIN)
        .map(|(start, _)| {
            let rest = &pem[start + PEM_BEGIN.len()..];
            let end = rest.find(PEM_BEGIN).unwrap_or(rest.len());
            let block = &pem[start..start + PEM_BEGIN.len() + end];
            DecodingKey::from_ec_pem(block.as_bytes()).map_err(|error| wrong(error.to_string()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    if keys.is_empty() {
        return Err(wrong("there is none in it".to_owned()));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header};
    use serde_json::{Value, json};

    use super::*;

    struct Signer {
        key: rcgen::KeyPair,
    }

    impl Signer {
        fn new() -> Self {
            Self {
                key: rcgen::KeyPair::generate().expect("a key"),
            }
        }

        fn sign(&self, claims: &Value) -> String {
            let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).expect("PEM");
            jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).expect("signed")
        }
    }

    fn claims() -> Value {
        json!({
            "aud": ["istio-ca"],
            "iss": "adit-local",
            "exp": jsonwebtoken::get_current_timestamp() + 600,
            "sub": "system:serviceaccount:istio-system:ztunnel",
            "kubernetes.io": {
                "namespace": "istio-system",
                "serviceaccount": {"name": "ztunnel", "uid": "1"},
                "pod": {"name": "ztunnel-a", "uid": "2"},
                "node": {"name": "n1", "uid": "3"},
            },
        })
    }

    fn with(path: &str, value: Value) -> Value {
        let mut claims = claims();
        *claims.pointer_mut(path).expect("there") = value;
        claims
    }

    fn without(path: &str, key: &str) -> Value {
        let mut claims = claims();
        let object = claims.pointer_mut(path).expect("there");
        object.as_object_mut().expect("an object").remove(key);
        claims
    }

    #[test]
    fn a_good_token_names_the_caller() {
        let signer = Signer::new();
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), signer.key.public_key_pem()).expect("written");
        let auth = JwtAuthenticator::from_file(file.path(), Some("adit-local")).expect("a key");
        assert_eq!(
            auth.verify(&signer.sign(&claims())),
            Ok(Caller {
                namespace: "istio-system".into(),
                service_account: "ztunnel".into(),
                pod_name: "ztunnel-a".into(),
                pod_uid: "2".into(),
                node: "n1".into(),
            })
        );
    }

    #[test]
    fn everything_else_is_refused() {
        let signer = Signer::new();
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), signer.key.public_key_pem()).expect("written");
        let auth = JwtAuthenticator::from_file(file.path(), Some("adit-local")).expect("a key");
        let now = jsonwebtoken::get_current_timestamp();
        let hs256 = {
            // The public key as a shared secret: the classic confusion of algorithms.
            let secret = signer.key.public_key_pem();
            let key = EncodingKey::from_secret(secret.as_bytes());
            jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims(), &key).expect("signed")
        };
        let cases = [
            ("another key", Signer::new().sign(&claims())),
            ("expired", signer.sign(&with("/exp", json!(now - 60)))),
            ("no exp", signer.sign(&without("", "exp"))),
            ("audience", signer.sign(&with("/aud", json!(["api"])))),
            ("no audience", signer.sign(&without("", "aud"))),
            ("issuer", signer.sign(&with("/iss", json!("other")))),
            ("no issuer", signer.sign(&without("", "iss"))),
            ("no claim", signer.sign(&without("", "kubernetes.io"))),
            ("no node", signer.sign(&without("/kubernetes.io", "node"))),
            ("no pod", signer.sign(&without("/kubernetes.io", "pod"))),
            (
                "empty node",
                signer.sign(&with("/kubernetes.io/node/name", json!(""))),
            ),
            (
                "no namespace",
                signer.sign(&without("/kubernetes.io", "namespace")),
            ),
            ("HS256", hs256),
            ("junk", "a.b.c".to_owned()),
            ("empty", String::new()),
        ];
        for (what, token) in cases {
            assert!(auth.verify(&token).is_err(), "{what}");
        }
    }

    #[test]
    fn a_new_key_in_the_file_is_found() {
        let (old, new) = (Signer::new(), Signer::new());
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), old.key.public_key_pem()).expect("written");
        let auth = JwtAuthenticator::from_file(file.path(), None).expect("a key");
        let token = new.sign(&claims());
        assert!(auth.verify(&token).is_err());
        let both = old.key.public_key_pem() + &new.key.public_key_pem();
        std::fs::write(file.path(), both).expect("written");
        // The file's time may not have moved within one tick of the kernel's clock.
        {
            let mut keys = auth.keys.lock();
            keys.modified = None;
            keys.looked = Instant::now() - RELOAD_INTERVAL;
        }
        assert!(auth.verify(&token).is_ok());
        assert!(auth.verify(&old.sign(&claims())).is_ok());
    }

    #[test]
    fn a_file_that_is_no_key_is_an_error_that_names_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "no key").expect("written");
        let error = JwtAuthenticator::from_file(file.path(), None)
            .err()
            .expect("no key")
            .to_string();
        assert!(
            error.contains(&file.path().display().to_string()),
            "{error}"
        );
    }
}
