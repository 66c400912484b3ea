use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;

use http::{Response, Version};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::super::testing::Sample;
use super::*;
use crate::client::LocalExecutor;

const SOON: Duration = Duration::from_secs(20);

struct Direct(SocketAddr);

impl Dial for Direct {
    type Io = TcpStream;

    async fn dial(&self, _to: &proto::ProviderService) -> io::Result<TcpStream> {
        TcpStream::connect(self.0).await
    }
}

type Received = Arc<Mutex<Vec<(http::request::Parts, Bytes)>>>;

/// A collector that answers `status` and keeps what it gets.
async fn collector(status: u16) -> (SocketAddr, Received) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let address = listener.local_addr().expect("address");
    let received = Received::default();
    let kept = received.clone();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let kept = kept.clone();
            spawn_local(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let kept = kept.clone();
                    async move {
                        let (head, body) = request.into_parts();
                        let grpc = head.version == Version::HTTP_2;
                        let body = body.collect().await.expect("body").to_bytes();
                        kept.lock().push((head, body));
                        let mut trailers = HeaderMap::new();
                        trailers.insert("grpc-status", HeaderValue::from(status));
                        let body = match grpc {
                            true => StreamBody::new(futures_util::stream::iter([
                                Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; 5]))),
                                Ok(Frame::trailers(trailers)),
                            ]))
                            .boxed_unsync(),
                            false => Empty::new().boxed_unsync(),
                        };
                        let mut response = Response::new(body);
                        if !grpc {
                            *response.status_mut() =
                                StatusCode::from_u16(status).expect("a status");
                        }
                        Ok::<_, Infallible>(response)
                    }
                });
                let server = auto::Builder::new(LocalExecutor);
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (address, received)
}

fn target(kind: proto::provider::Kind) -> ExportTarget {
    let provider = proto::Provider {
        name: "traces".into(),
        kind: Some(kind),
    };
    ExportTarget::from_provider(&provider, "waypoint.shop").expect("takes spans")
}

fn service() -> Option<proto::ProviderService> {
    Some(proto::ProviderService {
        hostname: "collector.observability.svc.cluster.local".into(),
        port: 4317,
        timeout: None,
    })
}

/// Exports `spans` sample spans and waits until they are accounted for.
async fn exported(target: ExportTarget, to: SocketAddr, spans: u64) -> Arc<ExportCounters> {
    let counters = Arc::new(ExportCounters::default());
    let queue = SpanQueue::new(counters.clone());
    let exporter = SpanExporter::new(queue.clone(), target, Direct(to));
    let task = spawn_local(exporter.run());
    for _ in 0..spans {
        queue.push(Span::new(&Sample::new().event(), &[]));
    }
    let done = async {
        loop {
            let of = |counter: &AtomicU64| counter.load(Relaxed);
            if of(&counters.exported) + of(&counters.failed) + of(&counters.dropped) >= spans {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, done).await.expect("in time");
    task.abort();
    counters
}

#[tokio::test]
async fn otlp_over_grpc() {
    LocalSet::new()
        .run_until(async {
            let (address, received) = collector(0).await;
            let target = target(proto::provider::Kind::Opentelemetry(proto::OpenTelemetry {
                service: service(),
                resource_attributes: vec![proto::Header {
                    name: "env".into(),
                    value: "test".into(),
                }],
                ..Default::default()
            }));
            let counters = exported(target, address, 3).await;
            assert_eq!(counters.exported.load(Relaxed), 3);
            let received = received.lock();
            let (head, body) = &received[0];
            assert_eq!(
                head.uri.path(),
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
            );
            assert_eq!(head.headers[CONTENT_TYPE], "application/grpc");
            let message = otlp::ExportTraceServiceRequest::decode(&body[5..]).expect("decodes");
            let spans = &message.resource_spans[0].scope_spans[0].spans;
            let span = &spans[0];
            assert_eq!(span.trace_id, [0xab; 16]);
            assert_eq!(span.name, "reviews.shop.svc.cluster.local:80/*");
            assert_eq!(
                span.end_time_unix_nano - span.start_time_unix_nano,
                12_000_000
            );
            let has = |key: &str| span.attributes.iter().any(|a| a.key == key);
            assert!(has("source.principal") && has("destination.principal"));
            let resource = message.resource_spans[0]
                .resource
                .as_ref()
                .expect("resource");
            let keys: Vec<_> = resource.attributes.iter().map(|a| &*a.key).collect();
            assert_eq!(keys, ["env", "service.name"]);
        })
        .await;
}

#[tokio::test]
async fn zipkin_and_otlp_over_http() {
    LocalSet::new()
        .run_until(async {
            let (address, received) = collector(202).await;
            let zipkin = target(proto::provider::Kind::Zipkin(proto::Zipkin {
                service: service(),
                ..Default::default()
            }));
            exported(zipkin, address, 1).await;
            let http = target(proto::provider::Kind::Opentelemetry(proto::OpenTelemetry {
                service: service(),
                http_path: "/v1/traces".into(),
                ..Default::default()
            }));
            exported(http, address, 1).await;
            let received = received.lock();
            assert_eq!(received[0].0.uri.path(), "/api/v2/spans");
            let json: serde_json::Value = serde_json::from_slice(&received[0].1).expect("JSON");
            assert_eq!(json[0]["traceId"], "ab".repeat(16));
            assert_eq!(json[0]["localEndpoint"]["serviceName"], "waypoint.shop");
            assert_eq!(json[0]["duration"], 12_000);
            assert_eq!(json[0]["tags"]["http.status_code"], "200");
            assert_eq!(received[1].0.uri.path(), "/v1/traces");
            let message = otlp::ExportTraceServiceRequest::decode(received[1].1.clone());
            assert_eq!(message.expect("decodes").resource_spans.len(), 1);
        })
        .await;
}

#[tokio::test]
async fn what_is_refused_is_counted_and_nothing_waits_for_it() {
    LocalSet::new()
        .run_until(async {
            let (address, _received) = collector(14).await;
            let kind = proto::provider::Kind::Opentelemetry(proto::OpenTelemetry {
                service: service(),
                ..Default::default()
            });
            let counters = exported(target(kind), address, 2).await;
            assert_eq!(counters.failed.load(Relaxed), 2);
        })
        .await;
}

#[tokio::test]
async fn a_full_queue_drops() {
    let counters = Arc::new(ExportCounters::default());
    let queue = SpanQueue::new(counters.clone());
    for _ in 0..QUEUE + 5 {
        queue.push(Span::new(&Sample::new().event(), &[]));
    }
    assert_eq!(counters.dropped.load(Relaxed), 5);
}
