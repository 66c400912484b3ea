//! Bad peers, want of resources, and the life of the port itself.

mod support;

use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::serve::SnapshotBuilder;
use adit_shared::identity::control_plane_client_config;
use adit_shared::proto::ADDRESS_TYPE;
use adit_shared::proto::workload::Address;
use rustls::pki_types::ServerName;
use support::{Mesh, PATIENCE, Proxy, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

async fn tls(mesh: &Mesh) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = control_plane_client_config(mesh.trust().roots().expect("roots")).expect("TLS");
    let tcp = TcpStream::connect(mesh.address()).await.expect("open");
    let name = ServerName::try_from("aditd.istio-system.svc").expect("a name");
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .expect("a handshake")
}

/// Reads until the server closes; whatever it says first.
async fn closed(mut stream: impl tokio::io::AsyncRead + Unpin) {
    let mut sink = vec![];
    let read = timeout(PATIENCE, stream.read_to_end(&mut sink)).await;
    assert!(read.is_ok(), "still open");
}

#[tokio::test]
async fn bad_peers_are_closed_in_time_and_disturb_nobody() {
    let mesh = Mesh::start_with(
        |config| {
            config.connections.handshake = Duration::from_millis(300);
            config.connections.first_request = Duration::from_millis(300);
        },
        SnapshotBuilder::new().build(),
    )
    .await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;

    let silent = TcpStream::connect(mesh.address()).await.expect("open");
    let mut junk = TcpStream::connect(mesh.address()).await.expect("open");
    junk.write_all(b"GET / HTTP/1.1\r\n\r\n")
        .await
        .expect("sent");
    let idle = tls(&mesh).await;
    let mut not_http = tls(&mesh).await;
    not_http.write_all(&[0; 64]).await.expect("sent");
    closed(silent).await;
    closed(junk).await;
    closed(idle).await;
    closed(not_http).await;

    let failures = &mesh.serving().metrics().connection_failures;
    for reason in ["handshake_timeout", "handshake", "no_request", "http"] {
        eventually(reason, || failures.get(reason) == 1).await;
    }
    mesh.publish(|edit| {
        edit.set(ADDRESS_TYPE, "a", &Address::default());
    });
    proxy.holds(ADDRESS_TYPE, &["a"]).await;
    assert!(proxy.terminations().is_empty());
}

#[tokio::test]
async fn more_connections_than_allowed_wait_their_turn() {
    let mesh = Mesh::start_with(
        |config| {
            config.connections.connections = 2;
            config.connections.handshake = Duration::from_millis(500);
        },
        SnapshotBuilder::new().build(),
    )
    .await;
    let mut held = vec![];
    for _ in 0..2 {
        held.push(TcpStream::connect(mesh.address()).await.expect("open"));
    }
    // Both slots are taken by peers that say nothing, but not for long.
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    assert!(mesh.serving().metrics().connections.get() <= 2);
}

#[tokio::test]
async fn the_serving_certificate_is_renewed_without_a_restart() {
    let mesh = Mesh::start_with(
        |config| config.serving_ttl = Duration::from_secs(4),
        SnapshotBuilder::new().build(),
    )
    .await;
    let serial = async || {
        let stream = tls(&mesh).await;
        let (_, session) = stream.get_ref();
        session.peer_certificates().expect("sent")[0].to_vec()
    };
    let first = serial().await;
    let start = tokio::time::Instant::now();
    while serial().await == first {
        assert!(start.elapsed() < PATIENCE, "not renewed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Beyond the life of the first certificate.
    tokio::time::sleep_until(start + Duration::from_secs(5)).await;
    assert_ne!(serial().await, first);
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented_and_a_large_header_is_refused() {
    let mesh = Mesh::start().await;
    let stream = tls(&mesh).await;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let request = |path: &str, header: usize| {
        http::Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("x-large", "x".repeat(header))
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .expect("legal")
    };
    let answer = sender
        .send_request(request("/nobody/knows", 1))
        .await
        .expect("answered");
    assert_eq!(answer.headers()["grpc-status"], "12");
    let answer = sender.send_request(request("/nobody/knows", 200_000)).await;
    let refused = match answer {
        Ok(answer) => answer.status() == http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        Err(_) => true,
    };
    assert!(refused);
    drop(sender);
    connection.abort();
}

#[tokio::test]
async fn a_stop_ends_streams_at_once() {
    let mut mesh = Mesh::start().await;
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.ready().await;
    let idle = tls(&mesh).await;
    let start = tokio::time::Instant::now();
    assert!(mesh.stop().await);
    assert!(start.elapsed() < Duration::from_secs(8));
    closed(idle).await;
    proxy.wait("disconnected", |status| !status.connected).await;
}

/// A process that has lost a part of it is started anew, which it has to hear of.
#[tokio::test]
async fn a_part_that_ends_by_itself_is_told() {
    let mut mesh = Mesh::start().await;
    let ended = timeout(Duration::from_millis(100), mesh.serving_mut().ended()).await;
    assert!(ended.is_err(), "nothing has ended");
    mesh.end_snapshots();
    let ended = timeout(PATIENCE, mesh.serving_mut().ended()).await;
    assert!(ended.is_ok(), "nobody is told");
    assert!(mesh.stop().await);
}

/// Tokens are looked at before bodies, and asking in vain earns no place.
#[tokio::test]
async fn a_stranger_is_refused_before_its_body_and_does_not_stay() {
    let mesh = Mesh::start_with(
        |config| config.connections.first_request = Duration::from_millis(300),
        SnapshotBuilder::new().build(),
    )
    .await;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(tls(&mesh).await),
    )
    .await
    .expect("HTTP/2");
    let connection = tokio::spawn(connection);
    for method in [
        "/istio.v1.auth.IstioCertificateService/CreateCertificate",
        "/adit.mesh.v1.EnrolmentService/ReportEnrolment",
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    ] {
        // Announces a message of which nothing ever comes.
        let (_never, body) = tokio::sync::mpsc::channel::<Result<_, std::convert::Infallible>>(1);
        let body: tokio_stream::wrappers::ReceiverStream<
            Result<hyper::body::Frame<bytes::Bytes>, _>,
        > = body.into();
        let request = http::Request::post(format!("https://aditd{method}"))
            .header("content-type", "application/grpc")
            .body(http_body_util::StreamBody::new(body))
            .expect("a request");
        let response = timeout(Duration::from_secs(5), sender.send_request(request))
            .await
            .unwrap_or_else(|_| panic!("{method}: waits for the body"))
            .expect("an answer");
        let status = response.headers().get("grpc-status").expect("a status");
        assert_eq!(status, "16", "{method}");
    }
    timeout(PATIENCE, connection)
        .await
        .expect("still open")
        .expect("no panic")
        .ok();
    assert_eq!(
        mesh.serving()
            .metrics()
            .connection_failures
            .get("no_request"),
        1
    );
}
