//! Streams of HTTP/2 frame by frame: how much is held for those that nobody reads, and how they
//! end when something breaks off.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;

use adit_shared::hbone::Tunnel;
use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::telemetry::Filter;
use bytes::Bytes;
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::support::{DEADLINE, Http2, Mesh, Raw, body, downgrade, eventually, get, run, send};

fn post() -> Request<()> {
    Request::post("http://web.shop/").body(()).unwrap()
}

/// Sends `data` as fast as it is taken.
async fn write(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(n)) => stream.send_data(data.split_to(n.min(data.len())), false)?,
            Some(Err(error)) => return Err(error),
            None => {
                let reason = poll_fn(|cx| stream.poll_reset(cx)).await?;
                return Err(reason.into());
            }
        }
    }
    Ok(())
}

/// Reads to the end. Returns how much there was, and the trailers.
async fn read(stream: &mut RecvStream) -> Result<(usize, Option<HeaderMap>), h2::Error> {
    let mut size = 0;
    while let Some(data) = timeout(DEADLINE, stream.data()).await.expect("in time") {
        let data = data?;
        size += data.len();
        stream.flow_control().release_capacity(data.len())?;
    }
    let trailers = timeout(DEADLINE, stream.trailers()).await.expect("in time");
    Ok((size, trailers?))
}

async fn response(response: h2::client::ResponseFuture) -> Result<Response<RecvStream>, h2::Error> {
    timeout(DEADLINE, response).await.expect("in time")
}

/// A short request on another stream.
async fn ping(sender: &mut SendRequest<Bytes>) {
    let request = Request::get("http://web.shop/ping").body(()).unwrap();
    let (answer, _) = sender.send_request(request, true).unwrap();
    assert_eq!(response(answer).await.unwrap().status(), 200);
}

#[test]
fn bodies_are_larger_than_any_window_and_have_trailers() {
    const SIZE: usize = 5 << 20;
    for endpoint2 in [true, false] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http);
            if !endpoint2 {
                downgrade(&mesh, &web);
            }
            // Sends back what it gets.
            let app = crate::support::Http(|request: Request<hyper::body::Incoming>| async move {
                let trailer = HeaderValue::from_static("x-end");
                let body = request.into_body();
                let mut answer = Response::new(body.map_err(|error| panic!("{error}")).boxed());
                answer.headers_mut().insert("trailer", trailer);
                answer
            });
            let _pod = mesh.pod(&web, "web-a", app).await;
            let client = mesh.client("default", "curl").await;
            let mut sender = client.frames(&web).await;
            let mut request = post();
            let headers = request.headers_mut();
            headers.insert("te", HeaderValue::from_static("trailers"));
            headers.insert("trailer", HeaderValue::from_static("x-end"));
            let (answer, mut stream) = sender.send_request(request, false).unwrap();
            let sending = async {
                write(&mut stream, vec![7; SIZE].into()).await.unwrap();
                let mut trailers = HeaderMap::new();
                trailers.insert("x-end", HeaderValue::from_static("yes"));
                stream.send_trailers(trailers).unwrap();
            };
            let reading = async {
                let mut body = response(answer).await.unwrap().into_body();
                read(&mut body).await.unwrap()
            };
            let ((), (size, trailers)) = tokio::join!(sending, reading);
            assert_eq!(size, SIZE);
            assert_eq!(trailers.expect("trailers")["x-end"], "yes");
        });
    }
}

/// A response that nobody reads is not taken from its endpoint either, and nobody waits for it.
#[test]
fn a_reader_that_stalls_holds_up_itself_alone() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let sent = Rc::new(Cell::new(0));
        let count = sent.clone();
        let app = Http2(
            move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| {
                let count = count.clone();
                async move {
                    let short = request.uri().path() == "/ping";
                    let mut stream = respond.send_response(Response::new(()), short).unwrap();
                    if short {
                        return;
                    }
                    let piece = Bytes::from(vec![0; 16 << 10]);
                    while write(&mut stream, piece.clone()).await.is_ok() {
                        count.set(count.get() + piece.len());
                    }
                }
            },
        );
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let mut stalled = Vec::new();
        for _ in 0..10 {
            let (answer, _) = sender.send_request(post(), true).unwrap();
            stalled.push(response(answer).await.unwrap());
            // The client's window is for all of its streams.
            let other = client.frames(&web).await;
            sender = other;
            ping(&mut sender).await;
        }
        // It comes to rest.
        let seen = Cell::new(0);
        eventually("it stands still", async || {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            seen.replace(sent.get()) == sent.get()
        })
        .await;
        let each = sent.get() / stalled.len();
        assert!(each < 512 << 10, "{each} bytes of each");
        ping(&mut sender).await;
    });
}

/// What one side breaks off the other does not take for complete.
#[test]
fn a_response_that_breaks_off_is_reset() {
    for (endpoint2, client2) in [(true, true), (true, false), (false, true)] {
        run(async {
            let mesh = Mesh::new().await;
            let protocol = match endpoint2 {
                true => Protocol::Http2,
                false => Protocol::Http,
            };
            let web = mesh.service("web", protocol);
            let go = Rc::new(Notify::new());
            let told = go.clone();
            let _pod = if endpoint2 {
                let app = Http2(move |_, mut respond: SendResponse<Bytes>| {
                    let go = told.clone();
                    async move {
                        let mut stream = respond.send_response(Response::new(()), false).unwrap();
                        stream.send_data("half".into(), false).unwrap();
                        go.notified().await;
                        stream.send_reset(Reason::INTERNAL_ERROR);
                    }
                });
                mesh.pod(&web, "web-a", app).await
            } else {
                downgrade(&mesh, &web);
                let app = Raw(move |tunnel: Tunnel| {
                    let go = told.clone();
                    async move {
                        let mut io = tunnel.into_io();
                        io.read_exact(&mut [0; 16]).await.unwrap();
                        let half =
                            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
                        io.write_all(half).await.unwrap();
                        go.notified().await;
                        io.shutdown().await.unwrap();
                        let _ = io.read_to_end(&mut Vec::new()).await;
                    }
                });
                mesh.pod(&web, "web-a", app).await
            };
            let client = mesh.client("default", "curl").await;
            if client2 {
                let mut sender = client.frames(&web).await;
                let (answer, _) = sender.send_request(post(), true).unwrap();
                let answer = response(answer).await.unwrap();
                go.notify_one();
                let error = read(&mut answer.into_body()).await.unwrap_err();
                assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
            } else {
                let mut sender = client.http1(&web).await;
                let answer = timeout(DEADLINE, sender.send_request(get("/"))).await;
                let body = answer.unwrap().unwrap().into_body();
                go.notify_one();
                assert!(timeout(DEADLINE, body.collect()).await.unwrap().is_err());
            }
        });
    }
}

/// NO_ERROR after a part of what was stated completes nothing, in either direction.
#[test]
fn what_is_shorter_than_stated_is_not_whole() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let ended = Ended::default();
        let go = Rc::new(Notify::new());
        let (kept, told) = (ended.clone(), go.clone());
        let app = Http2(
            move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| {
                let (kept, go) = (kept.clone(), told.clone());
                async move {
                    if request.method() == http::Method::POST {
                        go.notify_one();
                        let read = read(&mut request.into_body()).await;
                        let read = read.map(|(size, _)| size).map_err(|error| error.reason());
                        kept.replace(Some(read));
                        return;
                    }
                    let answer = Response::builder().header("content-length", "10");
                    let answer = answer.body(()).unwrap();
                    let mut stream = respond.send_response(answer, false).unwrap();
                    stream.send_data("half".into(), false).unwrap();
                    go.notified().await;
                    stream.send_reset(Reason::NO_ERROR);
                }
            },
        );
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let request = Request::get("http://web.shop/").body(()).unwrap();
        let (answer, _) = sender.send_request(request, true).unwrap();
        let answer = response(answer).await.unwrap();
        go.notify_one();
        let error = read(&mut answer.into_body()).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
        let (_answer, mut stream) = sender.send_request(post(), false).unwrap();
        stream.send_data("half".into(), false).unwrap();
        timeout(DEADLINE, go.notified()).await.expect("it arrives");
        stream.send_reset(Reason::NO_ERROR);
        eventually("it hears of it", async || ended.borrow().is_some()).await;
        assert_eq!(*ended.borrow(), Some(Err(Some(Reason::CANCEL))));
    });
}

/// How an endpoint's stream of a request has ended.
type Ended = Rc<RefCell<Option<Result<usize, Option<Reason>>>>>;

/// Answers nothing, and keeps how the request has ended.
fn never(ended: &Ended, arrived: &Rc<Notify>) -> impl crate::support::App {
    let (ended, arrived) = (ended.clone(), arrived.clone());
    Http2(
        move |request: Request<RecvStream>, respond: SendResponse<Bytes>| {
            let (ended, arrived) = (ended.clone(), arrived.clone());
            async move {
                arrived.notify_one();
                let read = read(&mut request.into_body()).await;
                let read = read.map(|(size, _)| size).map_err(|error| error.reason());
                ended.replace(Some(read));
                drop(respond);
            }
        },
    )
}

#[test]
fn a_request_that_its_client_gives_up_is_cancelled() {
    for client2 in [true, false] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http2);
            let (ended, arrived) = (Ended::default(), Rc::new(Notify::new()));
            let _pod = mesh.pod(&web, "web-a", never(&ended, &arrived)).await;
            let client = mesh.client("default", "curl").await;
            if client2 {
                let mut sender = client.frames(&web).await;
                let (answer, mut stream) = sender.send_request(post(), false).unwrap();
                stream.send_data("half".into(), false).unwrap();
                arrived.notified().await;
                stream.send_reset(Reason::CANCEL);
                assert!(response(answer).await.is_err());
                eventually("it hears of it", async || ended.borrow().is_some()).await;
            } else {
                let mut io = client.tunnel(web.address).await.unwrap().into_io();
                io.write_all(b"POST / HTTP/1.1\r\nhost: w\r\ncontent-length: 9\r\n\r\nhalf")
                    .await
                    .unwrap();
                arrived.notified().await;
                drop(io);
                eventually("it hears of it", async || ended.borrow().is_some()).await;
            }
            assert_eq!(*ended.borrow(), Some(Err(Some(Reason::CANCEL))));
        });
    }
}

/// RFC 9113 8.1: an endpoint may answer before it has the whole request, and say that it wants
/// no more of it.
#[test]
fn an_early_answer_is_whole_though_its_request_is_not() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let app = Http2(
            |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| async move {
                let refused = Response::builder().status(413).body(()).unwrap();
                let mut stream = respond.send_response(refused, false).unwrap();
                stream.send_data("too large".into(), true).unwrap();
                // NO_ERROR, as h2 has it for what is dropped then.
                drop(request);
            },
        );
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let (answer, mut stream) = sender.send_request(post(), false).unwrap();
        stream.send_data("begin".into(), false).unwrap();
        let answer = response(answer).await.unwrap();
        assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let (size, _) = read(&mut answer.into_body()).await.unwrap();
        assert_eq!(size, "too large".len());
        let reason = timeout(DEADLINE, poll_fn(|cx| stream.poll_reset(cx))).await;
        assert_eq!(reason.unwrap().unwrap(), Reason::NO_ERROR);
    });
}

/// The answer of one who reads on is there before the request is.
#[test]
fn an_upload_goes_on_after_its_answer_has_begun() {
    const SIZE: usize = 1 << 20;
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let ended = Ended::default();
        let kept = ended.clone();
        let app = Http2(
            move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| {
                let kept = kept.clone();
                async move {
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    let read = read(&mut request.into_body()).await;
                    let read = read.map(|(size, _)| size).map_err(|error| error.reason());
                    kept.replace(Some(read));
                    stream.send_data("done".into(), true).unwrap();
                }
            },
        );
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let (answer, mut stream) = sender.send_request(post(), false).unwrap();
        let mut body = response(answer).await.unwrap().into_body();
        write(&mut stream, vec![1; SIZE].into()).await.unwrap();
        stream.send_data(Bytes::new(), true).unwrap();
        assert_eq!(read(&mut body).await.unwrap().0, 4);
        assert_eq!(*ended.borrow(), Some(Ok(SIZE)));
        // Who does not want the answer has no use for the request.
        ended.take();
        let (answer, mut stream) = sender.send_request(post(), false).unwrap();
        let answer = response(answer).await.unwrap();
        stream.send_data("half".into(), false).unwrap();
        drop((answer, stream));
        eventually("it hears of it", async || ended.borrow().is_some()).await;
        assert_eq!(*ended.borrow(), Some(Err(Some(Reason::CANCEL))));
    });
}

/// GOAWAY: what is under way ends well, what comes goes elsewhere, and a request that it is too
/// late for is sent again.
#[test]
fn an_endpoint_that_says_goaway_loses_nothing() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let connections = Rc::new(Cell::new(0));
        let (leave, arrived) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
        let (count, left, reached) = (connections.clone(), leave.clone(), arrived.clone());
        let app = Raw(move |tunnel: Tunnel| {
            count.set(count.get() + 1);
            let (first, left, reached) = (count.get() == 1, left.clone(), reached.clone());
            async move {
                let mut connection = h2::server::handshake(tunnel.into_io()).await.unwrap();
                let mut told = false;
                loop {
                    let next = tokio::select! {
                        next = connection.accept() => next,
                        () = left.notified(), if first && !told => {
                            told = true;
                            connection.graceful_shutdown();
                            continue;
                        }
                    };
                    let Some(Ok((request, mut respond))) = next else {
                        return;
                    };
                    if request.method() == http::Method::POST {
                        reached.notify_one();
                    }
                    tokio::task::spawn_local(async move {
                        let (size, _) = read(&mut request.into_body()).await.unwrap();
                        let answer = Response::builder().header("x-size", size.to_string());
                        let answer = answer.body(()).unwrap();
                        let mut stream = respond.send_response(answer, false).unwrap();
                        stream
                            .send_data(if first { "old" } else { "new" }.into(), true)
                            .unwrap();
                    });
                }
            }
        });
        let pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        ping(&mut sender).await;
        let (under_way, mut stream) = sender.send_request(post(), false).unwrap();
        stream.send_data("a".into(), false).unwrap();
        timeout(DEADLINE, arrived.notified())
            .await
            .expect("it arrives");
        leave.notify_one();
        // Whenever it is heard of, all are answered.
        for _ in 0..200 {
            ping(&mut sender).await;
            if pod.tunnels.get() > 1 {
                break;
            }
        }
        assert_eq!(pod.tunnels.get(), 2, "a new connection");
        stream.send_data("b".into(), true).unwrap();
        let answer = response(under_way).await.unwrap();
        assert_eq!(answer.headers()["x-size"], "2");
        let mut body = answer.into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "old");
    });
}

#[test]
fn an_endpoint_is_asked_no_more_at_once_than_it_allows() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let app = Raw(|tunnel: Tunnel| async move {
            let mut builder = h2::server::Builder::new();
            let handshake = builder.max_concurrent_streams(2);
            let handshake = handshake.handshake::<_, Bytes>(tunnel.into_io());
            let mut connection = handshake.await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
                    respond.send_response(Response::new(()), true).unwrap();
                });
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let sender = client.frames(&web).await;
        let calls = (0..40).map(|_| {
            let mut sender = sender.clone();
            async move {
                for _ in 0..5 {
                    ping(&mut sender).await;
                }
            }
        });
        futures_util::future::join_all(calls).await;
    });
}

/// A response to HEAD has no body, ours no more than an endpoint's (RFC 9110 9.3.2).
#[test]
fn head_is_answered_without_a_body() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let head = || Request::head("http://web.shop/").body(()).unwrap();
        let (answer, _) = sender.send_request(head(), true).unwrap();
        let answer = response(answer).await.unwrap();
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.headers()["x-adit-reason"], "no_endpoints");
        assert!(answer.headers().contains_key("content-length"));
        assert!(answer.body().is_end_stream());
        let app = crate::support::Http(|_| async {
            let mut response = Response::new(body(""));
            let length = HeaderValue::from_static("5");
            response.headers_mut().insert("content-length", length);
            response
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (answer, _) = sender.send_request(head(), true).unwrap();
        let answer = response(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-length"], "5");
        assert!(answer.body().is_end_stream());
        // The other version is asked the same.
        let mut sender = client.http1(&web).await;
        let mut request = get("/");
        *request.method_mut() = http::Method::HEAD;
        let answer = send(&mut sender, request).await;
        assert_eq!((answer.status, answer.body.len()), (200, 0));
    });
}

/// Nobody has gone away: the log must not say so.
#[test]
fn head_that_we_answer_ourselves_ends_well() {
    for http2 in [false, true] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http);
            let client = mesh.client("default", "curl").await;
            let following = mesh.requests.following();
            let next = following.next(Filter::default(), DEADLINE);
            let calling = async {
                if http2 {
                    let mut sender = client.frames(&web).await;
                    let head = Request::head("http://web.shop/").body(()).unwrap();
                    let (answer, _) = sender.send_request(head, true).unwrap();
                    assert_eq!(response(answer).await.unwrap().status(), 503);
                } else {
                    let mut sender = client.http1(&web).await;
                    let mut request = get("/");
                    *request.method_mut() = http::Method::HEAD;
                    let answer = send(&mut sender, request).await;
                    assert_eq!((answer.status, answer.body.len()), (503, 0));
                    assert_ne!(answer.header("content-length"), "0");
                }
            };
            let (told, ()) = tokio::join!(biased; next, calling);
            let told = told.expect("followed");
            let end = told["steps"].as_array().unwrap().last().unwrap().clone();
            assert_eq!(end["details"], "no_endpoints", "{told:#}");
            assert_eq!(end["flags"], "UH", "{told:#}");
        });
    }
}

/// Up to 80 KiB it is us who refuse headers that are too large; beyond it is h2.
#[test]
fn headers_that_are_too_large_are_refused_by_us() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let client = mesh.client("default", "curl").await;
        for (size, reason) in [
            (63, Some("no_endpoints")),
            (66, Some("headers_too_large")),
            (90, None),
        ] {
            let mut sender = client.frames(&web).await;
            let request = Request::get("http://web.shop/").header("x", "x".repeat(size << 10));
            let (answer, _) = sender
                .send_request(request.body(()).unwrap(), true)
                .unwrap();
            let answer = response(answer).await.unwrap();
            let expected = if size > 64 { 431 } else { 503 };
            assert_eq!(answer.status(), expected, "{size} KiB");
            let told = answer.headers().get("x-adit-reason");
            assert_eq!(told.map(|told| told.to_str().unwrap()), reason);
        }
    });
}
