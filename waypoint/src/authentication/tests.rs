//! RequestAuthentication with real keys. Numbers are those of Istio's policy cases.

use std::sync::Arc;

use adit_shared::policy::http::Claims;
use adit_shared::proto::waypoint as proto;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Request, StatusCode, request};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Some time in 2033.
const NOW: f64 = 2_000_000_000.0;

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

enum Signer {
    Rsa(RsaKeyPair, &'static str),
    Ec(EcdsaKeyPair, &'static str),
    Ed(Ed25519KeyPair),
}

impl Signer {
    fn es256() -> Self {
        Self::ec("ES256")
    }

    fn ec(name: &'static str) -> Self {
        let algorithm = match name {
            "ES256" => &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            "ES384" => &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
            _ => &signature::ECDSA_P521_SHA512_FIXED_SIGNING,
        };
        Self::Ec(EcdsaKeyPair::generate(algorithm).expect("a key"), name)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Rsa(_, name) | Self::Ec(_, name) => name,
            Self::Ed(_) => "EdDSA",
        }
    }

    fn jwk(&self, id: &str) -> Value {
        let mut jwk = match self {
            Self::Rsa(pair, _) => json!({
                "kty": "RSA",
                "n": encode(pair.public_key().modulus().big_endian_without_leading_zero()),
                "e": encode(pair.public_key().exponent().big_endian_without_leading_zero()),
            }),
            Self::Ec(pair, name) => {
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = match *name {
                    "ES256" => "P-256",
                    "ES384" => "P-384",
                    _ => "P-521",
                };
                json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)})
            }
            Self::Ed(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": encode(pair.public_key())})
            }
        };
        if !id.is_empty() {
            jwk["kid"] = json!(id);
        }
        jwk
    }

    fn token(&self, id: &str, claims: &Value) -> String {
        self.with_header(
            &json!({"alg": self.name(), "typ": "JWT", "kid": id}),
            claims,
        )
    }

    fn with_header(&self, header: &Value, claims: &Value) -> String {
        let signed = format!(
            "{}.{}",
            encode(header.to_string()),
            encode(claims.to_string())
        );
        let signature = self.sign(signed.as_bytes());
        format!("{signed}.{}", encode(signature))
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(pair, name) => {
                let algorithm: &dyn signature::RsaEncoding = match *name {
                    "RS256" => &signature::RSA_PKCS1_SHA256,
                    "RS384" => &signature::RSA_PKCS1_SHA384,
                    "RS512" => &signature::RSA_PKCS1_SHA512,
                    "PS256" => &signature::RSA_PSS_SHA256,
                    "PS384" => &signature::RSA_PSS_SHA384,
                    _ => &signature::RSA_PSS_SHA512,
                };
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(algorithm, &random, message, &mut signature)
                    .expect("a signature");
                signature
            }
            Self::Ec(pair, _) => {
                let signature = pair.sign(&random, message).expect("a signature");
                signature.as_ref().to_vec()
            }
            Self::Ed(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }
}

fn jwks(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

fn rule(issuer: &str, signer: &Signer) -> proto::JwtRule {
    proto::JwtRule {
        issuer: issuer.into(),
        jwks: jwks(&[signer.jwk("k")]),
        ..Default::default()
    }
}

fn wire(rules: Vec<proto::JwtRule>) -> proto::RequestAuthentication {
    proto::RequestAuthentication {
        object: Some(proto::ObjectRef {
            kind: "RequestAuthentication".into(),
            namespace: "srv".into(),
            name: "jwt".into(),
            created: 0,
        }),
        rules,
        ..Default::default()
    }
}

fn convert(wire: &proto::RequestAuthentication) -> RequestAuthentication {
    // Inline keys only: nothing is spawned.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let sources = KeySources::new(runtime.handle().clone(), Fetcher::new(None));
    RequestAuthentication::from_resource("RequestAuthentication/srv/jwt", wire, &sources)
}

fn set(rules: Vec<proto::JwtRule>) -> AuthenticationSet {
    let policy = convert(&wire(rules));
    assert_eq!(policy.problems(), []);
    set_of(policy)
}

fn set_of(policy: RequestAuthentication) -> AuthenticationSet {
    let mut policies = RequestAuthentications::default();
    policies.upsert(policy);
    policies.for_service("srv/waypoint", "srv", Some("web.srv"))
}

fn request(uri: &str, headers: &[(&str, &str)]) -> request::Parts {
    let mut request = Request::get(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).expect("a request").into_parts().0
}

fn bearer(token: &str) -> request::Parts {
    request("/", &[("authorization", &format!("Bearer {token}"))])
}

fn run(
    authenticator: &Authenticator,
    set: &AuthenticationSet,
    parts: &mut request::Parts,
) -> Result<Option<Arc<Claims>>, Reason> {
    let future = authenticator.authenticate_at(set, parts, NOW);
    let result = futures_util::FutureExt::now_or_never(future);
    let result = result.expect("inline keys are not waited for");
    result.map_err(|error| error.reason)
}

fn once(set: &AuthenticationSet, mut parts: request::Parts) -> Result<Option<Arc<Claims>>, Reason> {
    run(&Authenticator::new(), set, &mut parts)
}

fn principal(result: Result<Option<Arc<Claims>>, Reason>) -> Option<(String, String)> {
    let claims = result.expect("accepted")?;
    let (issuer, subject) = claims.principal()?;
    Some((issuer.to_owned(), subject.to_owned()))
}

fn bob(issuer: &str) -> Option<(String, String)> {
    Some((issuer.to_owned(), "bob".to_owned()))
}

fn claims(issuer: &str) -> Value {
    json!({"iss": issuer, "sub": "bob", "exp": NOW + 100.0})
}

#[test]
fn every_algorithm() {
    let rsa = || RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
    let mut signers = vec![Signer::Ed(Ed25519KeyPair::generate().expect("a key"))];
    signers.extend(["ES256", "ES384", "ES512"].map(Signer::ec));
    signers.extend(
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"].map(|n| Signer::Rsa(rsa(), n)),
    );
    for signer in &signers {
        let set = set(vec![rule("X", signer)]);
        let token = signer.token("k", &claims("X"));
        assert_eq!(
            principal(once(&set, bearer(&token))),
            bob("X"),
            "{}",
            signer.name()
        );
        // Another key of the same kind.
        let mut broken = token.into_bytes();
        let at = broken.len() - 10;
        broken[at] = if broken[at] == b'A' { b'B' } else { b'A' };
        let broken = String::from_utf8(broken).expect("text");
        assert_eq!(
            once(&set, bearer(&broken)),
            Err(Reason::Signature),
            "{}",
            signer.name()
        );
    }
}

/// RFC 8725 2.1: what the header says never makes a public key into a secret, nor a
/// signature unnecessary.
#[test]
fn algorithm_confusion() {
    let signer = Signer::es256();
    let set = set(vec![rule("X", &signer)]);
    let body = encode(claims("X").to_string());
    let unsigned = |alg: &str| format!("{}.{body}.", encode(json!({"alg": alg}).to_string()));
    for alg in ["none", "None", "NONE", ""] {
        assert_eq!(once(&set, bearer(&unsigned(alg))), Err(Reason::Algorithm));
    }
    let jwk = signer.jwk("k");
    for secret in [jwk["x"].as_str().expect("x"), &jwk.to_string()] {
        let signed = format!("{}.{body}", encode(r#"{"alg":"HS256"}"#));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret.as_bytes());
        let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        let token = format!("{signed}.{}", encode(tag));
        assert_eq!(once(&set, bearer(&token)), Err(Reason::UnknownKey));
    }
    // A key for one algorithm is not used for another, nor a header with extensions.
    let rs = signer.with_header(&json!({"alg": "RS256", "kid": "k"}), &claims("X"));
    assert_eq!(once(&set, bearer(&rs)), Err(Reason::UnknownKey));
    let critical = json!({"alg": "ES256", "kid": "k", "crit": ["b64"], "b64": false});
    let critical = signer.with_header(&critical, &claims("X"));
    assert_eq!(once(&set, bearer(&critical)), Err(Reason::Malformed));
    // A secret is a key where the operator says so.
    let secret = b"a secret of the operator's own choice";
    let oct = proto::JwtRule {
        issuer: "X".into(),
        jwks: jwks(&[json!({"kty": "oct", "k": encode(secret)})]),
        ..Default::default()
    };
    let signed = format!("{}.{body}", encode(r#"{"alg":"HS256"}"#));
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
    let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
    let token = format!("{signed}.{}", encode(tag));
    assert_eq!(
        principal(once(&super::tests::set(vec![oct]), bearer(&token))),
        bob("X")
    );
}

#[test]
fn what_a_token_must_say() {
    let signer = Signer::es256();
    let audience = proto::JwtRule {
        audiences: vec!["api".into()],
        ..rule("A", &signer)
    };
    let set = set(vec![rule("X", &signer), rule("Y", &signer), audience]);
    let with = |claims: Value| once(&set, bearer(&signer.token("k", &claims)));
    // 79
    assert_eq!(once(&set, request("/", &[])), Ok(None));
    // 80
    for garbage in ["x", "a.b", "a.b.c", "a.b.c.d", "..", "é.é.é", "e30.e30.e30"] {
        assert!(once(&set, bearer(garbage)).is_err(), "{garbage}");
    }
    // 81
    assert_eq!(
        with(json!({"iss": "X", "exp": NOW - 61.0})),
        Err(Reason::Expired)
    );
    assert!(with(json!({"iss": "X", "exp": NOW - 59.0})).is_ok());
    assert_eq!(
        with(json!({"iss": "X", "nbf": NOW + 61.0})),
        Err(Reason::NotYetValid)
    );
    assert!(with(json!({"iss": "X", "nbf": NOW + 59.0})).is_ok());
    assert_eq!(
        with(json!({"iss": "X", "exp": "soon"})),
        Err(Reason::Malformed)
    );
    // 82
    let error = |claims: Value| {
        let mut parts = bearer(&signer.token("k", &claims));
        let authenticator = Authenticator::new();
        let future = authenticator.authenticate_at(&set, &mut parts, NOW);
        futures_util::FutureExt::now_or_never(future)
            .expect("ready")
            .expect_err("refused")
    };
    let wrong = error(json!({"iss": "A", "sub": "bob", "aud": ["web", 1]}));
    assert_eq!(wrong.status, StatusCode::FORBIDDEN);
    assert_eq!(
        error(json!({"iss": "A", "sub": "bob"})).reason,
        Reason::Audience
    );
    assert!(with(json!({"iss": "A", "aud": "api"})).is_ok());
    assert!(with(json!({"iss": "A", "aud": ["web", "api/"]})).is_ok());
    // 83
    let unknown = error(claims("Z"));
    assert_eq!(unknown.status, StatusCode::UNAUTHORIZED);
    assert_eq!(unknown.reason, Reason::UnknownIssuer);
    let challenge = unknown.www_authenticate.expect("a challenge");
    assert_eq!(
        challenge,
        "Bearer realm=\"http:///\", error=\"invalid_token\""
    );
    assert_eq!(with(json!({"sub": "bob"})), Err(Reason::UnknownIssuer));
    assert_eq!(with(json!({"iss": ["X"]})), Err(Reason::UnknownIssuer));
    // 91
    assert_eq!(principal(with(claims("Y"))), bob("Y"));
    // A token without a subject is no principal.
    assert_eq!(principal(with(json!({"iss": "X"}))), None);
    // An unknown key id; a token without one fits any key.
    let other = once(&set, bearer(&signer.token("other", &claims("X"))));
    assert_eq!(other, Err(Reason::UnknownKey));
    let without = signer.with_header(&json!({"alg": "ES256"}), &claims("X"));
    assert_eq!(principal(once(&set, bearer(&without))), bob("X"));
    // Another issuer's key.
    let stranger = Signer::es256();
    let forged = once(&set, bearer(&stranger.token("k", &claims("X"))));
    assert_eq!(forged, Err(Reason::Signature));
    let long = "a".repeat(token::MAX_TOKEN + 1);
    assert_eq!(once(&set, bearer(&long)), Err(Reason::Malformed));
}

#[test]
fn where_a_token_stands() {
    let signer = Signer::es256();
    let good = signer.token("k", &claims("X"));
    let anywhere = set(vec![rule("X", &signer)]);
    let authenticated = |set: &AuthenticationSet, uri: &str, headers: &[(&str, &str)]| {
        principal(once(set, request(uri, headers)))
    };
    for scheme in ["Bearer", "bearer", "BEARER", "Bearer "] {
        let value = format!("{scheme} {good}");
        assert_eq!(
            authenticated(&anywhere, "/", &[("authorization", &value)]),
            bob("X")
        );
    }
    for other in ["Basic eA==", "Bearer", "Bearer ", "", "Negotiate x"] {
        assert_eq!(
            authenticated(&anywhere, "/", &[("authorization", other)]),
            None
        );
    }
    for uri in [
        format!("/?access_token={good}"),
        format!("/?a=b&access_token={good}&c"),
        format!("/?access%5ftoken={good}"),
    ] {
        assert_eq!(authenticated(&anywhere, &uri, &[]), bob("X"));
    }
    // 92
    let header = set(vec![proto::JwtRule {
        from_headers: vec![proto::JwtHeader {
            name: "X-JWT".into(),
            prefix: "T ".into(),
        }],
        ..rule("X", &signer)
    }]);
    assert_eq!(
        authenticated(&header, "/", &[("x-jwt", &format!("T {good}"))]),
        bob("X")
    );
    assert_eq!(authenticated(&header, "/", &[("x-jwt", &good)]), None);
    let value = format!("Bearer {good}");
    assert_eq!(
        authenticated(&header, "/", &[("authorization", &value)]),
        None
    );
    // 93
    let cookie = set(vec![proto::JwtRule {
        from_cookies: vec!["session".into()],
        ..rule("X", &signer)
    }]);
    let value = format!("a=b; session={good}; c=d");
    assert_eq!(authenticated(&cookie, "/", &[("cookie", &value)]), bob("X"));
    assert_eq!(
        authenticated(&cookie, "/", &[("cookie", "a=b"), ("cookie", &value)]),
        bob("X")
    );
    assert_eq!(
        authenticated(&cookie, "/", &[("cookie", "sessions=x; session=")]),
        None
    );
    let spoiled = HeaderValue::from_bytes(format!("Bearer {good}\u{ff}").as_bytes());
    let mut parts = request("/", &[]);
    parts
        .headers
        .insert("authorization", spoiled.expect("a value"));
    assert_eq!(once(&anywhere, parts), Err(Reason::Malformed));
    // A place that only another issuer's rule looks at.
    let two = set(vec![
        proto::JwtRule {
            from_params: vec!["t".into()],
            ..rule("X", &signer)
        },
        rule("Y", &signer),
    ]);
    assert_eq!(authenticated(&two, &format!("/?t={good}"), &[]), bob("X"));
    assert_eq!(once(&two, bearer(&good)), Err(Reason::UnknownIssuer));
    // Of two tokens both must be good, and the first is who it is.
    let y = format!("Bearer {}", signer.token("k", &claims("Y")));
    let both = request(&format!("/?t={good}"), &[("authorization", &y)]);
    assert_eq!(principal(once(&two, both)), bob("X"));
    let one_bad = request(&format!("/?t={good}"), &[("authorization", "Bearer x")]);
    assert_eq!(once(&two, one_bad), Err(Reason::Malformed));
    let five = vec![("authorization", "Bearer x"); 5];
    assert_eq!(once(&two, request("/", &five)), Err(Reason::TooMany));
}

#[test]
fn what_the_endpoint_sees() {
    let signer = Signer::es256();
    let claims = json!({
        "iss": "X", "sub": "bob", "exp": NOW + 100.0, "role": "admin", "n": 7, "ok": true,
        "list": ["a", "b"], "nested": {"a": {"b": "deep"}}, "dotted.name": "flat",
        "bad": "line\nbreak",
    });
    let token = signer.token("k", &claims);
    let output = |header: &str, claim: &str| proto::ClaimToHeader {
        header: header.into(),
        claim: claim.into(),
    };
    let rule = proto::JwtRule {
        from_headers: vec![proto::JwtHeader {
            name: "authorization".into(),
            prefix: "Bearer ".into(),
        }],
        from_params: vec!["t".into()],
        from_cookies: vec!["c".into()],
        output_payload_to_header: "X-P".into(),
        output_claim_to_headers: vec![
            output("x-role", "role"),
            output("x-n", "n"),
            output("x-ok", "ok"),
            output("x-list", "list"),
            output("x-deep", "nested.a.b"),
            output("x-flat", "dotted.name"),
            output("x-none", "no.such"),
            output("x-bad", "bad"),
        ],
        ..rule("X", &signer)
    };
    let keep = set(vec![proto::JwtRule {
        forward_original_token: true,
        ..rule.clone()
    }]);
    let take = set(vec![rule]);
    let after = |set: &AuthenticationSet, mut parts: request::Parts| {
        run(&Authenticator::new(), set, &mut parts).expect("accepted");
        parts
    };
    let text = |parts: &request::Parts, name: &str| {
        let value = parts.headers.get(name)?;
        Some(value.to_str().expect("text").to_owned())
    };
    // 94
    let value = format!("Bearer {token}");
    let spoofed = [
        ("authorization", value.as_str()),
        ("x-p", "spoofed"),
        ("x-p", "twice"),
        ("x-none", "spoofed"),
        ("x-bad", "spoofed"),
        ("x-role", "root"),
    ];
    let seen = after(&take, request("/", &spoofed));
    let payload = token.split('.').nth(1).map(str::to_owned);
    assert_eq!(text(&seen, "x-p"), payload);
    assert_eq!(seen.headers.get_all("x-p").iter().count(), 1);
    for (name, value) in [
        ("x-role", Some("admin")),
        ("x-n", Some("7")),
        ("x-ok", Some("true")),
        ("x-list", Some("WyJhIiwiYiJd")),
        ("x-deep", Some("deep")),
        ("x-flat", Some("flat")),
        ("x-none", None),
        ("x-bad", None),
    ] {
        assert_eq!(text(&seen, name).as_deref(), value, "{name}");
    }
    // Nobody else writes them, also without a token, also in a preflight.
    let seen = after(&take, request("/", &spoofed[1..]));
    assert_eq!(text(&seen, "x-p"), None);
    assert_eq!(text(&seen, "x-role"), None);
    // 95
    let seen = after(&take, bearer(&token));
    assert_eq!(text(&seen, "authorization"), None);
    let seen = after(&keep, bearer(&token));
    assert_eq!(text(&seen, "authorization"), Some(value));
    let seen = after(&take, request(&format!("/a?x=1&t={token}&y=%20"), &[]));
    assert_eq!(seen.uri, "/a?x=1&y=%20");
    let seen = after(&take, request(&format!("http://web.srv/a?t={token}"), &[]));
    assert_eq!(seen.uri, "http://web.srv/a");
    let seen = after(&keep, request(&format!("/a?t={token}"), &[]));
    assert_eq!(seen.uri.query(), Some(format!("t={token}").as_str()));
    let cookies = format!("a=b; c={token};d=e");
    let seen = after(&take, request("/", &[("cookie", &cookies)]));
    assert_eq!(text(&seen, "cookie").as_deref(), Some("a=b; d=e"));
    let seen = after(&take, request("/", &[("cookie", &format!("c={token}"))]));
    assert_eq!(text(&seen, "cookie"), None);
}

#[test]
fn claims_for_routes() {
    let Value::Object(payload) = json!({
        "scope": "read write", "role": ["a", "b"], "n": 7, "deep": {"x": "y"}, "text": "a b",
    }) else {
        panic!("an object");
    };
    let claims = Claims::new(payload, []);
    let has = |path: &[&str], wanted: &str| {
        let path: Vec<Box<str>> = path.iter().map(|name| (*name).into()).collect();
        route::Claims::any(&claims, &path, &mut |value| value == wanted)
    };
    assert!(has(&["scope"], "write"));
    assert!(!has(&["scope"], "read write"));
    assert!(has(&["role"], "b"));
    assert!(has(&["n"], "7"));
    assert!(has(&["deep", "x"], "y"));
    assert!(has(&["text"], "a b"));
    assert!(!has(&["deep"], "y"));
    assert!(!has(&["none"], ""));
}

#[test]
fn preflight() {
    // 96
    let signer = Signer::es256();
    let set = set(vec![proto::JwtRule {
        output_payload_to_header: "x-p".into(),
        ..rule("X", &signer)
    }]);
    let mut parts = request(
        "/",
        &[
            ("origin", "https://a"),
            ("access-control-request-method", "PUT"),
            ("authorization", "Bearer garbage"),
            ("x-p", "spoofed"),
        ],
    );
    parts.method = http::Method::OPTIONS;
    assert_eq!(run(&Authenticator::new(), &set, &mut parts), Ok(None));
    assert!(!parts.headers.contains_key("x-p"));
    parts.headers.remove("origin");
    assert_eq!(
        run(&Authenticator::new(), &set, &mut parts),
        Err(Reason::Malformed)
    );
}

#[test]
fn invalid_ones_refuse_every_token() {
    let signer = Signer::es256();
    let token = signer.token("k", &claims("X"));
    let broken = |change: fn(&mut proto::JwtRule)| {
        let mut rule = rule("X", &signer);
        change(&mut rule);
        wire(vec![rule])
    };
    let mut cases = vec![
        (broken(|rule| rule.issuer.clear()), "rules[0].issuer"),
        (broken(|rule| rule.jwks = "{}".into()), "rules[0].jwks"),
        (
            broken(|rule| rule.jwks = r#"{"keys":[]}"#.into()),
            "rules[0].jwks",
        ),
        (
            broken(|rule| rule.jwks = r#"{"keys":[{"kty":"EC","crv":"P-256"}]}"#.into()),
            "rules[0].jwks",
        ),
        (
            broken(|rule| rule.jwks_uri = "http://a".into()),
            "rules[0].jwks",
        ),
        (broken(|rule| rule.jwks.clear()), "rules[0].jwks_uri"),
        (
            broken(|rule| {
                rule.jwks.clear();
                rule.jwks_uri = "ftp://a/b".into();
            }),
            "rules[0].jwks_uri",
        ),
        (
            broken(|rule| rule.output_payload_to_header = "a b".into()),
            "rules[0].output_payload_to_header",
        ),
        (
            broken(|rule| {
                rule.from_headers.push(proto::JwtHeader {
                    name: String::new(),
                    prefix: String::new(),
                });
            }),
            "rules[0].from_headers[0].name",
        ),
    ];
    cases.push((
        proto::RequestAuthentication {
            targets: vec![proto::Target::default()],
            ..wire(vec![rule("X", &signer)])
        },
        "targets[0]",
    ));
    cases.push((
        proto::RequestAuthentication {
            object: None,
            ..wire(vec![rule("X", &signer)])
        },
        "object",
    ));
    for (wire, field) in cases {
        let policy = convert(&wire);
        assert_eq!(policy.problems()[0].field, field);
        let set = set_of(policy);
        assert_eq!(
            once(&set, bearer(&token)),
            Err(Reason::Configuration),
            "{field}"
        );
        assert_eq!(once(&set, request("/", &[])), Ok(None), "{field}");
    }
    let told = proto::RequestAuthentication {
        invalid: "line 3".into(),
        ..wire(vec![rule("X", &signer)])
    };
    let policy = convert(&told);
    assert_eq!(policy.problems(), []);
    assert_eq!(
        once(&set_of(policy), bearer(&token)),
        Err(Reason::Configuration)
    );
    let unreadable = RequestAuthentication::unreadable("RequestAuthentication/srv/jwt", "bytes");
    assert_eq!(
        once(&set_of(unreadable), bearer(&token)),
        Err(Reason::Configuration)
    );
}

#[test]
fn tokens_are_remembered_within_bounds() {
    let signer = Signer::es256();
    let set = set(vec![rule("X", &signer)]);
    let authenticator = Authenticator::new();
    let token = signer.token("k", &claims("X"));
    for _ in 0..3 {
        assert_eq!(
            principal(run(&authenticator, &set, &mut bearer(&token))),
            bob("X")
        );
        assert_eq!(authenticator.cache.len(), 1);
    }
    // What is remembered still ends.
    let short = signer.token("k", &json!({"iss": "X", "sub": "bob", "exp": NOW + 1.0}));
    let at = |now| {
        let mut parts = bearer(&short);
        let future = authenticator.authenticate_at(&set, &mut parts, now);
        let result = futures_util::FutureExt::now_or_never(future).expect("ready");
        result.map(|_| ()).map_err(|error| error.reason)
    };
    assert_eq!(at(NOW), Ok(()));
    assert_eq!(at(NOW + 100.0), Err(Reason::Expired));
    // Another configuration looks anew.
    let stranger = super::tests::set(vec![rule("X", &Signer::es256())]);
    let result = run(&authenticator, &stranger, &mut bearer(&token));
    assert_eq!(result, Err(Reason::Signature));
    // Failures are not kept; successes not without end.
    let forged = Signer::es256().token("k", &claims("X"));
    let before = authenticator.cache.len();
    assert!(run(&authenticator, &set, &mut bearer(&forged)).is_err());
    assert_eq!(authenticator.cache.len(), before);
    for i in 0..2500 {
        let claims = json!({"iss": "X", "sub": i.to_string()});
        let token = signer.token("k", &claims);
        assert!(run(&authenticator, &set, &mut bearer(&token)).is_ok());
    }
    assert!(authenticator.cache.len() <= 2048);
}

#[test]
fn applies_where_it_is_meant() {
    let signer = Signer::es256();
    let target = proto::Target {
        kind: Some(proto::target::Kind::Service(proto::ServiceRef {
            namespace: "srv".into(),
            hostname: "web.srv".into(),
        })),
    };
    let mut policies = RequestAuthentications::default();
    policies.upsert(convert(&proto::RequestAuthentication {
        targets: vec![target],
        ..wire(vec![rule("X", &signer)])
    }));
    let applies = |policies: &RequestAuthentications, host| {
        !policies
            .for_destination("srv/waypoint", "srv", host, ["uid-1"])
            .is_empty()
    };
    assert!(applies(&policies, Some("web.srv")));
    assert!(!applies(&policies, Some("other.srv")));
    assert!(!applies(&policies, None));
    let workload = |uid: &str| proto::Target {
        kind: Some(proto::target::Kind::Workload(uid.into())),
    };
    for (uid, selected) in [("uid-1", true), ("uid-2", false)] {
        policies.upsert(convert(&proto::RequestAuthentication {
            targets: vec![workload(uid)],
            ..wire(vec![rule("X", &signer)])
        }));
        assert_eq!(applies(&policies, Some("other.srv")), selected);
    }
    policies.remove("srv/jwt");
    assert!(!applies(&policies, Some("web.srv")));
    assert_eq!(policies.iter().count(), 0);
}

proptest! {
    #[test]
    fn no_token_panics(token in "[A-Za-z0-9._=-]{0,80}", header in any::<Vec<u8>>()) {
        let _ = Token::parse(&token);
        let _ = Token::parse(&format!("{}.{token}.{token}", encode(&header)));
        let _ = KeySet::parse(&header);
    }

    #[test]
    fn no_request_panics(path in "/[ -~]{0,30}", cookie in "[ -~]{0,30}", header in "[ -~]{0,30}") {
        let signer = Signer::Ed(Ed25519KeyPair::generate().expect("a key"));
        let set = set(vec![proto::JwtRule {
            from_headers: vec![proto::JwtHeader { name: "h".into(), prefix: "a".into() }],
            from_params: vec!["a".into()],
            from_cookies: vec!["b".into()],
            ..rule("X", &signer)
        }]);
        let request = Request::get(path).header("cookie", cookie).header("h", header).body(());
        if let Ok(request) = request {
            let mut parts = request.into_parts().0;
            for location in set.locations.iter() {
                let _ = location.tokens(&parts);
                location.remove(&mut parts);
                prop_assert!(location.tokens(&parts).is_empty());
            }
        }
    }
}
