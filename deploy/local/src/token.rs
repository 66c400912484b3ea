//! Service-account tokens as Kubernetes projects them, signed by the local mesh.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;

use crate::error::LocalError;

/// Issuer of every token; what a kubeadm cluster has.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// The audience that Istio's control plane asks for.
pub const AUDIENCE: &str = "istio-ca";
/// How long a token is valid, in seconds.
pub const LIFETIME: u64 = 24 * 60 * 60;

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

/// The claims of a projected token (Kubernetes: "Schema for service account private
/// claims").
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Claims {
    iss: &'static str,
    sub: String,
    aud: [&'static str; 1],
    iat: u64,
    nbf: u64,
    exp: u64,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Private,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Private {
    namespace: String,
    serviceaccount: Named,
    pod: Named,
    node: Named,
}

impl Claims {
    /// The claims of a pod's token, issued at `now` (Unix time, seconds).
    pub fn new(namespace: &str, account: Named, pod: Named, node: Named, now: u64) -> Self {
        Self {
            iss: ISSUER,
            sub: format!("system:serviceaccount:{namespace}:{}", account.name),
            aud: [AUDIENCE],
            iat: now,
            nbf: now,
            exp: now + LIFETIME,
            kubernetes: Private {
                namespace: namespace.into(),
                serviceaccount: account,
                pod,
                node,
            },
        }
    }
}

/// Makes a P-256 key pair: the private half readable by root only.
pub(crate) fn create_key(private: &Path, public: &Path) -> Result<(), LocalError> {
    let failed = |error: rcgen::Error| {
        LocalError::Config(format!("cannot make the key that signs tokens: {error}"))
    };
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    write_private(private, key.serialize_pem().as_bytes())?;
    fs::write(public, key.public_key_pem()).map_err(LocalError::file("write", public))
}

/// Signs `claims` with the key in `private` and writes the token to `path`.
pub(crate) fn issue(private: &Path, claims: &Claims, path: &Path) -> Result<(), LocalError> {
    let pem = fs::read(private).map_err(LocalError::file("read", private))?;
    let failed = |error: jsonwebtoken::errors::Error| {
        LocalError::Config(format!("cannot sign a token: {error}"))
    };
    let key = EncodingKey::from_ec_pem(&pem).map_err(failed)?;
    let header = Header::new(Algorithm::ES256);
    let token = jsonwebtoken::encode(&header, claims, &key).map_err(failed)?;
    // By rename: a reader must not see half a token.
    let temporary = path.with_extension("tmp");
    write_private(&temporary, token.as_bytes())?;
    fs::rename(&temporary, path).map_err(LocalError::file("replace", path))
}

fn write_private(path: &Path, content: &[u8]) -> Result<(), LocalError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options
        .open(path)
        .and_then(|mut file| file.write_all(content));
    written.map_err(LocalError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn named(name: &str) -> Named {
        Named {
            name: name.into(),
            uid: format!("uid-{name}"),
        }
    }

    #[test]
    fn claims_have_the_shape_of_kubernetes() {
        let claims = Claims::new(
            "istio-system",
            named("ztunnel"),
            named("ztunnel-n1"),
            named("n1"),
            1000,
        );
        let json = serde_json::to_value(&claims).unwrap_or_default();
        assert_eq!(json["sub"], "system:serviceaccount:istio-system:ztunnel");
        assert_eq!(json["aud"], serde_json::json!(["istio-ca"]));
        assert_eq!(json["exp"], 1000 + 86_400);
        let private = &json["kubernetes.io"];
        assert_eq!(private["namespace"], "istio-system");
        assert_eq!(private["serviceaccount"]["uid"], "uid-ztunnel");
        assert_eq!(private["pod"]["name"], "ztunnel-n1");
        assert_eq!(private["node"]["name"], "n1");
    }

    #[test]
    fn a_token_verifies_with_the_public_key_and_the_private_one_is_private()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let (private, public) = (dir.path().join("k"), dir.path().join("p"));
        create_key(&private, &public)?;
        let now = std::time::UNIX_EPOCH.elapsed()?.as_secs();
        let claims = Claims::new("ns", named("sa"), named("pod"), named("node"), now);
        let token = dir.path().join("token");
        issue(&private, &claims, &token)?;
        let key = jsonwebtoken::DecodingKey::from_ec_pem(&fs::read(&public)?)?;
        let mut validation = jsonwebtoken::Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        let text = fs::read_to_string(&token)?;
        jsonwebtoken::decode::<serde_json::Value>(&text, &key, &validation)?;
        for file in [private, token] {
            assert_eq!(fs::metadata(file)?.permissions().mode() & 0o777, 0o600);
        }
        Ok(())
    }
}
