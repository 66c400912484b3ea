//! The CA client against a certificate service over real TLS on loopback: what it
//! sends, what it makes of the answers, and that it comes back after every loss.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::identity::{
    CaClient, CaClientOptions, CacheOptions, CertificateAuthority, CertificateCache,
    CertificateRequest, ControlPlaneEndpoint, ControlPlaneError, LocalCa, SignError, SpiffeId,
    TokenSource, TrustBundle, TrustDomain, WorkloadCertificate, control_plane_incoming,
    control_plane_server_config,
};
use adit_shared::proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use adit_shared::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prost_types::value::Kind;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

const HOUR: Duration = Duration::from_secs(3600);

/// Signs for whoever has the token, and remembers what it was asked.
#[derive(Clone)]
struct Service {
    ca: Arc<LocalCa>,
    seen: Arc<Mutex<Vec<(String, i64)>>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| {
            let value = request.metadata().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        if header("authorization").as_deref() != Some("Bearer the-token") {
            return Err(Status::unauthenticated("no"));
        }
        assert_eq!(header("clusterid").as_deref(), Some("Kubernetes"));
        let request = request.into_inner();
        let fields = request.metadata.unwrap_or_default().fields;
        let kind = fields
            .get("ImpersonatedIdentity")
            .and_then(|v| v.kind.clone());
        let Some(Kind::StringValue(uri)) = kind else {
            return Err(Status::invalid_argument("whose?"));
        };
        self.seen
            .lock()
            .push((uri.clone(), request.validity_duration));
        let identity: SpiffeId = uri.parse().map_err(|_| Status::invalid_argument("form"))?;
        let signed = self
            .ca
            .sign(&request.csr, &identity, HOUR)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: signed.to_pem_parts(),
        }))
    }
}

struct Server {
    service: Service,
    address: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(ca: &Arc<LocalCa>, address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = ca
            .issue_serving(&["localhost"], &[address.ip()], HOUR)
            .unwrap();
        let config = control_plane_server_config(serving.into_identity()).unwrap();
        let incoming = control_plane_incoming(listener, Arc::new(ArcSwap::from_pointee(config)));
        let service = Service {
            ca: ca.clone(),
            seen: Arc::default(),
        };
        let server = IstioCertificateServiceServer::new(service.clone());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .serve_with_incoming_shutdown(server, incoming, async {
                    let _ = stopped.await;
                })
                .await
                .unwrap();
        });
        Self {
            service,
            address,
            stop,
            task,
        }
    }

    fn client(&self, roots: TrustBundle, token: TokenSource) -> CaClient {
        let address = format!("https://{}", self.address);
        let endpoint = ControlPlaneEndpoint::new(&address, Arc::new(roots), None).unwrap();
        CaClient::new(
            &endpoint,
            CaClientOptions {
                token,
                cluster_id: "Kubernetes".into(),
                impersonate: true,
                headers: Vec::new(),
            },
        )
    }
}

fn ca() -> Arc<LocalCa> {
    Arc::new(LocalCa::generate(&TrustDomain::default()).unwrap())
}

fn roots(ca: &LocalCa) -> TrustBundle {
    TrustBundle::from_pem(&ca.root_pem()).unwrap()
}

fn cart() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

async fn sign(client: &CaClient) -> Result<WorkloadCertificate, SignError> {
    let request = CertificateRequest::new(&cart()).unwrap();
    let signed = client.sign(&cart(), request.csr_pem(), 24 * HOUR).await?;
    let now = SystemTime::now();
    Ok(WorkloadCertificate::new(&cart(), signed, request.into_key(), now).unwrap())
}

#[tokio::test]
async fn gets_a_certificate_in_the_name_of_a_workload() {
    let ca = ca();
    let server = Server::start(&ca, "127.0.0.1:0").await;
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "wrong\n").unwrap();
    let client = server.client(roots(&ca), TokenSource::File(token.clone()));

    let refused = sign(&client).await.unwrap_err();
    assert!(matches!(&refused, SignError::Refused(_)), "{refused}");

    // The token file is read for each call.
    std::fs::write(&token, "the-token\n").unwrap();
    sign(&client).await.unwrap();
    let seen = server.service.seen.lock().clone();
    assert_eq!(seen, [(cart().to_string(), 86_400)]);

    std::fs::remove_file(&token).unwrap();
    let error = sign(&client).await.unwrap_err();
    assert!(matches!(&error, SignError::Unreachable(_)), "{error}");
    assert!(error.to_string().contains("token"), "{error}");
}

#[tokio::test]
async fn gives_no_token_to_a_stranger() {
    let (ours, theirs) = (ca(), ca());
    let server = Server::start(&theirs, "127.0.0.1:0").await;
    let client = server.client(roots(&ours), TokenSource::Literal("the-token".into()));
    let error = sign(&client).await.unwrap_err();
    assert!(matches!(&error, SignError::Unreachable(_)), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(server.service.seen.lock().is_empty());
}

#[tokio::test]
async fn comes_back_after_the_authority_was_away() {
    let ca = ca();
    let server = Server::start(&ca, "127.0.0.1:0").await;
    let address = server.address.to_string();
    let client = server.client(roots(&ca), TokenSource::Literal("the-token".into()));
    sign(&client).await.unwrap();

    // Closes the listener and every connection.
    drop(server.stop);
    server.task.await.unwrap();
    let error = sign(&client).await.unwrap_err();
    assert!(matches!(&error, SignError::Unreachable(_)), "{error}");

    let _server = Server::start(&ca, &address).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while let Err(error) = sign(&client).await {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn follows_a_rotated_root() {
    let (old, new) = (ca(), ca());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    std::fs::write(&path, old.root_pem()).unwrap();
    let server = Server::start(&new, "127.0.0.1:0").await;
    let token = TokenSource::Literal("the-token".into());
    let client = server.client(TrustBundle::from_file(&path), token);
    assert!(sign(&client).await.is_err());
    std::fs::write(&path, old.root_pem() + &new.root_pem()).unwrap();
    sign(&client).await.unwrap();
}

#[tokio::test]
async fn feeds_the_cache() {
    let ca = ca();
    let server = Server::start(&ca, "[::1]:0").await;
    let client = server.client(roots(&ca), TokenSource::Literal("the-token".into()));
    let cache = CertificateCache::new(Arc::new(client), CacheOptions::default());
    let certificate = cache.get(&cart()).await.unwrap();
    assert_eq!(certificate.identity(), &cart());
    assert_eq!(cache.snapshot().len(), 1);
}

#[tokio::test]
async fn slow_clients_hold_up_nobody() {
    let ca = ca();
    let server = Server::start(&ca, "127.0.0.1:0").await;
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(
            tokio::net::TcpStream::connect(server.address)
                .await
                .unwrap(),
        );
    }
    let client = server.client(roots(&ca), TokenSource::Literal("the-token".into()));
    let signed = tokio::time::timeout(Duration::from_secs(5), sign(&client));
    signed.await.unwrap().unwrap();
}

#[test]
fn refuses_addresses_that_would_leak_a_token() {
    let roots = Arc::new(roots(&ca()));
    let endpoint = |address, name| ControlPlaneEndpoint::new(address, roots.clone(), name);
    for address in [
        "",
        "aditd:15012",
        "http://aditd:15012",
        "https://",
        "https://:15012",
        "https://a_b\u{7f}/",
    ] {
        let error = endpoint(address, None).unwrap_err();
        assert!(
            matches!(error, ControlPlaneError::Address { .. }),
            "{address}"
        );
    }
    assert!(endpoint("https://aditd", Some("not a name")).is_err());
    assert!(endpoint("https://aditd", Some("istiod.istio-system.svc")).is_ok());
    assert!(endpoint("https://[fd00::1]:15012", None).is_ok());
}
