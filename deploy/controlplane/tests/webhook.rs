//! The webhook's port, which anybody may reach: what one peer can take of it.

mod support;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::compile::MeshConfig;
use adit_controlplane::serve::SnapshotBuilder;
use adit_controlplane::source::SourceState;
use adit_controlplane::webhook::{Admission, PATH, Webhook, WebhookLimits};
use adit_shared::identity::control_plane_client_config;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body, Frame};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use support::{Mesh, PATIENCE, eventually};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const MOMENT: Duration = Duration::from_millis(200);

async fn start(change: impl FnOnce(&mut WebhookLimits)) -> Mesh {
    let mut limits = WebhookLimits::default();
    change(&mut limits);
    let (_, source) = watch::channel(SourceState::default());
    Mesh::start_with(
        |config| {
            config.webhook = Some(Webhook {
                listen: SocketAddr::from(([127, 0, 0, 1], 0)),
                admission: Admission::new(source, MeshConfig::default()),
                limits,
            });
        },
        SnapshotBuilder::new().build(),
    )
    .await
}

async fn connect(mesh: &Mesh, from: Ipv4Addr) -> TlsStream<TcpStream> {
    let roots = mesh.trust().roots().expect("roots");
    let mut config = control_plane_client_config(roots).expect("TLS");
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((from, 0).into()).expect("bound");
    let address = mesh.serving().webhook_address().expect("configured");
    let tcp = socket.connect(address).await.expect("open");
    let name = ServerName::try_from("istiod.istio-system.svc").expect("a name");
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .expect("a handshake")
}

/// A connection that may be asked on, and what tells that it has ended.
async fn open<B>(
    mesh: &Mesh,
    from: Ipv4Addr,
) -> (http1::SendRequest<B>, tokio::task::JoinHandle<()>)
where
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    let stream = TokioIo::new(connect(mesh, from).await);
    let (sender, connection) = http1::handshake(stream).await.expect("HTTP/1.1");
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

/// A question about a policy whose annotation is of that length.
fn question(length: usize) -> Bytes {
    let annotations = json!({"x": "y".repeat(length)});
    let object = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop", "annotations": annotations},
        "spec": {"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]},
    });
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {"uid": "u", "operation": "CREATE", "namespace": "shop", "name": "p",
            "object": object},
    })
    .to_string()
    .into()
}

fn post<B>(body: B) -> http::Request<B> {
    http::Request::post(PATH)
        .header("host", "istiod")
        .body(body)
        .expect("legal")
}

async fn ask(sender: &mut http1::SendRequest<Full<Bytes>>, body: Bytes) -> (u16, Value) {
    sender.ready().await.expect("open");
    let answer = sender.send_request(post(Full::new(body))).await;
    let answer = answer.expect("answered");
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.expect("whole");
    let json = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
    (status, json)
}

#[tokio::test]
async fn a_connection_that_is_not_used_is_closed_and_one_that_is_goes_on() {
    let idle = Duration::from_millis(500);
    let mesh = start(|limits| limits.idle = idle).await;
    let (_never, unused) = open::<Full<Bytes>>(&mesh, Ipv4Addr::LOCALHOST).await;
    let (mut sender, used) = open(&mesh, Ipv4Addr::LOCALHOST).await;
    let start = tokio::time::Instant::now();
    while start.elapsed() < 3 * idle {
        let (status, answer) = ask(&mut sender, question(1)).await;
        assert_eq!(status, 200);
        assert_eq!(answer["response"]["allowed"], true);
        tokio::time::sleep(idle / 5).await;
    }
    assert!(!used.is_finished());
    assert!(unused.is_finished(), "an unused connection keeps its place");
    timeout(PATIENCE, used)
        .await
        .expect("closed")
        .expect("ends");
}

#[tokio::test]
async fn one_address_does_not_take_all_connections() {
    let mesh = start(|limits| limits.connections_of_peer = 2).await;
    let flood = Ipv4Addr::new(127, 0, 0, 2);
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(open::<Full<Bytes>>(&mesh, flood).await);
    }
    let more = timeout(MOMENT, connect(&mesh, flood)).await;
    assert!(more.is_err(), "more than its share is served");
    let (mut other, _connection) = open(&mesh, Ipv4Addr::LOCALHOST).await;
    assert_eq!(ask(&mut other, question(1)).await.0, 200);
    // Who waits is served when there is a place again; who comes then is closed.
    let waits = connect(&mesh, flood);
    let free = async {
        tokio::time::sleep(MOMENT).await;
        held.pop();
    };
    timeout(PATIENCE, async { tokio::join!(waits, free) })
        .await
        .expect("the place is given on");
    let address = mesh.serving().webhook_address().expect("configured");
    let mut sockets = Vec::new();
    for _ in 0..32 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((flood, 0).into()).expect("bound");
        sockets.push(socket.connect(address).await.expect("open"));
    }
    let closed = |socket: &TcpStream| matches!(socket.try_read(&mut [0]), Ok(0));
    eventually("too many are closed", || {
        sockets.iter().filter(|socket| closed(socket)).count() >= 24
    })
    .await;
    assert_eq!(ask(&mut other, question(1)).await.0, 200);
}

#[tokio::test]
async fn a_request_is_as_long_as_it_may_be() {
    let mesh = start(|_| {}).await;
    for (length, expected) in [(3 << 20, 200), (5 << 20, 413)] {
        let (mut sender, _connection) = open(&mesh, Ipv4Addr::LOCALHOST).await;
        let (status, answer) = ask(&mut sender, question(length)).await;
        assert_eq!(status, expected, "{length}");
        assert_eq!(answer["response"]["allowed"] == true, expected == 200);
    }
}

/// Long requests that do not come hold up long ones, for their time, and no others.
#[tokio::test]
async fn long_requests_that_do_not_come_hold_up_no_short_ones() {
    let mesh = start(|limits| {
        limits.large = 2;
        limits.request = Duration::from_secs(2);
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let (send, frames) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
        let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(frames));
        let (mut sender, connection) = open(&mesh, Ipv4Addr::LOCALHOST).await;
        let answer = tokio::spawn(async move {
            let answer = sender.send_request(post(body)).await;
            answer.map(|answer| answer.status().as_u16())
        });
        let part = Bytes::from(vec![b' '; 100 << 10]);
        send.send(Ok(Frame::data(part))).await.expect("sent");
        held.push((send, connection, answer));
    }
    let (mut sender, _connection) = open(&mesh, Ipv4Addr::LOCALHOST).await;
    // Their first parts have come when a long one has to wait.
    let start = tokio::time::Instant::now();
    let short = ask(&mut sender, question(1)).await;
    assert_eq!(short.0, 200);
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "a short one waits"
    );
    for (_send, _connection, answer) in held {
        let status = timeout(PATIENCE, answer)
            .await
            .expect("ends")
            .expect("ends");
        assert_eq!(status.expect("answered"), 408);
    }
    assert_eq!(ask(&mut sender, question(100 << 10)).await.0, 200);
}
