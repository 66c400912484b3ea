//! A JSON Web Key Set (RFC 7517) and the check of one signature (RFC 7515, 7518, 8037).

use std::fmt;

use aws_lc_rs::{hmac, signature};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::Value;

/// More keys than any issuer publishes; each may be tried for one token.
const MAX_KEYS: usize = 256;

/// How a token is signed. There is no `none`: an unsigned token has no algorithm that is
/// known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
    Hs256,
    Hs384,
    Hs512,
}

impl Algorithm {
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            "HS256" => Self::Hs256,
            "HS384" => Self::Hs384,
            "HS512" => Self::Hs512,
            _ => return None,
        })
    }
}

/// Why a document is not a key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Not JSON of the form `{"keys": [...]}`.
    #[error("not a JSON Web Key Set: {0}")]
    Malformed(String),
    /// No key that can verify a token; with the reason of the first that cannot.
    #[error("no usable key{0}")]
    NoUsableKey(String),
    /// More than 256 keys.
    #[error("more than {MAX_KEYS} keys")]
    TooManyKeys,
}

/// The keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
}

struct Key {
    id: Option<Box<str>>,
    algorithm: Option<Algorithm>,
    material: Material,
}

enum Material {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    /// An uncompressed point on the curve of the algorithm.
    Ec(Algorithm, Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

/// Whether a signature is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    /// A key fits, and the signature is not by it.
    Bad,
    /// No key fits the token's key id and algorithm; newer keys may.
    NoKey,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct Wire {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

impl KeySet {
    /// Reads a key set. A key of a kind that is not known here is left out: sets hold keys
    /// for other purposes too (RFC 7517 5).
    ///
    /// # Errors
    /// [`KeySetError`].
    pub fn parse(text: &[u8]) -> Result<Self, KeySetError> {
        let document: Document = serde_json::from_slice(text)
            .map_err(|error| KeySetError::Malformed(error.to_string()))?;
        if document.keys.len() > MAX_KEYS {
            return Err(KeySetError::TooManyKeys);
        }
        let mut keys = Vec::with_capacity(document.keys.len());
        let mut first_reason = String::new();
        for value in document.keys {
            let key = Wire::deserialize(value)
                .map_err(|error| error.to_string())
                .and_then(Key::new);
            match key {
                Ok(key) => keys.push(key),
                Err(reason) if first_reason.is_empty() => first_reason = format!(": {reason}"),
                Err(_) => {}
            }
        }
        if keys.is_empty() {
            return Err(KeySetError::NoUsableKey(first_reason));
        }
        Ok(Self { keys })
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Never, once parsed.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Tries every key that fits the key id, if both have one, and the algorithm.
    pub(super) fn verify(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Verdict {
        let mut verdict = Verdict::NoKey;
        for key in &self.keys {
            let other = matches!((&key.id, id), (Some(own), Some(id)) if **own != *id);
            if other || key.algorithm.is_some_and(|own| own != algorithm) {
                continue;
            }
            match key.material.verify(algorithm, message, signature) {
                Some(true) => return Verdict::Good,
                Some(false) => verdict = Verdict::Bad,
                None => {}
            }
        }
        verdict
    }
}

impl Key {
    fn new(wire: Wire) -> Result<Self, String> {
        if wire.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("a key is not for signatures".to_owned());
        }
        let decode = |name: &str, text: &Option<String>| {
            let text = text.as_deref().unwrap_or_default();
            let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('='));
            match bytes {
                Ok(bytes) if !bytes.is_empty() => Ok(bytes),
                _ => Err(format!("{name} of a key is missing or not base64url")),
            }
        };
        // aws-lc takes numbers without leading zeros.
        let number = |name, text| {
            decode(name, text).map(|bytes| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                bytes[zeros..].to_vec()
            })
        };
        let material = match (wire.kty.as_str(), wire.crv.as_deref()) {
            ("RSA", _) => Material::Rsa {
                modulus: number("n", &wire.n)?,
                exponent: number("e", &wire.e)?,
            },
            ("EC", Some(curve)) => {
                let (algorithm, length) = match curve {
                    "P-256" => (Algorithm::Es256, 32),
                    "P-384" => (Algorithm::Es384, 48),
                    "P-521" => (Algorithm::Es512, 66),
                    other => return Err(format!("curve {other:?} is not known")),
                };
                let (x, y) = (number("x", &wire.x)?, number("y", &wire.y)?);
                if x.len() > length || y.len() > length {
                    return Err(format!("a point is not on {curve}"));
                }
                let mut point = vec![0; 1 + 2 * length];
                point[0] = 4;
                point[1 + length - x.len()..=length].copy_from_slice(&x);
                point[1 + 2 * length - y.len()..].copy_from_slice(&y);
                Material::Ec(algorithm, point)
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519(decode("x", &wire.x)?),
            ("oct", _) => Material::Secret(decode("k", &wire.k)?),
            (kty, _) => return Err(format!("key type {kty:?} is not known")),
        };
        let algorithm = match wire.alg.as_deref() {
            None => None,
            Some(name) => Some(
                Algorithm::parse(name).ok_or_else(|| format!("algorithm {name:?} is not known"))?,
            ),
        };
        Ok(Self {
            id: wire
                .kid
                .filter(|id| !id.is_empty())
                .map(String::into_boxed_str),
            algorithm,
            material,
        })
    }
}

impl Material {
    /// `None`: a key of this kind does not make such signatures. So a public key is never
    /// taken for a secret (RFC 8725 2.1).
    fn verify(&self, algorithm: Algorithm, message: &[u8], signed: &[u8]) -> Option<bool> {
        use Algorithm::*;
        match self {
            Self::Rsa { modulus, exponent } => {
                let parameters = match algorithm {
                    Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                    Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                    Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return None,
                };
                let key = signature::RsaPublicKeyComponents {
                    n: modulus,
                    e: exponent,
                };
                Some(key.verify(parameters, message, signed).is_ok())
            }
            Self::Ec(own, point) => {
                let parameters = match algorithm {
                    Es256 => &signature::ECDSA_P256_SHA256_FIXED,
                    Es384 => &signature::ECDSA_P384_SHA384_FIXED,
                    Es512 => &signature::ECDSA_P521_SHA512_FIXED,
                    _ => return None,
                };
                // RFC 7518 3.4: each algorithm has its curve.
                (*own == algorithm).then(|| {
                    let key = signature::UnparsedPublicKey::new(parameters, point);
                    key.verify(message, signed).is_ok()
                })
            }
            Self::Ed25519(point) => (algorithm == EdDsa).then(|| {
                let key = signature::UnparsedPublicKey::new(&signature::ED25519, point);
                key.verify(message, signed).is_ok()
            }),
            Self::Secret(secret) => {
                let algorithm = match algorithm {
                    Hs256 => hmac::HMAC_SHA256,
                    Hs384 => hmac::HMAC_SHA384,
                    Hs512 => hmac::HMAC_SHA512,
                    _ => return None,
                };
                let key = hmac::Key::new(algorithm, secret);
                Some(hmac::verify(&key, message, signed).is_ok())
            }
        }
    }
}

/// Without the secret.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.material {
            Material::Rsa { .. } => "RSA",
            Material::Ec(..) => "EC",
            Material::Ed25519(_) => "OKP",
            Material::Secret(_) => "oct",
        };
        f.debug_struct("Key")
            .field("kty", &kind)
            .field("kid", &self.id)
            .field("alg", &self.algorithm)
            .finish_non_exhaustive()
    }
}
