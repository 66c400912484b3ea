//! The administration endpoint (port 15000, loopback): configuration dump, log level, shutdown.

pub mod decide;
mod received;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::identity::dump_certificates;
use adit_shared::model::Service;
use adit_shared::telemetry::admin::{check_origin, parse_query, set_logging};
use adit_shared::telemetry::http::{
    HttpResponse, html, json as json_response, method_not_allowed, not_found, text,
};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;

pub use received::Received;

use crate::state::{Protocol, View};
use crate::telemetry::{Filter, NotFollowed};
use crate::worker::{Shared, WorkerHandle};

/// A worker that does not answer in this time is left out of the dump.
const WORKER_DEADLINE: Duration = Duration::from_secs(2);

/// How long a watcher waits for requests before it is told that there were none.
const TAP_WAIT: Duration = Duration::from_secs(1);

/// How long the next request that matches is waited for, together with its end.
const FOLLOW_WAIT: Duration = Duration::from_secs(30);
/// The longest that may be asked for.
const MAX_FOLLOW_SECONDS: u64 = 300;

/// What the endpoint serves from.
pub struct Admin {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// The resources as they came.
    pub received: Arc<Received>,
    /// The workers.
    pub workers: Arc<[WorkerHandle]>,
    /// Ends the process in good order.
    pub quit: Arc<Notify>,
}

impl Admin {
    /// Answers a request.
    pub async fn handle(self: Arc<Self>, request: Request<Incoming>) -> HttpResponse {
        if let Err(why) = check_origin(request.headers()) {
            return text(StatusCode::FORBIDDEN, why);
        }
        let query = parse_query(request.uri().query().unwrap_or_default());
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/") => html(INDEX),
            (&Method::GET, "/config_dump") => self.config_dump().await,
            (&Method::GET, "/connections") => self.connections().await,
            (&Method::GET, "/debug/decide") => match decide::Question::read(&query) {
                Ok(question) => {
                    let answer = question.answer(&self.shared.state.load_full());
                    json_response(StatusCode::OK, format!("{answer:#}\n"))
                }
                Err(wrong) => text(StatusCode::BAD_REQUEST, format!("{wrong}\n")),
            },
            (&Method::GET, "/debug/tap") => self.tap(&query).await,
            (&Method::POST, "/debug/trace") => self.follow(&query).await,
            (&Method::POST, "/logging") => set_logging(&query),
            (&Method::POST, "/quitquitquit") => {
                self.quit.notify_one();
                text(StatusCode::OK, "shutting down\n")
            }
            (_, "/" | "/config_dump" | "/connections" | "/debug/decide" | "/debug/tap") => {
                method_not_allowed("GET")
            }
            (_, "/debug/trace" | "/logging" | "/quitquitquit") => method_not_allowed("POST"),
            _ => not_found(),
        }
    }

    async fn tap(&self, query: &HashMap<String, String>) -> HttpResponse {
        let since = match query.get("since").map(|text| text.parse()) {
            None => None,
            Some(Ok(since)) => Some(since),
            Some(Err(_)) => return text(StatusCode::BAD_REQUEST, "since: a number is needed\n"),
        };
        let tapped = self.shared.requests.tap().read(since, TAP_WAIT).await;
        json_response(StatusCode::OK, format!("{}\n", json!(tapped)))
    }

    async fn follow(&self, query: &HashMap<String, String>) -> HttpResponse {
        let wait = match query.get("timeout").map(|text| text.parse::<u64>()) {
            None => FOLLOW_WAIT,
            Some(Ok(seconds)) if (1..=MAX_FOLLOW_SECONDS).contains(&seconds) => {
                Duration::from_secs(seconds)
            }
            Some(_) => {
                return text(
                    StatusCode::BAD_REQUEST,
                    format!("timeout: seconds are needed, 1 to {MAX_FOLLOW_SECONDS}\n"),
                );
            }
        };
        let said = |name: &str| query.get(name).filter(|text| !text.is_empty()).cloned();
        let filter = Filter {
            method: said("method"),
            path: said("path"),
            host: said("host"),
            header: said("header").map(|header| match header.split_once(':') {
                Some((name, value)) => (name.trim().to_lowercase(), Some(value.trim().into())),
                None => (header.trim().to_lowercase(), None),
            }),
            source: said("source"),
        };
        match self.shared.requests.following().next(filter, wait).await {
            Ok(told) => json_response(StatusCode::OK, format!("{told:#}\n")),
            Err(why @ NotFollowed::Busy) => text(StatusCode::CONFLICT, format!("{why}\n")),
            Err(why @ NotFollowed::Nothing) => {
                text(StatusCode::REQUEST_TIMEOUT, format!("{why}\n"))
            }
        }
    }

    async fn connections(&self) -> HttpResponse {
        let mut workers = Vec::new();
        for worker in self.workers.iter() {
            if let Ok(Ok(listing)) = timeout(WORKER_DEADLINE, worker.listing()).await {
                workers.push(listing);
            }
        }
        json_response(
            StatusCode::OK,
            format!("{:#}\n", json!({ "workers": workers })),
        )
    }

    async fn config_dump(&self) -> HttpResponse {
        let mut workers = Vec::new();
        for worker in self.workers.iter() {
            if let Ok(Ok(counts)) = timeout(WORKER_DEADLINE, worker.counts()).await {
                workers.push(counts);
            }
        }
        let view = self.shared.state.load_full();
        let services: Vec<Value> = view
            .services()
            .map(|service| {
                let ports = service.ports().iter().map(|port| {
                    json!({
                        "port": port.port,
                        "name": &*port.name,
                        "protocol": protocol(port.protocol),
                        "endpoints": decide::endpoints(&port.backend),
                    })
                });
                json!({
                    "namespace": &*service.entry().service().key.namespace,
                    "hostname": &*service.entry().service().key.hostname,
                    "addresses": addresses(service.entry().service()),
                    // Whether its traffic comes here.
                    "bound": is_bound(&view, service.entry().service()),
                    "ports": ports.collect::<Vec<_>>(),
                })
            })
            .collect();
        let dump = json!({
            "version": { "version": env!("CARGO_PKG_VERSION"), "component": "adit-waypoint" },
            "config": self.shared.config,
            "services": services,
            "resources": self.received.dump(),
            "certificates": dump_certificates(&self.shared.certificates.snapshot()),
            "workers": workers,
        });
        json_response(StatusCode::OK, format!("{dump:#}\n"))
    }
}

fn is_bound(view: &View, service: &Service) -> bool {
    let weighted = service.weighted_waypoints.iter().map(|w| &w.destination);
    let mut waypoints = service.waypoint.iter().chain(weighted);
    waypoints.any(|waypoint| view.is_self(waypoint))
}

fn addresses(service: &Service) -> Vec<String> {
    let all = service.addresses.iter();
    all.map(|address| address.block.addr().to_string())
        .collect()
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Undeclared => "undeclared",
        Protocol::Http => "HTTP",
        Protocol::Http2 => "HTTP2",
        Protocol::Grpc => "GRPC",
        Protocol::Tcp => "TCP",
        Protocol::Tls => "TLS",
    }
}

const INDEX: &str = "<!DOCTYPE html><title>waypoint</title><h1>Adit waypoint</h1><ul>\
<li><a href=\"config_dump\">config_dump</a>: everything the waypoint knows, as JSON\
<li><a href=\"connections\">connections</a>: what is open, of clients and to endpoints\
<li>debug/decide: what would become of a request, ?source=SPIFFE-ID&amp;destination=IP:PORT\
&amp;method=METHOD&amp;path=PATH&amp;headers=LINES&amp;serverName=NAME\
<li><a href=\"debug/tap\">debug/tap</a>: requests as they end, from ?since=NUMBER on\
<li>debug/trace: POST, follows the next request, ?method=METHOD&amp;path=PREFIX&amp;host=HOST\
&amp;header=NAME:VALUE&amp;source=SPIFFE-ID&amp;timeout=SECONDS\
<li>logging: POST, ?level=LEVEL or ?level=TARGET=LEVEL, ?reset\
<li>quitquitquit: POST, shuts down in good order</ul>\n";
