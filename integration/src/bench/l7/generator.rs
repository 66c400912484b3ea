//! The load generator: the same requests to every proxy, directly or as a ztunnel sends them.
//!
//! It opens its connections, sends one request on each, says `ready`, waits for a line, and
//! begins: what the caller then measures has no handshakes in it. With a rate, requests are
//! due at fixed times and their latency counts from then, so that a proxy that stalls does not
//! get fewer of them.

use std::cell::{Cell, RefCell};
use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::{ConnectRequest, Connection, Settings};
use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Method, Request};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;

use super::head::Head;
use super::identity::Credential;
use super::spec::{Hbone, LoadResult, LoadSpec, Protocol, path};
use super::upstream::SEEN;

/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Different requests of one connection.
const VARIETY: usize = 16;

/// Runs a load and prints its result.
///
/// # Errors
/// The connections could not be opened.
pub fn run(spec: &LoadSpec) -> anyhow::Result<()> {
    let spec = Rc::new(spec.clone());
    let result = block_on(generate(spec))?;
    println!("{}", serde_json::to_string(&result)?);
    Ok(())
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, future)
}

async fn generate(spec: Rc<LoadSpec>) -> anyhow::Result<LoadResult> {
    let shared = Rc::new(Shared::new(&spec));
    let dialer = Rc::new(Dialer::new(&spec)?);
    let mut tasks = Vec::new();
    for index in 0..spec.connections {
        let io = dialer.dial(index).await?;
        let requests = requests(&spec, index);
        match spec.protocol {
            Protocol::Http1 => {
                let mut connection = Http1::new(io, dialer.clone(), index);
                connection
                    .send(&requests[0])
                    .await
                    .context("first request")?;
                tasks.push(spawn_local(drive_http1(
                    connection,
                    requests,
                    shared.clone(),
                )));
            }
            Protocol::Http2 | Protocol::Grpc => {
                let mut builder = h2::client::Builder::new();
                builder
                    .initial_window_size(1 << 20)
                    .initial_connection_window_size(16 << 20)
                    .enable_push(false);
                let (sender, connection) = builder.handshake::<_, Bytes>(io).await?;
                spawn_local(async move {
                    // Its streams say why it ended.
                    let _ = connection.await;
                });
                let uri = requests_http2(&spec, index)?;
                send_http2(&sender, &uri[0])
                    .await
                    .context("first request")?;
                for stream in 0..spec.streams {
                    let requests = uri[stream % uri.len()..].to_vec();
                    let driven = drive_http2(sender.clone(), requests, shared.clone());
                    tasks.push(spawn_local(driven));
                }
            }
        }
    }
    println!("ready");
    std::io::stdout().flush()?;
    let told = || std::io::stdin().lock().read_line(&mut String::new());
    tokio::task::spawn_blocking(told).await??;
    let begin = Instant::now();
    let schedule = match spec.rate {
        None => None,
        Some(rate) => Some(shared.schedule(rate, spec.seconds)?),
    };
    shared.begin();
    tokio::time::sleep(Duration::from_secs_f64(spec.seconds)).await;
    shared.stop.set(true);
    for task in tasks {
        task.await.context("a connection's task")?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    if let Some(thread) = schedule {
        // It has ended before the tasks, who wait for its channel to close.
        let _ = thread.join();
    }
    Ok(shared.result(seconds))
}

/// What all connections of a load share.
struct Shared {
    started: Cell<bool>,
    start: Notify,
    stop: Cell<bool>,
    /// When requests are due; `None`: when the one before is answered.
    due: Option<Mutex<mpsc::UnboundedReceiver<Instant>>>,
    sender: RefCell<Option<mpsc::UnboundedSender<Instant>>>,
    micros: RefCell<Vec<u32>>,
    failures: Cell<u64>,
    failure: RefCell<Option<String>>,
}

impl Shared {
    fn new(spec: &LoadSpec) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            started: Cell::new(false),
            start: Notify::new(),
            stop: Cell::new(false),
            due: spec.rate.map(|_| Mutex::new(receiver)),
            sender: RefCell::new(Some(sender)),
            micros: RefCell::default(),
            failures: Cell::new(0),
            failure: RefCell::new(None),
        }
    }

    fn begin(&self) {
        self.started.set(true);
        self.start.notify_waiters();
    }

    async fn begun(&self) {
        while !self.started.get() {
            self.start.notified().await;
        }
    }

    /// A thread that says when requests are due: timers of the runtime are too coarse.
    fn schedule(&self, rate: f64, seconds: f64) -> anyhow::Result<std::thread::JoinHandle<()>> {
        ensure!(rate > 0.0, "a rate of {rate}");
        let sender = self.sender.take().context("one schedule")?;
        let begin = Instant::now();
        let count = (rate * seconds) as u64;
        Ok(std::thread::spawn(move || {
            // The default of 50 us would be seen in the result.
            let _ = nix::sys::prctl::set_timerslack(1);
            for index in 0..count {
                let due = begin + Duration::from_secs_f64(index as f64 / rate);
                let now = Instant::now();
                if due > now {
                    std::thread::sleep(due - now);
                }
                if sender.send(due).is_err() {
                    return;
                }
            }
        }))
    }

    /// Waits for the turn of the next request; `None`: there is none.
    async fn next(&self) -> Option<Instant> {
        match &self.due {
            None if self.stop.get() => None,
            None => Some(Instant::now()),
            Some(due) => due.lock().await.recv().await,
        }
    }

    fn count<T>(&self, due: Instant, answer: &anyhow::Result<T>) {
        match answer {
            Ok(_) => {
                let micros = u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX);
                self.micros.borrow_mut().push(micros);
            }
            Err(error) => {
                self.failures.set(self.failures.get() + 1);
                let mut first = self.failure.borrow_mut();
                first.get_or_insert_with(|| format!("{error:#}"));
            }
        }
    }

    fn result(&self, seconds: f64) -> LoadResult {
        let mut micros = self.micros.take();
        micros.sort_unstable();
        let at = |share: f64| {
            let index = (micros.len() as f64 * share) as usize;
            micros.get(index.min(micros.len().saturating_sub(1)))
        };
        let percentile = |share: f64| at(share).copied().map_or(0.0, f64::from);
        LoadResult {
            requests: micros.len() as u64,
            failures: self.failures.get(),
            seconds,
            p50: percentile(0.5),
            p99: percentile(0.99),
            p999: percentile(0.999),
            failure: self.failure.take(),
        }
    }
}

trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}
type BoxIo = Box<dyn Io>;

/// Opens connections to the target.
struct Dialer {
    target: SocketAddr,
    hbone: Option<(Hbone, Credential)>,
    /// HBONE connections, each for `share` client connections.
    tunnels: RefCell<Vec<Option<Connection>>>,
}

impl Dialer {
    fn new(spec: &LoadSpec) -> anyhow::Result<Self> {
        let hbone = match &spec.hbone {
            None => None,
            Some(hbone) => Some((hbone.clone(), Credential::issue(&hbone.ca, "client")?)),
        };
        Ok(Self {
            target: spec.target,
            hbone,
            tunnels: RefCell::default(),
        })
    }

    async fn dial(&self, index: usize) -> anyhow::Result<BoxIo> {
        let dialled = timeout(PATIENCE, self.dial_now(index)).await;
        dialled.with_context(|| format!("no connection within {PATIENCE:?}"))?
    }

    async fn dial_now(&self, index: usize) -> anyhow::Result<BoxIo> {
        let Some((hbone, credential)) = &self.hbone else {
            let stream = TcpStream::connect(self.target).await.context("connect")?;
            stream.set_nodelay(true)?;
            return Ok(Box::new(stream));
        };
        let slot = index / hbone.share.max(1);
        let known = self.tunnels.borrow().get(slot).cloned().flatten();
        let connection = match known.filter(Connection::is_usable) {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect(hbone.waypoint)
                    .await
                    .context("connect")?;
                stream.set_nodelay(true)?;
                let name = ServerName::IpAddress(hbone.waypoint.ip().into());
                let config = credential.certificate.client_config().clone();
                let tls = TlsStream::connect(stream, config, name, PATIENCE)
                    .await
                    .context("TLS")?;
                let connection = Connection::handshake(tls, &Settings::DEFAULT).await?;
                let mut tunnels = self.tunnels.borrow_mut();
                if tunnels.len() <= slot {
                    tunnels.resize(slot + 1, None);
                }
                tunnels[slot] = Some(connection.clone());
                connection
            }
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let request = ConnectRequest::new(self.target);
        let (tunnel, _) = connection
            .open(&request, deadline)
            .await
            .context("CONNECT")?;
        Ok(Box::new(tunnel.into_io()))
    }
}

/// Spread over all routes, and different for every connection.
fn paths(spec: &LoadSpec, index: usize) -> impl Iterator<Item = String> {
    let (routes, body) = (spec.routes.max(1), spec.body);
    let stride = (routes / VARIETY).max(1);
    (0..VARIETY).map(move |n| path((index * 7 + n * stride) % routes, body))
}

fn requests(spec: &LoadSpec, index: usize) -> Vec<Vec<u8>> {
    paths(spec, index)
        .map(|path| http1_request("GET", &path, &spec.host))
        .collect()
}

fn http1_request(method: &str, path: &str, host: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: adit-bench\r\nAccept: */*\r\n\
         X-Tenant: bench\r\n\r\n"
    )
    .into_bytes()
}

/// One connection of HTTP/1.1, opened again when it breaks.
struct Http1 {
    io: Option<BoxIo>,
    dialer: Rc<Dialer>,
    index: usize,
    buffer: Vec<u8>,
}

impl Http1 {
    fn new(io: BoxIo, dialer: Rc<Dialer>, index: usize) -> Self {
        Self {
            io: Some(io),
            dialer,
            index,
            buffer: Vec::with_capacity(80 << 10),
        }
    }

    async fn send(&mut self, request: &[u8]) -> anyhow::Result<()> {
        let mut io = match self.io.take() {
            Some(io) => io,
            None => self.dialer.dial(self.index).await?,
        };
        let exchanged = timeout(PATIENCE, exchange(&mut *io, request, &mut self.buffer)).await;
        let status = exchanged.with_context(|| format!("no answer within {PATIENCE:?}"))??;
        self.io = Some(io);
        ensure!(status == 200, "status {status}");
        Ok(())
    }
}

/// Sends a request, reads the whole answer and returns its status.
async fn exchange(io: &mut dyn Io, request: &[u8], buffer: &mut Vec<u8>) -> anyhow::Result<u16> {
    io.write_all(request).await.context("write")?;
    io.flush().await.context("flush")?;
    buffer.clear();
    let head = loop {
        if io.read_buf(buffer).await.context("read")? == 0 {
            bail!("closed before an answer");
        }
        if let Some(head) = Head::find(buffer) {
            break head;
        }
    };
    let status = Head::status(buffer).context("no status line")?;
    let length = head.content_length(buffer);
    let length = length.with_context(|| format!("status {status} without a length"))?;
    let mut missing = (head.length + length).saturating_sub(buffer.len());
    while missing > 0 {
        buffer.clear();
        match io.read_buf(buffer).await.context("read")? {
            0 => bail!("closed in the middle of an answer"),
            count => missing = missing.saturating_sub(count),
        }
    }
    Ok(status)
}

async fn drive_http1(mut connection: Http1, requests: Vec<Vec<u8>>, shared: Rc<Shared>) {
    shared.begun().await;
    for request in requests.iter().cycle() {
        let Some(due) = shared.next().await else {
            return;
        };
        let answer = connection.send(request).await;
        shared.count(due, &answer);
        if answer.is_err() {
            // What is broken must not spin.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn requests_http2(spec: &LoadSpec, index: usize) -> anyhow::Result<Vec<Request<()>>> {
    let grpc = spec.protocol == Protocol::Grpc;
    let make = |path: String| {
        let mut request = Request::new(());
        *request.uri_mut() = format!("http://{}{path}", spec.host).parse()?;
        let headers = request.headers_mut();
        headers.insert("user-agent", HeaderValue::from_static("adit-bench"));
        headers.insert("x-tenant", HeaderValue::from_static("bench"));
        if grpc {
            headers.insert("content-type", HeaderValue::from_static("application/grpc"));
            headers.insert("te", HeaderValue::from_static("trailers"));
        }
        *request.method_mut() = if grpc { Method::POST } else { Method::GET };
        Ok(request)
    };
    paths(spec, index).map(make).collect()
}

async fn send_http2(
    sender: &h2::client::SendRequest<Bytes>,
    request: &Request<()>,
) -> anyhow::Result<()> {
    let call = async {
        let mut sender = sender.clone().ready().await.context("connection")?;
        let grpc = *request.method() == Method::POST;
        let (response, mut send) = sender.send_request(request.clone(), !grpc)?;
        if grpc {
            // An empty message.
            send.send_data(Bytes::from_static(&[0; 5]), true)?;
        }
        let (head, mut body) = response.await?.into_parts();
        while let Some(chunk) = body.data().await {
            let length = chunk?.len();
            body.flow_control().release_capacity(length)?;
        }
        ensure!(head.status == 200, "status {}", head.status);
        if grpc {
            let trailers = body.trailers().await?;
            let status = trailers.as_ref().and_then(|t| t.get("grpc-status"));
            let status = status.or(head.headers.get("grpc-status"));
            ensure!(status.is_some_and(|s| s == "0"), "gRPC status {status:?}");
        }
        Ok(())
    };
    let called = timeout(PATIENCE, call).await;
    called.with_context(|| format!("no answer within {PATIENCE:?}"))?
}

async fn drive_http2(
    sender: h2::client::SendRequest<Bytes>,
    requests: Vec<Request<()>>,
    shared: Rc<Shared>,
) {
    shared.begun().await;
    for request in requests.iter().cycle() {
        let Some(due) = shared.next().await else {
            return;
        };
        let answer = send_http2(&sender, request).await;
        shared.count(due, &answer);
        if answer.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// One request over HTTP/1.1, or HTTP/2 where the load does: its status, and the route that
/// the upstream saw.
///
/// # Errors
/// There is no answer.
pub(super) fn probe(spec: &LoadSpec, method: &str, path: &str) -> anyhow::Result<Probe> {
    block_on(async {
        let dialer = Dialer::new(spec)?;
        let mut io = dialer.dial(0).await?;
        if spec.protocol == Protocol::Http1 {
            let request = http1_request(method, path, &spec.host);
            let answer = read_probe(&mut *io, &request);
            return timeout(PATIENCE, answer).await.context("no answer")?;
        }
        let (sender, connection) = h2::client::handshake(io).await?;
        spawn_local(connection);
        let mut sender: h2::client::SendRequest<Bytes> = sender.ready().await?;
        let uri = format!("http://{}{path}", spec.host);
        let request = Request::builder().method(method).uri(uri).body(())?;
        let (response, _) = sender.send_request(request, true)?;
        let (head, _) = timeout(PATIENCE, response)
            .await
            .context("no answer")??
            .into_parts();
        let seen = head
            .headers
            .get(SEEN)
            .map(|value| value.as_bytes().to_vec());
        Ok(Probe {
            status: head.status.as_u16(),
            route: String::from_utf8_lossy(&seen.unwrap_or_default()).into_owned(),
        })
    })
}

async fn read_probe(io: &mut dyn Io, request: &[u8]) -> anyhow::Result<Probe> {
    io.write_all(request).await?;
    io.flush().await?;
    let mut buffer = Vec::new();
    loop {
        if let Some(head) = Head::find(&buffer) {
            let route = head.value(&buffer, SEEN).unwrap_or_default();
            return Ok(Probe {
                status: Head::status(&buffer).context("no status line")?,
                route: String::from_utf8_lossy(route).into_owned(),
            });
        }
        ensure!(
            io.read_buf(&mut buffer).await? > 0,
            "closed before an answer"
        );
    }
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) status: u16,
    /// Name of the route that the upstream was told.
    pub(super) route: String,
}
