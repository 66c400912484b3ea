//! Limits of one connection of HTTP inside a tunnel, each at its value and one beyond.

use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::proxy::http::{
    HEADER_DEADLINE, MAX_HEADER_LIST, MAX_HEADERS, MAX_STREAMS, SWEEP,
};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::time::{Duration, Instant, sleep};

use crate::raw::{End, RawHttp1, RawHttp2, Stream, block, flag, frame, kind, recorder};
use crate::support::{Body, Client, Http, Mesh, Vip, downgrade, eventually, run};

const REFUSED_STREAM: u32 = 7;
/// Largest payload of a frame before SETTINGS allow more.
const FRAME: usize = 16 << 10;

async fn http2(client: &Client, to: &Vip) -> RawHttp2<impl Stream + use<>> {
    let tunnel = client.tunnel(to.address).await.expect("accepted");
    RawHttp2::new(tunnel.into_io()).await
}

/// A block in as many frames as it needs.
fn headers(stream: u32, flags: u8, block: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut pieces = block.chunks(FRAME).enumerate().peekable();
    while let Some((at, piece)) = pieces.next() {
        let end = match pieces.peek() {
            None => flag::END_HEADERS,
            Some(_) => 0,
        };
        match at {
            0 => bytes.extend(frame(kind::HEADERS, flags | end, stream, piece)),
            _ => bytes.extend(frame(kind::CONTINUATION, end, stream, piece)),
        }
    }
    bytes
}

fn get_block(more: &[(&str, &str)]) -> Vec<u8> {
    let mut all = vec![
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "w"),
        (":path", "/a"),
    ];
    all.extend_from_slice(more);
    block(&all)
}

/// Requests with such headers, in either version: what they are answered with, and whether they
/// arrived.
async fn ask(mesh: &Mesh, web: &Vip, values: &[(String, String)]) -> (u16, End) {
    let client = mesh.client("default", "curl").await;
    let mut http = RawHttp1::new(&client, web).await;
    let lines: String = values
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    http.send(format!("GET /a HTTP/1.1\r\nhost: w\r\n{lines}\r\n").as_bytes())
        .await;
    let first = http.answer().await.expect("answered").status;
    let pairs: Vec<_> = values
        .iter()
        .map(|(n, v)| (n.as_str(), v.as_str()))
        .collect();
    let mut http = http2(&client, web).await;
    http.send(&headers(1, flag::END_STREAM, &get_block(&pairs)))
        .await;
    (first, http.end_of(1).await)
}

#[test]
fn a_header_list_has_64_kibibytes() {
    run(async {
        assert_eq!(MAX_HEADER_LIST, 64 << 10);
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        downgrade(&mesh, &web);
        let (app, _) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let list = |size: usize| -> Vec<_> {
            (0..4)
                .map(|n| (format!("x-{n}"), "v".repeat(size / 4 - 200)))
                .collect()
        };
        let limit = MAX_HEADER_LIST as usize;
        assert_eq!(
            ask(&mesh, &web, &list(limit)).await,
            (200, End::Status(200))
        );
        assert_eq!(
            ask(&mesh, &web, &list(limit + 1000)).await,
            (431, End::Status(431))
        );
    });
}

#[test]
fn a_request_has_100_headers() {
    run(async {
        assert_eq!(MAX_HEADERS, 100);
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        downgrade(&mesh, &web);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let many = |count: usize| -> Vec<_> {
            (0..count).map(|n| (format!("x-{n}"), "1".into())).collect()
        };
        // With `host`.
        let most = MAX_HEADERS - 1;
        assert_eq!(ask(&mesh, &web, &many(most)).await, (200, End::Status(200)));
        assert_eq!(
            ask(&mesh, &web, &many(MAX_HEADERS + 1)).await,
            (431, End::Status(431))
        );
        assert_eq!(got.borrow().len(), 2);
    });
}

#[test]
fn a_head_without_end_is_refused_when_there_is_too_much_of_it() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        for (name, start, status) in [
            ("a target", "GET /", &[414, 431][..]),
            ("a method", "", &[431]),
            ("a name", "GET / HTTP/1.1\r\n", &[431]),
            ("a value", "GET / HTTP/1.1\r\nx: ", &[431]),
        ] {
            let mut http = RawHttp1::new(&client, &web).await;
            http.send(format!("{start}{}", "A".repeat(1 << 20)).as_bytes())
                .await;
            let answer = http.answer().await.map(|answer| answer.status);
            assert!(
                answer.is_some_and(|a| status.contains(&a)),
                "{name}: {answer:?}"
            );
            assert_eq!(http.answer().await, None, "{name}");
        }
        assert_eq!(got.borrow().len(), 0);
    });
}

#[test]
fn trailers_have_the_limit_of_headers() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        downgrade(&mesh, &web);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let large: String = (0..9)
            .map(|n| format!("x-{n}: {}\r\n", "v".repeat(8 << 10)))
            .collect();
        let many: String = (0..=MAX_HEADERS).map(|n| format!("x-{n}: 1\r\n")).collect();
        for trailers in [large, many] {
            let mut http = RawHttp1::new(&client, &web).await;
            http.send(
                format!(
                    "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n\
                     1\r\na\r\n0\r\n{trailers}\r\n"
                )
                .as_bytes(),
            )
            .await;
            let answer = http.answer().await.map(|answer| answer.status);
            assert!(matches!(answer, None | Some(400..)), "{answer:?}");
        }
        // No endpoint took one of them for whole.
        let cut = |request: &String| request.starts_with("CUT ");
        assert!(got.borrow().iter().all(cut), "{got:?}");
        // Nor in HTTP/2.
        let mut http = http2(&client, &web).await;
        let large = "v".repeat(70 << 10);
        let head = get_block(&[("trailer", "x")]);
        let mut bytes = headers(1, 0, &head);
        bytes.extend(frame(kind::DATA, 0, 1, b"a"));
        bytes.extend(headers(1, flag::END_STREAM, &block(&[("x", &large)])));
        http.send(&bytes).await;
        http.end_of(1).await;
        assert!(!got.borrow().iter().any(|request| request.contains("vvv")));
    });
}

#[test]
fn a_connection_has_200_streams() {
    run(async {
        assert_eq!(MAX_STREAMS, 200);
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let reached = std::rc::Rc::new(std::cell::Cell::new(0));
        let count = reached.clone();
        let never = Http(move |_: Request<Incoming>| {
            count.set(count.get() + 1);
            std::future::pending::<Response<Body>>()
        });
        let _pod = mesh.pod(&web, "web-a", never).await;
        let client = mesh.client("default", "curl").await;
        let mut http = http2(&client, &web).await;
        let get = get_block(&[]);
        let mut bytes = Vec::new();
        for n in 0..=MAX_STREAMS {
            bytes.extend(headers(2 * n + 1, flag::END_STREAM, &get));
        }
        http.send(&bytes).await;
        let end = http.end_of(2 * MAX_STREAMS + 1).await;
        assert_eq!(end, End::Reset(REFUSED_STREAM));
        eventually("all others arrive", async || {
            reached.get() == MAX_STREAMS as usize
        })
        .await;
    });
}

#[test]
fn a_head_has_ten_seconds() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        // From the first byte of a head, be it the first or a later one; of a preface too.
        let first = async {
            let mut http = RawHttp1::new(&client, &web).await;
            slow(&mut http, b"GET /a HTTP/1.1\r\nhost: w\r\nx: ").await
        };
        let second = async {
            let mut http = RawHttp1::new(&client, &web).await;
            http.send(b"GET /1 HTTP/1.1\r\nhost: w\r\n\r\n").await;
            assert_eq!(http.answer().await.unwrap().body, "/1");
            slow(&mut http, b"GET /2 HTTP/1.1\r\nx: ").await
        };
        let preface = async {
            let mut http = RawHttp1::new(&client, &web).await;
            let begun = Instant::now();
            http.send(b"PRI * HTTP/2.0\r\n").await;
            assert_eq!(http.answer().await, None);
            begun.elapsed()
        };
        let (first, second, preface) = tokio::join!(first, second, preface);
        for took in [first, second, preface] {
            assert!(took >= HEADER_DEADLINE - SWEEP, "{took:?}");
            assert!(took < HEADER_DEADLINE + SWEEP * 4, "{took:?}");
        }
        assert_eq!(got.borrow().len(), 1);
    });
}

/// Sends the beginning of a head, and then a byte now and then; returns how long that went.
async fn slow(http: &mut RawHttp1, start: &[u8]) -> Duration {
    let begun = Instant::now();
    http.send(start).await;
    let trickle = begun + HEADER_DEADLINE - SWEEP * 2;
    while Instant::now() < trickle {
        http.send(b"y").await;
        sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(http.answer().await, None);
    begun.elapsed()
}
