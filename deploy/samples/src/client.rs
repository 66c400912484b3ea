//! Clients that observe: every call or line of a connection is one JSON line.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::echo;
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
    #[arg(long = "header", short = 'H')]
    headers: Vec<String>,
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

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Ends with an error when any call got no answer (of whatever status).
pub(crate) async fn call(options: CallOptions) -> anyhow::Result<()> {
    let authority = options.url.authority().context("the URL needs a host")?;
    let host = authority.host();
    let target = format!("{host}:{}", authority.port_u16().unwrap_or(80));
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
    target: &str,
    connection: Option<(Sender, SocketAddr)>,
) -> anyhow::Result<(Value, Option<(Sender, SocketAddr)>)> {
    let (mut sender, local) = match connection {
        Some(connection) => connection,
        None => open(target, options.http2).await?,
    };
    let path = options.url.path_and_query().map_or("/", |p| p.as_str());
    let authority = options.url.authority().map_or("", |a| a.as_str());
    // HTTP/2 takes the authority from the URI, HTTP/1.1 from the header.
    let uri = match sender {
        Sender::Http1(_) => path.to_owned(),
        Sender::Http2(_) => format!("http://{authority}{path}"),
    };
    let mut request = Request::builder().method(options.method.clone()).uri(uri);
    if matches!(sender, Sender::Http1(_)) {
        request = request.header(http::header::HOST, authority);
        if !options.keepalive {
            request = request.header(http::header::CONNECTION, "close");
        }
    }
    for header in &options.headers {
        let (name, value) = header
            .split_once(':')
            .with_context(|| format!("header {header:?} has no colon"))?;
        request = request.header(name.trim(), value.trim());
    }
    let request = request.body(Full::new(Bytes::from(options.data.clone())))?;
    let response = match &mut sender {
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
    let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
    let answer: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let named = parts
        .headers
        .get("x-adit-sample")
        .and_then(|v| v.to_str().ok());
    let mut line = json!({
        "status": parts.status.as_u16(),
        "server": named,
        "version": answer["version"],
        "peer": answer["peer"],
        "local": local,
        "bytes": body.len(),
    });
    if options.json {
        line["answer"] = match answer {
            Value::Null => String::from_utf8_lossy(&body).into_owned().into(),
            answer => answer,
        };
    }
    Ok((line, Some((sender, local))))
}

async fn open(target: &str, h2: bool) -> anyhow::Result<(Sender, SocketAddr)> {
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

/// Options of `grpc`.
#[derive(Args)]
pub(crate) struct GrpcOptions {
    /// `http://host:port`
    url: String,
    /// Calls to make, all on one connection
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Milliseconds between calls
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// What to say
    #[arg(long, default_value = "hello")]
    message: String,
    /// Milliseconds for a whole call
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// Ends with an error when any call failed.
pub(crate) async fn grpc(options: GrpcOptions) -> anyhow::Result<()> {
    let limit = Duration::from_millis(options.timeout);
    let endpoint = tonic::transport::Endpoint::from_shared(options.url.clone())?;
    let channel = endpoint.connect_timeout(limit).connect_lazy();
    let mut failed = 0;
    for index in 0..options.count {
        if index > 0 {
            sleep(Duration::from_millis(options.interval)).await;
        }
        let begin = Instant::now();
        let call = echo::call(channel.clone(), options.message.clone());
        let mut line = match timeout(limit, call).await {
            Ok(Ok(answer)) => json!({"status": 0, "server": answer.server,
                "version": answer.version, "peer": answer.peer, "message": answer.message}),
            Ok(Err(status)) => {
                failed += 1;
                json!({"status": status.code() as i32, "error": status.message()})
            }
            Err(_) => {
                failed += 1;
                json!({"error": format!("no answer within {} ms", options.timeout)})
            }
        };
        line["call"] = (index + 1).into();
        line["latency_ms"] = (begin.elapsed().as_micros() as f64 / 1000.0).into();
        println!("{line}");
    }
    if failed > 0 {
        bail!("{failed} of {} calls failed", options.count);
    }
    Ok(())
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
