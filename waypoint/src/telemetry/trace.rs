//! Trace context: which trace a request belongs to, whether it is sampled, and the headers that
//! carry this on.
//!
//! Read: `traceparent` (W3C Trace Context), then `b3`, then `x-b3-*` (B3 propagation). Written
//! on: in the form in which it came, and `traceparent` where none came. A caller's decision to
//! sample or not is kept; without one the configured percentage decides. What cannot be
//! understood is treated as absent, as both specifications ask.

use adit_shared::hbone::Traceparent;
use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
/// The request's own name, through all hops.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A longer `x-request-id` is replaced.
const MAX_REQUEST_ID: usize = 128;

/// Sampling in millionths: what percentages with four decimals are.
pub const EVERY_REQUEST: u32 = 1_000_000;

/// The trace of one request at this hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Of the whole trace.
    pub trace_id: [u8; 16],
    /// Of this hop.
    pub span_id: [u8; 8],
    /// The caller's span; `None`: the trace begins here.
    pub parent_id: Option<[u8; 8]>,
    /// Whether spans are reported.
    pub sampled: bool,
}

/// In which form the context came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    W3c,
    B3Single,
    B3Multi,
}

/// What the caller said.
struct Incoming {
    trace_id: [u8; 16],
    parent_id: [u8; 8],
    /// `None`: it left the decision to us.
    sampled: Option<bool>,
    form: Form,
}

impl TraceContext {
    /// The context of a request with `headers`, which are changed to what goes on to the
    /// endpoint. `sampling` is the share of requests without a decision, in millionths;
    /// `random` are three independent random numbers. With `propagate` false the headers are
    /// left as they came.
    pub fn begin(
        headers: &mut HeaderMap,
        sampling: u32,
        propagate: bool,
        random: [u64; 3],
    ) -> Self {
        let incoming = read(headers);
        let chosen = || random[2] % u64::from(EVERY_REQUEST) < u64::from(sampling);
        let span_id = random[1].max(1).to_be_bytes();
        let context = match &incoming {
            Some(incoming) => Self {
                trace_id: incoming.trace_id,
                span_id,
                parent_id: Some(incoming.parent_id),
                sampled: incoming.sampled.unwrap_or_else(chosen),
            },
            None => {
                let mut trace_id = [0; 16];
                trace_id[..8].copy_from_slice(&random[0].max(1).to_be_bytes());
                trace_id[8..].copy_from_slice(&random[1].rotate_left(32).to_be_bytes());
                Self {
                    trace_id,
                    span_id,
                    parent_id: None,
                    // A decision without a trace (`x-b3-sampled`, `b3: 0`) holds, too.
                    sampled: bare_decision(headers).unwrap_or_else(chosen),
                }
            }
        };
        if propagate {
            context.write(
                headers,
                incoming.map_or(Form::W3c, |incoming| incoming.form),
            );
        }
        context
    }

    fn write(&self, headers: &mut HeaderMap, form: Form) {
        let (trace, span) = (hex(&self.trace_id), hex(&self.span_id));
        match form {
            Form::W3c => {
                let value = Traceparent {
                    trace_id: self.trace_id,
                    parent_id: self.span_id,
                    flags: u8::from(self.sampled),
                };
                headers.insert(TRACEPARENT, value.to_header());
            }
            Form::B3Single => {
                let sampled = if self.sampled { '1' } else { '0' };
                let mut value = format!("{trace}-{span}-{sampled}");
                if let Some(parent) = self.parent_id {
                    value.push('-');
                    value.push_str(&hex(&parent));
                }
                put(headers, B3, value);
            }
            Form::B3Multi => {
                put(headers, B3_TRACE, trace);
                put(headers, B3_SPAN, span);
                if let Some(parent) = self.parent_id {
                    put(headers, B3_PARENT, hex(&parent));
                }
                let sampled = if self.sampled { "1" } else { "0" };
                headers.insert(B3_SAMPLED, HeaderValue::from_static(sampled));
            }
        }
    }

    /// The trace id in hexadecimal.
    pub fn trace_id_hex(&self) -> String {
        hex(&self.trace_id)
    }
}

/// Makes sure that the request has a usable `x-request-id`.
pub fn ensure_request_id(headers: &mut HeaderMap, random: [u64; 2]) {
    let usable = |value: &HeaderValue| {
        let bytes = value.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    if headers.get(&REQUEST_ID).is_some_and(usable) {
        return;
    }
    headers.insert(REQUEST_ID, uuid(random));
}

/// A version 4 UUID (RFC 9562 5.4).
fn uuid(random: [u64; 2]) -> HeaderValue {
    let mut bytes = [0_u8; 16];
    bytes[..8].copy_from_slice(&random[0].to_be_bytes());
    bytes[8..].copy_from_slice(&random[1].to_be_bytes());
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (n, byte) in bytes.iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    // Hexadecimal digits and hyphens.
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(char::from(HEX[usize::from(byte >> 4)]));
        text.push(char::from(HEX[usize::from(byte & 15)]));
    }
    text
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

fn read(headers: &HeaderMap) -> Option<Incoming> {
    w3c(headers)
        .or_else(|| b3_single(headers))
        .or_else(|| b3_multi(headers))
}

fn w3c(headers: &HeaderMap) -> Option<Incoming> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    // Two of them say nothing (W3C Trace Context 3.2).
    let (value, None) = (values.next()?, values.next()) else {
        return None;
    };
    let parsed = Traceparent::parse(value.as_bytes()).ok()?;
    Some(Incoming {
        trace_id: parsed.trace_id,
        parent_id: parsed.parent_id,
        sampled: Some(parsed.flags & 1 == 1),
        form: Form::W3c,
    })
}

/// `{trace}-{span}[-{sampled}[-{parent}]]`.
fn b3_single(headers: &HeaderMap) -> Option<Incoming> {
    let mut parts = headers.get(B3)?.to_str().ok()?.split('-');
    let trace_id = trace_id(parts.next()?)?;
    let parent_id = id::<8>(parts.next()?)?;
    Some(Incoming {
        trace_id,
        parent_id,
        sampled: parts.next().and_then(decision),
        form: Form::B3Single,
    })
}

fn b3_multi(headers: &HeaderMap) -> Option<Incoming> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    Some(Incoming {
        trace_id: trace_id(text(B3_TRACE)?)?,
        parent_id: id::<8>(text(B3_SPAN)?)?,
        sampled: multi_decision(headers),
        form: Form::B3Multi,
    })
}

fn multi_decision(headers: &HeaderMap) -> Option<bool> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text(B3_FLAGS) {
        // Debug implies that it is sampled.
        Some("1") => Some(true),
        _ => text(B3_SAMPLED).and_then(decision),
    }
}

fn bare_decision(headers: &HeaderMap) -> Option<bool> {
    let single = headers.get(B3).and_then(|value| value.to_str().ok());
    single
        .and_then(decision)
        .or_else(|| multi_decision(headers))
}

fn decision(text: &str) -> Option<bool> {
    match text {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

/// 32 digits, or 16 that stand for the lower half.
fn trace_id(text: &str) -> Option<[u8; 16]> {
    match text.len() {
        32 => id(text),
        16 => {
            let mut whole = [0; 16];
            whole[8..].copy_from_slice(&id::<8>(text)?);
            Some(whole)
        }
        _ => None,
    }
}

/// Hexadecimal of exactly `N` bytes, not all zero.
fn id<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    if pairs.len() != N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    (bytes != [0; N]).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM: [u64; 3] = [7, 9, 999_999];
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(of: &[(&'static str, String)]) -> HeaderMap {
        of.iter()
            .map(|(name, value)| {
                let value = HeaderValue::try_from(value).expect("value");
                (HeaderName::from_static(name), value)
            })
            .collect()
    }

    fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
        headers.get(name).and_then(|value| value.to_str().ok())
    }

    #[test]
    fn a_request_without_a_trace_begins_one() {
        let mut map = HeaderMap::new();
        let context = TraceContext::begin(&mut map, EVERY_REQUEST, true, RANDOM);
        assert!(context.sampled);
        assert_eq!(context.parent_id, None);
        let value = text(&map, "traceparent").expect("written");
        let parsed = Traceparent::parse(value.as_bytes()).expect("valid");
        assert_eq!(parsed.trace_id, context.trace_id);
        assert_eq!(parsed.parent_id, context.span_id);
        assert_eq!(parsed.flags, 1);
    }

    #[test]
    fn the_callers_trace_goes_on_in_its_own_form() {
        let mut map = headers(&[("traceparent", format!("00-{TRACE}-{SPAN}-01"))]);
        let context = TraceContext::begin(&mut map, 0, true, RANDOM);
        assert!(context.sampled, "the caller decided");
        assert_eq!(context.trace_id_hex(), TRACE);
        assert_eq!(context.parent_id.map(|p| hex(&p)).as_deref(), Some(SPAN));
        let value = text(&map, "traceparent").expect("written");
        assert!(value.starts_with(&format!("00-{TRACE}-")), "{value}");
        assert!(!value.contains(SPAN), "{value}");

        let mut map = headers(&[("b3", format!("{TRACE}-{SPAN}-0"))]);
        let context = TraceContext::begin(&mut map, EVERY_REQUEST, true, RANDOM);
        assert!(!context.sampled);
        assert_eq!(
            text(&map, "b3"),
            Some(&*format!("{TRACE}-{}-0-{SPAN}", hex(&context.span_id)))
        );
        assert!(map.get("traceparent").is_none());

        let mut map = headers(&[
            ("x-b3-traceid", SPAN.into()),
            ("x-b3-spanid", SPAN.into()),
            ("x-b3-flags", "1".into()),
        ]);
        let context = TraceContext::begin(&mut map, 0, true, RANDOM);
        assert!(context.sampled);
        assert_eq!(context.trace_id_hex(), format!("{}{SPAN}", "0".repeat(16)));
        assert_eq!(text(&map, "x-b3-parentspanid"), Some(SPAN));
        assert_eq!(text(&map, "x-b3-sampled"), Some("1"));
    }

    #[test]
    fn what_is_malformed_counts_as_absent() {
        for bad in [
            ("traceparent", "00-xyz".to_owned()),
            ("traceparent", format!("00-{}-{SPAN}-01", "0".repeat(32))),
            ("b3", TRACE.to_owned()),
            ("b3", format!("{TRACE}-{}-1", "0".repeat(16))),
            ("x-b3-traceid", TRACE.to_owned()),
        ] {
            let mut map = headers(std::slice::from_ref(&bad));
            let context = TraceContext::begin(&mut map, 0, true, RANDOM);
            assert_eq!(context.parent_id, None, "{bad:?}");
            assert_ne!(context.trace_id_hex(), TRACE, "{bad:?}");
        }
    }

    #[test]
    fn sampling_is_a_share_and_a_decision_without_trace_holds() {
        let at = |share, random| {
            TraceContext::begin(&mut HeaderMap::new(), share, true, [1, 2, random]).sampled
        };
        assert!(!at(0, 0));
        assert!(at(10_000, 9_999));
        assert!(!at(10_000, 10_000));
        let mut map = headers(&[("x-b3-sampled", "0".into())]);
        assert!(!TraceContext::begin(&mut map, EVERY_REQUEST, true, RANDOM).sampled);
        let mut map = headers(&[("b3", "1".into())]);
        assert!(TraceContext::begin(&mut map, 0, true, RANDOM).sampled);
    }

    #[test]
    fn without_propagation_headers_stay_as_they_came() {
        let mut map = headers(&[("traceparent", format!("00-{TRACE}-{SPAN}-01"))]);
        let before = map.clone();
        TraceContext::begin(&mut map, 0, false, RANDOM);
        assert_eq!(map, before);
    }

    #[test]
    fn a_usable_request_id_stays_and_another_is_replaced() {
        let mut map = headers(&[("x-request-id", "abc-1".into())]);
        ensure_request_id(&mut map, [1, 2]);
        assert_eq!(text(&map, "x-request-id"), Some("abc-1"));
        let mut map = headers(&[("x-request-id", "x".repeat(129))]);
        ensure_request_id(&mut map, [0x0123_4567_89ab_cdef, 2]);
        let made = text(&map, "x-request-id").expect("made");
        assert_eq!(made, "01234567-89ab-4def-8000-000000000002");
    }
}
