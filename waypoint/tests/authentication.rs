//! Issuers' keys over the wire: fetched once for everyone, renewed, rotated, and kept
//! through an outage.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adit_shared::proto::waypoint as proto;
use adit_waypoint::authentication::{
    AuthenticationSet, Authenticator, Fetcher, KeySources, Reason, RequestAuthentication,
    RequestAuthentications, Resolve,
};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

const DEADLINE: Duration = Duration::from_secs(10);

struct Signer(EcdsaKeyPair, &'static str);

impl Signer {
    fn new(id: &'static str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
        Self(pair, id)
    }

    fn jwk(&self) -> serde_json::Value {
        let (x, y) = self.0.public_key().as_ref()[1..].split_at(32);
        let encode = |bytes| URL_SAFE_NO_PAD.encode(bytes);
        json!({"kty": "EC", "crv": "P-256", "kid": self.1, "x": encode(x), "y": encode(y)})
    }

    fn token(&self) -> String {
        let encode = |text: serde_json::Value| URL_SAFE_NO_PAD.encode(text.to_string());
        let header = encode(json!({"alg": "ES256", "kid": self.1}));
        let signed = format!(
            "{header}.{}",
            encode(json!({"iss": "http://issuer", "sub": "bob"}))
        );
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes());
        let signature = URL_SAFE_NO_PAD.encode(signature.expect("a signature"));
        format!("{signed}.{signature}")
    }
}

fn jwks(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|s| s.jwk()).collect::<Vec<_>>()}).to_string()
}

/// What the issuer answers now.
#[derive(Clone)]
enum Answer {
    Document(String),
    Status(StatusCode),
    Redirect(String),
    Never,
}

/// A server of an issuer on loopback. Stops when dropped.
struct Issuer {
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    requests: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Issuer {
    async fn start(answer: Answer) -> Self {
        Self::start_with(answer, None).await
    }

    async fn start_with(answer: Answer, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        let answer = Arc::new(Mutex::new(answer));
        let requests = Arc::new(AtomicUsize::new(0));
        let (own_answer, own_requests) = (answer.clone(), requests.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let (answer, requests) = (own_answer.clone(), own_requests.clone());
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, answer, requests).await,
                        Some(config) => {
                            let acceptor = tokio_rustls::TlsAcceptor::from(config);
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, answer, requests).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            answer,
            requests,
            task: task.abort_handle(),
        }
    }

    fn uri(&self) -> String {
        format!("http://{}/keys", self.address)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    fn say(&self, answer: Answer) {
        *self.answer.lock() = answer;
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    answer: Arc<Mutex<Answer>>,
    requests: Arc<AtomicUsize>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer.lock().clone();
        requests.fetch_add(1, Ordering::Relaxed);
        async move {
            let response = match answer {
                Answer::Never => std::future::pending().await,
                Answer::Status(status) => Response::builder().status(status).body(Bytes::new()),
                Answer::Redirect(to) if request.uri().path() == "/keys" => Response::builder()
                    .status(302)
                    .header("location", to)
                    .body(Bytes::new()),
                Answer::Redirect(_) => Response::builder().status(404).body(Bytes::new()),
                Answer::Document(text) => Response::builder().body(text.into()),
            };
            let response = response.expect("a response").map(Full::new);
            Ok::<_, Infallible>(response)
        }
    });
    // A client that goes away is no failure of the server.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn sources() -> KeySources {
    sources_with(Fetcher::new(None))
}

/// Keys that are good for an hour, so that only what a test does makes a fetch.
fn sources_with(fetcher: Fetcher) -> KeySources {
    let hour = Duration::from_secs(3600);
    KeySources::new(Handle::current(), fetcher).with_timing(
        hour,
        Duration::from_millis(50),
        Duration::from_millis(20),
    )
}

fn set(sources: &KeySources, uri: &str) -> AuthenticationSet {
    set_of(
        sources,
        proto::JwtRule {
            issuer: "http://issuer".into(),
            jwks_uri: uri.into(),
            timeout: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            ..Default::default()
        },
    )
}

fn set_of(sources: &KeySources, rule: proto::JwtRule) -> AuthenticationSet {
    let wire = proto::RequestAuthentication {
        object: Some(proto::ObjectRef {
            kind: "RequestAuthentication".into(),
            namespace: "srv".into(),
            name: "jwt".into(),
            created: 0,
        }),
        rules: vec![rule],
        ..Default::default()
    };
    let policy =
        RequestAuthentication::from_resource("RequestAuthentication/srv/jwt", &wire, sources);
    assert_eq!(policy.problems(), []);
    let mut policies = RequestAuthentications::default();
    policies.upsert(policy);
    policies.for_service("srv/waypoint", "srv", None)
}

async fn present(
    authenticator: &Authenticator,
    set: &AuthenticationSet,
    token: &str,
) -> Result<(), Reason> {
    let request = Request::get("/").header("authorization", format!("Bearer {token}"));
    let mut parts = request.body(()).expect("a request").into_parts().0;
    match authenticator.authenticate(set, &mut parts).await {
        Ok(claims) => {
            let claims = claims.expect("a principal");
            assert_eq!(claims.principal(), Some(("http://issuer", "bob")));
            Ok(())
        }
        Err(error) => Err(error.reason),
    }
}

/// Waits until `condition` holds.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < end, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn one_fetch_for_everyone() {
    let signer = Signer::new("a");
    let issuer = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let sources = sources();
    // The same address in two policies, and many requests before it has answered.
    let (one, two) = (set(&sources, &issuer.uri()), set(&sources, &issuer.uri()));
    let authenticator = Authenticator::new();
    let token = signer.token();
    let requests = (0..20).map(|i| {
        let set = if i % 2 == 0 { &one } else { &two };
        present(&authenticator, set, &token)
    });
    for result in futures_util::future::join_all(requests).await {
        assert_eq!(result, Ok(()));
    }
    assert_eq!(issuer.requests(), 1);
    let status = sources.status();
    assert_eq!(
        (status.len(), status[0].keys, status[0].attempts),
        (1, 1, 1)
    );
    // The last rule that uses it takes it along.
    drop((one, two));
    assert!(sources.status().is_empty());
}

#[tokio::test]
async fn rotation_is_seen_with_the_first_token_of_the_new_key() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let issuer = Issuer::start(Answer::Document(jwks(&[&old]))).await;
    let sources = sources();
    let set = set(&sources, &issuer.uri());
    let authenticator = Authenticator::new();
    assert_eq!(present(&authenticator, &set, &old.token()).await, Ok(()));
    let kept = old.token();
    assert_eq!(present(&authenticator, &set, &kept).await, Ok(()));
    issuer.say(Answer::Document(jwks(&[&old, &new])));
    eventually("the new key", async || {
        present(&authenticator, &set, &new.token()).await == Ok(())
    })
    .await;
    assert_eq!(present(&authenticator, &set, &kept).await, Ok(()));
    // The old key is withdrawn: its tokens end, remembered or not.
    issuer.say(Answer::Document(jwks(&[&new])));
    let stranger = Signer::new("third");
    eventually("the old key's end", async || {
        let _ = present(&authenticator, &set, &stranger.token()).await;
        present(&authenticator, &set, &kept).await == Err(Reason::UnknownKey)
    })
    .await;
    assert_eq!(present(&authenticator, &set, &new.token()).await, Ok(()));
}

#[tokio::test]
async fn unknown_keys_do_not_make_a_fetch_each() {
    let signer = Signer::new("a");
    let issuer = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let hour = Duration::from_secs(3600);
    let sources = KeySources::new(Handle::current(), Fetcher::new(None));
    let sources = sources.with_timing(hour, hour, hour);
    let set = set(&sources, &issuer.uri());
    let authenticator = Authenticator::new();
    assert_eq!(present(&authenticator, &set, &signer.token()).await, Ok(()));
    let stranger = Signer::new("b");
    for _ in 0..50 {
        let result = present(&authenticator, &set, &stranger.token()).await;
        assert_eq!(result, Err(Reason::UnknownKey));
    }
    assert_eq!(issuer.requests(), 1);
}

#[tokio::test]
async fn an_outage_leaves_the_last_keys_in_force() {
    let (signer, other) = (Signer::new("a"), Signer::new("b"));
    let issuer = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let sources = KeySources::new(Handle::current(), Fetcher::new(None)).with_timing(
        Duration::from_millis(20),
        Duration::from_millis(10),
        Duration::from_millis(10),
    );
    let set = set(&sources, &issuer.uri());
    let authenticator = Authenticator::new();
    assert_eq!(present(&authenticator, &set, &signer.token()).await, Ok(()));
    for outage in [
        Answer::Status(StatusCode::INTERNAL_SERVER_ERROR),
        Answer::Document("<html>".into()),
        Answer::Document(r#"{"keys":[]}"#.into()),
        Answer::Redirect("/elsewhere".into()),
    ] {
        let seen = issuer.requests();
        issuer.say(outage);
        // An attempt that began before may still have had the good answer.
        eventually("two failed attempts", async || issuer.requests() > seen + 2).await;
        eventually("the reason", async || {
            sources.status()[0].last_error.is_some()
        })
        .await;
        assert_eq!(present(&authenticator, &set, &signer.token()).await, Ok(()));
        assert_eq!(
            present(&authenticator, &set, &other.token()).await,
            Err(Reason::UnknownKey)
        );
    }
    issuer.say(Answer::Document(jwks(&[&signer, &other])));
    eventually("the end of the outage", async || {
        present(&authenticator, &set, &other.token()).await == Ok(())
    })
    .await;
}

#[tokio::test]
async fn without_keys_every_token_is_refused() {
    let signer = Signer::new("a");
    let issuer = Issuer::start(Answer::Status(StatusCode::SERVICE_UNAVAILABLE)).await;
    let sources = sources();
    let set = set(&sources, &issuer.uri());
    let authenticator = Authenticator::new();
    let result = present(&authenticator, &set, &signer.token()).await;
    assert_eq!(result, Err(Reason::NoKeys));
    issuer.say(Answer::Document(jwks(&[&signer])));
    eventually("keys", async || {
        present(&authenticator, &set, &signer.token()).await == Ok(())
    })
    .await;
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_holds_a_request_no_longer_than_its_timeout() {
    let signer = Signer::new("a");
    let issuer = Issuer::start(Answer::Never).await;
    let sources = sources();
    let set = set(&sources, &issuer.uri());
    let start = Instant::now();
    let result = present(&Authenticator::new(), &set, &signer.token()).await;
    assert_eq!(result, Err(Reason::NoKeys));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    eventually("the reason", async || {
        sources.status()[0].last_error.as_deref() == Some("no answer in time")
    })
    .await;
}

#[tokio::test]
async fn a_host_of_the_mesh_is_found_by_the_mesh() {
    let signer = Signer::new("a");
    let issuer = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let address = issuer.address;
    let resolve: Box<Resolve> = Box::new(move |host, port| {
        (host == "keys.auth.svc.cluster.local" && port == 8080).then(|| vec![address])
    });
    let sources = sources_with(Fetcher::new(Some(resolve)));
    let set = set(&sources, "http://keys.auth.svc.cluster.local:8080/keys");
    let result = present(&Authenticator::new(), &set, &signer.token()).await;
    assert_eq!(result, Ok(()));
}

#[tokio::test]
async fn an_issuer_is_asked_where_its_keys_are() {
    let signer = Signer::new("a");
    let keys = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let document = json!({"issuer": "http://issuer", "jwks_uri": keys.uri()}).to_string();
    let discovery = Issuer::start(Answer::Document(document)).await;
    let address = discovery.address;
    let resolve: Box<Resolve> = Box::new(move |host, _| (host == "issuer").then(|| vec![address]));
    let sources = sources_with(Fetcher::new(Some(resolve)));
    let set = set_of(
        &sources,
        proto::JwtRule {
            issuer: "http://issuer".into(),
            ..Default::default()
        },
    );
    let result = present(&Authenticator::new(), &set, &signer.token()).await;
    assert_eq!(result, Ok(()));
}

#[tokio::test]
async fn a_redirect_is_followed() {
    let signer = Signer::new("a");
    let keys = Issuer::start(Answer::Document(jwks(&[&signer]))).await;
    let moved = Issuer::start(Answer::Redirect(keys.uri())).await;
    let sources = sources();
    let set = set(&sources, &moved.uri());
    let result = present(&Authenticator::new(), &set, &signer.token()).await;
    assert_eq!(result, Ok(()));
}

#[tokio::test]
async fn https_is_checked() {
    let signer = Signer::new("a");
    let certified = rcgen::generate_simple_self_signed(vec!["issuer.example".to_owned()])
        .expect("a certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.expect("a key"))
        .expect("a configuration");
    let answer = Answer::Document(jwks(&[&signer]));
    let issuer = Issuer::start_with(answer, Some(Arc::new(config))).await;
    let address = issuer.address;
    let resolve = || -> Option<Box<Resolve>> { Some(Box::new(move |_, _| Some(vec![address]))) };
    let fetcher = Fetcher::with_roots(resolve(), vec![certified.cert.der().clone()]);
    let sources = sources_with(fetcher);
    let set_for = |host: &str| set(&sources, &format!("https://{host}/keys"));
    let authenticator = Authenticator::new();
    let good = set_for("issuer.example");
    assert_eq!(
        present(&authenticator, &good, &signer.token()).await,
        Ok(())
    );
    // Another name than the certificate's, or a root that is not trusted.
    let other = set_for("other.example");
    assert_eq!(
        present(&authenticator, &other, &signer.token()).await,
        Err(Reason::NoKeys)
    );
    let untrusting = sources_with(Fetcher::with_roots(resolve(), vec![]));
    let set = set(&untrusting, "https://issuer.example/keys");
    assert_eq!(
        present(&authenticator, &set, &signer.token()).await,
        Err(Reason::NoKeys)
    );
}
