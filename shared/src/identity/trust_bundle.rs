//! The roots that the control plane is verified against. The file is looked at on
//! every use, so a rotated root needs neither a restart nor a watcher; a file that is
//! broken or gone leaves the last good roots in force.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Root certificates from a PEM file, re-read when it changes, or from text.
#[derive(Debug)]
pub struct TrustBundle {
    path: Option<PathBuf>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    stamp: Option<Stamp>,
    roots: Option<Arc<RootCertStore>>,
}

/// What changes when a file is written, replaced, or its ConfigMap symlink is moved.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(m: &Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: m.ino(),
            length: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
        }
    }
}

impl TrustBundle {
    /// A bundle in `path`. The file need not exist yet.
    pub fn from_file(path: impl Into<PathBuf>) -> Self {
        Self {
            path: Some(path.into()),
            loaded: Mutex::new(Loaded {
                stamp: None,
                roots: None,
            }),
        }
    }

    /// A bundle that never changes.
    ///
    /// # Errors
    /// [`TrustBundleError`] when `pem` holds no usable certificate.
    pub fn from_pem(pem: &str) -> Result<Self, TrustBundleError> {
        let roots = parse(pem.as_bytes(), Path::new("inline"))?;
        Ok(Self {
            path: None,
            loaded: Mutex::new(Loaded {
                stamp: None,
                roots: Some(Arc::new(roots)),
            }),
        })
    }

    /// The roots as of now.
    ///
    /// # Errors
    /// [`TrustBundleError`] when they have never been readable. Once they have been, a
    /// broken file is logged and the last good roots are given.
    pub fn roots(&self) -> Result<Arc<RootCertStore>, TrustBundleError> {
        let mut loaded = self.loaded.lock();
        if let Some(path) = &self.path {
            match reload(path, loaded.stamp) {
                Ok(None) => {}
                Ok(Some((stamp, roots))) => {
                    tracing::info!(path = %path.display(), roots = roots.len(), "trust bundle loaded");
                    *loaded = Loaded {
                        stamp: Some(stamp),
                        roots: Some(Arc::new(roots)),
                    };
                }
                Err(error) if loaded.roots.is_none() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "trust bundle unusable; the last good one stays in force");
                }
            }
        }
        // `from_pem` sets the roots, and so did the reload above.
        loaded.roots.clone().ok_or(TrustBundleError::Empty {
            path: self.path.clone().unwrap_or_default(),
        })
    }
}

/// Reads `path` unless it still bears `known`.
fn reload(
    path: &Path,
    known: Option<Stamp>,
) -> Result<Option<(Stamp, RootCertStore)>, TrustBundleError> {
    let unreadable = |source| TrustBundleError::Unreadable {
        path: path.into(),
        source: Arc::new(source),
    };
    // The stamp is taken before the contents: a change in between is seen next time.
    let stamp = Stamp::from(&std::fs::metadata(path).map_err(unreadable)?);
    if known == Some(stamp) {
        return Ok(None);
    }
    let pem = std::fs::read(path).map_err(unreadable)?;
    Ok(Some((stamp, parse(&pem, path)?)))
}

fn parse(pem: &[u8], path: &Path) -> Result<RootCertStore, TrustBundleError> {
    let invalid = |reason: String| TrustBundleError::Invalid {
        path: path.into(),
        reason,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|e| invalid(e.to_string()))?;
        roots.add(certificate).map_err(|e| invalid(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(TrustBundleError::Empty { path: path.into() });
    }
    Ok(roots)
}

/// Why there are no roots.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TrustBundleError {
    /// The file cannot be read.
    #[error("cannot read the trust bundle {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Arc<std::io::Error>,
    },
    /// It holds something that is not a certificate.
    #[error("invalid trust bundle {path}: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It holds no certificate.
    #[error("the trust bundle {path} holds no certificate", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{LocalCa, TrustDomain};

    fn root_pem() -> String {
        let ca = LocalCa::generate(&TrustDomain::default()).expect("a CA");
        ca.root_pem()
    }

    #[test]
    fn follows_the_file_and_survives_a_broken_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("root-cert.pem");
        let bundle = TrustBundle::from_file(&path);
        assert!(matches!(
            bundle.roots(),
            Err(TrustBundleError::Unreadable { .. })
        ));

        std::fs::write(&path, root_pem()).expect("write");
        let first = bundle.roots().expect("loaded");
        assert!(Arc::ptr_eq(&first, &bundle.roots().expect("cached")));

        // Two roots during a rotation.
        std::fs::write(&path, root_pem() + &root_pem()).expect("write");
        let second = bundle.roots().expect("reloaded");
        assert_eq!((first.len(), second.len()), (1, 2));

        for broken in [
            "",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            std::fs::write(&path, broken).expect("write");
            let kept = bundle.roots().expect("the last good one");
            assert!(Arc::ptr_eq(&second, &kept));
        }
        std::fs::remove_file(&path).expect("remove");
        assert!(Arc::ptr_eq(&second, &bundle.roots().expect("kept")));
    }
}
