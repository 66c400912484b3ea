//! What a waypoint promises of tokens: who has not the issuer's key is not believed. The fuzz
//! target and the replay of its corpus in plain tests both call [`check`].
//!
//! The input is the value of an `authorization` header, and a set of keys (RFC 7517).

use adit_shared::proto::waypoint as proto;
use adit_waypoint::authentication::{
    AuthenticationSet, Authenticator, Fetcher, KeySet, KeySources, RequestAuthentication,
    RequestAuthentications,
};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::FutureExt as _;
use http::header::{AUTHORIZATION, HeaderValue};
use http::{Request, StatusCode};

/// The issuer's key, of which the private half is nowhere.
const X: &str = "sESfQERw2oxXndf7nhGY9m4N9hj9vxbtCBBa36Rre-4";
const Y: &str = "Xij_mYAYm42I1hZCVYyFKNc6X1UY33ft_DDx6fsYF8U";
const ISSUER: &str = "http://issuer";

thread_local! {
    static SET: AuthenticationSet = set();
}

/// Judges one header. Panics if a promise is broken.
pub fn check(input: &[u8]) {
    is_believed(input);
}

/// [`check`], which says whether the header's token was believed.
pub fn is_believed(input: &[u8]) -> bool {
    if let Ok(keys) = KeySet::parse(input) {
        assert!(!keys.is_empty(), "a set without keys is none");
    }
    let Ok(value) = HeaderValue::from_bytes(input) else {
        return false;
    };
    let mut request = Request::new(());
    request.headers_mut().insert(AUTHORIZATION, value.clone());
    let (mut parts, ()) = request.into_parts();
    let authenticator = Authenticator::new();
    let judged = SET.with(|set| authenticator.authenticate(set, &mut parts).now_or_never());
    let judged = judged.expect("inline keys are not waited for");
    let believed = matches!(judged, Ok(Some(_)));
    match judged {
        Err(refused) => assert!(
            matches!(
                refused.status,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
            ),
            "{}",
            refused.status
        ),
        Ok(None) => assert_eq!(parts.headers.get(AUTHORIZATION), Some(&value), "not ours"),
        Ok(Some(claims)) => {
            let text = value.to_str().expect("a token is ASCII");
            assert!(is_genuine(text), "the issuer has not signed {text:?}");
            let principal = claims.principal().expect("a token has a subject");
            assert_eq!(principal.0, ISSUER);
            assert!(!parts.headers.contains_key(AUTHORIZATION), "it stays here");
        }
    }
    believed
}

/// Whether the issuer has signed it, by a reading of our own.
fn is_genuine(text: &str) -> bool {
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).ok();
    let token = text.split_whitespace().nth(1).unwrap_or_default();
    let Some((signed, signature)) = token.rsplit_once('.') else {
        return false;
    };
    let (Some(x), Some(y), Some(signature)) = (decode(X), decode(Y), decode(signature)) else {
        return false;
    };
    let point = [&[4][..], &x, &y].concat();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(signed.as_bytes(), &signature)
        .is_ok()
}

fn set() -> AuthenticationSet {
    let key = format!(r#"{{"kty":"EC","crv":"P-256","kid":"k","x":"{X}","y":"{Y}"}}"#);
    let wire = proto::RequestAuthentication {
        object: Some(proto::ObjectRef {
            kind: "RequestAuthentication".into(),
            namespace: "srv".into(),
            name: "jwt".into(),
            created: 0,
        }),
        rules: vec![proto::JwtRule {
            issuer: ISSUER.into(),
            jwks: format!(r#"{{"keys":[{key}]}}"#),
            ..Default::default()
        }],
        ..Default::default()
    };
    // Nothing is spawned on it.
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    let sources = KeySources::new(runtime.handle().clone(), Fetcher::new(None));
    let name = "RequestAuthentication/srv/jwt";
    let policy = RequestAuthentication::from_resource(name, &wire, &sources);
    assert_eq!(policy.problems(), []);
    let mut policies = RequestAuthentications::default();
    policies.upsert(policy);
    policies.for_service("srv/waypoint", "srv", Some("web.srv"))
}
