//! The admin endpoint (port 15000, loopback): configuration dump, log level, CPU profile,
//! shutdown; paths and keys as Istio's ztunnel has them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::telemetry::http::{
    HttpResponse, json as json_response, method_not_allowed, not_found, text,
};
use adit_shared::telemetry::logging;
use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, Response, StatusCode};
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
            "policies": dump::policies(&snapshot),
            "stagedServices": {},
            "staticConfig": Value::Null,
            "version": { "version": env!("CARGO_PKG_VERSION"), "component": "adit-ztunnel" },
            "config": self.shared.config,
            "certificates": dump::certificates(&self.shared.certificates.snapshot()),
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

/// `?level=info` or `?level=access=debug,...`, `?reset`; no query: the filter as it is.
/// Loopback keeps others out, but not the browser of somebody who forwards the port: a page
/// from anywhere could have it POST here (with an `Origin`), or read answers under a name of
/// its own that it lets resolve to 127.0.0.1 (which is then the `Host`). Tools send neither.
fn check_origin(headers: &HeaderMap) -> Result<(), &'static str> {
    if headers.contains_key(ORIGIN) {
        return Err("requests of web pages are not answered\n");
    }
    let Some(host) = headers.get(HOST) else {
        return Ok(());
    };
    let host = host.to_str().ok().and_then(|h| h.parse::<Authority>().ok());
    let local = host.is_some_and(|host| {
        let name = host.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    });
    if local {
        Ok(())
    } else {
        Err("the host must be localhost or an address\n")
    }
}

fn set_logging(query: &HashMap<String, String>) -> HttpResponse {
    let done = match query.get("level") {
        Some(level) => logging::set_filter(level),
        None if query.contains_key("reset") => logging::reset(),
        None => logging::current_filter(),
    };
    match done {
        Ok(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
        Err(error) => text(
            StatusCode::BAD_REQUEST,
            format!(
                "{error}\nusage: POST /logging, ?level=LEVEL or ?level=TARGET=LEVEL,..., ?reset\n"
            ),
        ),
    }
}

/// Pairs of a query; `%XX` and `+` are decoded.
fn parse_query(query: &str) -> HashMap<String, String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name.to_owned(), decode(value))
        })
        .collect()
}

fn decode(value: &str) -> String {
    let bytes = value.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn html(body: &'static str) -> HttpResponse {
    let mut response = text(StatusCode::OK, body);
    let kind = http::HeaderValue::from_static("text/html; charset=utf-8");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, kind);
    response
}

const INDEX: &str = "<!DOCTYPE html><title>ztunnel</title><h1>Adit ztunnel</h1><ul>\
<li><a href=\"config_dump\">config_dump</a>: everything the proxy knows, as JSON\
<li>logging: POST, ?level=LEVEL or ?level=TARGET=LEVEL, ?reset\
<li><a href=\"debug/pprof/profile\">debug/pprof/profile</a>: CPU profile, ?seconds=10&amp;frequency=100\
<li>quitquitquit: POST, shuts down in good order</ul>\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tools_are_answered() {
        for (host, origin, answered) in [
            (Some("localhost:15000"), None, true),
            (Some("127.0.0.1:15000"), None, true),
            (Some("[::1]:15000"), None, true),
            (Some("10.0.0.7"), None, true),
            (None, None, true),
            (Some("rebound.example:15000"), None, false),
            (Some("localhost.example"), None, false),
            (Some(""), None, false),
            (Some("localhost:15000"), Some("https://page.example"), false),
            (Some("localhost:15000"), Some("null"), false),
        ] {
            let mut headers = HeaderMap::new();
            let value = http::HeaderValue::from_static;
            host.map(|h| headers.insert(HOST, value(h)));
            origin.map(|o| headers.insert(ORIGIN, value(o)));
            let done = check_origin(&headers);
            assert_eq!(done.is_ok(), answered, "{host:?} {origin:?}: {done:?}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = parse_query("level=access%3Ddebug,h2%3Dwarn&reset&x=a+b%2");
        assert_eq!(query["level"], "access=debug,h2=warn");
        assert_eq!(query["reset"], "");
        assert_eq!(query["x"], "a b%2");
    }
}
