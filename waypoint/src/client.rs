//! Services that the waypoint itself asks: external authorization, collectors of spans.
//!
//! One client per provider and worker. It keeps a few connections and makes new ones as it
//! needs them; a connection that turns out to be closed before anything was sent is replaced
//! silently. Every call has a deadline and a bound for its answer.

use std::cell::RefCell;
use std::io;
use std::time::Duration;

use adit_shared::proto::waypoint::ProviderService;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::timeout;

/// Connections that are kept when nobody needs them.
const MAX_IDLE: usize = 16;
/// Of an answer's body.
const MAX_ANSWER: usize = 1 << 20;
/// A call's, where the provider says nothing.
const DEADLINE: Duration = Duration::from_secs(10);

/// How a service is reached: the data path's own way, so that one in the mesh is spoken to
/// over HBONE.
pub trait Dial {
    /// The stream.
    type Io: AsyncRead + AsyncWrite + Unpin + 'static;

    /// Connects to a provider's service.
    fn dial(&self, to: &ProviderService) -> impl Future<Output = io::Result<Self::Io>>;
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("connect: {0}")]
    Connect(io::Error),
    /// The connection broke, or the other end does not speak the protocol.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// No answer within the deadline.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// An answer of more than 1 MiB.
    #[error("the answer is longer than {MAX_ANSWER} bytes")]
    TooLong,
    /// The answer's body could not be read.
    #[error("the answer broke off: {0}")]
    Body(String),
    /// A gRPC call was answered with something else.
    #[error("HTTP status {0} instead of a gRPC answer")]
    Status(StatusCode),
    /// A gRPC call failed.
    #[error("gRPC status {code}: {message}")]
    Grpc {
        /// Its status code; 2 (unknown) where there was none.
        code: u32,
        /// Its text.
        message: String,
    },
    /// A gRPC answer that is not one message.
    #[error("malformed gRPC answer: {0}")]
    Malformed(String),
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers.
    pub head: http::response::Parts,
    /// Its body.
    pub body: Bytes,
    /// Its trailers.
    pub trailers: HeaderMap,
}

type Http1 = conn::http1::SendRequest<Full<Bytes>>;
type Http2 = conn::http2::SendRequest<Full<Bytes>>;

/// A client of one service, on one worker.
pub struct ServiceClient<D> {
    dial: D,
    service: ProviderService,
    deadline: Duration,
    idle: RefCell<Vec<Http1>>,
    shared: RefCell<Option<Http2>>,
}

impl<D: Dial> ServiceClient<D> {
    /// A client without connections yet.
    pub fn new(dial: D, service: ProviderService) -> Self {
        let stated = service.timeout.as_ref();
        let stated = stated.and_then(adit_shared::proto::duration);
        Self {
            dial,
            deadline: stated.filter(|t| !t.is_zero()).unwrap_or(DEADLINE),
            service,
            idle: RefCell::default(),
            shared: RefCell::default(),
        }
    }

    /// `host:port`, as the provider is configured.
    pub fn authority(&self) -> String {
        format!("{}:{}", self.service.hostname, self.service.port)
    }

    /// Sends a request in origin form over HTTP/1.1.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn http1(&self, request: Request<Full<Bytes>>) -> Result<Answer, ClientError> {
        timeout(self.deadline, self.call_http1(request))
            .await
            .map_err(|_| ClientError::Timeout(self.deadline))?
    }

    /// Makes a unary gRPC call of `path` (`/package.Service/Method`).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn unary<M: Message + Default>(
        &self,
        path: &str,
        headers: HeaderMap,
        message: &impl Message,
    ) -> Result<M, ClientError> {
        timeout(self.deadline, self.call_grpc(path, headers, message))
            .await
            .map_err(|_| ClientError::Timeout(self.deadline))?
    }

    async fn call_http1(&self, mut request: Request<Full<Bytes>>) -> Result<Answer, ClientError> {
        let (mut sender, response) = loop {
            let kept = self.idle.borrow_mut().pop();
            let reused = kept.is_some();
            let mut sender = match kept {
                Some(mut sender) => match sender.ready().await {
                    Ok(()) => sender,
                    Err(_) => continue,
                },
                None => self.connect_http1().await?,
            };
            match sender.try_send_request(request).await {
                Ok(response) => break (sender, response),
                Err(mut failed) => match failed.take_message() {
                    // Closed meanwhile, and nothing of it was sent.
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(failed.into_error().into()),
                },
            }
        };
        let answer = collect(response).await?;
        if sender.ready().await.is_ok() {
            let mut idle = self.idle.borrow_mut();
            if idle.len() < MAX_IDLE {
                idle.push(sender);
            }
        }
        Ok(answer)
    }

    async fn call_grpc<M: Message + Default>(
        &self,
        path: &str,
        headers: HeaderMap,
        message: &impl Message,
    ) -> Result<M, ClientError> {
        let uri = Uri::builder()
            .scheme("http")
            .authority(self.authority())
            .path_and_query(path)
            .build()
            .map_err(|error| ClientError::Malformed(error.to_string()))?;
        let body = frame(message);
        let mut sender = self.http2().await?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = headers;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        let response = match sender.try_send_request(request).await {
            Ok(response) => response,
            Err(mut failed) => {
                *self.shared.borrow_mut() = None;
                match failed.take_message() {
                    Some(unsent) => self.http2().await?.send_request(unsent).await?,
                    None => return Err(failed.into_error().into()),
                }
            }
        };
        let answer = collect(response).await?;
        if answer.head.status != StatusCode::OK {
            return Err(ClientError::Status(answer.head.status));
        }
        let of = |name| answer.trailers.get(name).or(answer.head.headers.get(name));
        let text = |name| of(name).and_then(|value: &HeaderValue| value.to_str().ok());
        match text("grpc-status").map(str::parse::<u32>) {
            Some(Ok(0)) => unframe(answer.body),
            status => Err(ClientError::Grpc {
                code: status.and_then(Result::ok).unwrap_or(2),
                message: text("grpc-message").unwrap_or_default().to_owned(),
            }),
        }
    }

    async fn connect_http1(&self) -> Result<Http1, ClientError> {
        let io = self.dial.dial(&self.service).await;
        let io = TokioIo::new(io.map_err(ClientError::Connect)?);
        let (sender, connection) = conn::http1::handshake(io).await?;
        spawn_local(connection);
        Ok(sender)
    }

    /// The one connection that all calls share.
    async fn http2(&self) -> Result<Http2, ClientError> {
        let kept = self.shared.borrow().clone();
        if let Some(mut sender) = kept
            && sender.ready().await.is_ok()
        {
            return Ok(sender);
        }
        let io = self.dial.dial(&self.service).await;
        let io = TokioIo::new(io.map_err(ClientError::Connect)?);
        let (sender, connection) = conn::http2::handshake(LocalExecutor, io).await?;
        spawn_local(connection);
        *self.shared.borrow_mut() = Some(sender.clone());
        Ok(sender)
    }
}

async fn collect(response: http::Response<hyper::body::Incoming>) -> Result<Answer, ClientError> {
    let (head, body) = response.into_parts();
    let collected = Limited::new(body, MAX_ANSWER).collect().await;
    let collected = collected.map_err(|error| match error.downcast::<LengthLimitError>() {
        Ok(_) => ClientError::TooLong,
        Err(error) => ClientError::Body(error.to_string()),
    })?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    Ok(Answer {
        head,
        body: collected.to_bytes(),
        trailers,
    })
}

/// A message as gRPC sends it: uncompressed, with its length before it.
fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // There is room: the buffer grows.
    let _ = message.encode(&mut framed);
    framed.freeze()
}

fn unframe<M: Message + Default>(mut body: Bytes) -> Result<M, ClientError> {
    let malformed = |what: &str| ClientError::Malformed(what.to_owned());
    if body.len() < 5 {
        return Err(malformed("no message"));
    }
    if body.get_u8() != 0 {
        return Err(malformed("compressed, which was not asked for"));
    }
    if body.get_u32() as usize != body.len() {
        return Err(malformed("not exactly one message"));
    }
    M::decode(body).map_err(|error| ClientError::Malformed(error.to_string()))
}

/// Runs hyper's tasks on this worker's thread.
#[derive(Debug, Clone, Copy)]
pub struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_framing() {
        let message = ProviderService {
            hostname: "a".into(),
            port: 7,
            timeout: None,
        };
        let framed = frame(&message);
        assert_eq!(framed[..5], [0, 0, 0, 0, 5]);
        let back: ProviderService = unframe(framed.clone()).expect("one message");
        assert_eq!(back, message);
        let bad = |bytes: &[u8]| {
            unframe::<ProviderService>(Bytes::copy_from_slice(bytes)).expect_err("malformed")
        };
        assert!(matches!(bad(&framed[..4]), ClientError::Malformed(_)));
        assert!(matches!(bad(&framed[..9]), ClientError::Malformed(_)));
        assert!(matches!(bad(&[1, 0, 0, 0, 0]), ClientError::Malformed(_)));
        assert!(matches!(
            bad(&[0, 0, 0, 0, 1, 0xff]),
            ClientError::Malformed(_)
        ));
    }
}
