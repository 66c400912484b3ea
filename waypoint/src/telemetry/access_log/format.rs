//! A format, compiled.

use serde_json::Value;

use super::super::event::RequestEvent;
use super::operator::Operator;

/// Istio's default line.
pub const DEFAULT_TEXT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" ",
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% ",
    "%CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" ",
    "%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% ",
    "\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" ",
    "\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% ",
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% ",
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
);

/// Istio's default JSON, and who was at both ends.
pub const DEFAULT_JSON: &str = r#"{
"start_time":"%START_TIME%","route_name":"%ROUTE_NAME%","method":"%REQ(:METHOD)%",
"path":"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%","protocol":"%PROTOCOL%",
"response_code":"%RESPONSE_CODE%","response_flags":"%RESPONSE_FLAGS%",
"response_code_details":"%RESPONSE_CODE_DETAILS%",
"connection_termination_details":"%CONNECTION_TERMINATION_DETAILS%",
"bytes_received":"%BYTES_RECEIVED%","bytes_sent":"%BYTES_SENT%","duration":"%DURATION%",
"upstream_service_time":"%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
"x_forwarded_for":"%REQ(X-FORWARDED-FOR)%","user_agent":"%REQ(USER-AGENT)%",
"request_id":"%REQ(X-REQUEST-ID)%","authority":"%REQ(:AUTHORITY)%",
"upstream_host":"%UPSTREAM_HOST%","upstream_cluster":"%UPSTREAM_CLUSTER_RAW%",
"upstream_local_address":"%UPSTREAM_LOCAL_ADDRESS%",
"downstream_local_address":"%DOWNSTREAM_LOCAL_ADDRESS%",
"downstream_remote_address":"%DOWNSTREAM_REMOTE_ADDRESS%",
"requested_server_name":"%REQUESTED_SERVER_NAME%",
"upstream_transport_failure_reason":"%UPSTREAM_TRANSPORT_FAILURE_REASON%",
"downstream_peer_uri_san":"%DOWNSTREAM_PEER_URI_SAN%",
"upstream_peer_uri_san":"%UPSTREAM_PEER_URI_SAN%","trace_id":"%TRACE_ID%"}"#;

/// A longer format is refused.
const MAX_LENGTH: usize = 64 << 10;

/// A compiled format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    shape: Shape,
    reads_response: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    Text(Vec<Segment>),
    Json(Node),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Value(Operator),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    /// Members with their keys, as they are written.
    Object(Vec<(String, Node)>),
    Text(Vec<Segment>),
    /// What holds no operator, as it is written.
    Fixed(String),
}

/// Why a format is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// More than 64 KiB.
    #[error("longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// A `%` without another one.
    #[error("a % is not closed after {0:?}")]
    Open(String),
    /// No such operator, or not with this argument.
    #[error("unknown operator %{0}%")]
    Unknown(String),
    /// The JSON format is no JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
}

impl Format {
    fn new(shape: Shape) -> Self {
        let reads_response = match &shape {
            Shape::Text(segments) => reads_response(segments),
            Shape::Json(node) => node.reads_response(),
        };
        Self {
            shape,
            reads_response,
        }
    }

    /// Whether it has something of the headers of responses.
    pub fn reads_response(&self) -> bool {
        self.reads_response
    }

    /// A line of text.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn text(format: &str) -> Result<Self, FormatError> {
        Ok(Self::new(Shape::Text(segments(format)?)))
    }

    /// A line of JSON; `format` is an object whose texts hold operators.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn json(format: &str) -> Result<Self, FormatError> {
        if format.len() > MAX_LENGTH {
            return Err(FormatError::TooLong);
        }
        let value: Value =
            serde_json::from_str(format).map_err(|error| FormatError::Json(error.to_string()))?;
        if !value.is_object() {
            return Err(FormatError::Json("it is something else".into()));
        }
        Ok(Self::new(Shape::Json(node(&value)?)))
    }

    /// Istio's default for text.
    pub fn default_text() -> Self {
        // A test holds that it is valid.
        Self::text(DEFAULT_TEXT).unwrap_or(Self::new(Shape::Text(Vec::new())))
    }

    /// The default for JSON.
    pub fn default_json() -> Self {
        Self::json(DEFAULT_JSON).unwrap_or(Self::new(Shape::Text(Vec::new())))
    }

    /// Appends the line of `event` to `out`.
    pub fn render(&self, event: &RequestEvent<'_>, out: &mut String) {
        match &self.shape {
            Shape::Text(segments) => plain(segments, event, out),
            Shape::Json(node) => json(node, event, out),
        }
    }
}

fn reads_response(segments: &[Segment]) -> bool {
    segments.iter().any(|segment| match segment {
        Segment::Literal(_) => false,
        Segment::Value(operator) => operator.reads_response(),
    })
}

impl Node {
    fn reads_response(&self) -> bool {
        match self {
            Self::Object(members) => members.iter().any(|(_, node)| node.reads_response()),
            Self::Text(segments) => reads_response(segments),
            Self::Fixed(_) => false,
        }
    }
}

fn segments(format: &str) -> Result<Vec<Segment>, FormatError> {
    if format.len() > MAX_LENGTH {
        return Err(FormatError::TooLong);
    }
    let mut segments = Vec::new();
    let mut literal = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        literal.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            literal.push('%');
            rest = after;
            continue;
        }
        let end = end_of_operator(rest).ok_or_else(|| {
            let excerpt = rest.chars().take(40).collect();
            FormatError::Open(excerpt)
        })?;
        let operator = operator(&rest[..end])?;
        if !literal.is_empty() {
            segments.push(Segment::Literal(std::mem::take(&mut literal)));
        }
        segments.push(Segment::Value(operator));
        rest = &rest[end + 1..];
    }
    literal.push_str(rest);
    if !literal.is_empty() {
        segments.push(Segment::Literal(literal));
    }
    Ok(segments)
}

/// Where the closing `%` is; one inside parentheses belongs to the argument.
fn end_of_operator(text: &str) -> Option<usize> {
    let mut inside = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => inside = true,
            b')' => inside = false,
            b'%' if !inside => return Some(at),
            _ => {}
        }
    }
    None
}

/// `NAME`, `NAME(argument)`, `NAME(argument):limit`.
fn operator(text: &str) -> Result<Operator, FormatError> {
    let unknown = || FormatError::Unknown(text.to_owned());
    let (name, rest) = match text.split_once('(') {
        Some((name, rest)) => (name, Some(rest)),
        None => (text, None),
    };
    let (argument, limit) = match rest {
        None => (None, None),
        Some(rest) => {
            let (argument, limit) = rest.rsplit_once(')').ok_or_else(unknown)?;
            let limit = match limit.strip_prefix(':') {
                Some(limit) => Some(limit.parse().map_err(|_| unknown())?),
                None if limit.is_empty() => None,
                None => return Err(unknown()),
            };
            (Some(argument), limit)
        }
    };
    let operator = Operator::parse(name, argument).ok_or_else(unknown)?;
    Ok(match limit {
        Some(limit) => Operator::Limited(Box::new(operator), limit),
        None => operator,
    })
}

fn node(value: &Value) -> Result<Node, FormatError> {
    Ok(match value {
        Value::Object(members) => {
            let mut nodes = Vec::with_capacity(members.len());
            for (key, value) in members {
                nodes.push((Value::String(key.clone()).to_string(), node(value)?));
            }
            Node::Object(nodes)
        }
        Value::String(text) => Node::Text(segments(text)?),
        other => Node::Fixed(other.to_string()),
    })
}

fn plain(segments: &[Segment], event: &RequestEvent<'_>, out: &mut String) {
    for segment in segments {
        match segment {
            Segment::Literal(text) => out.push_str(text),
            Segment::Value(operator) => {
                let start = out.len();
                if !operator.write(event, out) {
                    out.push('-');
                }
                // A header must not begin a line of its own.
                if out[start..].contains(['\n', '\r', '"']) {
                    let value = out.split_off(start);
                    for c in value.chars() {
                        match c {
                            '\n' => out.push_str("\\n"),
                            '\r' => out.push_str("\\r"),
                            '"' => out.push_str("\\\""),
                            c => out.push(c),
                        }
                    }
                }
            }
        }
    }
}

fn json(node: &Node, event: &RequestEvent<'_>, out: &mut String) {
    match node {
        Node::Object(members) => {
            out.push('{');
            for (n, (key, node)) in members.iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                out.push_str(key);
                out.push(':');
                json(node, event, out);
            }
            out.push('}');
        }
        Node::Fixed(text) => out.push_str(text),
        // One operator alone keeps its type, and is null without a value.
        Node::Text(segments) => match &segments[..] {
            [Segment::Value(operator)] if operator.is_number() => {
                if !operator.write(event, out) {
                    out.push_str("null");
                }
            }
            [Segment::Value(operator)] => {
                out.push('"');
                let start = out.len();
                if operator.write(event, out) {
                    escape_from(out, start);
                    out.push('"');
                } else {
                    out.truncate(start - 1);
                    out.push_str("null");
                }
            }
            segments => {
                out.push('"');
                for segment in segments {
                    let start = out.len();
                    match segment {
                        Segment::Literal(text) => out.push_str(text),
                        Segment::Value(operator) => {
                            if !operator.write(event, out) {
                                out.push('-');
                            }
                        }
                    }
                    escape_from(out, start);
                }
                out.push('"');
            }
        },
    }
}

/// Escapes what was appended since `start` (RFC 8259 7).
fn escape_from(out: &mut String, start: usize) {
    // Hardly any value needs it. Without an early end many bytes are looked at at once.
    let needs = |b: u8| b < b' ' || b == b'"' || b == b'\\' || b >= 0x7f;
    let bytes = out.as_bytes().get(start..).unwrap_or_default();
    if !bytes.iter().fold(false, |any, &b| any | needs(b)) {
        return;
    }
    let value = out.split_off(start);
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                use std::fmt::Write as _;
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
}
