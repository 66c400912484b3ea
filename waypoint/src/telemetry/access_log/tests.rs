use std::sync::Arc;

use http::HeaderValue;

use super::super::event::{Protocol, ResponseFlags};
use super::super::testing::Sample;
use super::*;

fn rendered(format: &Format, sample: &Sample) -> String {
    let mut line = String::new();
    format.render(&sample.event(), &mut line);
    line
}

#[test]
fn the_default_line_is_istios() {
    let mut sample = Sample::new();
    let headers = &mut sample.request_headers;
    headers.insert("user-agent", HeaderValue::from_static("curl/8"));
    headers.insert("x-request-id", HeaderValue::from_static("id-1"));
    let format = Format::text(DEFAULT_TEXT).expect("valid");
    assert_eq!(format, Format::default_text());
    assert_eq!(
        rendered(&format, &sample),
        "[2023-11-14T22:13:20.123Z] \"GET /reviews/1?full=yes HTTP/1.1\" 200 - via_upstream - \
         \"-\" 3 1200 12 11 \"-\" \"curl/8\" \"id-1\" \"reviews.shop\" \"10.244.1.5:8080\" \
         outbound|80||reviews.shop.svc.cluster.local 10.244.1.9:40000 10.96.0.7:80 \
         10.244.2.3:51234 - shop/reviews.0\n"
    );
}

#[test]
fn the_default_json_has_istios_keys_and_both_identities() {
    let format = Format::json(DEFAULT_JSON).expect("valid");
    assert_eq!(format, Format::default_json());
    let line = rendered(&format, &Sample::new());
    let json: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(json["response_code"], 200);
    assert_eq!(json["duration"], 12);
    assert_eq!(json["user_agent"], serde_json::Value::Null);
    assert_eq!(json["authority"], "reviews.shop");
    let of = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    assert_eq!(json["downstream_peer_uri_san"], of("productpage"));
    assert_eq!(json["upstream_peer_uri_san"], of("reviews"));
}

#[test]
fn operators() {
    let mut sample = Sample::new();
    sample.grpc_status = Some(14);
    sample.protocol = Protocol::Grpc;
    sample.flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE | ResponseFlags::RETRY_LIMIT_EXCEEDED;
    let headers = &mut sample.request_headers;
    headers.insert("x-b", HeaderValue::from_static("bee"));
    let cases = [
        ("%REQ(X-A?X-B)%", "bee"),
        ("%REQ(X-A)%", "-"),
        ("%REQ(X-A?:METHOD)%", "GET"),
        ("%REQ(:PATH):4%", "/rev"),
        ("%GRPC_STATUS% %GRPC_STATUS_NUMBER%", "Unavailable 14"),
        ("%RESPONSE_FLAGS%", "UF,URX"),
        ("100%% %PROTOCOL%", "100% HTTP/2"),
        ("%START_TIME(%s)%", "1700000000"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.244.2.3"),
        ("%UPSTREAM_REMOTE_PORT%", "8080"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "1"),
        ("%TRACE_ID%", "abababababababababababababababab"),
        ("%REQUESTED_SERVER_NAME%", "-"),
    ];
    for (format, expected) in cases {
        let format = Format::text(format).expect(format);
        assert_eq!(rendered(&format, &sample), expected);
    }
}

#[test]
fn only_what_names_headers_of_responses_reads_them() {
    for (format, reads) in [
        (Format::default_text(), false),
        (Format::default_json(), false),
        (Format::text("%RESP(SERVER)%").expect("valid"), true),
        (Format::text("%RESP(SERVER):5%").expect("valid"), true),
        (
            Format::json(r#"{"a":{"b":"x %RESP(SERVER?VIA)%"}}"#).expect("valid"),
            true,
        ),
        (
            Format::text("%REQ(SERVER)% %RESPONSE_CODE%").expect("valid"),
            false,
        ),
    ] {
        assert_eq!(format.reads_response(), reads, "{format:?}");
    }
}

#[test]
fn bad_formats_are_told() {
    let error = |format: &str| Format::text(format).expect_err(format).to_string();
    assert_eq!(error("%NO_SUCH%"), "unknown operator %NO_SUCH%");
    assert_eq!(error("%REQ(x"), "a % is not closed after \"REQ(x\"");
    assert_eq!(error("%REQ%"), "unknown operator %REQ%");
    assert_eq!(error("%REQ(a):b%"), "unknown operator %REQ(a):b%");
    assert_eq!(
        error("%START_TIME(%q)%"),
        "unknown operator %START_TIME(%q)%"
    );
    assert!(Format::json("[1]").is_err());
    assert!(Format::json("{\"a\": \"%X%\"}").is_err());
}

#[test]
fn a_value_cannot_forge_a_line_or_a_member() {
    let mut sample = Sample::new();
    sample.path = "/\" 200 -\n[2020] \"GET".into();
    let text = Format::text("\"%REQ(:PATH)%\" %RESPONSE_CODE%").expect("valid");
    let line = rendered(&text, &sample);
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with("\"/\\\" 200"), "{line}");
    let json = Format::json("{\"p\":\"%REQ(:PATH)%\",\"q\":\"a %REQ(:PATH)%\"}").expect("valid");
    let line = rendered(&json, &sample);
    let parsed: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(parsed["p"], sample.path);
    assert_eq!(parsed["q"], format!("a {}", sample.path));
}

#[test]
fn lines_reach_the_writer_whole() {
    #[derive(Clone, Default)]
    struct Output(Arc<parking_lot::Mutex<Vec<u8>>>);
    impl std::io::Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let output = Output::default();
    let log = LogWriter::start(output.clone()).expect("thread");
    let sample = Sample::new();
    let format = Format::text("%RESPONSE_CODE%").expect("valid");
    write(&log, &format, &sample.event());
    write(&log, &format, &sample.event());
    assert!(log.flush(std::time::Duration::from_secs(10)));
    assert_eq!(*output.0.lock(), b"200\n200\n");
}
