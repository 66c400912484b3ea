//! Many requests over connections that are kept, and a count of who answered what: how a
//! split of traffic is seen.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use serde_json::json;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use crate::client::{HttpTarget, Sender, fetch, open};
use crate::grpc_client::{self, Calls};
use crate::stats::Histogram;

const MAX_CONNECTIONS: usize = 4096;
/// Different errors that are told.
const MAX_ERRORS: usize = 16;

/// Options of `requests`.
#[derive(Args)]
pub(crate) struct RequestsOptions {
    /// `http://host[:port]/path`
    url: Uri,
    /// Requests in all
    #[arg(long, short = 'n', default_value_t = 1000)]
    requests: u64,
    /// Connections, each with one request under way
    #[arg(long, short = 'c', default_value_t = 1)]
    connections: usize,
    /// HTTP/2 with prior knowledge
    #[arg(long)]
    http2: bool,
    /// Unary calls of the gRPC Echo service
    #[arg(long, conflicts_with = "http2")]
    grpc: bool,
    /// Request header or gRPC metadata, `name: value`; may be repeated
    #[arg(long = "header", short = 'H', value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Method
    #[arg(long, short = 'X', default_value = "GET")]
    method: Method,
    /// Milliseconds for each request
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// `name: value`.
pub(crate) fn parse_header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = text
        .split_once(':')
        .with_context(|| format!("header {text:?} has no colon"))?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

#[derive(Default)]
struct Counts {
    statuses: BTreeMap<String, u64>,
    versions: BTreeMap<String, u64>,
    servers: BTreeMap<String, u64>,
    both: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    failures: u64,
    connections: u64,
}

impl Counts {
    fn answered(&mut self, status: String, version: &str, server: &str) {
        *self.both.entry(format!("{version}/{status}")).or_default() += 1;
        *self.statuses.entry(status).or_default() += 1;
        *self.versions.entry(version.into()).or_default() += 1;
        *self.servers.entry(server.into()).or_default() += 1;
    }

    fn failed(&mut self, error: String) {
        self.failures += 1;
        if self.errors.len() < MAX_ERRORS || self.errors.contains_key(&error) {
            *self.errors.entry(error).or_default() += 1;
        }
    }
}

struct Run {
    options: RequestsOptions,
    target: HttpTarget,
    headers: HeaderMap,
    left: Cell<u64>,
    counts: RefCell<Counts>,
    histogram: RefCell<Histogram>,
}

/// Prints one JSON line. Requests without an answer are counted, not fatal.
pub(crate) async fn requests(options: RequestsOptions) -> anyhow::Result<()> {
    ensure!(
        (1..=MAX_CONNECTIONS).contains(&options.connections),
        "1 to {MAX_CONNECTIONS} connections"
    );
    let mut headers = HeaderMap::new();
    for (name, value) in &options.headers {
        headers.append(name.clone(), value.clone());
    }
    let run = Rc::new(Run {
        target: HttpTarget::of(&options.url)?,
        headers,
        left: Cell::new(options.requests),
        counts: RefCell::default(),
        histogram: RefCell::new(Histogram::new()),
        options,
    });
    let begin = Instant::now();
    LocalSet::new()
        .run_until(async {
            let mut tasks = JoinSet::new();
            for _ in 0..run.options.connections {
                let run = run.clone();
                tasks.spawn_local(async move {
                    match run.options.grpc {
                        true => run.grpc().await,
                        false => run.http().await,
                    }
                });
            }
            tasks.join_all().await
        })
        .await;
    let took = begin.elapsed().as_secs_f64();
    let (counts, histogram) = (run.counts.borrow(), run.histogram.borrow());
    let protocol = match (run.options.grpc, run.options.http2) {
        (true, _) => "grpc",
        (false, true) => "http2",
        (false, false) => "http1",
    };
    let report = json!({"kind": "requests", "protocol": protocol,
        "requests": run.options.requests, "failures": counts.failures,
        "statuses": counts.statuses, "versions": counts.versions, "servers": counts.servers,
        "versions_and_statuses": counts.both, "errors": counts.errors,
        "connections_opened": counts.connections, "seconds": took,
        "per_second": histogram.count() as f64 / took, "latency": histogram.summary()});
    println!("{report}");
    Ok(())
}

impl Run {
    /// Whether another request is to be made; it is then this caller's.
    fn next(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left > 0
    }

    async fn http(&self) {
        let limit = Duration::from_millis(self.options.timeout);
        let mut connection: Option<Sender> = None;
        while self.next() {
            let begin = Instant::now();
            let one = async {
                let mut sender = match connection.take().filter(Sender::is_open) {
                    Some(sender) => sender,
                    None => {
                        self.counts.borrow_mut().connections += 1;
                        open(&self.target.address, self.options.http2).await?.0
                    }
                };
                let (target, method) = (&self.target, &self.options.method);
                let answer = fetch(&mut sender, target, method, &self.headers).await?;
                anyhow::Ok((sender, answer))
            };
            match timeout(limit, one)
                .await
                .context("no answer in time")
                .flatten()
            {
                Ok((sender, answer)) => {
                    connection = Some(sender);
                    self.histogram.borrow_mut().record(begin.elapsed());
                    let text = |name: &str| {
                        let value = answer.headers.get(name)?.to_str().ok()?;
                        Some(value.to_owned())
                    };
                    self.counts.borrow_mut().answered(
                        answer.status.as_u16().to_string(),
                        &text("x-adit-version").unwrap_or_else(|| "-".into()),
                        &text("x-adit-sample").unwrap_or_else(|| "-".into()),
                    );
                }
                Err(error) => self.failed(error).await,
            }
        }
    }

    async fn grpc(&self) {
        let limit = Duration::from_millis(self.options.timeout);
        let calls = match Calls::to(&self.options.url, limit, &self.headers) {
            Ok(calls) => calls,
            Err(error) => return self.failed(error).await,
        };
        self.counts.borrow_mut().connections += 1;
        while self.next() {
            let begin = Instant::now();
            match timeout(limit, calls.unary("hello")).await {
                Ok(Ok(answer)) => {
                    self.histogram.borrow_mut().record(begin.elapsed());
                    let mut counts = self.counts.borrow_mut();
                    counts.answered("0".into(), &answer.version, &answer.server);
                }
                Ok(Err(status)) if !grpc_client::is_local(&status) => {
                    self.histogram.borrow_mut().record(begin.elapsed());
                    let code = (status.code() as i32).to_string();
                    self.counts.borrow_mut().answered(code, "-", "-");
                }
                Ok(Err(status)) => self.failed(anyhow::anyhow!("{status}")).await,
                Err(_) => self.failed(anyhow::anyhow!("no answer in time")).await,
            }
        }
    }

    async fn failed(&self, error: anyhow::Error) {
        self.counts.borrow_mut().failed(format!("{error:#}"));
        // A refusal is quick; a loop of them must not take the machine.
        sleep(Duration::from_millis(1)).await;
    }
}
