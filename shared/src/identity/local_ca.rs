//! A certificate authority whose key is here: the control plane's own, and the one that
//! tests use. Either self-signed or an intermediate plugged in by the operator
//! (Istio's `cacerts`: `ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`, `root-cert.pem`).

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, X509Certificate, X509CertificationRequest};

use super::authority::{certificate_pem, pem_block};
use super::derived::DerivedSecret;
use super::{
    CertificateAuthority, CertificateFacts, CertificateInvalid, CertificateRequest,
    ControlPlaneIdentity, SignError, SignedChain, SpiffeId, TrustDomain, WorkloadCertificate,
};

/// How long a generated root is valid.
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The longest validity that is given to a leaf, as in Istio.
const MAX_LEAF_TTL: Duration = Duration::from_secs(90 * 24 * 3600);
/// Leaves are valid from a little before now: the clocks of nodes differ.
const BACKDATE: Duration = Duration::from_secs(60);

/// A certificate authority that holds its key.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    /// The certificate that signs.
    certificate: CertificateDer<'static>,
    /// What goes between the leaf and the roots, nearest to the leaf first.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

/// The four PEM files of a certificate authority, by Istio's names.
#[derive(Clone)]
pub struct CaFiles {
    /// `ca-cert.pem`: the certificate that signs.
    pub certificate: String,
    /// `ca-key.pem`: its key.
    pub key: String,
    /// `cert-chain.pem`: from the signing certificate up to, with or without, the root.
    pub chain: String,
    /// `root-cert.pem`: the roots that workloads trust.
    pub roots: String,
}

impl CaFiles {
    const NAMES: [&'static str; 4] = [
        "ca-cert.pem",
        "ca-key.pem",
        "cert-chain.pem",
        "root-cert.pem",
    ];

    /// Reads the four files of `directory`.
    ///
    /// # Errors
    /// [`LocalCaError::File`] that names the file.
    pub fn read(directory: &Path) -> Result<Self, LocalCaError> {
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).map_err(|source| LocalCaError::File { path, source })
        };
        let [certificate, key, chain, roots] = Self::NAMES;
        Ok(Self {
            certificate: read(certificate)?,
            key: read(key)?,
            chain: read(chain)?,
            roots: read(roots)?,
        })
    }

    /// Writes the four files into `directory`, the key readable by the owner only. The
    /// key is written last: a directory without it is not a certificate authority.
    ///
    /// # Errors
    /// [`LocalCaError::File`] that names the file.
    pub fn write(&self, directory: &Path) -> Result<(), LocalCaError> {
        let write = |name: &str, text: &str, mode: u32| {
            let path = directory.join(name);
            replace_file(&path, text, mode).map_err(|source| LocalCaError::File { path, source })
        };
        let [certificate, key, chain, roots] = Self::NAMES;
        write(certificate, &self.certificate, 0o644)?;
        write(chain, &self.chain, 0o644)?;
        write(roots, &self.roots, 0o644)?;
        write(key, &self.key, 0o600)
    }
}

/// Writes beside `path` and renames, so that no reader sees half a file.
fn replace_file(path: &Path, text: &str, mode: u32) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // A left-over of a crash could have another mode.
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

impl LocalCa {
    /// A new self-signed root: P-256, ten years.
    ///
    /// # Errors
    /// [`LocalCaError::Generate`] when no key can be made.
    pub fn generate(trust_domain: &TrustDomain) -> Result<Self, LocalCaError> {
        let key = KeyPair::generate().map_err(LocalCaError::Generate)?;
        let mut params = ca_params(
            trust_domain.as_str(),
            ROOT_TTL,
            BasicConstraints::Unconstrained,
        );
        params.use_authority_key_identifier_extension = true;
        let root = params.self_signed(&key).map_err(LocalCaError::Generate)?;
        let root = CertificateDer::from(root);
        Self::assemble(root.clone(), key, Vec::new(), vec![root])
    }

    /// A new intermediate signed by this authority, for a second control plane or for a
    /// root that is kept elsewhere.
    ///
    /// # Errors
    /// [`LocalCaError::Generate`] when no key can be made.
    pub fn intermediate(&self, name: &str, ttl: Duration) -> Result<Self, LocalCaError> {
        let key = KeyPair::generate().map_err(LocalCaError::Generate)?;
        let mut params = ca_params(name, ttl, BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        let signed = params
            .signed_by(&key, &self.issuer)
            .map_err(LocalCaError::Generate)?;
        let certificate = CertificateDer::from(signed);
        let mut intermediates = vec![certificate.clone()];
        intermediates.extend(self.intermediates.iter().cloned());
        Self::assemble(certificate, key, intermediates, self.roots.clone())
    }

    /// An authority from its PEM files.
    ///
    /// # Errors
    /// [`LocalCaError`] when a file is not PEM, the key does not belong to the
    /// certificate, or a certificate signed by it would not verify against the roots.
    pub fn from_files(files: &CaFiles) -> Result<Self, LocalCaError> {
        let read = |name: &'static str, pem: &str| {
            let invalid = |reason: String| LocalCaError::Invalid { name, reason };
            let all = CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| invalid(e.to_string()))?;
            if all.is_empty() {
                return Err(invalid("it holds no certificate".into()));
            }
            Ok(all)
        };
        let certificate = read("ca-cert.pem", &files.certificate)?.swap_remove(0);
        let chain = read("cert-chain.pem", &files.chain)?;
        let roots = read("root-cert.pem", &files.roots)?;
        let key = KeyPair::from_pem(&files.key).map_err(|e| LocalCaError::Invalid {
            name: "ca-key.pem",
            reason: e.to_string(),
        })?;

        // Peers have the roots; sending them in the chain would be waste.
        let mut intermediates: Vec<_> = chain.into_iter().filter(|c| !roots.contains(c)).collect();
        if !roots.contains(&certificate) && !intermediates.contains(&certificate) {
            intermediates.insert(0, certificate.clone());
        }
        Self::assemble(certificate, key, intermediates, roots)
    }

    /// Reads the authority in `directory`.
    ///
    /// # Errors
    /// As [`CaFiles::read`] and [`Self::from_files`].
    pub fn load(directory: &Path) -> Result<Self, LocalCaError> {
        Self::from_files(&CaFiles::read(directory)?)
    }

    /// Reads the authority in `directory`, or generates one there if it has none.
    ///
    /// # Errors
    /// As [`Self::load`] and [`Self::generate`]; an unusable authority is an error and
    /// is never replaced.
    pub fn load_or_generate(
        directory: &Path,
        trust_domain: &TrustDomain,
    ) -> Result<Self, LocalCaError> {
        let key = directory.join(CaFiles::NAMES[1]);
        if key.exists() {
            return Self::load(directory);
        }
        let ca = Self::generate(trust_domain)?;
        fs::create_dir_all(directory).map_err(|source| LocalCaError::File {
            path: directory.into(),
            source,
        })?;
        ca.to_files().write(directory)?;
        Ok(ca)
    }

    /// The authority as PEM files. Contains the private key.
    pub fn to_files(&self) -> CaFiles {
        let chain = match self.intermediates.as_slice() {
            [] => certificate_pem(&self.certificate),
            some => some.iter().map(|c| certificate_pem(c)).collect(),
        };
        CaFiles {
            certificate: certificate_pem(&self.certificate),
            key: pem_block("PRIVATE KEY", self.issuer.key().serialized_der()),
            chain,
            roots: self.root_pem(),
        }
    }

    /// A secret for `purpose` that every replica with this authority's key makes alike.
    pub fn derive_secret(&self, purpose: &str) -> DerivedSecret {
        DerivedSecret::of(self.issuer.key().serialized_der(), purpose)
    }

    /// The roots as PEM: the `root-cert.pem` that clients are given.
    pub fn root_pem(&self) -> String {
        self.roots.iter().map(|c| certificate_pem(c)).collect()
    }

    /// End of the signing certificate's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs the public key of `csr_pem` for `identity`. Everything else that the CSR
    /// asks for is ignored; that its sender has the private key is verified.
    ///
    /// The validity is `ttl`, but at most 90 days and not beyond our own.
    ///
    /// # Errors
    /// [`LocalCaError::Request`] when the CSR is malformed, its signature is wrong or
    /// its key is not ECDSA P-256 or P-384; [`LocalCaError::Expired`].
    pub fn sign(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<SignedChain, LocalCaError> {
        let public_key = verified_public_key(csr_pem)?;
        let uri = identity.to_string().try_into();
        let san = SanType::URI(uri.map_err(|e: rcgen::Error| LocalCaError::Sign(e))?);
        self.issue(&public_key, vec![san], ttl)
    }

    /// A certificate with a new key for a server of the control plane that is reached
    /// by `dns_names` and `addresses`.
    ///
    /// # Errors
    /// [`LocalCaError::Sign`] when a name is not a DNS name.
    pub fn issue_serving(
        &self,
        dns_names: &[&str],
        addresses: &[IpAddr],
        ttl: Duration,
    ) -> Result<ServingCertificate, LocalCaError> {
        let key = KeyPair::generate().map_err(LocalCaError::Generate)?;
        let mut sans = Vec::new();
        for name in dns_names {
            let name = (*name).try_into().map_err(LocalCaError::Sign)?;
            sans.push(SanType::DnsName(name));
        }
        sans.extend(addresses.iter().copied().map(SanType::IpAddress));
        let signed = self.issue(&key, sans, ttl)?;
        let leaf = signed.chain.first().ok_or(CertificateInvalid::NoLeaf)?;
        Ok(ServingCertificate {
            facts: CertificateFacts::read(leaf)?,
            chain: signed.chain,
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        })
    }

    fn issue(
        &self,
        public_key: &impl PublicKeyData,
        sans: Vec<SanType>,
        ttl: Duration,
    ) -> Result<SignedChain, LocalCaError> {
        let now = SystemTime::now();
        if now >= self.not_after {
            return Err(LocalCaError::Expired);
        }
        let end = (now + ttl.min(MAX_LEAF_TTL)).min(self.not_after);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = sans;
        params.serial_number = Some(random_serial());
        params.not_before = (now - BACKDATE).into();
        params.not_after = end.into();
        // Explicit, because only then does rcgen write the subject key identifier.
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params
            .signed_by(public_key, &self.issuer)
            .map_err(LocalCaError::Sign)?;
        let mut chain = vec![CertificateDer::from(leaf)];
        chain.extend(self.intermediates.iter().cloned());
        Ok(SignedChain {
            chain,
            roots: self.roots.clone(),
        })
    }

    fn assemble(
        certificate: CertificateDer<'static>,
        key: KeyPair,
        intermediates: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, LocalCaError> {
        let facts = CertificateFacts::read(&certificate)?;
        check_signing_certificate(&certificate, &key)?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|e| LocalCaError::Invalid {
                name: "ca-cert.pem",
                reason: e.to_string(),
            })?;
        let ca = Self {
            issuer,
            certificate,
            intermediates,
            roots,
            not_after: facts.not_after,
        };
        ca.self_check()?;
        Ok(ca)
    }

    /// Issues one certificate and verifies it as a workload would: nothing says more
    /// about a chain than a handshake's own check.
    fn self_check(&self) -> Result<(), LocalCaError> {
        let probe = SpiffeId::new(TrustDomain::default(), "adit-system", "probe")
            .map_err(|e| LocalCaError::Probe(e.to_string()))?;
        let probe_failed = |e: &dyn std::fmt::Display| LocalCaError::Probe(e.to_string());
        let request = CertificateRequest::new(&probe).map_err(|e| probe_failed(&e))?;
        let signed = self.sign(request.csr_pem(), &probe, Duration::from_secs(60))?;
        WorkloadCertificate::new(&probe, signed, request.into_key(), SystemTime::now())?;
        Ok(())
    }
}

impl std::fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalCa")
            .field("not_after", &self.not_after)
            .field("intermediates", &self.intermediates.len())
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

impl CertificateAuthority for LocalCa {
    fn sign<'a>(
        &'a self,
        identity: &'a SpiffeId,
        csr_pem: &'a str,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
        let signed = LocalCa::sign(self, csr_pem, identity, ttl);
        std::future::ready(signed.map_err(|e| SignError::Refused(e.to_string()))).boxed()
    }
}

/// A server certificate of the control plane with its key.
#[derive(Debug)]
pub struct ServingCertificate {
    /// Serial number, validity and PEM of the leaf.
    pub facts: CertificateFacts,
    chain: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl ServingCertificate {
    /// Chain and key, for [`super::control_plane_server_config`].
    pub fn into_identity(self) -> ControlPlaneIdentity {
        ControlPlaneIdentity {
            chain: self.chain,
            key: self.key.into(),
        }
    }
}

fn ca_params(name: &str, ttl: Duration, constraints: BasicConstraints) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, name.to_owned());
    params.serial_number = Some(random_serial());
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ttl).into();
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

/// 127 random bits: positive, as RFC 5280 4.1.2.2 wants it, and unguessable.
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    // A leading zero byte would have to be stripped from the encoding.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// The public key of a CSR whose signature proves possession of the private key.
fn verified_public_key(csr_pem: &str) -> Result<SubjectPublicKeyInfo, LocalCaError> {
    let bad = |reason: String| LocalCaError::Request(reason);
    let csr = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
        .map_err(|e| bad(format!("not PEM: {e}")))?;
    let (rest, csr) =
        X509CertificationRequest::from_der(&csr).map_err(|e| bad(format!("not a CSR: {e}")))?;
    if !rest.is_empty() {
        return Err(bad("bytes follow the CSR".into()));
    }
    csr.verify_signature()
        .map_err(|_| bad("its signature does not prove possession of the key".into()))?;
    let spki = csr.certification_request_info.subject_pki.raw;
    let key = SubjectPublicKeyInfo::from_der(spki).map_err(|e| bad(format!("its key: {e}")))?;
    let algorithm = key.algorithm();
    if algorithm != &rcgen::PKCS_ECDSA_P256_SHA256 && algorithm != &rcgen::PKCS_ECDSA_P384_SHA384 {
        return Err(bad("its key is not ECDSA P-256 or P-384".into()));
    }
    Ok(key)
}

/// That `certificate` may sign certificates and that `key` is its key.
fn check_signing_certificate(
    certificate: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<(), LocalCaError> {
    let invalid = |reason: &str| LocalCaError::Invalid {
        name: "ca-cert.pem",
        reason: reason.into(),
    };
    let (_, x509) = X509Certificate::from_der(certificate).map_err(|e| invalid(&e.to_string()))?;
    if !x509.is_ca() {
        return Err(invalid("it is not a CA certificate"));
    }
    if x509.public_key().raw != key.subject_public_key_info() {
        return Err(invalid("ca-key.pem is not its key"));
    }
    Ok(())
}

/// Why an authority cannot be had, or cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum LocalCaError {
    /// A file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file of the authority is unusable.
    #[error("{name}: {reason}")]
    Invalid {
        /// By Istio's name.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// No key or certificate could be made.
    #[error("cannot generate a certificate authority: {0}")]
    Generate(#[source] rcgen::Error),
    /// A test certificate could not be made.
    #[error("self-check of the certificate authority: {0}")]
    Probe(String),
    /// A certificate of this authority would not be accepted.
    #[error("certificates of this authority would be refused: {0}")]
    Useless(#[from] CertificateInvalid),
    /// The request is malformed or proves nothing.
    #[error("certificate signing request: {0}")]
    Request(String),
    /// The certificate could not be made.
    #[error("cannot sign: {0}")]
    Sign(#[source] rcgen::Error),
    /// Our own certificate is no longer valid.
    #[error("the certificate authority has expired")]
    Expired,
}

#[cfg(test)]
mod tests;
