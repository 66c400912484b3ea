//! Frames that cost their sender little and their reader much, on HBONE connections and on
//! HTTP/2 inside of their tunnels. Each ends that connection or is borne; a neighbour's requests
//! go on meanwhile.

use adit_shared::hbone::record::TlsStream;
use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::proxy::http::MAX_STREAMS;
use http::{Request, Response};
use hyper::body::Incoming;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use crate::raw::{End, RawHttp2, Stream, block, flag, frame, kind};
use crate::support::{
    Body, Client, DEADLINE, Http, Mesh, Vip, body, echo, eventually, get, identity, run, send,
};

const ENHANCE_YOUR_CALM: u32 = 11;

/// Where a flood goes.
#[derive(Debug, Clone, Copy)]
enum Level {
    /// Frames of the HBONE connection.
    Outer,
    /// Frames inside of one of its tunnels.
    Inner,
}

struct Flood {
    name: &'static str,
    bytes: fn(&Target) -> Vec<u8>,
    /// It ends with GOAWAY(ENHANCE_YOUR_CALM); else it is borne.
    calm: bool,
}

struct Target {
    /// Headers that open a stream.
    open: Vec<u8>,
}

const FLOODS: &[Flood] = &[
    // CVE-2023-44487.
    Flood {
        name: "rapid reset",
        bytes: |target| {
            let mut bytes = Vec::new();
            for n in 0..5000 {
                let stream = 2 * n + 1;
                bytes.extend(frame(
                    kind::HEADERS,
                    flag::END_HEADERS,
                    stream,
                    &target.open,
                ));
                bytes.extend(frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            }
            bytes
        },
        calm: true,
    },
    // CVE-2024-27316 and others of that spring.
    Flood {
        name: "empty CONTINUATIONs",
        bytes: |target| {
            let mut bytes = frame(kind::HEADERS, 0, 1, &target.open);
            for _ in 0..50_000 {
                bytes.extend(frame(kind::CONTINUATION, 0, 1, &[]));
            }
            bytes
        },
        calm: true,
    },
    Flood {
        name: "CONTINUATIONs without end",
        bytes: |target| {
            let mut bytes = frame(kind::HEADERS, 0, 1, &target.open);
            let more = block(&[("x", &"v".repeat(4000))]);
            for _ in 0..500 {
                bytes.extend(frame(kind::CONTINUATION, 0, 1, &more));
            }
            bytes
        },
        calm: true,
    },
    // CVE-2019-9518.
    Flood {
        name: "empty DATA",
        bytes: |target| {
            let mut bytes = frame(kind::HEADERS, flag::END_HEADERS, 1, &target.open);
            for _ in 0..50_000 {
                bytes.extend(frame(kind::DATA, 0, 1, &[]));
            }
            bytes
        },
        calm: true,
    },
    // CVE-2019-9515, -9512: each wants an answer. Who does not read the answers is not read
    // from any more.
    Flood {
        name: "SETTINGS",
        bytes: |_| frame(kind::SETTINGS, 0, 0, &[]).repeat(200_000),
        calm: false,
    },
    Flood {
        name: "PING",
        bytes: |_| frame(kind::PING, 0, 0, &[1; 8]).repeat(200_000),
        calm: false,
    },
];

/// A connection of HTTP/2 to the HBONE port.
async fn outer(mesh: &Mesh) -> RawHttp2<impl Stream + use<>> {
    let certificate = mesh.certificate(&identity("default", "mallory")).await;
    let stream = TcpStream::connect(mesh.address).await.unwrap();
    let name = ServerName::IpAddress(mesh.address.ip().into());
    let config = certificate.client_config().clone();
    let tls = TlsStream::connect(stream, config, name, DEADLINE).await;
    RawHttp2::new(tls.unwrap()).await
}

async fn inner(client: &Client, to: &Vip) -> RawHttp2<impl Stream + use<>> {
    let tunnel = client.tunnel(to.address).await.expect("accepted");
    RawHttp2::new(tunnel.into_io()).await
}

/// Sends a flood and says how it ended.
async fn pour(mut http: RawHttp2<impl Stream>, flood: &Flood, target: &Target) -> Option<End> {
    let bytes = (flood.bytes)(target);
    if flood.calm {
        // GOAWAY may come before all has been sent, so that both go on at once.
        return timeout(DEADLINE, http.send_and_end(&bytes)).await.ok();
    }
    // Without reading. All of it may be taken or not, but not for want of time.
    let _ = timeout(Duration::from_secs(1), http.write(&bytes)).await;
    None
}

async fn floods(level: Level) {
    let mesh = Mesh::new().await;
    let web = mesh.service("web", Protocol::Http);
    let (app, _) = echo("a");
    let _pod = mesh.pod(&web, "web-a", app).await;
    let good = mesh.client("default", "curl").await;
    let mut sender = good.http1(&web).await;
    for flood in FLOODS {
        let bad = mesh.client("default", "mallory").await;
        let target = Target {
            open: match level {
                Level::Outer => block(&[(":method", "CONNECT"), (":authority", "10.96.0.1:80")]),
                Level::Inner => block(&[
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":authority", "w"),
                    (":path", "/"),
                ]),
            },
        };
        let pouring = async {
            match level {
                Level::Outer => pour(outer(&mesh).await, flood, &target).await,
                Level::Inner => pour(inner(&bad, &web).await, flood, &target).await,
            }
        };
        let calling = async {
            for _ in 0..20 {
                let answer = send(&mut sender, get("/")).await;
                assert_eq!(answer.status, 200, "{}", flood.name);
            }
        };
        let (end, ()) = tokio::join!(pouring, calling);
        let expected = flood.calm.then_some(End::GoAway(ENHANCE_YOUR_CALM));
        assert_eq!(end, expected, "{level:?} {}", flood.name);
    }
    // Nothing of it is left.
    drop(sender);
    drop(good);
    eventually("the workers are empty", async || {
        let counts = &mesh.counts().await[0];
        (counts.connections, counts.streams, counts.http_connections) == (0, 0, 0)
    })
    .await;
}

#[test]
fn floods_of_an_hbone_connection_end_it() {
    run(floods(Level::Outer));
}

#[test]
fn floods_inside_of_a_tunnel_end_its_connection() {
    run(floods(Level::Inner));
}

/// Each stream is reset when it has been accepted, which no counter of pending resets sees.
#[test]
fn resets_one_by_one_leave_no_more_work_than_streams_are_allowed() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let running = std::rc::Rc::new(std::cell::Cell::new((0_usize, 0_usize)));
        let reached = std::rc::Rc::new(std::cell::Cell::new(0));
        let (count, arrived) = (running.clone(), reached.clone());
        struct Running(std::rc::Rc<std::cell::Cell<(usize, usize)>>);
        impl Drop for Running {
            fn drop(&mut self) {
                let (now, most) = self.0.get();
                self.0.set((now - 1, most));
            }
        }
        let never = Http(move |_: Request<Incoming>| {
            let (now, most) = count.get();
            count.set((now + 1, most.max(now + 1)));
            let guard = Running(count.clone());
            arrived.set(arrived.get() + 1);
            async move {
                std::future::pending::<()>().await;
                drop(guard);
                Response::<Body>::new(body(""))
            }
        });
        let _pod = mesh.pod(&web, "web-a", never).await;
        let client = mesh.client("default", "curl").await;
        let mut http = inner(&client, &web).await;
        let open = block(&[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/"),
        ]);
        let headers = flag::END_HEADERS | flag::END_STREAM;
        for n in 0..300_u32 {
            let stream = 2 * n + 1;
            let before = reached.get();
            http.send(&frame(kind::HEADERS, headers, stream, &open))
                .await;
            eventually("it arrives", async || reached.get() > before).await;
            http.send(&frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]))
                .await;
        }
        // What was reset ends at the endpoint too.
        eventually("all have ended", async || running.get().0 == 0).await;
        let most = running.get().1;
        assert_eq!(reached.get(), 300);
        assert!(most <= MAX_STREAMS as usize, "{most}");
        eventually("the worker has none", async || {
            mesh.counts().await[0].http_connections <= 1
        })
        .await;
    });
}
