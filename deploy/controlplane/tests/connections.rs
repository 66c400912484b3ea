//! Bad peers, want of resources, and the life of the port itself.

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::serve::{ResourceSnapshot, SnapshotBuilder};
use adit_shared::identity::control_plane_client_config;
use adit_shared::proto::security::Authorization;
use adit_shared::proto::workload::Address;
use adit_shared::proto::xds::DeltaDiscoveryRequest;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use prost::Message as _;
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

type Frames = tokio::sync::mpsc::Sender<Result<Frame<Bytes>, Infallible>>;

/// An xDS stream by hand, on a connection of its own.
struct Raw {
    frames: Frames,
    answer: tokio::task::JoinHandle<hyper::body::Incoming>,
}

impl Raw {
    /// `window` is what the server may send before the client reads.
    async fn open(mesh: &Mesh, node: &str, window: u32) -> Self {
        let stream = hyper_util::rt::TokioIo::new(tls(mesh).await);
        let (mut sender, connection) =
            hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
                .initial_stream_window_size(window)
                .handshake(stream)
                .await
                .expect("HTTP/2");
        tokio::spawn(connection);
        let (frames, body) = tokio::sync::mpsc::channel(8);
        let body: tokio_stream::wrappers::ReceiverStream<_> = body.into();
        let token = mesh.node_token(node).authorization().expect("a token");
        let method =
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
        let request = http::Request::post(format!("https://aditd{method}"))
            .header("content-type", "application/grpc")
            .header("authorization", token.to_str().expect("ASCII"))
            .body(StreamBody::new(body))
            .expect("a request");
        let answer = tokio::spawn(async move {
            let response = sender.send_request(request).await.expect("an answer");
            assert!(response.headers().get("grpc-status").is_none(), "refused");
            response.into_body()
        });
        Self { frames, answer }
    }

    async fn send(&self, bytes: Vec<u8>) {
        let frame = Frame::data(bytes.into());
        self.frames.send(Ok(frame)).await.expect("sent");
    }

    /// A subscription to everything of a type, with claims of so many resources.
    async fn subscribe(&self, url: &str, claims: usize) {
        let version = |i| (format!("Kubernetes//Pod/shop/{i:064}"), "v".to_owned());
        let request = DeltaDiscoveryRequest {
            type_url: url.into(),
            initial_resource_versions: (0..claims).map(version).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len()).expect("short");
        self.send([&[0][..], &length.to_be_bytes(), &message].concat())
            .await;
    }
}

/// And a policy.
fn one_address() -> ResourceSnapshot {
    let mut edit = SnapshotBuilder::new();
    edit.set(ADDRESS_TYPE, "a", &Address::default());
    edit.set(AUTHORIZATION_TYPE, "b", &Authorization::default());
    edit.build()
}

/// Long requests have to come, and who waits behind those that do not has all the time that a
/// first request has.
#[tokio::test]
async fn long_requests_that_do_not_come_lose_their_turns() {
    let mesh = Mesh::start_with(
        |config| {
            config.streams.large_requests = 1;
            config.streams.first_request = Duration::from_millis(500);
        },
        one_address(),
    )
    .await;
    let mut slow = Vec::new();
    for node in ["n1", "n2"] {
        let raw = Raw::open(&mesh, node, 1 << 16).await;
        // A megabyte, of which a little comes.
        raw.send(vec![0, 0, 0x10, 0, 0, 1, 2, 3]).await;
        slow.push(raw);
    }
    let good = Raw::open(&mesh, "n3", 1 << 16).await;
    good.subscribe(ADDRESS_TYPE, 2000).await;
    let mut answer = good.answer.await.expect("an answer");
    let response = timeout(PATIENCE, answer.frame()).await.expect("in time");
    assert!(response.expect("open").expect("open").is_data(), "ended");
    let ends = &mesh.serving().metrics().stream_ends;
    eventually("both have ended", || ends.get("no_request") == 2).await;
}

/// More than there ever were places for: everything is ready for them and they take none of it.
#[tokio::test]
async fn clients_that_do_not_read_hold_up_nobody() {
    let mesh = Mesh::start_with(|_| {}, one_address()).await;
    let mut deaf = Vec::new();
    for i in 0..80 {
        let raw = Raw::open(&mesh, &format!("deaf-{i}"), 0).await;
        raw.subscribe(AUTHORIZATION_TYPE, 0).await;
        raw.subscribe(ADDRESS_TYPE, 0).await;
        // The transport has one response and the next one waits for it: there is no room.
        raw.subscribe(ENROLMENT_TYPE, 0).await;
        deaf.push(raw);
    }
    let pushes = &mesh.serving().metrics().pushes;
    eventually("they are being served", || {
        pushes.get(AUTHORIZATION_TYPE) == 80 && pushes.get(ADDRESS_TYPE) == 80
    })
    .await;
    let start = tokio::time::Instant::now();
    let proxy = Proxy::start(mesh.client_config("n1"));
    proxy.holds(ADDRESS_TYPE, &["a"]).await;
    for name in ["b", "c", "d"] {
        mesh.publish(|edit| {
            edit.set(ADDRESS_TYPE, name, &Address::default());
        });
        eventually(name, || proxy.body(ADDRESS_TYPE, name).is_some()).await;
    }
    // Less than they have to take what is for them.
    assert!(start.elapsed() < Duration::from_secs(15));
}
