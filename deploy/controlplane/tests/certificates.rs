//! The certificate service and the enrolment reports, over TCP and TLS.

mod support;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::identity::{
    CaClient, CaClientOptions, CacheOptions, CertificateAuthority, CertificateCache,
    CertificateError, CertificateRequest, CertificateState, SignError, SpiffeId, TokenSource,
    WorkloadCertificate,
};
use adit_shared::proto::ca::IstioCertificateRequest;
use adit_shared::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use adit_shared::proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use adit_shared::proto::enrolment::{EnrolmentReport, EnrolmentState, PodEnrolment};
use adit_shared::telemetry::Metrics;
use parking_lot::Mutex;
use support::Mesh;
use tonic::Code;

fn id(text: &str) -> SpiffeId {
    text.parse().expect("legal")
}

fn client(mesh: &Mesh, token: TokenSource, impersonate: bool) -> CaClient {
    let options = CaClientOptions {
        token,
        cluster_id: "Kubernetes".into(),
        impersonate,
        headers: vec![],
    };
    CaClient::new(&mesh.endpoint(), options)
}

fn pod_token(mesh: &Mesh, namespace: &str, account: &str, node: &str) -> TokenSource {
    let claims = mesh.claims(namespace, account, node);
    TokenSource::Literal(mesh.sign(&claims).into())
}

async fn ask(
    client: &CaClient,
    identity: &SpiffeId,
    ttl: Duration,
) -> Result<WorkloadCertificate, SignError> {
    let request = CertificateRequest::new(identity).expect("a key");
    let signed = client.sign(identity, request.csr_pem(), ttl).await?;
    Ok(
        WorkloadCertificate::new(identity, signed, request.into_key(), SystemTime::now())
            .expect("what is issued is valid"),
    )
}

#[tokio::test]
async fn a_node_gets_certificates_for_its_own_pods() {
    let mesh = Mesh::start().await;
    let client = client(&mesh, mesh.node_token("n1"), true);
    let cart = id("spiffe://cluster.local/ns/shop/sa/cart");
    let certificate = ask(&client, &cart, Duration::from_secs(600))
        .await
        .expect("issued");
    assert_eq!(certificate.identity(), &cart);
    let left = certificate
        .not_after()
        .duration_since(SystemTime::now())
        .expect("valid");
    assert!(left <= Duration::from_secs(600) && left > Duration::from_secs(500));
    assert_eq!(mesh.serving().metrics().certificates_issued.get(), 1);
}

/// One thread, so that what the cache's task logs is logged here.
#[tokio::test]
async fn a_refusal_is_told_by_name_and_disturbs_no_other_identity() {
    let log = Log::default();
    let sink = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .finish();
    let _logging = tracing::subscriber::set_default(subscriber);

    let mesh = Mesh::start().await;
    let authority = client(&mesh, mesh.node_token("n1"), true);
    let cache = CertificateCache::new(Arc::new(authority), CacheOptions::default());
    let metrics = Metrics::new("ztunnel", "test");
    metrics.watch_certificates(cache.clone());
    let cart = id("spiffe://cluster.local/ns/shop/sa/cart");
    // Its pods are on the other node.
    let pay = id("spiffe://cluster.local/ns/shop/sa/pay");
    let (allowed, refused) = tokio::join!(cache.get(&cart), cache.get(&pay));
    let certificate = allowed.expect("issued");
    let error = refused.expect_err("not on this node");
    assert!(
        matches!(&error, CertificateError::Sign(SignError::Refused(_))),
        "{error}"
    );

    for status in cache.snapshot() {
        match status.state {
            CertificateState::Available => assert_eq!(status.identity, cart),
            CertificateState::Unavailable(why) => {
                assert_eq!(status.identity, pay);
                assert_eq!(why.to_string(), error.to_string());
            }
            CertificateState::Initializing => panic!("{} is still waited for", status.identity),
        }
    }
    let text = metrics.encode();
    let count = |reason: &str| {
        let name = format!("adit_certificate_fetch_failures_total{{reason=\"{reason}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.and_then(|count| count.parse::<u64>().ok())
    };
    assert!(count("refused") >= Some(1), "{text}");
    assert_eq!(count("unreachable"), Some(0));
    let log = log.text();
    let mut lines = log
        .lines()
        .filter(|l| l.contains("certificate not fetched"));
    assert!(
        lines.next().is_some_and(|l| l.contains("WARN")
            && l.contains(&pay.to_string())
            && l.contains("refused")),
        "{log}"
    );
    // The same one is still in use, and nothing of the other one's trouble is its own.
    let again = cache.try_get(&cart).expect("still there");
    assert_eq!(again.facts().serial, certificate.facts().serial);
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock()).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_waypoint_gets_its_own_identity_and_no_other() {
    let mesh = Mesh::start().await;
    let own = id("spiffe://cluster.local/ns/shop/sa/waypoint");
    let token = || pod_token(&mesh, "shop", "waypoint", "n1");
    let certificate = ask(
        &client(&mesh, token(), false),
        &own,
        Duration::from_secs(600),
    )
    .await
    .expect("issued");
    assert_eq!(certificate.identity(), &own);
    // A pod of its own node, for which a ztunnel would get one.
    let cart = id("spiffe://cluster.local/ns/shop/sa/cart");
    let refused = ask(
        &client(&mesh, token(), true),
        &cart,
        Duration::from_secs(600),
    )
    .await;
    assert!(refused.is_err());
}

#[tokio::test]
async fn the_maximum_decides_over_what_is_asked_for() {
    let mesh = Mesh::start().await;
    let client = client(&mesh, mesh.node_token("n1"), true);
    let cart = id("spiffe://cluster.local/ns/shop/sa/cart");
    let day = Duration::from_secs(24 * 3600);
    for (asked, allowed) in [(day, 7200), (Duration::ZERO, 3600)] {
        let certificate = ask(&client, &cart, asked).await.expect("issued");
        let left = certificate
            .not_after()
            .duration_since(SystemTime::now())
            .expect("valid");
        assert!(left <= Duration::from_secs(allowed), "{left:?}");
        assert!(left > Duration::from_secs(allowed - 100), "{left:?}");
    }
}

#[tokio::test]
async fn everybody_else_is_refused_without_detail() {
    let mesh = Mesh::start().await;
    let cart = "spiffe://cluster.local/ns/shop/sa/cart";
    let mut expired = mesh.claims("istio-system", "ztunnel", "n1");
    expired["exp"] = (jsonwebtoken::get_current_timestamp() - 120).into();
    let mut audience = mesh.claims("istio-system", "ztunnel", "n1");
    audience["aud"] = "api".into();
    let literal = |claims| TokenSource::Literal(mesh.sign(claims).into());
    let cases = [
        ("not_on_node", mesh.node_token("n2"), cart),
        (
            "not_on_node",
            mesh.node_token("n1"),
            "spiffe://cluster.local/ns/shop/sa/pay",
        ),
        (
            "trust_domain",
            mesh.node_token("n1"),
            "spiffe://other.mesh/ns/shop/sa/cart",
        ),
        (
            "not_a_node_proxy",
            pod_token(&mesh, "shop", "cart", "n1"),
            cart,
        ),
        (
            "not_a_node_proxy",
            pod_token(&mesh, "istio-system", "istiod", "n1"),
            cart,
        ),
        ("expired", literal(&expired), cart),
        ("audience", literal(&audience), cart),
    ];
    for (reason, token, identity) in cases {
        let client = client(&mesh, token, true);
        let refused = ask(&client, &id(identity), Duration::from_secs(600)).await;
        match refused {
            Err(SignError::Refused(text)) => {
                assert_eq!(text, "Unauthenticated: authentication failure", "{reason}");
            }
            other => panic!("{reason}: {other:?}"),
        }
    }
    let metrics = mesh.serving().metrics();
    assert_eq!(metrics.certificate_refusals.get("not_on_node"), 2);
    assert_eq!(metrics.certificate_refusals.get("trust_domain"), 1);
    assert_eq!(metrics.certificate_refusals.get("not_a_node_proxy"), 2);
    assert_eq!(metrics.authentication_failures.get("invalid"), 2);
    assert_eq!(metrics.certificates_issued.get(), 0);
}

#[tokio::test]
async fn a_pod_gets_its_own_identity_and_no_other() {
    let mesh = Mesh::start().await;
    let token = pod_token(&mesh, "shop", "gateway", "n1");
    let client = client(&mesh, token, false);
    let own = id("spiffe://cluster.local/ns/shop/sa/gateway");
    let certificate = ask(&client, &own, Duration::from_secs(600)).await;
    assert_eq!(certificate.expect("issued").identity(), &own);
}

#[tokio::test]
async fn a_bad_request_to_sign_says_why() {
    let mesh = Mesh::start().await;
    let mut client = IstioCertificateServiceClient::new(mesh.endpoint().channel());
    let rsa_like = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
    for csr in ["", "junk", rsa_like] {
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr: csr.to_owned(),
            ..IstioCertificateRequest::default()
        });
        let token = pod_token(&mesh, "shop", "cart", "n1");
        let token = token.authorization().expect("a token");
        request.metadata_mut().insert("authorization", token);
        let status = client.create_certificate(request).await.expect_err("junk");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(
            status.message().contains("certificate signing request"),
            "{status:?}"
        );
    }
    assert_eq!(mesh.serving().metrics().csr_errors.get(), 3);
}

#[tokio::test]
async fn only_the_proxy_of_a_node_reports_for_it() {
    let mesh = Mesh::start().await;
    let mut client = EnrolmentServiceClient::new(mesh.endpoint().channel());
    let pods = vec![PodEnrolment {
        uid: "u1".into(),
        state: EnrolmentState::Enrolled.into(),
        message: String::new(),
    }];
    let report = EnrolmentReport {
        node: "n1".into(),
        pods: pods.clone(),
    };
    let cases = [
        (mesh.node_token("n2"), Code::PermissionDenied),
        (
            pod_token(&mesh, "shop", "cart", "n1"),
            Code::PermissionDenied,
        ),
        (TokenSource::Literal("junk".into()), Code::Unauthenticated),
        (mesh.node_token("n1"), Code::Ok),
    ];
    for (token, expected) in cases {
        assert_eq!(mesh.reports.of("n1"), None);
        let mut request = tonic::Request::new(report.clone());
        let token = token.authorization().expect("a token");
        request.metadata_mut().insert("authorization", token);
        let code = match client.report_enrolment(request).await {
            Ok(_) => Code::Ok,
            Err(status) => status.code(),
        };
        assert_eq!(code, expected);
    }
    assert_eq!(mesh.reports.of("n1"), Some(pods));
}
