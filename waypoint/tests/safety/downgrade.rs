//! HTTP/2 from the client, HTTP/1.1 to the endpoint: what one can say and the other cannot
//! must not become another request on the way (RFC 9113 8.1.1, 8.2, 8.3, 10.3).

use adit_shared::proto::waypoint::service_port::Protocol;

use crate::raw::{End, RawHttp2, block, flag, frame, kind, recorder};
use crate::support::{Mesh, downgrade, eventually, run};

const PROTOCOL_ERROR: u32 = 1;

struct Case {
    name: &'static str,
    headers: &'static [(&'static str, &'static str)],
    /// DATA frames; none: the headers end the stream.
    data: &'static [&'static str],
    /// Names and values; none: the last DATA ends the stream.
    trailers: &'static [(&'static str, &'static str)],
    end: End,
    got: &'static [&'static str],
}

const fn case(
    name: &'static str,
    headers: &'static [(&'static str, &'static str)],
    data: &'static [&'static str],
    end: End,
    got: &'static [&'static str],
) -> Case {
    Case {
        name,
        headers,
        data,
        trailers: &[],
        end,
        got,
    }
}

const fn malformed(
    name: &'static str,
    headers: &'static [(&'static str, &'static str)],
    data: &'static [&'static str],
) -> Case {
    case(name, headers, data, End::Reset(PROTOCOL_ERROR), &[])
}

/// The pseudo-headers of `POST /a` for `w`, and others.
macro_rules! post {
    ($($name:literal: $value:literal),* $(,)?) => {
        &[
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a"),
            $(($name, $value)),*
        ]
    };
}

const CASES: &[Case] = &[
    case(
        "a length",
        post!("content-length": "3"),
        &["ab", "c"],
        End::Status(200),
        &["POST /a HTTP/1.1\r\ncontent-length: 3\r\nhost: w\r\n\r\nabc"],
    ),
    case(
        "no length",
        post!(),
        &["abc"],
        End::Status(200),
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ),
    // The classic H2.CL: the rest of the data would be the next request.
    malformed(
        "more data than the length",
        post!("content-length": "0"),
        &["GET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    malformed(
        "another length",
        post!("content-length": "3", "content-length": "4"),
        &["abcd"],
    ),
    malformed("a negative length", post!("content-length": "-1"), &["a"]),
    malformed(
        "a length of no number",
        post!("content-length": "1 "),
        &["a"],
    ),
    malformed("a length and no data", post!("content-length": "3"), &[]),
    // RFC 9113 8.2.2.
    malformed(
        "transfer-encoding",
        post!("transfer-encoding": "chunked"),
        &["0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    malformed("connection", post!("connection": "x-a", "x-a": "1"), &[]),
    malformed("keep-alive", post!("keep-alive": "1"), &[]),
    malformed("proxy-connection", post!("proxy-connection": "1"), &[]),
    malformed("upgrade", post!("upgrade": "websocket"), &[]),
    malformed("te other than trailers", post!("te": "gzip"), &[]),
    case(
        "te: trailers",
        post!("te": "trailers"),
        &[],
        End::Status(200),
        &["POST /a HTTP/1.1\r\nhost: w\r\nte: trailers\r\n\r\n"],
    ),
    // RFC 9113 8.2.1.
    malformed("upper case", post!("X-a": "1"), &[]),
    malformed("a space in a name", post!("x a": "1"), &[]),
    malformed("a colon in a name", post!("x:a": "1"), &[]),
    malformed("a line in a name", post!("x: 1\r\ny": "1"), &[]),
    malformed("an empty name", post!("": "1"), &[]),
    malformed("CRLF in a value", post!("x": "1\r\ny: 2"), &[]),
    malformed("LF in a value", post!("x": "1\ny: 2"), &[]),
    malformed("CR in a value", post!("x": "1\ry: 2"), &[]),
    malformed("NUL in a value", post!("x": "1\0"), &[]),
    // RFC 9113 8.3.
    malformed("a pseudo-header that nobody knows", post!(":x": "1"), &[]),
    malformed(
        "a pseudo-header of responses",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a"),
            (":status", "200"),
        ],
        &[],
    ),
    malformed(
        "a pseudo-header after others",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            ("x", "1"),
            (":authority", "w"),
            (":path", "/a"),
        ],
        &[],
    ),
    malformed(
        "two paths",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a"),
            (":path", "/b"),
        ],
        &[],
    ),
    malformed(
        "no path",
        &[(":method", "GET"), (":scheme", "http"), (":authority", "w")],
        &[],
    ),
    malformed(
        "an empty path",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", ""),
        ],
        &[],
    ),
    malformed(
        "no scheme",
        &[(":method", "GET"), (":authority", "w"), (":path", "/a")],
        &[],
    ),
    malformed(
        "no method",
        &[(":scheme", "http"), (":authority", "w"), (":path", "/a")],
        &[],
    ),
    malformed(
        "a request line in the method",
        &[
            (":method", "GET /smuggled HTTP/1.1\r\nx:"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a"),
        ],
        &[],
    ),
    malformed(
        "a space in the path",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/smuggled HTTP/1.1 /a"),
        ],
        &[],
    ),
    malformed(
        "a line in the path",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/smuggled HTTP/1.1\r\nx: /a"),
        ],
        &[],
    ),
    malformed(
        "a line in the authority",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w\r\nx: 1"),
            (":path", "/a"),
        ],
        &[],
    ),
    malformed(
        "a line in the scheme",
        &[
            (":method", "GET"),
            (":scheme", "http\r\nx: 1"),
            (":authority", "w"),
            (":path", "/a"),
        ],
        &[],
    ),
    case(
        "a fragment",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a?b#c"),
        ],
        &[],
        End::Status(200),
        &["GET /a?b HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    case(
        "asterisk form",
        &[
            (":method", "OPTIONS"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "*"),
        ],
        &[],
        End::Status(200),
        &["OPTIONS * HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    case(
        "a path that is an address",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "http://x/a"),
        ],
        &[],
        End::Reset(PROTOCOL_ERROR),
        &[],
    ),
    // RFC 9113 8.3.1: a request with two names for its host is malformed.
    case(
        "another host",
        post!("host": "x"),
        &[],
        End::Status(400),
        &[],
    ),
    case(
        "two hosts",
        post!("host": "w", "host": "x"),
        &[],
        End::Status(400),
        &[],
    ),
    case(
        "host in place of the authority",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/a"),
            ("host", "w"),
        ],
        &[],
        End::Status(200),
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    case(
        "no host at all",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a")],
        &[],
        End::Status(400),
        &[],
    ),
    case(
        "user information",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "u@w"),
            (":path", "/a"),
        ],
        &[],
        End::Status(400),
        &[],
    ),
    case(
        "CONNECT",
        &[(":method", "CONNECT"), (":authority", "w:80")],
        &[],
        End::Status(405),
        &[],
    ),
    case(
        "a body of GET",
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "w"),
            (":path", "/a"),
        ],
        &["abc"],
        End::Status(200),
        &["GET /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ),
    // In HTTP/1.1 trailers come only if they were announced; here they are dropped.
    Case {
        name: "trailers",
        headers: post!(),
        data: &["a"],
        trailers: &[("x-sum", "1")],
        end: End::Status(200),
        got: &[
            "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        ],
    },
    Case {
        name: "trailers with forbidden fields",
        headers: post!("trailer": "content-length, host, transfer-encoding, x-sum"),
        data: &["a"],
        trailers: &[("content-length", "9"), ("host", "x"), ("x-sum", "1")],
        end: End::Status(200),
        got: &["POST /a HTTP/1.1\r\n\
             trailer: content-length, host, transfer-encoding, x-sum\r\nhost: w\r\n\
             transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-sum: 1\r\n\r\n"],
    },
];

/// A request on a connection of its own.
async fn request(http: &mut RawHttp2<impl crate::raw::Stream>, stream: u32, case: &Case) {
    let ends = |last: bool| if last { flag::END_STREAM } else { 0 };
    let data = case.data.len();
    let mut bytes = frame(
        kind::HEADERS,
        flag::END_HEADERS | ends(data == 0),
        stream,
        &block(case.headers),
    );
    for (at, piece) in case.data.iter().enumerate() {
        let last = at + 1 == data && case.trailers.is_empty();
        bytes.extend(frame(kind::DATA, ends(last), stream, piece.as_bytes()));
    }
    if !case.trailers.is_empty() {
        let flags = flag::END_HEADERS | flag::END_STREAM;
        bytes.extend(frame(kind::HEADERS, flags, stream, &block(case.trailers)));
    }
    http.send(&bytes).await;
}

#[test]
fn what_http2_can_say_does_not_become_another_request_of_http1() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        downgrade(&mesh, &web);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut wrong = Vec::new();
        for case in CASES {
            got.borrow_mut().clear();
            let tunnel = client.tunnel(web.address).await.expect("accepted");
            let mut http = RawHttp2::new(tunnel.into_io()).await;
            request(&mut http, 1, case).await;
            let end = http.end_of(1).await;
            let arrived = got.borrow().clone();
            // What was cut off has not been acted upon.
            let whole: Vec<_> = arrived.iter().filter(|r| !r.starts_with("CUT ")).collect();
            // Malformed names and values the parser takes for the connection's fault.
            let ended = end == case.end
                || (case.end == End::Reset(PROTOCOL_ERROR) && end == End::GoAway(PROTOCOL_ERROR));
            if !ended || whole != case.got {
                wrong.push(format!("{}: {end:?}, {arrived:#?}", case.name));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        // Whatever was tried: the next request is answered as its own.
        assert_eq!(client.get(&web, "/next").await.text(), "/next");
    });
}

#[test]
fn forbidden_trailers_do_not_reach_an_endpoint_of_http2() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let trailers = std::rc::Rc::new(std::cell::RefCell::new(None));
        let kept = trailers.clone();
        let app = crate::support::Http(move |request: http::Request<hyper::body::Incoming>| {
            let kept = kept.clone();
            async move {
                use http_body_util::BodyExt as _;
                let collected = request.into_body().collect().await.unwrap();
                *kept.borrow_mut() = collected.trailers().cloned();
                http::Response::new(crate::support::body("ok"))
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let tunnel = client.tunnel(web.address).await.expect("accepted");
        let mut http = RawHttp2::new(tunnel.into_io()).await;
        let case = Case {
            name: "",
            headers: post!(),
            data: &["a"],
            trailers: &[
                ("content-length", "9"),
                ("host", "x"),
                ("authorization", "Bearer x"),
                ("x-forwarded-client-cert", "URI=spiffe://forged"),
                ("x-sum", "1"),
            ],
            end: End::Status(200),
            got: &[],
        };
        request(&mut http, 1, &case).await;
        assert_eq!(http.end_of(1).await, case.end);
        eventually("trailers", async || trailers.borrow().is_some()).await;
        let trailers = trailers.borrow();
        let names: Vec<_> = trailers.as_ref().unwrap().keys().collect();
        assert_eq!(names, ["x-sum"]);
    });
}
