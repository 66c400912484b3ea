use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use ::http::{Request, Response};
use adit_shared::proto::ext_authz::authorization_server::{Authorization, AuthorizationServer};
use adit_shared::proto::ext_authz::{self as wire, check_response::HttpResponse};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::*;
use crate::client::LocalExecutor;

struct Direct(SocketAddr);

impl Dial for Direct {
    type Io = TcpStream;

    async fn dial(&self, _to: &proto::ProviderService) -> io::Result<TcpStream> {
        TcpStream::connect(self.0).await
    }
}

/// Decides by the header `x-ask`, and keeps what it was asked.
#[derive(Clone, Default)]
struct Service(Arc<Mutex<Vec<wire::AttributeContext>>>);

#[tonic::async_trait]
impl Authorization for Service {
    async fn check(
        &self,
        request: tonic::Request<wire::CheckRequest>,
    ) -> Result<tonic::Response<wire::CheckResponse>, tonic::Status> {
        let attributes = request.into_inner().attributes.unwrap_or_default();
        let http = attributes.request.clone().and_then(|r| r.http);
        let ask = http.and_then(|http| http.headers.get("x-ask").cloned());
        self.0.lock().push(attributes);
        let option = |key: &str, value: &str, append: Option<bool>| wire::HeaderValueOption {
            header: Some(wire::HeaderValue {
                key: key.into(),
                value: value.into(),
                raw_value: Vec::new(),
            }),
            append,
            append_action: 0,
        };
        let status = |code| {
            Some(wire::Status {
                code,
                message: String::new(),
            })
        };
        let answer = match ask.as_deref() {
            Some("allow") => wire::CheckResponse {
                status: status(0),
                http_response: Some(HttpResponse::OkResponse(wire::OkHttpResponse {
                    headers: vec![
                        option("x-user", "ann", None),
                        option("x-role", "admin", Some(true)),
                        option("host", "elsewhere", None),
                    ],
                    headers_to_remove: vec!["x-ask".into(), "content-length".into()],
                    response_headers_to_add: vec![option("x-checked", "yes", None)],
                    ..Default::default()
                })),
            },
            Some("deny") => wire::CheckResponse {
                status: status(7),
                http_response: Some(HttpResponse::DeniedResponse(wire::DeniedHttpResponse {
                    status: Some(wire::HttpStatus { code: 401 }),
                    headers: vec![option("www-authenticate", "Basic", None)],
                    body: "who are you?".into(),
                })),
            },
            Some("both") => wire::CheckResponse {
                status: status(0),
                http_response: Some(HttpResponse::DeniedResponse(Default::default())),
            },
            Some("slow") => {
                tokio::time::sleep(Duration::from_secs(30)).await;
                wire::CheckResponse::default()
            }
            Some("error") => return Err(tonic::Status::internal("broken")),
            _ => wire::CheckResponse {
                status: status(16),
                http_response: None,
            },
        };
        Ok(tonic::Response::new(answer))
    }
}

async fn grpc_service() -> (SocketAddr, Service) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let address = listener.local_addr().expect("address");
    let service = Service::default();
    let server = AuthorizationServer::new(service.clone());
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(server.clone());
            let io = TokioIo::new(stream);
            let server = http2::Builder::new(LocalExecutor);
            spawn_local(async move { server.serve_connection(io, service).await });
        }
    });
    (address, service)
}

fn common() -> proto::ExtAuthzCommon {
    proto::ExtAuthzCommon {
        service: Some(proto::ProviderService {
            hostname: "authz.shop.svc.cluster.local".into(),
            port: 9000,
            timeout: Duration::from_millis(500).try_into().ok(),
        }),
        ..Default::default()
    }
}

fn grpc(common: proto::ExtAuthzCommon, at: SocketAddr) -> ExternalAuthorization<Direct> {
    let kind = proto::provider::Kind::ExtAuthzGrpc(proto::ExtAuthzGrpc {
        common: Some(common),
    });
    provider(kind, at).expect("valid")
}

fn provider(
    kind: proto::provider::Kind,
    at: SocketAddr,
) -> Result<ExternalAuthorization<Direct>, ProviderError> {
    let provider = proto::Provider {
        name: "authz".into(),
        kind: Some(kind),
    };
    ExternalAuthorization::new(&provider, Direct(at))
}

async fn ask(of: &ExternalAuthorization<Direct>, ask: &str, body: &str, whole: bool) -> Decision {
    let request = Request::get("/reviews/1?full=yes")
        .header("x-ask", ask)
        .header("x-tag", "a")
        .header("x-tag", "b")
        .header("authorization", "Bearer t")
        .body(())
        .expect("valid");
    let (parts, ()) = request.into_parts();
    let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/client"
        .parse()
        .expect("valid");
    of.check(&CheckInput {
        request: &parts,
        host: "reviews.shop",
        time: SystemTime::now(),
        source: "10.0.0.1:1234".parse().expect("address"),
        source_identity: Some(&identity),
        destination: "10.96.0.1:80".parse().expect("address"),
        destination_identity: &identity,
        body: Bytes::copy_from_slice(body.as_bytes()),
        body_is_whole: whole,
    })
    .await
}

fn header(name: &'static str, value: &'static str) -> (HeaderName, HeaderValue) {
    let name = HeaderName::from_static(name);
    (name, HeaderValue::from_static(value))
}

#[tokio::test]
async fn grpc_allows_with_changes_and_denies_with_an_answer() {
    let run = async {
        let (at, service) = grpc_service().await;
        let of = grpc(
            proto::ExtAuthzCommon {
                body_max_bytes: 100,
                clear_route_cache: true,
                ..common()
            },
            at,
        );
        let Decision::Allowed(changes) = ask(&of, "allow", "hello", true).await else {
            panic!("denied");
        };
        let (user, role) = (header("x-user", "ann"), header("x-role", "admin"));
        assert_eq!(
            changes.request,
            [
                HeaderChange::Set(user.0, user.1),
                HeaderChange::Append(role.0, role.1),
                HeaderChange::Remove(HeaderName::from_static("x-ask")),
            ],
            "neither the host nor the framing can be changed"
        );
        assert_eq!(changes.response.len(), 1);
        assert!(changes.clear_route_cache);
        {
            let asked = service.0.lock();
            let source = asked[0].source.clone().expect("source");
            assert_eq!(source.principal, "spiffe://cluster.local/ns/shop/sa/client");
            let http = asked[0].request.clone().and_then(|r| r.http).expect("http");
            assert_eq!(http.path, "/reviews/1?full=yes");
            assert_eq!(http.host, "reviews.shop");
            assert_eq!(http.headers["x-tag"], "a,b");
            assert_eq!(http.headers[":method"], "GET");
            assert_eq!(http.body, "hello");
        }
        let Decision::Denied(denial) = ask(&of, "deny", "", true).await else {
            panic!("allowed");
        };
        assert_eq!(denial.status, 401);
        assert_eq!(denial.body, "who are you?");
        assert_eq!(denial.headers.len(), 1);
        assert_eq!(denial.error, None);
        let Decision::Denied(denial) = ask(&of, "bare", "", true).await else {
            panic!("allowed");
        };
        assert_eq!((denial.status.as_u16(), denial.error), (403, None));
    };
    LocalSet::new().run_until(run).await;
}

#[tokio::test]
async fn a_service_that_fails_denies_unless_open() {
    let run = async {
        let (at, _service) = grpc_service().await;
        let closed = grpc(
            proto::ExtAuthzCommon {
                status_on_error: 503,
                ..common()
            },
            at,
        );
        for how in ["error", "both", "slow"] {
            let Decision::Denied(denial) = ask(&closed, how, "", true).await else {
                panic!("{how}: allowed");
            };
            assert_eq!(denial.status, 503, "{how}");
            assert!(denial.error.is_some(), "{how}");
        }
        let open = proto::ExtAuthzCommon {
            fail_open: true,
            ..common()
        };
        let Decision::Allowed(changes) = ask(&grpc(open, at), "error", "", true).await else {
            panic!("denied");
        };
        let why = changes.failed_open.expect("told");
        assert!(why.contains("gRPC status 13"), "{why}");
        // Nobody listens there.
        let nobody = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let free = nobody.local_addr().expect("address");
        drop(nobody);
        let Decision::Denied(denial) = ask(&grpc(common(), free), "allow", "", true).await else {
            panic!("allowed");
        };
        assert_eq!(denial.status, 403);
        // The denial of a service is one, open or not.
        let open = proto::ExtAuthzCommon {
            fail_open: true,
            ..common()
        };
        let denied = ask(&grpc(open, at), "deny", "", true).await;
        assert!(matches!(denied, Decision::Denied(_)));
    };
    LocalSet::new().run_until(run).await;
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_or_cut() {
    let run = async {
        let (at, service) = grpc_service().await;
        let limit = proto::ExtAuthzCommon {
            body_max_bytes: 4,
            ..common()
        };
        let Decision::Denied(denial) = ask(&grpc(limit.clone(), at), "allow", "long", false).await
        else {
            panic!("allowed");
        };
        assert_eq!(denial.status, 413);
        assert!(service.0.lock().is_empty(), "not asked");
        let partial = proto::ExtAuthzCommon {
            body_allow_partial: true,
            body_pack_as_bytes: true,
            ..limit
        };
        let allowed = ask(&grpc(partial, at), "allow", "long", false).await;
        assert!(matches!(allowed, Decision::Allowed(_)));
        let asked = service.0.lock();
        let http = asked[0].request.clone().and_then(|r| r.http).expect("http");
        assert_eq!((&*http.body, &*http.raw_body), ("", &b"long"[..]));
        assert_eq!(http.headers["x-envoy-auth-partial-body"], "true");
    };
    LocalSet::new().run_until(run).await;
}

/// An HTTP service that decides by the header `x-ask` and says what it was asked.
async fn http_service() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let address = listener.local_addr().expect("address");
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(async |request: Request<Incoming>| {
                let (head, body) = request.into_parts();
                let body = body.collect().await.expect("body").to_bytes();
                let ask = head.headers.get("x-ask");
                let status = match ask.map(HeaderValue::as_bytes) {
                    Some(b"allow") => 200,
                    Some(b"error") => 500,
                    Some(b"moved") => 302,
                    _ => 403,
                };
                let mut names: Vec<_> = head.headers.keys().map(|n| n.as_str()).collect();
                names.sort_unstable();
                let response = Response::builder()
                    .status(status)
                    .header("x-user", "ann")
                    .header("x-other", "1")
                    .header("location", "/login")
                    .header("set-cookie", "a=1")
                    .header("set-cookie", "b=2")
                    .header("x-seen-path", head.uri.to_string())
                    .header("x-seen-names", names.join(","))
                    .body(Full::new(body));
                Ok::<_, Infallible>(response.expect("valid"))
            });
            let io = TokioIo::new(stream);
            spawn_local(http1::Builder::new().serve_connection(io, service));
        }
    });
    address
}

#[tokio::test]
async fn http_allows_by_200_and_passes_the_chosen_headers() {
    let run = async {
        let at = http_service().await;
        let kind = proto::provider::Kind::ExtAuthzHttp(proto::ExtAuthzHttp {
            common: Some(common()),
            path_prefix: "/check/".into(),
            include_request_headers: vec!["X-Ask".into()],
            include_additional_headers: vec![proto::Header {
                name: "x-from".into(),
                value: "mesh".into(),
            }],
            headers_to_upstream_on_allow: vec!["x-seen-*".into(), "x-user".into()],
            headers_to_downstream_on_allow: vec!["*-other".into()],
            headers_to_downstream_on_deny: vec!["location".into(), "set-cookie".into()],
        });
        let of = provider(kind, at).expect("valid");
        for _ in 0..3 {
            let Decision::Allowed(changes) = ask(&of, "allow", "", true).await else {
                panic!("denied");
            };
            let mut headers = HeaderMap::new();
            for change in &changes.request {
                change.apply(&mut headers);
            }
            assert_eq!(headers["x-user"], "ann");
            assert_eq!(headers["x-seen-path"], "/check/reviews/1?full=yes");
            assert_eq!(
                headers["x-seen-names"],
                "authorization,content-length,host,x-ask,x-from"
            );
            assert!(!headers.contains_key("x-other"));
            assert_eq!(changes.response.len(), 1);
        }
        let Decision::Denied(denial) = ask(&of, "moved", "", true).await else {
            panic!("allowed");
        };
        assert_eq!(denial.status, 302);
        let mut headers = HeaderMap::new();
        for change in &denial.headers {
            change.apply(&mut headers);
        }
        assert_eq!(headers["location"], "/login");
        let cookies: Vec<_> = headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"]);
        assert_eq!(headers.len(), 3);
        let Decision::Denied(denial) = ask(&of, "error", "", true).await else {
            panic!("allowed");
        };
        assert_eq!(denial.status, 403, "an error is no decision");
        assert!(denial.error.is_some());
    };
    LocalSet::new().run_until(run).await;
}

#[test]
fn providers_that_cannot_be_used_are_told() {
    let at: SocketAddr = "127.0.0.1:1".parse().expect("address");
    let error = |kind| provider(kind, at).err().expect("refused").to_string();
    use adit_shared::proto::waypoint::provider::Kind;
    assert_eq!(
        error(Kind::Prometheus(true)),
        "provider \"authz\" is not one for external authorization"
    );
    assert_eq!(
        error(Kind::Invalid("no such service".into())),
        "provider \"authz\": no such service"
    );
    let of = |common| {
        Kind::ExtAuthzGrpc(proto::ExtAuthzGrpc {
            common: Some(common),
        })
    };
    let bad = proto::ExtAuthzCommon {
        status_on_error: 70_000,
        ..common()
    };
    assert_eq!(
        error(of(bad)),
        "provider \"authz\": statusOnError 70000 is no status"
    );
    let nowhere = proto::ExtAuthzCommon::default();
    assert_eq!(
        error(of(nowhere)),
        "provider \"authz\": service or port is missing"
    );
}

#[test]
fn matchers_mean_names_without_case() {
    let name = HeaderName::from_static("x-user-id");
    for (pattern, expected) in [
        ("*", true),
        ("X-User-Id", true),
        ("x-user-*", true),
        ("*-ID", true),
        ("x-user", false),
        ("*-name", false),
    ] {
        assert_eq!(
            Matcher::parse(pattern).matches(&name),
            expected,
            "{pattern}"
        );
    }
}
