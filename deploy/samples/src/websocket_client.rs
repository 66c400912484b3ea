//! A WebSocket client: sends messages and prints a JSON line for each that comes back.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clap::Args;
use http::{HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::client::HttpTarget;
use crate::requests::parse_header;
use crate::socket::resolve;
use crate::websocket::{CLOSE, Frame, TEXT, accept};

/// Options of `websocket`.
#[derive(Args)]
pub(crate) struct WebsocketOptions {
    /// `http://host[:port]/path`
    url: Uri,
    /// Messages to send
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Milliseconds between messages
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// What to say
    #[arg(long, default_value = "hello")]
    message: String,
    /// Request header, `name: value`; may be repeated
    #[arg(long = "header", short = 'H', value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Milliseconds to connect, and for each message to come back
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// Ends with an error when the connection does before its messages are back.
pub(crate) async fn websocket(options: WebsocketOptions) -> anyhow::Result<()> {
    let limit = Duration::from_millis(options.timeout);
    let target = HttpTarget::of(&options.url)?;
    let opened = timeout(limit, open(&options, &target)).await;
    let mut io = opened.context("no upgrade in time")??;
    for index in 0..options.count {
        if index > 0 {
            sleep(Duration::from_millis(options.interval)).await;
        }
        let begin = Instant::now();
        let message = format!("{} {}", options.message, index + 1);
        let trip = async {
            let frame = Frame::new(TEXT, message.as_bytes());
            frame.write(&mut io, Some([7, 1, 9, 3])).await?;
            Frame::read(&mut io).await
        };
        let answer = timeout(limit, trip).await;
        let answer = answer.context("no message came back in time")??;
        let Some(answer) = answer else {
            println!("{}", json!({"event": "ended", "messages": index}));
            bail!("the connection ended after {index} messages");
        };
        ensure!(
            answer.payload == message.as_bytes(),
            "something else came back"
        );
        let took = begin.elapsed().as_micros() as f64 / 1000.0;
        println!(
            "{}",
            json!({"event": "echo", "message": message, "latency_ms": took})
        );
    }
    let last = async {
        Frame::new(CLOSE, 1000u16.to_be_bytes())
            .write(&mut io, Some([7, 1, 9, 3]))
            .await?;
        Frame::read(&mut io).await
    };
    let closed = timeout(limit, last).await.context("no close came back")??;
    let well = closed.is_some_and(|frame| frame.opcode() == CLOSE);
    println!("{}", json!({"event": "closed", "answered": well}));
    Ok(())
}

async fn open(
    options: &WebsocketOptions,
    target: &HttpTarget,
) -> anyhow::Result<TokioIo<hyper::upgrade::Upgraded>> {
    let address = resolve(&target.address).await?;
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("connect {address}"))?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Its end shows at the sender.
    tokio::spawn(connection.with_upgrades());
    // Any sixteen bytes do (RFC 6455 4.1).
    let key = STANDARD.encode(b"adit-sample-key!");
    let mut request = Request::builder()
        .uri(&target.path)
        .header(header::HOST, &target.authority)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key);
    for (name, value) in &options.headers {
        request = request.header(name, value);
    }
    let response = sender
        .send_request(request.body(Empty::<Bytes>::new())?)
        .await?;
    let headers = response.headers();
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let line = json!({"event": "answer", "status": response.status().as_u16(),
        "server": text("x-adit-sample"), "version": text("x-adit-version")});
    println!("{line}");
    ensure!(
        response.status() == StatusCode::SWITCHING_PROTOCOLS,
        "the server answers {}",
        response.status()
    );
    let accepted = text(header::SEC_WEBSOCKET_ACCEPT.as_str());
    ensure!(
        accepted == Some(accept(&key).as_str()),
        "Sec-WebSocket-Accept is wrong"
    );
    Ok(TokioIo::new(hyper::upgrade::on(response).await?))
}
