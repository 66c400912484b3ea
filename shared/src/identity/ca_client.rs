//! Istio's certificate service, seen from a node
//! (`istio.v1.auth.IstioCertificateService/CreateCertificate`).

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::{
    CertificateAuthority, ControlPlaneEndpoint, SignError, SignedChain, SpiffeId, TokenSource,
};
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;

/// No answer of a certificate authority is longer.
const MAX_RESPONSE: usize = 1 << 20;

/// How to present ourselves to the certificate service.
#[derive(Debug, Clone)]
pub struct CaClientOptions {
    /// Sent as `authorization: Bearer`.
    pub token: TokenSource,
    /// Sent as `clusterid`.
    pub cluster_id: String,
    /// Ask in the name of the identity (`ImpersonatedIdentity`): for a node that serves
    /// many workloads. Otherwise the certificate is for the caller's own identity.
    pub impersonate: bool,
    /// Further headers (`CA_HEADER_*`).
    pub headers: Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>,
}

/// A certificate authority behind gRPC and TLS.
#[derive(Debug, Clone)]
pub struct CaClient {
    client: IstioCertificateServiceClient<Channel>,
    options: CaClientOptions,
}

impl CaClient {
    /// A client of the service at `endpoint`. Connects on first use; must be used within
    /// a tokio runtime.
    pub fn new(endpoint: &ControlPlaneEndpoint, options: CaClientOptions) -> Self {
        let client = IstioCertificateServiceClient::new(endpoint.channel())
            .max_decoding_message_size(MAX_RESPONSE);
        Self { client, options }
    }

    async fn create(
        &self,
        identity: &SpiffeId,
        csr_pem: &str,
        ttl: Duration,
    ) -> Result<SignedChain, SignError> {
        let metadata = self.options.impersonate.then(|| Struct {
            fields: [(
                "ImpersonatedIdentity".to_owned(),
                Value {
                    kind: Some(Kind::StringValue(identity.to_string())),
                },
            )]
            .into(),
        });
        let mut request = Request::new(IstioCertificateRequest {
            csr: csr_pem.into(),
            validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            metadata,
        });
        let authorization = self
            .options
            .token
            .authorization()
            .map_err(|e| SignError::Unreachable(e.to_string()))?;
        let headers = request.metadata_mut();
        headers.insert("authorization", authorization);
        if let Ok(cluster) = self.options.cluster_id.parse() {
            headers.insert("clusterid", cluster);
        }
        for (name, value) in &self.options.headers {
            headers.insert(name.clone(), value.clone());
        }
        // A clone shares the connection.
        let response = self.client.clone().create_certificate(request).await;
        let response = response.map_err(sign_error)?;
        SignedChain::from_pem_parts(&response.into_inner().cert_chain)
    }
}

impl CertificateAuthority for CaClient {
    fn sign<'a>(
        &'a self,
        identity: &'a SpiffeId,
        csr_pem: &'a str,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
        self.create(identity, csr_pem, ttl).boxed()
    }
}

/// Whether the authority said no or could not be asked.
fn sign_error(status: Status) -> SignError {
    let text = describe(&status);
    match status.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::Unimplemented => SignError::Refused(text),
        _ => SignError::Unreachable(text),
    }
}

/// The status with its causes: tonic hides "connection refused" behind "transport error".
fn describe(status: &Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
