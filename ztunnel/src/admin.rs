//! The admin endpoint (port 15000, loopback): configuration dump, log level, CPU profile,
//! shutdown; paths and keys as Istio's ztunnel has them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use adit_shared::telemetry::admin::{check_origin, parse_query, set_logging};
use adit_shared::telemetry::http::{
    HttpResponse, html, json as json_response, method_not_allowed, not_found, text,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

use crate::dump;
use crate::enrolment::EnrolledPods;
use crate::worker::{Shared, WorkerHandle};

/// A worker that does not answer in this time is left out of the dump.
const WORKER_DEADLINE: Duration = Duration::from_secs(2);

/// What the endpoint serves from.
pub struct Admin {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// The workers.
    pub workers: Arc<[WorkerHandle]>,
    /// Pods that are enrolled.
    pub pods: Arc<EnrolledPods>,
    /// Ends the process in good order.
    pub quit: Arc<Notify>,
    /// One profile at a time.
    pub profiling: Semaphore,
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
            (&Method::POST, "/logging") => set_logging(&query),
            (&Method::GET, "/debug/pprof/profile") => self.profile(&query).await,
            (&Method::POST, "/quitquitquit") => {
                self.quit.notify_one();
                text(StatusCode::OK, "shutting down\n")
            }
            (_, "/" | "/config_dump" | "/debug/pprof/profile") => method_not_allowed("GET"),
            (_, "/logging" | "/quitquitquit") => method_not_allowed("POST"),
            _ => not_found(),
        }
    }

    async fn config_dump(&self) -> HttpResponse {
        let mut views = Vec::new();
        for worker in self.workers.iter() {
            if let Ok(Ok(open)) = timeout(WORKER_DEADLINE, worker.connections()).await {
                views.extend(open);
            }
        }
        let pods: BTreeMap<String, Value> = self.pods.list();
        let snapshot = self.shared.model.load_full();
        let dump = json!({
            "workloads": dump::workloads(&snapshot),
            "services": dump::services(&snapshot),
            "waypoints": dump::waypoints(&snapshot, &self.shared.failing_waypoints),
            "policies": dump::policies(&snapshot),
            "stagedServices": {},
            "staticConfig": Value::Null,
            "version": { "version": env!("CARGO_PKG_VERSION"), "component": "adit-ztunnel" },
            "config": self.shared.config,
            "certificates": adit_shared::identity::dump_certificates(&self.shared.certificates.snapshot()),
            "workloadState": dump::connections(views, &pods),
        });
        json_response(StatusCode::OK, format!("{dump:#}\n"))
    }

    async fn profile(&self, query: &HashMap<String, String>) -> HttpResponse {
        let number = |name, default: u64, max| match query.get(name).map(|v| v.parse::<u64>()) {
            None => Ok(default),
            Some(Ok(n)) if (1..=max).contains(&n) => Ok(n),
            Some(_) => Err(format!("{name} must be a number from 1 to {max}\n")),
        };
        let (seconds, frequency) =
            match (number("seconds", 10, 300), number("frequency", 100, 1000)) {
                (Ok(seconds), Ok(frequency)) => (seconds, frequency),
                (Err(wrong), _) | (_, Err(wrong)) => return text(StatusCode::BAD_REQUEST, wrong),
            };
        let Ok(_only) = self.profiling.try_acquire() else {
            return text(StatusCode::CONFLICT, "a profile is being taken already\n");
        };
        match take_profile(seconds, frequency as i32).await {
            Ok(profile) => {
                let mut response = Response::new(Full::new(profile.into()));
                let kind = http::HeaderValue::from_static("application/octet-stream");
                response
                    .headers_mut()
                    .insert(http::header::CONTENT_TYPE, kind);
                response
            }
            Err(error) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("profile: {error}\n"),
            ),
        }
    }
}

async fn take_profile(seconds: u64, frequency: i32) -> Result<Vec<u8>, pprof::Error> {
    use pprof::protos::Message;
    let guard = pprof::ProfilerGuardBuilder::default()
        .frequency(frequency)
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let profile = guard.report().build()?.pprof()?;
    Ok(profile.encode_to_vec())
}

const INDEX: &str = "<!DOCTYPE html><title>ztunnel</title><h1>Adit ztunnel</h1><ul>\
<li><a href=\"config_dump\">config_dump</a>: everything the proxy knows, as JSON\
<li>logging: POST, ?level=LEVEL or ?level=TARGET=LEVEL, ?reset\
<li><a href=\"debug/pprof/profile\">debug/pprof/profile</a>: CPU profile, ?seconds=10&amp;frequency=100\
<li>quitquitquit: POST, shuts down in good order</ul>\n";
