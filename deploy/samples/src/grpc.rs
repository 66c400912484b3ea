//! The gRPC Echo service over HTTP/2: messages are answered while they come, the status
//! is in the trailers.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::mpsc;

use crate::answer::{Body, Server};
use crate::collector::{self, ExportResponse};
use crate::echo::{
    EchoRequest, EchoResponse, HEALTH_CHECK, HealthCheckRequest, HealthCheckResponse, Method,
    frame, take,
};
use crate::fault::Fault;

/// Answers of `Repeat`.
const MAX_ANSWERS: u32 = 1_000_000;
/// Answers that wait for a slow reader.
const WAITING: usize = 16;

type Frames = mpsc::Sender<Result<Frame<Bytes>, std::io::Error>>;
/// A status code and its text.
type Status = (u32, String);

/// Whether a request is a gRPC call.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Answers a call; what is sent is sent by a task of its own.
pub(crate) fn answer(
    server: Rc<Server>,
    request: Request<Incoming>,
    peer: SocketAddr,
    fault: &Fault,
) -> Response<Body> {
    let (frames, mut sent) = mpsc::channel(WAITING);
    let fault = fault.clone();
    let call = Call {
        blank: EchoResponse {
            server: server.name.clone(),
            version: server.version.clone(),
            peer: peer.to_string(),
            metadata: metadata(request.headers()),
            ..EchoResponse::default()
        },
        frames,
    };
    if let Some(status) = fault.status {
        // As a proxy that is not gRPC would fail.
        return server.respond(status, crate::answer::full(Bytes::new()));
    }
    let collected = server.clone();
    tokio::task::spawn_local(async move {
        if request.uri().path() == collector::PATH {
            let outcome = call.collect(&collected, request.into_body()).await;
            return call.finish(outcome).await;
        }
        if request.uri().path() == HEALTH_CHECK {
            let outcome = call.health(request.into_body()).await;
            return call.finish(outcome).await;
        }
        let method = Method::of(request.uri().path());
        let outcome = match (fault.grpc_status, method) {
            (Some(code), _) => Err((code, "fault injected".into())),
            (None, Some(method)) => call.serve(method, request.into_body()).await,
            (None, None) => Err((12, format!("{} is not implemented", request.uri().path()))),
        };
        call.finish(outcome).await;
    });
    let frames = futures_util::stream::poll_fn(move |context| sent.poll_recv(context));
    let body = StreamBody::new(frames).boxed_unsync();
    let mut response = server.respond(StatusCode::OK, body);
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

struct Call {
    blank: EchoResponse,
    frames: Frames,
}

impl Call {
    /// Spans of a proxy.
    async fn collect(&self, server: &Server, body: Incoming) -> Result<(), Status> {
        let mut messages = Messages::of(body);
        if let Some(request) = messages.next().await? {
            server.spans.take(request);
        }
        self.send(&ExportResponse {}).await
    }

    /// A kubelet's probe.
    async fn health(&self, body: Incoming) -> Result<(), Status> {
        let request: Option<HealthCheckRequest> = Messages::of(body).next().await?;
        request.ok_or((3, "no message".to_owned()))?;
        self.send(&HealthCheckResponse::SERVING).await
    }

    async fn serve(&self, method: Method, body: Incoming) -> Result<(), Status> {
        let mut messages = Messages::of(body);
        match method {
            Method::Unary | Method::Server => {
                let request: Option<EchoRequest> = messages.next().await?;
                let request = request.ok_or((3, "no message".to_owned()))?;
                if messages.next::<EchoRequest>().await?.is_some() {
                    return Err((3, "more than one message".into()));
                }
                let count = match method {
                    Method::Server => request.count.min(MAX_ANSWERS),
                    _ => 1,
                };
                for index in 0..count {
                    if index > 0 && request.interval_ms > 0 {
                        let pause = Duration::from_millis(request.interval_ms.into());
                        tokio::time::sleep(pause).await;
                    }
                    self.reply(request.message.clone(), 1).await?;
                }
            }
            Method::Client => {
                let (mut received, mut last) = (0, String::new());
                while let Some(request) = messages.next::<EchoRequest>().await? {
                    received += 1;
                    last = request.message;
                }
                self.reply(last, received).await?;
            }
            Method::Bidi => {
                let mut received = 0;
                while let Some(request) = messages.next::<EchoRequest>().await? {
                    received += 1;
                    self.reply(request.message, received).await?;
                }
            }
        }
        Ok(())
    }

    async fn reply(&self, message: String, received: u32) -> Result<(), Status> {
        let response = EchoResponse {
            message,
            received,
            ..self.blank.clone()
        };
        self.send(&response).await
    }

    async fn send(&self, message: &impl prost::Message) -> Result<(), Status> {
        let sent = self.frames.send(Ok(Frame::data(frame(message)))).await;
        sent.map_err(|_| (1, "the caller is gone".to_owned()))
    }

    async fn finish(&self, outcome: Result<(), Status>) {
        let (status, text) = outcome.err().unwrap_or_default();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from(status));
        if let Ok(text) = HeaderValue::from_str(&text)
            && !text.is_empty()
        {
            trailers.insert("grpc-message", text);
        }
        // A caller that is gone does not care.
        let _ = self.frames.send(Ok(Frame::trailers(trailers))).await;
    }
}

struct Messages {
    body: Incoming,
    buffer: BytesMut,
}

impl Messages {
    fn of(body: Incoming) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
        }
    }

    async fn next<M: prost::Message + Default>(&mut self) -> Result<Option<M>, Status> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err((3, "a message is cut off".into())),
                Some(Err(error)) => return Err((1, error.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// The call's own metadata, values of one name joined.
fn metadata(headers: &HeaderMap) -> std::collections::BTreeMap<String, String> {
    let all = crate::answer::headers(headers).into_iter();
    all.map(|(name, values)| (name, values.join(", ")))
        .collect()
}
