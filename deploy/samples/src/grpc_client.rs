//! A client of the gRPC Echo service, for every kind of call.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use futures_util::StreamExt;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

use crate::echo::{EchoRequest, EchoResponse, Method};
use crate::requests::parse_header;

/// Messages of a stream, in either direction.
const MAX_MESSAGES: u32 = 100_000;

/// Options of `grpc`.
#[derive(Args)]
pub(crate) struct GrpcOptions {
    /// `http://host:port`
    url: Uri,
    /// Calls to make, all on one connection
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Milliseconds between calls
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// Kind of call
    #[arg(long, value_enum, default_value_t = Method::Unary)]
    kind: Method,
    /// Messages of a streaming call
    #[arg(long, default_value_t = 3)]
    messages: u32,
    /// What to say
    #[arg(long, default_value = "hello")]
    message: String,
    /// Metadata, `name: value`; may be repeated
    #[arg(long = "header", short = 'H', value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Print the whole of the last answer too
    #[arg(long)]
    json: bool,
    /// Milliseconds for a whole call
    #[arg(long, default_value_t = 5000)]
    timeout: u64,
}

/// Calls over one channel.
pub(crate) struct Calls {
    channel: Channel,
    metadata: MetadataMap,
}

impl Calls {
    /// Connects with the first call.
    pub(crate) fn to(url: &Uri, limit: Duration, headers: &HeaderMap) -> anyhow::Result<Self> {
        let endpoint = Channel::builder(url.clone());
        Ok(Self {
            channel: endpoint.connect_timeout(limit).connect_lazy(),
            metadata: MetadataMap::from_headers(headers.clone()),
        })
    }

    /// `Echo`.
    pub(crate) async fn unary(&self, message: &str) -> Result<EchoResponse, Status> {
        let mut answers = self.call(Method::Unary, message, 1).await?;
        answers.pop().ok_or_else(|| Status::internal("no answer"))
    }

    /// A call of any kind with `messages` messages where it streams; all its answers.
    pub(crate) async fn call(
        &self,
        method: Method,
        message: &str,
        messages: u32,
    ) -> Result<Vec<EchoResponse>, Status> {
        let messages = messages.clamp(1, MAX_MESSAGES);
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let codec: ProstCodec<EchoRequest, EchoResponse> = ProstCodec::default();
        let path = PathAndQuery::try_from(method.path())
            .map_err(|error| Status::internal(error.to_string()))?;
        let one = EchoRequest {
            message: message.to_owned(),
            count: messages,
            interval_ms: 0,
        };
        match method {
            Method::Unary => {
                let request = self.request(one);
                Ok(vec![grpc.unary(request, path, codec).await?.into_inner()])
            }
            Method::Client => {
                let many = futures_util::stream::iter(vec![one; messages as usize]);
                let answer = grpc.client_streaming(self.request(many), path, codec);
                Ok(vec![answer.await?.into_inner()])
            }
            Method::Server => {
                let answers = grpc.server_streaming(self.request(one), path, codec);
                collect(answers.await?.into_inner()).await
            }
            Method::Bidi => {
                let many = futures_util::stream::iter(vec![one; messages as usize]);
                let answers = grpc.streaming(self.request(many), path, codec);
                collect(answers.await?.into_inner()).await
            }
        }
    }

    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = self.metadata.clone();
        request
    }
}

async fn collect(mut answers: tonic::Streaming<EchoResponse>) -> Result<Vec<EchoResponse>, Status> {
    let mut all = Vec::new();
    while let Some(answer) = answers.next().await {
        all.push(answer?);
    }
    Ok(all)
}

/// Whether a status was made here, because no answer came.
pub(crate) fn is_local(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Ends with an error when any call failed.
pub(crate) async fn grpc(options: GrpcOptions) -> anyhow::Result<()> {
    let limit = Duration::from_millis(options.timeout);
    let mut headers = HeaderMap::new();
    for (name, value) in &options.headers {
        headers.append(name.clone(), value.clone());
    }
    options.url.authority().context("the URL needs a host")?;
    let calls = Calls::to(&options.url, limit, &headers)?;
    let mut failed = 0;
    for index in 0..options.count {
        if index > 0 {
            sleep(Duration::from_millis(options.interval)).await;
        }
        let begin = Instant::now();
        let call = calls.call(options.kind, &options.message, options.messages);
        let mut line = match timeout(limit, call).await {
            Ok(Ok(answers)) => told(&answers, options.json),
            Ok(Err(status)) => {
                failed += 1;
                let from = if is_local(&status) {
                    "client"
                } else {
                    "server"
                };
                json!({"status": status.code() as i32, "error": status.message(), "from": from})
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

fn told(answers: &[EchoResponse], whole: bool) -> Value {
    let Some(last) = answers.last() else {
        return json!({"status": 0, "answers": 0});
    };
    let mut line = json!({"status": 0, "server": last.server, "version": last.version,
        "peer": last.peer, "message": last.message, "received": last.received,
        "answers": answers.len()});
    if whole {
        line["metadata"] = json!(last.metadata);
    }
    line
}
