//! Request smuggling (RFC 9112 11.2): messages that two readers could understand differently.
//! For each: what the client is told, what exactly arrived at the endpoint, and whether the
//! connection goes on, which is tried with another request behind it in the same write.

use adit_shared::proto::waypoint::service_port::Protocol;

use crate::raw::{RawHttp1, recorder};
use crate::support::{Mesh, eventually, run};

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The request behind is answered.
    Open,
    /// It never is, and never arrives.
    Closed,
}
use Then::{Closed, Open};

struct Case {
    name: &'static str,
    sent: &'static str,
    /// Statuses of the answers.
    answers: &'static [u16],
    /// What the endpoint got.
    got: &'static [&'static str],
    then: Then,
}

const AFTER: &str = "GET /after HTTP/1.1\r\nhost: after\r\n\r\n";
/// A refusal without a byte for the endpoint, after which nothing that follows is believed.
const fn refused(name: &'static str, sent: &'static str, answers: &'static [u16]) -> Case {
    Case {
        name,
        sent,
        answers,
        got: &[],
        then: Closed,
    }
}

const fn served(name: &'static str, sent: &'static str, got: &'static [&'static str]) -> Case {
    Case {
        name,
        sent,
        answers: &[200],
        got,
        then: Open,
    }
}

/// The smuggled request has this target wherever a case has one: it must never arrive.
const SMUGGLED: &str = "/smuggled";

const LENGTHS: &[Case] = &[
    served(
        "content-length",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3\r\n\r\nabc",
        &["POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3\r\n\r\nabc"],
    ),
    served(
        "chunked",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ),
    // RFC 9112 6.3: chunked wins, the length is gone, and the connection ends.
    Case {
        name: "CL.TE",
        sent: "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n\
               0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[200],
        got: &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
        then: Closed,
    },
    Case {
        name: "TE.CL",
        sent: "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n\
               3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[200],
        got: &[
            "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ],
        then: Closed,
    },
    refused(
        "different lengths",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        &[400],
    ),
    // RFC 9110 8.6: the same twice may be taken as one.
    served(
        "the same length twice",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        &["POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3\r\n\r\nabc"],
    ),
    refused(
        "a list of lengths",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 3, 3\r\n\r\nabc",
        &[400],
    ),
    refused(
        "negative",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: -1\r\n\r\n",
        &[400],
    ),
    refused(
        "with a plus",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: +3\r\n\r\nabc",
        &[400],
    ),
    refused(
        "hexadecimal",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 0x3\r\n\r\nabc",
        &[400],
    ),
    refused(
        "beyond 64 bits",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 18446744073709551619\r\n\r\nabc",
        &[400],
    ),
    refused(
        "the largest of 64 bits",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 18446744073709551615\r\n\r\nabc",
        &[431],
    ),
    refused(
        "an empty length",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length:\r\n\r\nabc",
        &[400],
    ),
    served(
        "a length with leading zeros",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 003\r\n\r\nabc",
        &["POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 003\r\n\r\nabc"],
    ),
    // Its body is not a request.
    served(
        "a length on GET",
        "GET /a HTTP/1.1\r\nhost: w\r\ncontent-length: 35\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\ncontent-length: 35\r\n\r\n\
           GET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    served(
        "chunked on GET",
        "GET /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    ),
];

const CODINGS: &[Case] = &[
    refused(
        "chunked, identity",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "identity, chunked",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        &[501],
    ),
    refused(
        "gzip, chunked",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        &[501],
    ),
    refused(
        "xchunked",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "chunked twice in a list",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        &[501],
    ),
    refused(
        "chunked twice",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        &[501],
    ),
    refused(
        "chunked, then identity",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "quoted",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "vertical tab before the value",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "space before the colon",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "tab before the colon",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding\t: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "on HTTP/1.0",
        "POST /a HTTP/1.0\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    served(
        "upper case, with a tab after the colon",
        "POST /a HTTP/1.1\r\nhost: w\r\nTRANSFER-ENCODING:\tCHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"],
    ),
    // An underscore is another header, for us and for the endpoint.
    served(
        "transfer_encoding",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\ntransfer_encoding: chunked\r\n\r\na",
        &[
            "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\ntransfer_encoding: chunked\r\n\r\na",
        ],
    ),
];

const CHUNKS: &[Case] = &[
    served(
        "extensions are dropped",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1;x=y;\"q\"\r\na\r\n0;z\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"],
    ),
    served(
        "leading zeros in a size",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n0001\r\na\r\n000\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"],
    ),
    served(
        "trailers that were not announced",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-sum: 1\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"],
    ),
    served(
        "trailers that were announced",
        "POST /a HTTP/1.1\r\nhost: w\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
         1\r\na\r\n0\r\nx-sum: 1\r\n\r\n",
        &[
            "POST /a HTTP/1.1\r\nhost: w\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
           1\r\na\r\n0\r\nx-sum: 1\r\n\r\n",
        ],
    ),
    // RFC 9110 6.5.1: framing, routing and authority are not for trailers.
    served(
        "trailers with forbidden fields",
        "POST /a HTTP/1.1\r\nhost: w\r\n\
         trailer: content-length, transfer-encoding, host, x-sum, connection\r\n\
         transfer-encoding: chunked\r\n\r\n\
         1\r\na\r\n0\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\nhost: other\r\n\
         connection: close\r\nx-sum: 1\r\n\r\n",
        &["POST /a HTTP/1.1\r\nhost: w\r\n\
           trailer: content-length, transfer-encoding, host, x-sum, connection\r\n\
           transfer-encoding: chunked\r\n\r\n\
           1\r\na\r\n0\r\nx-sum: 1\r\n\r\n"],
    ),
];

/// Bodies that turn out to be bad when their head has been passed on.
const BAD_CHUNKS: &[(&str, &str)] = &[
    ("no digit", ";\r\na\r\n0\r\n\r\n"),
    ("a sign", "-1\r\na\r\n0\r\n\r\n"),
    ("0x", "0x1\r\na\r\n0\r\n\r\n"),
    ("beyond 64 bits", "fffffffffffffffff\r\na\r\n0\r\n\r\n"),
    ("wraps to 1", "10000000000000001\r\na\r\n0\r\n\r\n"),
    ("bare LF after the size", "1\na\r\n0\r\n\r\n"),
    ("bare CR after the size", "1\rXa\r\n0\r\n\r\n"),
    ("LF in an extension", "1;x\ny\r\na\r\n0\r\n\r\n"),
    ("bare LF after the data", "1\r\na\n0\r\n\r\n"),
    ("more data than the size", "1\r\nab\r\n0\r\n\r\n"),
    ("a digit after a space", "1 1\r\na\r\n0\r\n\r\n"),
];

const HEADS: &[Case] = &[
    refused(
        "obs-fold",
        "GET /a HTTP/1.1\r\nhost: w\r\nx-a: 1\r\n x-b: 2\r\n\r\n",
        &[400],
    ),
    refused(
        "obs-fold of the first line",
        "GET /a HTTP/1.1\r\n host: w\r\nhost: w\r\n\r\n",
        &[400],
    ),
    refused(
        "obs-fold of the coding",
        "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    refused(
        "bare CR in a value",
        "GET /a HTTP/1.1\r\nhost: w\r\nx-a: 1\rx-b: 2\r\n\r\n",
        &[400],
    ),
    refused(
        "NUL in a value",
        "GET /a HTTP/1.1\r\nhost: w\r\nx-a: 1\0\r\n\r\n",
        &[400],
    ),
    refused(
        "NUL in a name",
        "GET /a HTTP/1.1\r\nhost: w\r\nx\0a: 1\r\n\r\n",
        &[400],
    ),
    refused(
        "NUL in the target",
        "GET /a\0 HTTP/1.1\r\nhost: w\r\n\r\n",
        &[400],
    ),
    refused(
        "an empty name",
        "GET /a HTTP/1.1\r\nhost: w\r\n: 1\r\n\r\n",
        &[400],
    ),
    refused(
        "a line without a colon",
        "GET /a HTTP/1.1\r\nhost: w\r\nx-a\r\n\r\n",
        &[400],
    ),
    refused(
        "two spaces in the request line",
        "GET  /a HTTP/1.1\r\nhost: w\r\n\r\n",
        &[400],
    ),
    refused(
        "a space in the target",
        "GET /a b HTTP/1.1\r\nhost: w\r\n\r\n",
        &[400],
    ),
    refused(
        "a tab in the request line",
        "GET\t/a HTTP/1.1\r\nhost: w\r\n\r\n",
        &[400],
    ),
    refused("HTTP/0.9", "GET /a\r\n\r\n", &[400]),
    refused("HTTP/1.2", "GET /a HTTP/1.2\r\nhost: w\r\n\r\n", &[400]),
    refused("HTTP/2.0", "GET /a HTTP/2.0\r\nhost: w\r\n\r\n", &[400]),
    refused(
        "a method that is no token",
        "G(T /a HTTP/1.1\r\nhost: w\r\n\r\n",
        &[400],
    ),
    // RFC 9112 2.2 lets a reader take LF alone for a line's end. Ours does; what goes on has
    // CRLF, so that nobody behind can see it in another way.
    served(
        "bare LF",
        "GET /a HTTP/1.1\nhost: w\nx-a: 1\n\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\nx-a: 1\r\n\r\n"],
    ),
    served(
        "an empty line before the request line",
        "\r\nGET /a HTTP/1.1\r\nhost: w\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
];

const TARGETS: &[Case] = &[
    Case {
        name: "no host",
        sent: "GET /a HTTP/1.1\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "HTTP/1.0 without a host",
        sent: "GET /a HTTP/1.0\r\n\r\n",
        answers: &[200],
        got: &["GET /a HTTP/1.1\r\nhost: web.shop.svc.cluster.local\r\n\r\n"],
        then: Closed,
    },
    Case {
        name: "two hosts",
        sent: "GET /a HTTP/1.1\r\nhost: w\r\nhost: x\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "the same host twice",
        sent: "GET /a HTTP/1.1\r\nhost: w\r\nHost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "an empty host",
        sent: "GET /a HTTP/1.1\r\nhost:\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "a host with a path",
        sent: "GET /a HTTP/1.1\r\nhost: w/x\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "a host with user information",
        sent: "GET /a HTTP/1.1\r\nhost: u@w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    served(
        "absolute form",
        "GET http://x/a?b HTTP/1.1\r\nhost: w\r\n\r\n",
        &["GET /a?b HTTP/1.1\r\nhost: x\r\n\r\n"],
    ),
    served(
        "absolute form without a path",
        "GET http://x HTTP/1.1\r\nhost: x\r\n\r\n",
        &["GET / HTTP/1.1\r\nhost: x\r\n\r\n"],
    ),
    served(
        "absolute form with a query alone",
        "GET http://x?a=/b HTTP/1.1\r\nhost: x\r\n\r\n",
        &["GET /?a=/b HTTP/1.1\r\nhost: x\r\n\r\n"],
    ),
    Case {
        name: "absolute form with user information",
        sent: "GET http://u:p@x/a HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "absolute form with two hosts",
        sent: "GET http://x/a HTTP/1.1\r\nhost: w\r\nhost: x\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "authority form",
        sent: "GET w:80 HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "a target without a slash",
        sent: "GET a HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    // Refused, it is no tunnel, and what follows is another request.
    Case {
        name: "CONNECT",
        sent: "CONNECT w:80 HTTP/1.1\r\nhost: w:80\r\n\r\n",
        answers: &[405],
        got: &[],
        then: Open,
    },
    served(
        "asterisk form",
        "OPTIONS * HTTP/1.1\r\nhost: w\r\n\r\n",
        &["OPTIONS * HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    Case {
        name: "asterisk form of GET",
        sent: "GET * HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    // RFC 9112 3.2: a fragment is not part of a target; what is judged is what is sent.
    served(
        "a fragment",
        "GET /a?b#c HTTP/1.1\r\nhost: w\r\n\r\n",
        &["GET /a?b HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
];

const HOPS: &[Case] = &[
    served(
        "what connection names",
        "GET /a HTTP/1.1\r\nhost: w\r\nconnection: x-a, X-B\r\nx-a: 1\r\nx-b: 2\r\nx-c: 3\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\nx-c: 3\r\n\r\n"],
    ),
    served(
        "what connection names in another line",
        "GET /a HTTP/1.1\r\nhost: w\r\nx-a: 1\r\nconnection: keep-alive\r\nconnection: x-a\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    // Neither whose request it is nor how long it is can be taken away.
    served(
        "what connection may not name",
        "POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\n\
         connection: host, content-length, x-forwarded-client-cert\r\n\r\na",
        &["POST /a HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\n\r\na"],
    ),
    // h2c smuggling: the endpoint could take the one that was not looked at.
    served(
        "h2c behind another protocol",
        "GET /a HTTP/1.1\r\nhost: w\r\nupgrade: websocket, h2c\r\n\
         connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    served(
        "h2c in another line",
        "GET /a HTTP/1.1\r\nhost: w\r\nupgrade: websocket\r\nupgrade: h2c\r\n\
         connection: upgrade\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
    served(
        "hop by hop",
        "GET /a HTTP/1.1\r\nhost: w\r\nkeep-alive: 1\r\nproxy-connection: close\r\nte: gzip\r\n\
         upgrade: h2c\r\nhttp2-settings: AAMAAABk\r\nconnection: upgrade, http2-settings\r\n\r\n",
        &["GET /a HTTP/1.1\r\nhost: w\r\n\r\n"],
    ),
];

const SERIES: &[Case] = &[
    Case {
        name: "pipelining",
        sent: "GET /1 HTTP/1.1\r\nhost: w\r\n\r\nPOST /2 HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\n\r\n\
               aGET /3 HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[200, 200, 200],
        got: &[
            "GET /1 HTTP/1.1\r\nhost: w\r\n\r\n",
            "POST /2 HTTP/1.1\r\nhost: w\r\ncontent-length: 1\r\n\r\na",
            "GET /3 HTTP/1.1\r\nhost: w\r\n\r\n",
        ],
        then: Open,
    },
    Case {
        name: "a bad one between good ones",
        sent: "GET /1 HTTP/1.1\r\nhost: w\r\n\r\nGET /2 HTTP/1.1\r\nhost: w\r\nx: 1\r\n y\r\n\r\n",
        answers: &[200, 400],
        got: &["GET /1 HTTP/1.1\r\nhost: w\r\n\r\n"],
        then: Closed,
    },
    Case {
        name: "after connection: close",
        sent: "GET /1 HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n",
        answers: &[200],
        got: &["GET /1 HTTP/1.1\r\nhost: w\r\n\r\n"],
        then: Closed,
    },
    // The body of a refused request does not become the next one.
    Case {
        name: "the body of a refused request",
        sent: "POST /a HTTP/1.1\r\ncontent-length: 35\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
    Case {
        name: "the chunked body of a refused request",
        sent: "POST /a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n\
               23\r\nGET /smuggled HTTP/1.1\r\nhost: w\r\n\r\n\r\n0\r\n\r\n",
        answers: &[400],
        got: &[],
        then: Closed,
    },
];

/// Runs each case on a connection of its own; says of all that differ.
async fn check(cases: &[Case]) {
    let mesh = Mesh::new().await;
    let web = mesh.service("web", Protocol::Http);
    let (app, got) = recorder();
    let _pod = mesh.pod(&web, "web-a", app).await;
    let client = mesh.client("default", "curl").await;
    let mut wrong = Vec::new();
    for case in cases {
        got.borrow_mut().clear();
        let mut http = RawHttp1::new(&client, &web).await;
        http.send(format!("{}{AFTER}", case.sent).as_bytes()).await;
        let mut answers = Vec::new();
        let mut then = Closed;
        while let Some(answer) = http.answer().await {
            if answer.body == "/after" {
                then = Open;
                break;
            }
            answers.push(answer.status);
        }
        let mut arrived = got.borrow().clone();
        if then == Open {
            let after = arrived.pop();
            assert_eq!(after.as_deref(), Some(AFTER), "{}", case.name);
        }
        if answers != case.answers || then != case.then || arrived != case.got {
            wrong.push(format!(
                "{}: {answers:?}, {then:?}, {arrived:#?}",
                case.name
            ));
        }
        let smuggled = format!(" {SMUGGLED} ");
        assert!(
            !arrived
                .iter()
                .any(|request| request[..request.len().min(30)].contains(&smuggled)),
            "{}",
            case.name
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_body_has_one_length() {
    run(check(LENGTHS));
}

#[test]
fn a_coding_is_chunked_or_nothing() {
    run(check(CODINGS));
}

#[test]
fn chunks_are_written_anew() {
    run(check(CHUNKS));
}

#[test]
fn heads_that_are_not_well_formed_are_refused() {
    run(check(HEADS));
}

#[test]
fn a_target_names_one_resource_of_one_host() {
    run(check(TARGETS));
}

#[test]
fn headers_of_the_connection_end_here() {
    run(check(HOPS));
}

#[test]
fn requests_on_one_connection_do_not_run_into_each_other() {
    run(check(SERIES));
}

#[test]
fn a_body_that_turns_out_to_be_bad_ends_both_connections() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, got) = recorder();
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let head = "POST /a HTTP/1.1\r\nhost: w\r\ntransfer-encoding: chunked\r\n\r\n";
        for (name, chunks) in BAD_CHUNKS {
            got.borrow_mut().clear();
            let mut http = RawHttp1::new(&client, &web).await;
            http.send(format!("{head}{chunks}{AFTER}").as_bytes()).await;
            let mut answers = Vec::new();
            while let Some(answer) = http.answer().await {
                answers.push(answer.status);
            }
            // Nothing, or that it was the client's fault.
            assert!(matches!(answers[..], [] | [400]), "{name}: {answers:?}");
            // The endpoint sees a request that was cut off, never a whole one.
            eventually("cut off", async || {
                let got = got.borrow();
                got.iter().all(|request| request.starts_with("CUT POST /a"))
            })
            .await;
            let whole = got.borrow().iter().any(|r| r.ends_with("\r\n0\r\n\r\n"));
            assert!(!whole, "{name}: {:?}", got.borrow());
            // Its connection is not used again.
            assert_eq!(client.get(&web, "/next").await.text(), "/next", "{name}");
        }
    });
}

#[test]
fn what_the_mesh_says_of_a_request_cannot_be_forged() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, got) = crate::support::echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut http = RawHttp1::new(&client, &web).await;
        http.send(
            b"GET /a HTTP/1.1\r\nhost: w\r\nX-Forwarded-Client-Cert: URI=spiffe://forged\r\n\
              x-forwarded-client-cert: URI=spiffe://again\r\n\
              connection: x-forwarded-client-cert, x-request-id\r\n\r\n",
        )
        .await;
        assert_eq!(http.answer().await.unwrap().status, 200);
        let got = got.lock().unwrap();
        let certificates: Vec<_> = got[0]
            .headers
            .get_all("x-forwarded-client-cert")
            .iter()
            .collect();
        assert_eq!(
            certificates,
            ["By=spiffe://cluster.local/ns/shop/sa/waypoint;\
              URI=spiffe://cluster.local/ns/default/sa/curl"]
        );
        assert!(got[0].headers.contains_key("x-request-id"));
    });
}
