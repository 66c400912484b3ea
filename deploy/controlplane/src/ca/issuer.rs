//! Decides and signs. No I/O, so every refusal is a table test.
//!
//! The order is Istio's: the caller is known (by its token); if it asks in the name of
//! another it must be a node proxy, and that other must run on its node. Beyond Istio the
//! trust domain of the identity is compared too.

use std::sync::Arc;

use adit_shared::identity::{LocalCaError, SpiffeId, TrustDomain};
use adit_shared::proto::ca::IstioCertificateRequest;
use prost_types::value::Kind;

use super::{CurrentCa, PodDirectory, TtlPolicy};
use crate::auth::{Caller, TrustedAccounts};

/// The metadata field with the identity that a node asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// A CSR of the largest key that we take is well below this.
const MAX_CSR_BYTES: usize = 16 << 10;

/// Issues certificates to callers.
pub struct CertificateIssuer {
    ca: CurrentCa,
    pods: Arc<dyn PodDirectory>,
    trust_domain: TrustDomain,
    trusted: TrustedAccounts,
    ttl: TtlPolicy,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// An identity of another was asked for by one who is no node proxy.
    #[error("{IMPERSONATED} is for the service accounts of node proxies only")]
    NotANodeProxy,
    /// The token's pod is not, or no longer, there.
    #[error("the pod that the token names does not exist")]
    UnknownCaller,
    /// Not a SPIFFE id, or not text.
    #[error("{IMPERSONATED}: {0}")]
    Identity(String),
    /// An identity of another mesh.
    #[error("the identity {identity} is not of trust domain {ours}")]
    TrustDomain {
        /// What was asked for.
        identity: SpiffeId,
        /// What we issue for.
        ours: TrustDomain,
    },
    /// No pod with that identity on the caller's node.
    #[error("no pod of {identity} runs on the caller's node")]
    NotOnNode {
        /// What was asked for.
        identity: SpiffeId,
    },
    /// The request to sign.
    #[error("{0}")]
    Csr(String),
    /// Our own fault.
    #[error("signing failed: {0}")]
    Signing(LocalCaError),
}

impl Refusal {
    /// A short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotANodeProxy => "not_a_node_proxy",
            Self::UnknownCaller => "unknown_caller",
            Self::Identity(_) => "identity",
            Self::TrustDomain { .. } => "trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::Csr(_) => "csr",
            Self::Signing(_) => "signing",
        }
    }
}

impl CertificateIssuer {
    /// An issuer for the identities of `trust_domain`.
    pub fn new(
        ca: impl Into<CurrentCa>,
        pods: Arc<dyn PodDirectory>,
        trust_domain: TrustDomain,
        trusted: TrustedAccounts,
        ttl: TtlPolicy,
    ) -> Self {
        Self {
            ca: ca.into(),
            pods,
            trust_domain,
            trusted,
            ttl,
        }
    }

    /// The authority that signs.
    pub fn ca(&self) -> &CurrentCa {
        &self.ca
    }

    /// The service accounts of node proxies.
    pub fn trusted(&self) -> &TrustedAccounts {
        &self.trusted
    }

    /// Which pods there are.
    pub fn pods(&self) -> &Arc<dyn PodDirectory> {
        &self.pods
    }

    /// Answers a request of `caller`, who has been authenticated: the identity and the
    /// certificate chain for it as Istio's certificate service writes it.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn issue(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
    ) -> Result<(SpiffeId, Vec<String>), Refusal> {
        let identity = self.authorize(caller, request)?;
        if request.csr.len() > MAX_CSR_BYTES {
            return Err(Refusal::Csr(format!(
                "the certificate signing request is longer than {MAX_CSR_BYTES} bytes"
            )));
        }
        let ttl = self.ttl.decide(request.validity_duration);
        let chain =
            self.ca
                .get()
                .sign(&request.csr, &identity, ttl)
                .map_err(|error| match error {
                    LocalCaError::Request(_) => Refusal::Csr(error.to_string()),
                    error => Refusal::Signing(error),
                })?;
        Ok((identity, chain.to_pem_parts()))
    }

    fn authorize(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
    ) -> Result<SpiffeId, Refusal> {
        let field = request
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.fields.get(IMPERSONATED));
        let Some(field) = field else {
            return SpiffeId::new(
                self.trust_domain.clone(),
                &caller.namespace,
                &caller.service_account,
            )
            .map_err(|error| Refusal::Identity(error.to_string()));
        };
        if !self.trusted.contains(caller) {
            return Err(Refusal::NotANodeProxy);
        }
        if !self.pods.knows(caller) {
            return Err(Refusal::UnknownCaller);
        }
        let Some(Kind::StringValue(uri)) = &field.kind else {
            return Err(Refusal::Identity("is not a string".to_owned()));
        };
        let identity: SpiffeId = uri
            .parse()
            .map_err(|error| Refusal::Identity(format!("{error}")))?;
        if *identity.trust_domain() != self.trust_domain {
            return Err(Refusal::TrustDomain {
                identity,
                ours: self.trust_domain.clone(),
            });
        }
        let (namespace, account) = (identity.namespace(), identity.service_account());
        if !self.pods.runs_on(&caller.node, namespace, account) {
            return Err(Refusal::NotOnNode { identity });
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use adit_shared::identity::{
        CertificateRequest, LocalCa, SignedChain, TrustDomain, WorkloadCertificate,
    };
    use prost_types::{Struct, Value};

    use super::*;

    struct Pods;

    impl PodDirectory for Pods {
        fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
            (node, namespace, service_account) == ("n1", "shop", "cart")
        }

        fn knows(&self, caller: &Caller) -> bool {
            caller.pod_uid != "gone"
        }
    }

    fn issuer() -> CertificateIssuer {
        let domain = TrustDomain::default();
        CertificateIssuer::new(
            Arc::new(LocalCa::generate(&domain).expect("a CA")),
            Arc::new(Pods),
            domain,
            TrustedAccounts::default(),
            TtlPolicy {
                default: Duration::from_secs(3600),
                max: Duration::from_secs(7200),
            },
        )
    }

    fn caller(namespace: &str, service_account: &str, uid: &str, node: &str) -> Caller {
        Caller {
            namespace: namespace.into(),
            service_account: service_account.into(),
            pod_name: "p".into(),
            pod_uid: uid.into(),
            node: node.into(),
        }
    }

    fn request(csr: &str, impersonated: Option<Kind>) -> IstioCertificateRequest {
        IstioCertificateRequest {
            csr: csr.to_owned(),
            validity_duration: 24 * 3600,
            metadata: impersonated.map(|kind| Struct {
                fields: [(IMPERSONATED.to_owned(), Value { kind: Some(kind) })].into(),
            }),
        }
    }

    #[test]
    fn refusals_by_reason() {
        let issuer = issuer();
        let cart: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart"
            .parse()
            .expect("legal");
        let csr = CertificateRequest::new(&cart).expect("a key");
        let node = caller("istio-system", "ztunnel", "u", "n1");
        let uri = |text: &str| Some(Kind::StringValue(text.to_owned()));
        let good = || uri("spiffe://cluster.local/ns/shop/sa/cart");
        let cases = [
            (node.clone(), good(), "-"),
            (caller("shop", "cart", "u", "n1"), None, "-"),
            (
                caller("shop", "cart", "u", "n1"),
                good(),
                "not_a_node_proxy",
            ),
            (
                caller("shop", "ztunnel", "u", "n1"),
                good(),
                "not_a_node_proxy",
            ),
            (
                caller("istio-system", "ztunnel", "gone", "n1"),
                good(),
                "unknown_caller",
            ),
            (
                caller("istio-system", "ztunnel", "u", "n2"),
                good(),
                "not_on_node",
            ),
            (
                caller("istio-system", "ztunnel", "u", ""),
                good(),
                "not_on_node",
            ),
            (
                node.clone(),
                uri("spiffe://cluster.local/ns/shop/sa/other"),
                "not_on_node",
            ),
            (
                node.clone(),
                uri("spiffe://other.mesh/ns/shop/sa/cart"),
                "trust_domain",
            ),
            (
                node.clone(),
                uri("cluster.local/ns/shop/sa/cart"),
                "identity",
            ),
            (node.clone(), uri(""), "identity"),
            (node.clone(), Some(Kind::BoolValue(true)), "identity"),
        ];
        for (caller, impersonated, expected) in cases {
            let shown = format!("{caller}: {impersonated:?}");
            let got = issuer.issue(&caller, &request(csr.csr_pem(), impersonated));
            let got = got.as_ref().map_or_else(Refusal::reason, |_| "-");
            assert_eq!(got, expected, "{shown}");
        }
    }

    #[test]
    fn a_bad_request_to_sign_is_named() {
        let issuer = issuer();
        let caller = caller("shop", "cart", "u", "n1");
        let long = "x".repeat(MAX_CSR_BYTES + 1);
        for csr in ["", "junk", &long] {
            let refusal = issuer.issue(&caller, &request(csr, None));
            assert!(matches!(refusal, Err(Refusal::Csr(_))), "{csr:.20}");
        }
    }

    #[test]
    fn the_certificate_is_for_the_identity_and_no_longer_than_allowed() {
        let issuer = issuer();
        let caller = caller("shop", "cart", "u", "n1");
        let own: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart"
            .parse()
            .expect("legal");
        let other: SpiffeId = "spiffe://cluster.local/ns/shop/sa/admin"
            .parse()
            .expect("legal");
        // The names in the request to sign are ignored.
        let csr = CertificateRequest::new(&other).expect("a key");
        let (identity, chain) = issuer
            .issue(&caller, &request(csr.csr_pem(), None))
            .expect("issued");
        assert_eq!(identity, own);
        let signed = SignedChain::from_pem_parts(&chain).expect("PEM");
        let now = SystemTime::now();
        let certificate =
            WorkloadCertificate::new(&own, signed, csr.into_key(), now).expect("valid");
        let left = certificate
            .not_after()
            .duration_since(now)
            .expect("not expired");
        assert!(left <= Duration::from_secs(7200), "{left:?}");
        assert!(left > Duration::from_secs(7000), "{left:?}");
    }
}
