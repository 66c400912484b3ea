//! What a server does with clients that misbehave, and that nobody else notices.

#[path = "support/hbone.rs"]
mod support;

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::hbone::{ConnectionError, Settings};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::spawn_local;

/// A client that may do what ours does not.
async fn raw_client(settings: Settings) -> (SendRequest<Bytes>, Server) {
    let (client, server) = sockets().await;
    let server = start(server, settings, echo);
    let (sender, connection) = h2::client::Builder::new()
        .handshake::<_, Bytes>(client)
        .await
        .expect("handshake");
    spawn_local(async move {
        let _ = connection.await;
    });
    (sender, server)
}

fn connect_to(authority: &'static str) -> Request<()> {
    let mut parts = http::uri::Parts::default();
    parts.authority = Some(authority.parse().expect("authority"));
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from_parts(parts).expect("uri");
    request
}

#[test]
fn malformed_requests_are_answered_and_disturb_nobody() {
    run(async {
        let (mut sender, server) = raw_client(Settings::DEFAULT).await;
        let (response, mut body) = sender
            .send_request(connect_to("10.0.0.5:80"), false)
            .expect("send");
        let response = soon("response", response).await.expect("response");
        assert_eq!(response.status(), StatusCode::OK);

        let get = Request::get("http://10.0.0.5/").body(()).expect("request");
        let post = Request::post("https://10.0.0.5:80/x")
            .body(())
            .expect("request");
        let bad = [
            get,
            post,
            connect_to("10.0.0.5"),
            connect_to("a..b:80"),
            connect_to("x:0"),
        ];
        let count = bad.len() as u64;
        for request in bad {
            let what = format!("{request:?}");
            let (response, _) = sender.send_request(request, true).expect("send");
            let response = soon("response", response).await.expect(&what);
            assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{what}");
            let status = response
                .headers()
                .get("proxy-status")
                .expect("proxy-status");
            assert_eq!(status, "adit; error=http_request_error");
        }

        // The tunnel that was open all the time works.
        let mut stream = response.into_body();
        body.send_data(Bytes::from_static(b"hello"), true)
            .expect("send");
        let echoed = soon("echo", stream.data())
            .await
            .expect("data")
            .expect("data");
        assert_eq!(echoed, "hello");
        while let Some(end) = soon("end", stream.data()).await {
            assert!(end.expect("END_STREAM").is_empty());
        }
        drop((sender, body, stream));
        let served = soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!((served.accepted, served.malformed), (1, count));
    });
}

#[test]
fn headers_that_only_inform_do_not_fail_a_request() {
    run(async {
        let ignored = Rc::new(Cell::new(0));
        let seen = ignored.clone();
        let (client, server) = sockets().await;
        let _server = start(server, Settings::DEFAULT, async move |incoming| {
            seen.set(incoming.ignored.len());
            echo(incoming).await;
        });
        let (mut sender, connection) = h2::client::handshake(client).await.expect("handshake");
        spawn_local(async move {
            let _ = connection.await;
        });
        let mut request = connect_to("10.0.0.5:80");
        for name in ["baggage", "forwarded", "traceparent"] {
            let value = HeaderValue::from_bytes(b"\xff\"%zz").expect("opaque");
            request.headers_mut().insert(name, value);
        }
        let (response, _body) = sender.send_request(request, false).expect("send");
        let response = soon("response", response).await.expect("response");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(ignored.get(), 3);
    });
}

#[test]
fn oversized_headers_are_refused_and_the_connection_lives() {
    run(async {
        let (mut sender, _server) = raw_client(Settings::DEFAULT).await;
        let mut request = connect_to("10.0.0.5:80");
        let value = HeaderValue::from_bytes(&[b'a'; 15_000]).expect("ascii");
        for i in 0..5 {
            let name = http::HeaderName::from_bytes(format!("x-{i}").as_bytes()).expect("name");
            request.headers_mut().insert(name, value.clone());
        }
        let (response, _body) = sender.send_request(request, false).expect("send");
        match soon("response", response).await {
            Ok(response) => {
                assert_eq!(
                    response.status(),
                    StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
                );
            }
            Err(error) => assert!(error.is_reset(), "{error}"),
        }
        let (response, _body) = sender
            .send_request(connect_to("10.0.0.5:80"), false)
            .expect("send");
        let response = soon("response", response).await.expect("response");
        assert_eq!(response.status(), StatusCode::OK);
    });
}

#[test]
fn streams_above_the_limit_are_refused() {
    run(async {
        let settings = Settings {
            max_concurrent_streams: 2,
            ..Settings::DEFAULT
        };
        let (client, server) = sockets().await;
        let _server = start(server, settings, echo);
        // Before it has read our SETTINGS a client may send more than they allow.
        let (sender, connection) = h2::client::Builder::new()
            .initial_max_send_streams(100)
            .handshake::<_, Bytes>(client)
            .await
            .expect("handshake");
        let mut sender = sender;
        let streams: Vec<_> = (0..5)
            .map(|_| {
                sender
                    .send_request(connect_to("10.0.0.5:80"), false)
                    .expect("send")
            })
            .collect();
        spawn_local(async move {
            let _ = connection.await;
        });
        let (mut accepted, mut refused) = (0, 0);
        let mut bodies = Vec::new();
        for (response, body) in streams {
            match soon("response", response).await {
                Ok(response) => {
                    bodies.push((response, body));
                    accepted += 1;
                }
                Err(error) => {
                    assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM), "{error}");
                    refused += 1;
                }
            }
        }
        assert_eq!((accepted, refused), (2, 3));
    });
}

#[test]
fn a_client_without_a_preface_is_dropped_at_the_deadline() {
    run(async {
        let settings = Settings {
            preface_timeout: Duration::from_millis(50),
            ..Settings::DEFAULT
        };
        // Nothing at all, and one byte after the other.
        for trickle in [false, true] {
            let (mut client, server) = sockets().await;
            let mut server = start(server, settings, echo);
            let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r".iter();
            let end = loop {
                if trickle && let Some(byte) = preface.next() {
                    let _ = client.write_all(&[*byte]).await;
                }
                let tick = tokio::time::timeout(Duration::from_millis(5), &mut server.task).await;
                if let Ok(end) = tick {
                    break end.expect("join");
                }
            };
            assert!(
                matches!(end, Err(ConnectionError::PrefaceTimeout)),
                "{end:?}"
            );
            // Its SETTINGS, then the end: a reset if it has not read all of the trickle.
            let _ = soon("close", client.read_to_end(&mut Vec::new())).await;
        }
    });
}

#[test]
fn noise_instead_of_a_preface_ends_the_connection() {
    run(async {
        let (mut client, server) = sockets().await;
        let server = start(server, Settings::DEFAULT, echo);
        client
            .write_all(b"GET / HTTP/1.1\r\n\r\n")
            .await
            .expect("write");
        let end = soon("the end", server.task).await.expect("join");
        assert!(matches!(end, Err(ConnectionError::Protocol(_))), "{end:?}");
    });
}

#[test]
fn a_client_that_never_opens_a_stream_is_sent_away() {
    run(async {
        let settings = Settings {
            first_stream_timeout: Duration::from_millis(50),
            ..Settings::DEFAULT
        };
        let (connection, server) = connect(settings, echo).await;
        let end = soon("the client's end", connection.closed()).await;
        assert!(end.is_orderly(), "{end}");
        let served = soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!(served.accepted, 0);
    });
}

#[test]
fn an_idle_connection_is_closed_and_a_silent_stream_keeps_it() {
    run(async {
        let settings = Settings {
            first_stream_timeout: Duration::from_millis(200),
            idle_timeout: Duration::from_millis(20),
            ..Settings::DEFAULT
        };
        let (connection, server) = connect(settings, echo).await;
        let mut tunnel = open(&connection).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert!(connection.is_usable(), "a stream is open");
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
        drop(tunnel);
        soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
    });
}

#[test]
fn a_peer_that_does_not_answer_ping_is_dead_for_both_sides() {
    run(async {
        let settings = Settings {
            ping_interval: Duration::from_millis(20),
            ping_timeout: Duration::from_millis(60),
            ..Settings::DEFAULT
        };
        // A client that goes silent after its preface and SETTINGS.
        let (mut client, server) = sockets().await;
        let server = start(server, settings, echo);
        client
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await
            .expect("write");
        let end = soon("the end", server.task).await.expect("join");
        assert!(matches!(end, Err(ConnectionError::Dead)), "{end:?}");

        // A server that is a black hole.
        let (client, _silent) = sockets().await;
        let connection = adit_shared::hbone::Connection::handshake(client, &settings)
            .await
            .expect("handshake");
        let end = soon("the end", connection.closed()).await;
        assert!(matches!(end, ConnectionError::Dead), "{end}");

        // Peers that answer live on.
        let (connection, _server) = connect(settings, echo).await;
        let mut tunnel = open(&connection).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
    });
}

#[test]
fn a_handler_that_panics_resets_its_stream_only() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, async |incoming| {
            if incoming.request.authority.port() == 1 {
                panic!("on purpose");
            }
            echo(incoming).await;
        })
        .await;
        let mut tunnel = open(&connection).await;
        let bad = "10.0.0.5:1".parse::<SocketAddr>().expect("address");
        let bad = adit_shared::hbone::ConnectRequest::new(bad);
        connection.open(&bad, patience()).await.expect_err("reset");
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
    });
}

/// CVE-2023-44487: streams that are reset do not count against the client's limit; what was
/// started for them must.
#[test]
fn streams_opened_and_reset_in_series_start_a_bounded_number_of_handlers() {
    run(async {
        let settings = Settings {
            max_concurrent_streams: 4,
            ..Settings::DEFAULT
        };
        let running = Rc::new(Cell::new(0));
        let most = Rc::new(Cell::new(0));
        let (client, server) = sockets().await;
        let (now, peak) = (running.clone(), most.clone());
        let _server = start(server, settings, async move |incoming| {
            now.set(now.get() + 1);
            peak.set(peak.get().max(now.get()));
            // Slow to notice that nobody waits.
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop(incoming);
        });
        let (mut sender, connection) = h2::client::Builder::new()
            .handshake::<_, Bytes>(client)
            .await
            .expect("handshake");
        let connection = spawn_local(async move {
            let _ = connection.await;
        });
        for _ in 0..50 {
            if connection.is_finished() {
                break;
            }
            let Ok((response, mut stream)) = sender.send_request(connect_to("10.0.0.5:80"), false)
            else {
                break;
            };
            // Long enough for the server to have accepted it.
            let _ = tokio::time::timeout(Duration::from_millis(5), response).await;
            stream.send_reset(h2::Reason::CANCEL);
        }
        assert_eq!(most.get(), 8, "twice the limit, and no more");
    });
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Many streams with windows of a gigabyte, and nobody reads the socket: what waits for it is
/// bounded for the connection, not for each stream. When it is read, everything goes on.
#[test]
fn a_peer_that_stops_reading_has_us_hold_a_bounded_amount() {
    const STREAMS: u32 = 60;
    const CHUNK: usize = 64 << 10;
    run(async {
        let written = Rc::new(Cell::new(0));
        let (mut client, server) = sockets().await;
        let count = written.clone();
        let settings = Settings {
            ping_timeout: PATIENCE,
            ..Settings::DEFAULT
        };
        let _server = start(server, settings, async move |incoming| {
            let Ok(mut tunnel) = incoming.respond.accept(None) else {
                return;
            };
            while tunnel.write_chunk(vec![0; CHUNK].into()).await.is_ok() {
                count.set(count.get() + CHUNK);
            }
        });
        let window = (1_u32 << 30).to_be_bytes();
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(4, 0, 0, &[&[0, 4][..], &window].concat()));
        hello.extend(frame(4, 1, 0, &[]));
        hello.extend(frame(8, 0, 0, &window));
        // :method and :authority as literals with names from the static table.
        let headers = [&b"\x02\x07CONNECT\x01\x0b"[..], b"10.0.0.5:80"].concat();
        for stream in 0..STREAMS {
            hello.extend(frame(1, 4, 2 * stream + 1, &headers));
        }
        client.write_all(&hello).await.expect("sent");

        let (mut last, mut quiet) = (0, 0);
        eventually("the writers wait", || {
            quiet = if written.get() == last && last > 0 {
                quiet + 1
            } else {
                0
            };
            last = written.get();
            quiet == 200
        })
        .await;
        // The kernel's buffers of both sockets come on top.
        let bound = settings.connection_send_buffer + STREAMS as usize * CHUNK + (16 << 20);
        assert!(last <= bound, "{last} of {bound} bytes were taken");

        let mut sink = vec![0; 1 << 20];
        while written.get() < 2 * bound {
            let n = soon("bytes", client.read(&mut sink)).await.expect("read");
            assert_ne!(n, 0, "the connection ended");
        }
    });
}

#[test]
fn random_bytes_after_the_preface_never_panic_the_server() {
    use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
    run(async {
        let mut random = StdRng::seed_from_u64(7);
        for _ in 0..200 {
            let (mut client, server) = sockets().await;
            let server = start(server, Settings::DEFAULT, echo);
            let mut noise = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            let mut tail = [0; 64];
            random.fill_bytes(&mut tail);
            // Plausible frame headers get further than pure noise.
            tail[0] = 0;
            tail[1] = 0;
            tail[2] %= 40;
            tail[3] %= 10;
            noise.extend_from_slice(&tail);
            let _ = client.write_all(&noise).await;
            drop(client);
            let end = soon("the end", server.task).await;
            assert!(end.is_ok(), "the task panicked");
        }
    });
}
