//! Port 15014: metrics, readiness, and who is connected.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::accept::accept;
use super::clients::Clients;
use super::metrics::Metrics;
use super::snapshot::ResourceSnapshot;

const MAX_CONNECTIONS: usize = 256;
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// A scraper keeps its connection; nobody needs one for longer than this.
const MAX_AGE: Duration = Duration::from_secs(600);

pub(super) struct Monitoring {
    pub(super) metrics: Arc<Metrics>,
    pub(super) clients: Clients,
    pub(super) snapshots: watch::Receiver<Arc<ResourceSnapshot>>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Monitoring {
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener) {
        let this = self.clone();
        let connected = move |tcp, _, place| {
            let this = this.clone();
            this.tasks.clone().spawn(async move {
                let _place = place;
                let service = service_fn(|request| {
                    let response = this.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_DEADLINE)
                    .serve_connection(TokioIo::new(tcp), service);
                tokio::select! {
                    // A peer that goes away is no news.
                    _ = connection => {}
                    () = sleep(MAX_AGE) => {}
                    () = this.stop.cancelled() => {}
                }
            });
        };
        let accepts = self.metrics.accepts.clone();
        accept(listener, MAX_CONNECTIONS, accepts, &self.stop, connected).await;
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let text = "text/plain; charset=utf-8";
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return respond(StatusCode::METHOD_NOT_ALLOWED, text, "GET only\n".into());
        }
        match request.uri().path() {
            "/metrics" | "/stats/prometheus" => {
                let generation = self.snapshots.borrow().generation();
                let generation = i64::try_from(generation).unwrap_or(i64::MAX);
                self.metrics.generation.set(generation);
                let version = "text/plain; version=0.0.4; charset=utf-8";
                respond(StatusCode::OK, version, self.metrics.render())
            }
            "/ready" if self.snapshots.borrow().is_ready() => {
                respond(StatusCode::OK, text, "ready\n".into())
            }
            "/ready" => respond(
                StatusCode::SERVICE_UNAVAILABLE,
                text,
                "the configuration has not been read yet\n".into(),
            ),
            "/debug/syncz" => match serde_json::to_string_pretty(&self.clients.report()) {
                Ok(json) => respond(StatusCode::OK, "application/json", json),
                Err(error) => respond(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    text,
                    format!("{error}\n"),
                ),
            },
            "/" => respond(
                StatusCode::OK,
                text,
                "/metrics\n/ready\n/debug/syncz\n".into(),
            ),
            _ => respond(StatusCode::NOT_FOUND, text, "no such page\n".into()),
        }
    }
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
