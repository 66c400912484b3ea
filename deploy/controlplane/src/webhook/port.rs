//! Port 15017: HTTPS for the API server, HTTP/2 or HTTP/1.1.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Admission, PATH};

/// Callers are API servers, of which there are few.
const MAX_CONNECTIONS: usize = 64;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For a request to arrive and be answered.
const DEADLINE: Duration = Duration::from_secs(10);
/// A connection is not used for longer.
const MAX_AGE: Duration = Duration::from_secs(600);
/// Two versions of an object, of which etcd takes 1.5 MiB each.
const MAX_BODY: usize = 8 << 20;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The port of the webhook.
pub(crate) struct Port<C> {
    pub(crate) admission: Admission,
    /// The TLS configuration of the moment.
    pub(crate) tls: C,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl<C: Fn() -> Arc<ServerConfig> + Send + Sync + 'static> Port<C> {
    /// Accepts until stopped.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener) {
        let admission = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = async {
                    // The semaphore is never closed.
                    let slot = admission.clone().acquire_owned().await.ok();
                    (listener.accept().await, slot)
                } => accepted,
                () = self.stop.cancelled() => return,
            };
            match accepted {
                (Ok((tcp, peer)), slot) => {
                    let this = self.clone();
                    self.tasks.spawn(async move {
                        let _slot = slot;
                        if let Err(error) = this.connection(tcp).await {
                            tracing::debug!(%peer, error, "webhook connection failed");
                        }
                    });
                }
                (Err(error), _) => {
                    tracing::warn!(%error, "webhook: cannot accept");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(&self, tcp: TcpStream) -> Result<(), String> {
        // The API server calls webhooks over HTTP/1.1, which xDS and CA do not offer.
        let mut config = ServerConfig::clone(&(self.tls)());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let handshake = TlsAcceptor::from(Arc::new(config)).accept(tcp);
        let tls = tokio::select! {
            tls = timeout(HANDSHAKE, handshake) => tls
                .map_err(|_| "no TLS handshake in time".to_owned())?
                .map_err(|error| error.to_string())?,
            () = self.stop.cancelled() => return Ok(()),
        };
        let admission = self.admission.clone();
        let service =
            service_fn(move |request| {
                let admission = admission.clone();
                async move {
                    let answered = timeout(DEADLINE, answer(&admission, request)).await;
                    Ok::<_, Infallible>(answered.unwrap_or_else(|_| {
                        text(StatusCode::REQUEST_TIMEOUT, "no request in time\n")
                    }))
                }
            });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HANDSHAKE);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(64);
        let connection = builder.serve_connection(TokioIo::new(tls), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            done = connection.as_mut() => return done.map_err(|error| error.to_string()),
            () = sleep(MAX_AGE) => {}
            () = self.stop.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        match timeout(DEADLINE, connection).await {
            Ok(done) => done.map_err(|error| error.to_string()),
            Err(_) => Err("requests were still under way".to_owned()),
        }
    }
}

async fn answer(admission: &Admission, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return text(StatusCode::NOT_FOUND, "no such page\n");
    }
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "POST only\n");
    }
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
    };
    match admission.review(&body).await {
        Ok(json) => {
            let mut response = Response::new(Full::new(json.into()));
            let kind = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
    }
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
