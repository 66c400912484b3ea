//! GEP-1619: sessions by cookie and by header.

use http::header::SET_COOKIE;

use super::*;

const NOW: u64 = 1_800_000_000;
const SCOPE: &str = "mesh/echo";
const UID: &str = "Kubernetes//Pod/mesh/echo-v1-0";

fn key(byte: u8) -> SessionKey {
    SessionKey::new(&[byte; 32]).expect("key")
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn cookie() -> proto::SessionPersistence {
    proto::SessionPersistence {
        name: "sess".into(),
        absolute_timeout: seconds(3600),
        idle_timeout: seconds(600),
        ..Default::default()
    }
}

fn header() -> proto::SessionPersistence {
    proto::SessionPersistence {
        name: "X-Session".into(),
        r#type: proto::session_persistence::Type::Header.into(),
        ..cookie()
    }
}

fn persistence(of: proto::SessionPersistence) -> SessionPersistence {
    let route = http_route(
        "r",
        vec![proto::HttpRule {
            session_persistence: Some(of),
            ..rule("r", vec![])
        }],
    );
    let route = understood(&route);
    route.rules()[0].session().expect("kept").clone()
}

/// The request headers of a client that got `(name, value)`.
fn returned((name, value): (HeaderName, HeaderValue)) -> HeaderMap {
    if name != SET_COOKIE {
        return HeaderMap::from_iter([(name, value)]);
    }
    let text = value.to_str().expect("text");
    let (pair, _) = text.split_once(';').expect("attributes");
    let line = format!("other=1; {pair}; last=2");
    let line = HeaderValue::from_str(&line).expect("value");
    HeaderMap::from_iter([(http::header::COOKIE, line)])
}

fn told(of: &SessionPersistence, session: &Session) -> (HeaderName, HeaderValue) {
    of.header(session, &key(1), SCOPE, [7; 12], false)
        .expect("sealed")
}

#[test]
fn a_session_comes_back_to_its_endpoint() {
    for of in [cookie(), header()] {
        let of = persistence(of);
        let session = Session::begin(UID, NOW);
        let headers = returned(told(&of, &session));
        let found = of.find(&headers, &key(1), SCOPE, NOW + 599);
        assert_eq!(found, Some(Ok(session)));
        assert_eq!(of.find(&HeaderMap::new(), &key(1), SCOPE, NOW), None);
    }
}

#[test]
fn timeouts() {
    let of = persistence(cookie());
    let find = |session: &Session, now| {
        let headers = returned(told(&of, session));
        of.find(&headers, &key(1), SCOPE, now).expect("token")
    };
    let begun = Session::begin(UID, NOW);
    assert_eq!(find(&begun, NOW + 600), Err(SessionError::Idle));
    let kept = begun.used_at(NOW + 3500);
    assert_eq!(find(&kept, NOW + 3599), Ok(kept.clone()));
    assert_eq!(find(&kept, NOW + 3600), Err(SessionError::Expired));
    // Another replica's clock.
    assert_eq!(find(&begun, NOW - 30), Ok(begun.clone()));
    assert_eq!(find(&begun, NOW - 3000), Err(SessionError::Invalid));

    assert!(!of.is_stale(&begun, NOW + 59));
    assert!(of.is_stale(&begun, NOW + 60));
    let without = persistence(proto::SessionPersistence {
        idle_timeout: None,
        absolute_timeout: None,
        ..cookie()
    });
    assert!(!without.is_stale(&begun, u64::MAX));
    let headers = returned(told(&without, &begun));
    let found = without.find(&headers, &key(1), SCOPE, u64::MAX);
    assert_eq!(found, Some(Ok(begun)));
}

/// A cookie lives as long as its session, or as the browser does.
#[test]
fn attributes_of_the_cookie() {
    let text = |of: proto::SessionPersistence, session: &Session, secure| {
        let of = persistence(of);
        let header = of.header(session, &key(1), SCOPE, [7; 12], secure);
        let (name, value) = header.expect("sealed");
        assert_eq!(name, SET_COOKIE);
        let value = value.to_str().expect("text").to_owned();
        let (_, attributes) = value.split_once("; ").expect("attributes");
        attributes.to_owned()
    };
    let begun = Session::begin(UID, NOW);
    let plain = "Path=/; HttpOnly; SameSite=Lax";
    assert_eq!(
        text(cookie(), &begun, false),
        format!("{plain}; Max-Age=3600")
    );
    assert_eq!(
        text(cookie(), &begun.used_at(NOW + 600), true),
        format!("{plain}; Secure; Max-Age=3000")
    );
    let below = proto::SessionPersistence {
        path: "/shop".into(),
        session_cookie: true,
        ..cookie()
    };
    assert_eq!(
        text(below, &begun, false),
        "Path=/shop; HttpOnly; SameSite=Lax"
    );
    let of_browser = proto::SessionPersistence {
        session_cookie: true,
        ..cookie()
    };
    assert_eq!(text(of_browser, &begun, false), plain);
}

#[test]
fn tokens_are_opaque_and_cannot_be_forged() {
    let of = persistence(header());
    let begun = Session::begin(UID, NOW);
    let (name, token) = told(&of, &begun);
    let token = token.to_str().expect("text").to_owned();
    let find = |of: &SessionPersistence, token: &str, byte: u8, scope: &str| {
        let value = HeaderValue::from_str(token).expect("value");
        let headers = HeaderMap::from_iter([(HeaderName::from_static("x-session"), value)]);
        of.find(&headers, &key(byte), scope, NOW).expect("token")
    };
    assert_eq!(name, "x-session");
    assert_eq!(find(&of, &token, 1, SCOPE), Ok(begun.clone()));
    assert_eq!(find(&of, &token, 2, SCOPE), Err(SessionError::Invalid));
    assert_eq!(
        find(&of, &token, 1, "mesh/other"),
        Err(SessionError::Invalid)
    );
    for at in 0..token.len() {
        let mut forged = token.clone().into_bytes();
        forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
        let forged = String::from_utf8(forged).expect("text");
        assert_eq!(
            find(&of, &forged, 1, SCOPE),
            Err(SessionError::Invalid),
            "{at}"
        );
        let cut = &token[..at];
        assert_eq!(find(&of, cut, 1, SCOPE), Err(SessionError::Invalid), "{at}");
    }
    let long = "A".repeat(100_000);
    assert_eq!(find(&of, &long, 1, SCOPE), Err(SessionError::Invalid));

    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(&token);
    let bytes = bytes.expect("base64");
    assert!(!bytes.windows(4).any(|window| window == b"echo"));

    // A token of another session name.
    let other = persistence(proto::SessionPersistence {
        name: "other".into(),
        ..header()
    });
    let (_, theirs) = told(&other, &begun);
    let theirs = theirs.to_str().expect("text");
    assert_eq!(find(&of, theirs, 1, SCOPE), Err(SessionError::Invalid));
    let uid = "x".repeat(5000);
    let long = of.header(&Session::begin(&uid, NOW), &key(1), SCOPE, [0; 12], false);
    assert_eq!(long.err(), Some(SessionError::TooLong));
}

#[test]
fn settings() {
    let of = persistence(proto::SessionPersistence {
        name: String::new(),
        ..cookie()
    });
    assert_eq!(
        (of.name(), of.session_type()),
        ("adit-session", SessionType::Cookie)
    );
    for bad in [
        proto::SessionPersistence {
            name: "a b".into(),
            ..cookie()
        },
        proto::SessionPersistence {
            name: String::new(),
            ..header()
        },
        proto::SessionPersistence {
            path: "shop".into(),
            ..cookie()
        },
        proto::SessionPersistence {
            path: "/; Domain=example".into(),
            ..cookie()
        },
        proto::SessionPersistence {
            r#type: 7,
            ..cookie()
        },
        proto::SessionPersistence {
            absolute_timeout: seconds(-1),
            ..cookie()
        },
    ] {
        let rule = proto::HttpRule {
            session_persistence: Some(bad.clone()),
            ..rule("r", vec![])
        };
        let route = Route::from_proto(&http_route("r", vec![rule]));
        assert_eq!(route.problems().len(), 1, "{bad:?}");
        let table = HttpTable::new([&route]);
        let sent = get("/");
        let Lookup::Matched(matched) = table.find(&sent.view()) else {
            panic!("matches");
        };
        assert!(matched.invalid().is_some(), "{bad:?}");
    }
}
