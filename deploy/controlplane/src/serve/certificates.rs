//! Istio's certificate service over gRPC: [`CertificateIssuer`] decides, this answers.

use std::sync::Arc;

use adit_shared::proto::ca::istio_certificate_service_server::IstioCertificateService;
use adit_shared::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::gate::{self, unauthenticated};
use super::metrics::Metrics;
use crate::ca::{CertificateIssuer, Refusal};

pub(super) struct Certificates {
    pub(super) issuer: Arc<CertificateIssuer>,
    pub(super) metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        let caller = gate::caller(&extensions)?;
        match self.issuer.issue(&caller, &request) {
            Ok((identity, cert_chain)) => {
                self.metrics.certificates_issued.inc();
                info!(%caller, %identity, "certificate issued");
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(refusal) => {
                warn!(%caller, reason = %refusal, "certificate refused");
                self.metrics.certificate_refusals.inc(refusal.reason());
                Err(self.status(&refusal))
            }
        }
    }
}

impl Certificates {
    /// As istiod answers: what is wrong with a request to sign is told, why somebody may not
    /// have an identity is not.
    fn status(&self, refusal: &Refusal) -> Status {
        match refusal {
            Refusal::Csr(why) => {
                self.metrics.csr_errors.inc();
                Status::invalid_argument(why)
            }
            Refusal::Signing(_) => {
                self.metrics.sign_errors.inc();
                Status::internal("the certificate cannot be signed")
            }
            Refusal::NotANodeProxy
            | Refusal::UnknownCaller
            | Refusal::Identity(_)
            | Refusal::TrustDomain { .. }
            | Refusal::NotOnNode { .. } => unauthenticated(),
        }
    }
}
