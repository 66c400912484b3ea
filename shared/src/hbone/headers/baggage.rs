//! `baggage`: who a workload is, for the telemetry of its peer (W3C Baggage, with Istio's keys).

use std::borrow::Cow;
use std::fmt::Write as _;
use std::ops::Deref;
use std::sync::Arc;

use http::HeaderValue;
use http::header::HeaderMap;

use super::{BAGGAGE, HeaderError, excerpt};

/// W3C Baggage 3.3.2: what a sender must be able to pass on.
const MAX_BYTES: usize = 8192;
const MAX_MEMBERS: usize = 64;
/// A Kubernetes name has at most 253 bytes, a label value 63.
const MAX_VALUE: usize = 256;

/// What is known of a workload. Empty parts are unknown and not written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BaggageFields {
    /// `k8s.cluster.name`.
    pub cluster: Arc<str>,
    /// `k8s.namespace.name`.
    pub namespace: Arc<str>,
    /// `deployment`, `cronjob`, `pod` or `job`; anything else is not written.
    pub workload_type: &'static str,
    /// `k8s.<workload type>.name`.
    pub workload_name: Arc<str>,
    /// `service.name`: canonical name.
    pub service_name: Arc<str>,
    /// `service.version`: canonical revision.
    pub service_version: Arc<str>,
    /// `cloud.region`.
    pub region: Arc<str>,
    /// `cloud.availability_zone`.
    pub zone: Arc<str>,
}

/// A workload's description together with its header value, which is made once: a workload
/// sends the same with each of its connections. Cloning counts a reference.
#[derive(Debug, Clone)]
pub struct Baggage(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fields: BaggageFields,
    header: HeaderValue,
}

/// Why a baggage is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BaggageError {
    /// Longer than 8192 bytes.
    #[error("more than {MAX_BYTES} bytes")]
    TooLong,
    /// More than 64 members.
    #[error("more than {MAX_MEMBERS} members")]
    TooMany,
    /// A member is not `key=value`.
    #[error("member \"{0}\" is not key=value")]
    Member(String),
    /// The same key twice.
    #[error("{0} stands there twice")]
    Repeated(&'static str),
    /// A value is too long, badly percent-encoded, or no printable UTF-8.
    #[error("illegal value of {0}")]
    Value(&'static str),
}

/// Istio's keys, in the order in which they are written.
const CLUSTER: &str = "k8s.cluster.name";
const NAMESPACE: &str = "k8s.namespace.name";
const SERVICE_NAME: &str = "service.name";
const SERVICE_VERSION: &str = "service.version";
const REGION: &str = "cloud.region";
const ZONE: &str = "cloud.availability_zone";
const WORKLOAD_TYPES: [(&str, &str); 4] = [
    ("deployment", "k8s.deployment.name"),
    ("cronjob", "k8s.cronjob.name"),
    ("pod", "k8s.pod.name"),
    ("job", "k8s.job.name"),
];

impl Baggage {
    /// Fixes a description and makes its header.
    pub fn new(fields: BaggageFields) -> Self {
        let header = HeaderValue::from_str(&fields.encode())
            // The encoding leaves nothing but printable ASCII.
            .unwrap_or_else(|_| HeaderValue::from_static(""));
        Self(Arc::new(Inner { fields, header }))
    }

    pub(in super::super) fn header(&self) -> &HeaderValue {
        &self.0.header
    }

    /// The baggage of a message, `None` if it has none. `known` is used again if it is the same.
    pub(in super::super) fn from_headers(
        headers: &HeaderMap,
        known: Option<&Self>,
    ) -> Result<Option<Self>, HeaderError> {
        let mut values = headers.get_all(BAGGAGE).iter();
        let Some(first) = values.next() else {
            return Ok(None);
        };
        if values.next().is_some() {
            return Err(HeaderError::Repeated(BAGGAGE));
        }
        if let Some(known) = known
            && known.header() == first
        {
            return Ok(Some(known.clone()));
        }
        let fields = BaggageFields::parse(first.as_bytes())?;
        Ok(Some(Self(Arc::new(Inner {
            fields,
            header: first.clone(),
        }))))
    }
}

impl Deref for Baggage {
    type Target = BaggageFields;

    fn deref(&self) -> &BaggageFields {
        &self.0.fields
    }
}

impl PartialEq for Baggage {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.fields == other.0.fields
    }
}

impl Eq for Baggage {}

impl From<BaggageFields> for Baggage {
    fn from(fields: BaggageFields) -> Self {
        Self::new(fields)
    }
}

impl BaggageFields {
    /// Reads the value of a `baggage` header. Keys other than Istio's are skipped.
    ///
    /// # Errors
    /// When it is not W3C Baggage, is too large, or a value makes no sense.
    pub fn parse(header: &[u8]) -> Result<Self, BaggageError> {
        if header.len() > MAX_BYTES {
            return Err(BaggageError::TooLong);
        }
        let mut fields = Self::default();
        if header.trim_ascii().is_empty() {
            return Ok(fields);
        }
        for (count, member) in header.split(|b| *b == b',').enumerate() {
            if count == MAX_MEMBERS {
                return Err(BaggageError::TooMany);
            }
            fields.parse_member(member)?;
        }
        Ok(fields)
    }

    fn parse_member(&mut self, member: &[u8]) -> Result<(), BaggageError> {
        let malformed = || BaggageError::Member(excerpt(member));
        // What follows a semicolon are properties, which Istio does not use.
        let pair = member.split(|b| *b == b';').next().unwrap_or_default();
        let equals = pair.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
        let (key, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
        if key.is_empty() || !key.iter().all(|b| b.is_ascii_graphic()) {
            return Err(malformed());
        }
        let (key, field) = match key {
            b"k8s.cluster.name" => (CLUSTER, &mut self.cluster),
            b"k8s.namespace.name" => (NAMESPACE, &mut self.namespace),
            b"service.name" => (SERVICE_NAME, &mut self.service_name),
            b"service.version" => (SERVICE_VERSION, &mut self.service_version),
            b"cloud.region" => (REGION, &mut self.region),
            b"cloud.availability_zone" => (ZONE, &mut self.zone),
            other => {
                let kind = WORKLOAD_TYPES
                    .into_iter()
                    .find(|(_, key)| key.as_bytes() == other);
                let Some((kind, key)) = kind else {
                    return Ok(());
                };
                self.workload_type = kind;
                (key, &mut self.workload_name)
            }
        };
        if !field.is_empty() {
            return Err(BaggageError::Repeated(key));
        }
        *field = decode(value).ok_or(BaggageError::Value(key))?.into();
        Ok(())
    }

    fn encode(&self) -> String {
        let mut header = String::new();
        let workload_key = WORKLOAD_TYPES
            .into_iter()
            .find(|(kind, _)| *kind == self.workload_type);
        let members = [
            (CLUSTER, &self.cluster),
            (NAMESPACE, &self.namespace),
            workload_key.map_or(("", &self.workload_name), |(_, key)| {
                (key, &self.workload_name)
            }),
            (SERVICE_NAME, &self.service_name),
            (SERVICE_VERSION, &self.service_version),
            (REGION, &self.region),
            (ZONE, &self.zone),
        ];
        for (key, value) in members {
            if key.is_empty() || value.is_empty() || value.len() > MAX_VALUE {
                continue;
            }
            if !header.is_empty() {
                header.push(',');
            }
            header.push_str(key);
            header.push('=');
            encode_into(&mut header, value);
        }
        header
    }
}

/// Percent-encodes what may not stand in a value, and `=`, at which Istio's parser would split.
fn encode_into(out: &mut String, value: &str) {
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'"' | b',' | b';' | b'\\' | b'%' | b'=') {
            out.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

fn decode(value: &[u8]) -> Option<Cow<'_, str>> {
    // Percent-encoding makes a value at most three times as long.
    if value.len() > MAX_VALUE * 3 {
        return None;
    }
    let decoded = if value.contains(&b'%') {
        let mut bytes = Vec::with_capacity(value.len());
        let mut rest = value;
        while let Some((first, tail)) = rest.split_first() {
            rest = tail;
            if *first != b'%' {
                bytes.push(*first);
                continue;
            }
            let (digits, tail) = rest.split_at_checked(2)?;
            rest = tail;
            let digit = |b: u8| char::from(b).to_digit(16);
            bytes.push(u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?);
        }
        Cow::Owned(String::from_utf8(bytes).ok()?)
    } else {
        Cow::Borrowed(std::str::from_utf8(value).ok()?)
    };
    let printable = !decoded.chars().any(char::is_control);
    (decoded.len() <= MAX_VALUE && printable).then_some(decoded)
}
