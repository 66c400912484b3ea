//! Clients that observe: every call or line of a connection is one JSON line.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::requests::parse_header;
use crate::serve::addresses;
use crate::socket::resolve;

/// The part of an answer that is looked at.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// Options of `call`.
#[derive(Args)]
pub(crate) struct CallOptions {
    /// `http://host[:port]/path`
    url: Uri,
    /// Calls to make
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Milliseconds between calls
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// Use one connection as long as it lasts
    #[arg(long)]
    keepalive: bool,
    /// HTTP/2 with prior knowledge
    #[arg(long)]
    http2: bool,
    /// Request header, `name: value`; may be repeated
    #[arg(long = "header", short = 'H', value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Method
    #[arg(long, short = 'X', default_value = "GET")]
    method: Method,
    /// Request body
    #[arg(long, short = 'd', default_value = "")]
    data: String,
    /// Print the whole answer of the server too
    #[arg(long)]
    json: bool,
    /// Milliseconds for a whole call
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// Where requests go.
pub(crate) struct HttpTarget {
    /// `host:port`.
    pub(crate) address: String,
    /// As the URL has it.
    pub(crate) authority: String,
    /// With its query.
    pub(crate) path: String,
}

/// An answer, read to its end.
pub(crate) struct HttpAnswer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

/// A connection that takes requests.
pub(crate) enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl HttpTarget {
    pub(crate) fn of(url: &Uri) -> anyhow::Result<Self> {
        let authority = url.authority().context("the URL needs a host")?;
        let path = url.path_and_query().map_or("/", |p| p.as_str());
        Ok(Self {
            address: format!(
                "{}:{}",
                authority.host(),
                authority.port_u16().unwrap_or(80)
            ),
            authority: authority.to_string(),
            path: path.into(),
        })
    }
}

impl Sender {
    /// Whether it may take another request.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            Self::Http1(sender) => !sender.is_closed(),
            Self::Http2(sender) => !sender.is_closed(),
        }
    }
}

/// Sends a request without body.
pub(crate) async fn fetch(
    sender: &mut Sender,
    target: &HttpTarget,
    method: &Method,
    headers: &HeaderMap,
) -> anyhow::Result<HttpAnswer> {
    exchange(sender, target, method, headers, Bytes::new()).await
}

async fn exchange(
    sender: &mut Sender,
    target: &HttpTarget,
    method: &Method,
    headers: &HeaderMap,
    body: Bytes,
) -> anyhow::Result<HttpAnswer> {
    // HTTP/2 takes the authority from the URI, HTTP/1.1 from the header.
    let uri = match sender {
        Sender::Http1(_) => target.path.clone(),
        Sender::Http2(_) => format!("http://{}{}", target.authority, target.path),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(uri)
        .body(Full::new(body))?;
    *request.headers_mut() = headers.clone();
    if matches!(sender, Sender::Http1(_)) && !headers.contains_key(http::header::HOST) {
        let host = HeaderValue::from_str(&target.authority)?;
        request.headers_mut().insert(http::header::HOST, host);
    }
    let response = match sender {
        Sender::Http1(sender) => {
            sender.ready().await?;
            sender.send_request(request).await?
        }
        Sender::Http2(sender) => {
            sender.ready().await?;
            sender.send_request(request).await?
        }
    };
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!(error))?;
    Ok(HttpAnswer {
        status: parts.status,
        headers: parts.headers,
        trailers: body.trailers().cloned(),
        body: body.to_bytes(),
    })
}

/// Ends with an error when any call got no answer (of whatever status).
pub(crate) async fn call(options: CallOptions) -> anyhow::Result<()> {
    let target = HttpTarget::of(&options.url)?;
    let limit = Duration::from_millis(options.timeout);
    let mut connection: Option<(Sender, SocketAddr)> = None;
    let mut failed = 0;
    for index in 0..options.count {
        if index > 0 {
            sleep(Duration::from_millis(options.interval)).await;
        }
        let begin = Instant::now();
        let reused = connection.is_some();
        let taken = connection.take();
        let outcome = timeout(limit, one_call(&options, &target, taken)).await;
        let took = begin.elapsed().as_micros() as f64 / 1000.0;
        let mut line = match outcome {
            Ok(Ok((line, kept))) => {
                connection = kept.filter(|_| options.keepalive);
                line
            }
            Ok(Err(error)) => {
                failed += 1;
                json!({"error": format!("{error:#}")})
            }
            Err(_) => {
                failed += 1;
                json!({"error": format!("no answer within {} ms", options.timeout)})
            }
        };
        line["call"] = (index + 1).into();
        line["latency_ms"] = took.into();
        line["reused"] = reused.into();
        println!("{line}");
    }
    if failed > 0 {
        bail!("{failed} of {} calls got no answer", options.count);
    }
    Ok(())
}

async fn one_call(
    options: &CallOptions,
    target: &HttpTarget,
    connection: Option<(Sender, SocketAddr)>,
) -> anyhow::Result<(Value, Option<(Sender, SocketAddr)>)> {
    let (mut sender, local) = match connection {
        Some(connection) => connection,
        None => open(&target.address, options.http2).await?,
    };
    let mut headers = HeaderMap::new();
    if matches!(sender, Sender::Http1(_)) && !options.keepalive {
        headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    for (name, value) in &options.headers {
        headers.append(name.clone(), value.clone());
    }
    let data = Bytes::from(options.data.clone());
    let answered = exchange(&mut sender, target, &options.method, &headers, data).await?;
    let answer: Value = serde_json::from_slice(&answered.body).unwrap_or(Value::Null);
    let text = |name: &str| answered.headers.get(name).and_then(|v| v.to_str().ok());
    let mut line = json!({
        "status": answered.status.as_u16(),
        "server": text("x-adit-sample"),
        "version": text("x-adit-version"),
        "reason": text("x-adit-reason"),
        "peer": answer["peer"],
        "local": local,
        "bytes": answered.body.len(),
    });
    if options.json {
        line["headers"] = json!(crate::answer::headers(&answered.headers));
        if let Some(trailers) = &answered.trailers {
            line["trailers"] = json!(crate::answer::headers(trailers));
        }
        line["answer"] = match answer {
            Value::Null => String::from_utf8_lossy(&answered.body).into_owned().into(),
            answer => answer,
        };
    }
    Ok((line, Some((sender, local))))
}

pub(crate) async fn open(target: &str, h2: bool) -> anyhow::Result<(Sender, SocketAddr)> {
    let address = resolve(target).await?;
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("connect {address}"))?;
    stream.set_nodelay(true)?;
    let (_, local) = addresses(&stream).context("the connection is gone")?;
    let io = TokioIo::new(stream);
    if h2 {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        // Its end shows at the sender.
        tokio::spawn(connection);
        return Ok((Sender::Http2(sender), local));
    }
    let (sender, connection) = http1::handshake(io).await?;
    tokio::spawn(connection);
    Ok((Sender::Http1(sender), local))
}

/// Options of `tcp`.
#[derive(Args)]
pub(crate) struct TcpOptions {
    /// `host:port` of an echo port
    target: String,
    /// Milliseconds between lines
    #[arg(long, default_value_t = 1000)]
    interval: u64,
    /// End after so many lines; 0 means when the connection ends
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// The server speaks first: wait for its line
    #[arg(long)]
    greeting: bool,
    /// Milliseconds to connect, and for each line to come back
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// Ends with an error when the connection does before its lines are sent.
pub(crate) async fn tcp(options: TcpOptions) -> anyhow::Result<()> {
    let limit = Duration::from_millis(options.timeout);
    let address = resolve(&options.target).await?;
    let connected = timeout(limit, TcpStream::connect(address)).await;
    let stream = match connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
        Ok(stream) => stream,
        Err(error) => {
            println!(
                "{}",
                json!({"event": "refused", "error": error.to_string()})
            );
            bail!("connect {address}: {error}");
        }
    };
    stream.set_nodelay(true)?;
    let begin = Instant::now();
    let (peer, local) = addresses(&stream).context("the connection is gone")?;
    println!(
        "{}",
        json!({"event": "connected", "local": local, "remote": peer})
    );
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    if options.greeting {
        let greeting = timeout(limit, lines.next_line()).await;
        let greeting = greeting.context("no greeting in time")??;
        println!("{}", json!({"event": "greeting", "line": greeting}));
    }
    let mut index = 0;
    let how = loop {
        index += 1;
        if options.count > 0 && index > options.count {
            return Ok(());
        }
        let sent = Instant::now();
        if let Err(error) = write.write_all(format!("line {index}\n").as_bytes()).await {
            break error.to_string();
        }
        match timeout(limit, lines.next_line()).await {
            Ok(Ok(Some(line))) => {
                let took = sent.elapsed().as_micros() as f64 / 1000.0;
                println!(
                    "{}",
                    json!({"event": "echo", "line": line, "latency_ms": took})
                );
            }
            Ok(Ok(None)) => break "closed".into(),
            Ok(Err(error)) => break error.to_string(),
            Err(_) => break format!("nothing came back within {} ms", options.timeout),
        }
        // An end must be seen when it happens, not at the next line.
        tokio::select! {
            () = sleep(Duration::from_millis(options.interval)) => {}
            line = lines.next_line() => match line {
                Ok(Some(line)) => println!("{}", json!({"event": "unexpected", "line": line})),
                Ok(None) => break "closed".into(),
                Err(error) => break error.to_string(),
            },
        }
    };
    let after = begin.elapsed().as_millis() as u64;
    println!(
        "{}",
        json!({"event": "ended", "how": how, "after_ms": after, "lines": index})
    );
    bail!("the connection ended: {how}")
}
