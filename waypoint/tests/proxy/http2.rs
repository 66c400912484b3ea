//! HTTP/2 and gRPC through the waypoint.

use std::convert::Infallible;

use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::support::{Answer, Body, DEADLINE, Http, Mesh, body, echo, get, run, send, send2};

fn grpc(path: &str, message: &[u8]) -> Request<Body> {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    Request::post(format!("http://web.shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body(framed))
        .unwrap()
}

/// A gRPC server that sends back what it gets, with a status in trailers.
fn grpc_echo(status: &'static str) -> impl crate::support::App {
    Http(move |request: Request<Incoming>| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        let timeout = request.headers().get("grpc-timeout").cloned();
        let sent = request.into_body().collect().await.unwrap().to_bytes();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        let frames = [Ok(Frame::data(sent)), Ok(Frame::trailers(trailers))];
        let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed());
        if let Some(timeout) = timeout {
            response.headers_mut().insert("x-timeout", timeout);
        }
        response
    })
}

#[test]
fn grpc_calls_have_messages_and_trailers() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Grpc);
        let _pod = mesh.pod(&web, "web-a", grpc_echo("0")).await;
        let client = mesh.client("default", "curl").await;
        let sender = client.http2(&web).await;
        for _ in 0..3 {
            let mut request = grpc("/echo.Echo/Say", b"hello");
            let time = HeaderValue::from_static("5S");
            request.headers_mut().insert("grpc-timeout", time);
            let answer = send2(&sender, request).await;
            assert_eq!(answer.status, 200);
            assert_eq!(&answer.body[5..], b"hello");
            assert_eq!(answer.trailers.as_ref().unwrap()["grpc-status"], "0");
            // What is left of the client's time.
            assert!(answer.header("x-timeout").ends_with('u'), "{answer:?}");
        }
    });
}

#[test]
fn a_grpc_call_without_an_endpoint_is_unavailable() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Grpc);
        let client = mesh.client("default", "curl").await;
        let sender = client.http2(&web).await;
        let answer = send2(&sender, grpc("/echo.Echo/Say", b"")).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("grpc-status"), "14");
        assert_eq!(answer.header("x-adit-reason"), "no_endpoints");
    });
}

#[test]
fn a_grpc_call_beyond_its_time_ends_with_deadline_exceeded() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Grpc);
        let never = Http(|_| std::future::pending::<Response<Body>>());
        let _pod = mesh.pod(&web, "web-a", never).await;
        let client = mesh.client("default", "curl").await;
        let sender = client.http2(&web).await;
        let mut request = grpc("/echo.Echo/Say", b"");
        let time = HeaderValue::from_static("100m");
        request.headers_mut().insert("grpc-timeout", time);
        let answer = send2(&sender, request).await;
        assert_eq!(answer.header("grpc-status"), "4");
    });
}

#[test]
fn streams_flow_both_ways_at_the_same_time() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        // Sends each piece back as soon as it has come.
        let app = Http(|request: Request<Incoming>| async move {
            let frames = stream::unfold(request.into_body(), |mut incoming| async move {
                let frame = incoming.frame().await?.unwrap();
                let data = frame.into_data().unwrap_or_default();
                Some((Ok::<_, Infallible>(Frame::data(data)), incoming))
            });
            Response::new(BoxedLocal::boxed(frames))
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http2(&web).await;
        let (pieces, inbox) = mpsc::channel::<Bytes>(1);
        let sent = stream::unfold(inbox, |mut inbox| async move {
            let piece = inbox.recv().await?;
            Some((Ok::<_, Infallible>(Frame::data(piece)), inbox))
        });
        let request = Request::post("http://web.shop/")
            .body(BoxedLocal::boxed(sent))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let mut back = response.into_body();
        for n in 0..5_u8 {
            pieces.send(vec![n; 1000].into()).await.unwrap();
            let mut got = 0;
            while got < 1000 {
                let frame = timeout(DEADLINE, back.frame()).await.unwrap();
                let data = frame.unwrap().unwrap().into_data().unwrap();
                assert!(data.iter().all(|byte| *byte == n));
                got += data.len();
            }
        }
        drop(pieces);
        while let Some(frame) = timeout(DEADLINE, back.frame()).await.unwrap() {
            assert!(frame.unwrap().into_data().unwrap().is_empty());
        }
    });
}

/// Boxes a stream of frames by way of a channel: hyper's tasks here are local, the bodies of
/// tests are `Send`.
pub struct BoxedLocal;

impl BoxedLocal {
    pub fn boxed<S>(frames: S) -> Body
    where
        S: futures_util::Stream<Item = Result<Frame<Bytes>, Infallible>> + 'static,
    {
        use futures_util::StreamExt as _;
        let (sender, receiver) = mpsc::channel(1);
        spawn_local(async move {
            let mut frames = std::pin::pin!(frames);
            while let Some(frame) = frames.next().await {
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
        });
        let frames = stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        // Whoever reads it is the only one.
        http_body_util::BodyExt::boxed(StreamBody::new(sync_wrapper(frames)))
    }
}

/// Makes a stream `Sync` by never sharing it.
fn sync_wrapper<S>(frames: S) -> impl futures_util::Stream<Item = S::Item> + Send + Sync
where
    S: futures_util::Stream + Send + 'static,
    S::Item: Send,
{
    let frames = std::sync::Mutex::new(Box::pin(frames));
    stream::poll_fn(move |cx| {
        let mut frames = frames.lock().unwrap();
        futures_util::Stream::poll_next(frames.as_mut(), cx)
    })
}

#[test]
fn a_client_of_http2_reaches_a_port_of_http_in_http2_and_one_of_http1_in_http1() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let sender = client.http2(&web).await;
        let request = Request::get("http://web.shop/two").body(body("")).unwrap();
        let answer = send2(&sender, request).await;
        assert_eq!((answer.status, answer.version), (200, Version::HTTP_2));
        let answer: Answer = client.get(&web, "/one").await;
        assert_eq!((answer.status, answer.version), (200, Version::HTTP_11));
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0].version, Version::HTTP_2);
        assert_eq!(seen[1].version, Version::HTTP_11);
        assert_eq!(seen[0].uri.authority().unwrap(), "web.shop");
    });
}

#[test]
fn http1_calls_to_a_port_of_http2_share_connections() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let (app, seen) = echo("a");
        let pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let calls = (0..8).map(|_| async {
            let mut sender = client.http1(&web).await;
            send(&mut sender, get("/")).await.status
        });
        let all = futures_util::future::join_all(calls).await;
        assert_eq!(all, [200; 8]);
        assert_eq!(seen.lock().unwrap().len(), 8);
        assert_eq!(pod.tunnels.get(), 1);
    });
}
