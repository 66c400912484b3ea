//! Authorities as Secrets, by Istio's names.

use std::collections::BTreeMap;
use std::time::SystemTime;

use adit_shared::identity::{CaFiles, LocalCa, LocalCaError};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;

use super::rotation::Previous;

/// The one that an operator plugs in.
pub const PLUGGED_SECRET: &str = "cacerts";
/// The one that we make.
pub const OWN_SECRET: &str = "istio-ca-secret";
/// The one before, during a rotation.
pub const PREVIOUS_SECRET: &str = "adit-ca-previous";

/// Istio's type for [`OWN_SECRET`].
const OWN_TYPE: &str = "istio.io/ca-root";
const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";
/// The signing certificate of the authority that follows.
const NEXT: &str = "next-ca-cert.pem";
/// When the rotation began.
const SINCE: &str = "adit.io/rotation-began";

/// Why a Secret is no authority.
#[derive(Debug, thiserror::Error)]
pub(super) enum CaSecretError {
    /// A key is missing or empty.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Not text.
    #[error("{0} is not text")]
    NotText(&'static str),
    /// The files do not fit together.
    #[error(transparent)]
    Unusable(#[from] LocalCaError),
    /// The time of a rotation.
    #[error("annotation {SINCE}: {0}")]
    Time(String),
}

/// Reads and tries an authority. Chain and roots may be left out where the certificate is
/// its own root, as Istio's generated Secret does.
pub(super) fn files(secret: &Secret) -> Result<CaFiles, CaSecretError> {
    let certificate = text(secret, CERTIFICATE)?.ok_or(CaSecretError::Missing(CERTIFICATE))?;
    let key = text(secret, KEY)?.ok_or(CaSecretError::Missing(KEY))?;
    let files = CaFiles {
        chain: text(secret, CHAIN)?.unwrap_or_else(|| certificate.clone()),
        roots: text(secret, ROOTS)?.unwrap_or_else(|| certificate.clone()),
        certificate,
        key,
    };
    LocalCa::from_files(&files)?;
    Ok(files)
}

/// Reads the authority of a rotation. It may have expired, and is good for its roots then.
pub(super) fn previous(secret: &Secret) -> Result<Previous, CaSecretError> {
    let required = |key| text(secret, key)?.ok_or(CaSecretError::Missing(key));
    let began = secret
        .metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(SINCE))
        .ok_or(CaSecretError::Missing(SINCE))?;
    let began: Timestamp = began
        .parse()
        .map_err(|error| CaSecretError::Time(format!("{error}")))?;
    Ok(Previous {
        files: CaFiles {
            certificate: required(CERTIFICATE)?,
            key: required(KEY)?,
            chain: required(CHAIN)?,
            roots: required(ROOTS)?,
        },
        next: required(NEXT)?,
        since: began.into(),
    })
}

/// The Secret of an authority that we have made.
pub(super) fn own_secret(namespace: &str, files: &CaFiles) -> Secret {
    Secret {
        type_: Some(OWN_TYPE.to_owned()),
        ..secret(namespace, OWN_SECRET, files)
    }
}

/// The Secret of the authority before.
pub(super) fn previous_secret(namespace: &str, previous: &Previous) -> Secret {
    let mut secret = secret(namespace, PREVIOUS_SECRET, &previous.files);
    let data = secret.data.get_or_insert_default();
    data.insert(NEXT.to_owned(), bytes(&previous.next));
    secret.metadata.annotations = Some([(SINCE.to_owned(), rfc3339(previous.since))].into());
    secret
}

fn secret(namespace: &str, name: &str, files: &CaFiles) -> Secret {
    let data: BTreeMap<_, _> = [
        (CERTIFICATE, &files.certificate),
        (KEY, &files.key),
        (CHAIN, &files.chain),
        (ROOTS, &files.roots),
    ]
    .map(|(key, text)| (key.to_owned(), bytes(text)))
    .into();
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some([("app".to_owned(), "istiod".to_owned())].into()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    }
}

fn bytes(text: &str) -> ByteString {
    ByteString(text.as_bytes().to_vec())
}

/// `None` where it is missing or empty.
fn text(secret: &Secret, key: &'static str) -> Result<Option<String>, CaSecretError> {
    let Some(bytes) = secret.data.as_ref().and_then(|data| data.get(key)) else {
        return Ok(None);
    };
    match std::str::from_utf8(&bytes.0) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(CaSecretError::NotText(key)),
    }
}

fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use adit_shared::identity::TrustDomain;

    use super::*;

    fn ca() -> CaFiles {
        LocalCa::generate(&TrustDomain::default())
            .expect("a CA")
            .to_files()
    }

    #[test]
    fn what_is_written_is_read() {
        let own = ca();
        let read = files(&own_secret("istio-system", &own)).expect("usable");
        assert_eq!(read.certificate, own.certificate);
        assert_eq!(read.roots, own.roots);

        let rotation = Previous {
            files: own.clone(),
            next: ca().certificate,
            since: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        };
        let read = previous(&previous_secret("istio-system", &rotation)).expect("usable");
        assert_eq!((read.next, read.since), (rotation.next, rotation.since));
        assert_eq!(read.files.key, own.key);
    }

    #[test]
    fn a_secret_of_istio_has_no_roots() {
        let own = ca();
        let mut secret = own_secret("istio-system", &own);
        let data = secret.data.as_mut().expect("data");
        data.insert(ROOTS.into(), bytes(""));
        data.remove(CHAIN);
        assert_eq!(files(&secret).expect("usable").roots, own.certificate);
    }

    #[test]
    fn what_is_no_authority_says_why() {
        let broken = |change: fn(&mut BTreeMap<String, ByteString>)| {
            let mut secret = own_secret("istio-system", &ca());
            change(secret.data.as_mut().expect("data"));
            files(&secret).err().expect("unusable").to_string()
        };
        for (change, expected) in [
            (
                (|data| drop(data.remove(KEY))) as fn(&mut BTreeMap<_, _>),
                "ca-key.pem is missing",
            ),
            (
                |data| drop(data.insert(CERTIFICATE.into(), ByteString(vec![0xff]))),
                "ca-cert.pem is not text",
            ),
            (
                |data| drop(data.insert(KEY.into(), bytes(&ca().key))),
                "ca-key.pem is not its key",
            ),
        ] {
            let error = broken(change);
            assert!(error.contains(expected), "{error}");
        }
    }
}
