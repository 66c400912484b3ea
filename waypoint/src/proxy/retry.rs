//! Whether a request that failed is tried again, and when: pure.
//!
//! The words are Envoy's `retry_on`. A request that no endpoint has looked at may always be
//! sent elsewhere; one that may have been acted upon only where the policy says so, or where
//! its method allows it and nothing but a stale connection was in the way.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::waypoint as pb;
use http::Method;
use rand::Rng;

use super::upstream::Reached;

/// Base of the pauses between tries (Envoy: 25 ms).
const BACKOFF: Duration = Duration::from_millis(25);
/// The longest pause is so many times the base (Envoy's `max_interval`).
const MAX_BACKOFF: u32 = 10;
/// Tries beyond the first of a request that no route says anything of (Istio).
const DEFAULT_ATTEMPTS: u32 = 2;

/// What failed tries are repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Conditions(u16);

impl Conditions {
    const CONNECT_FAILURE: Self = Self(1);
    const REFUSED_STREAM: Self = Self(1 << 1);
    const RESET_BEFORE_REQUEST: Self = Self(1 << 2);
    const RESET: Self = Self(1 << 3);
    const SERVER_ERROR: Self = Self(1 << 4);
    const GATEWAY_ERROR: Self = Self(1 << 5);
    const RETRIABLE_4XX: Self = Self(1 << 6);
    const CODES: Self = Self(1 << 7);
    const CANCELLED: Self = Self(1 << 8);
    const DEADLINE_EXCEEDED: Self = Self(1 << 9);
    const INTERNAL: Self = Self(1 << 10);
    const RESOURCE_EXHAUSTED: Self = Self(1 << 11);
    const UNAVAILABLE: Self = Self(1 << 12);

    const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "connect-failure" => Self::CONNECT_FAILURE,
            "refused-stream" => Self::REFUSED_STREAM,
            "reset-before-request" => Self::RESET_BEFORE_REQUEST,
            "reset" => Self::RESET,
            "5xx" => Self::SERVER_ERROR,
            "gateway-error" => Self::GATEWAY_ERROR,
            "retriable-4xx" => Self::RETRIABLE_4XX,
            "retriable-status-codes" => Self::CODES,
            "cancelled" => Self::CANCELLED,
            "deadline-exceeded" => Self::DEADLINE_EXCEEDED,
            "internal" => Self::INTERNAL,
            "resource-exhausted" => Self::RESOURCE_EXHAUSTED,
            "unavailable" => Self::UNAVAILABLE,
            _ => return None,
        })
    }
}

/// How often and when a request is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries beyond the first.
    pub attempts: u32,
    /// Of one try; `None`: no bound of its own.
    pub per_try_timeout: Option<Duration>,
    conditions: Conditions,
    codes: Arc<[u16]>,
    backoff: Duration,
}

/// What became of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// There was no answer.
    Failed(Reached),
    /// Its time was over.
    TimedOut,
    /// It was answered with this status, and this gRPC status if that is known with the head.
    Answered(u16, Option<u32>),
}

impl RetryPolicy {
    /// Requests that follow a route which says nothing of retries (Istio: two, and never for
    /// what may have been acted upon).
    pub fn routed() -> Self {
        Self {
            attempts: DEFAULT_ATTEMPTS,
            per_try_timeout: None,
            conditions: Conditions::CONNECT_FAILURE
                .with(Conditions::REFUSED_STREAM)
                .with(Conditions::RESET_BEFORE_REQUEST)
                .with(Conditions::UNAVAILABLE)
                .with(Conditions::CANCELLED)
                .with(Conditions::CODES),
            codes: Arc::new([]),
            backoff: BACKOFF,
        }
    }

    /// Never.
    pub fn never() -> Self {
        Self {
            attempts: 0,
            ..Self::routed()
        }
    }

    /// Requests without a route.
    pub fn unrouted() -> Self {
        Self {
            conditions: Conditions::CONNECT_FAILURE
                .with(Conditions::REFUSED_STREAM)
                .with(Conditions::RESET_BEFORE_REQUEST),
            ..Self::routed()
        }
    }

    /// What a route or the mesh says. Words that are not known are not met by anything.
    pub fn from_proto(retry: &pb::Retry) -> Self {
        let mut conditions = match retry.conditions.is_empty() {
            // The Gateway API's: what was not processed, what is unavailable, and the codes.
            true => Self::routed().conditions,
            false => Conditions::default(),
        };
        let mut codes: Vec<u16> = retry
            .codes
            .iter()
            .filter_map(|code| u16::try_from(*code).ok())
            .collect();
        for name in retry.conditions.iter().map(|name| name.trim()) {
            match (Conditions::named(name), name.parse()) {
                (Some(condition), _) => conditions = conditions.with(condition),
                (None, Ok(code)) => codes.push(code),
                (None, Err(_)) => {}
            }
        }
        if !codes.is_empty() {
            conditions = conditions.with(Conditions::CODES);
        }
        let duration = |wire: &Option<prost_types::Duration>| {
            let duration = Duration::try_from((*wire)?).ok()?;
            (!duration.is_zero()).then_some(duration)
        };
        Self {
            attempts: retry.attempts,
            per_try_timeout: duration(&retry.per_try_timeout),
            conditions,
            codes: codes.into(),
            backoff: duration(&retry.backoff).unwrap_or(BACKOFF),
        }
    }

    /// Whether a try that was answered, or cut off half-way, may be repeated: then the body
    /// has to be kept.
    pub fn may_resend(&self) -> bool {
        self.attempts > 0 && self.conditions != Self::unrouted().conditions
    }

    /// Whether a try that ended so is repeated, `count` tries having been made.
    pub fn repeats(&self, tried: Tried, count: u32) -> bool {
        if count > self.attempts {
            return false;
        }
        let has = |condition| self.conditions.has(condition);
        let failed = has(Conditions::SERVER_ERROR) || has(Conditions::RESET);
        match tried {
            Tried::Failed(Reached::NotConnected) => {
                failed
                    || has(Conditions::CONNECT_FAILURE)
                    || has(Conditions::RESET_BEFORE_REQUEST)
                    || has(Conditions::GATEWAY_ERROR)
            }
            Tried::Failed(Reached::NotProcessed) => {
                failed || has(Conditions::REFUSED_STREAM) || has(Conditions::RESET_BEFORE_REQUEST)
            }
            Tried::Failed(Reached::Stale | Reached::Sent) => {
                failed || has(Conditions::GATEWAY_ERROR)
            }
            Tried::TimedOut => {
                failed
                    || has(Conditions::GATEWAY_ERROR)
                    || has(Conditions::DEADLINE_EXCEEDED)
                    || self.lists(504)
            }
            Tried::Answered(status, grpc) => {
                (has(Conditions::SERVER_ERROR) && (500..600).contains(&status))
                    || (has(Conditions::GATEWAY_ERROR) && (502..=504).contains(&status))
                    || (has(Conditions::RETRIABLE_4XX) && status == 409)
                    || self.lists(status)
                    || grpc.is_some_and(|grpc| self.lists_grpc(grpc))
            }
        }
    }

    fn lists(&self, status: u16) -> bool {
        self.conditions.has(Conditions::CODES) && self.codes.contains(&status)
    }

    fn lists_grpc(&self, status: u32) -> bool {
        let condition = match status {
            1 => Conditions::CANCELLED,
            4 => Conditions::DEADLINE_EXCEEDED,
            8 => Conditions::RESOURCE_EXHAUSTED,
            13 => Conditions::INTERNAL,
            14 => Conditions::UNAVAILABLE,
            _ => return false,
        };
        self.conditions.has(condition)
    }

    /// The pause before try number `count` (the first retry is 1): exponential, with full
    /// jitter, so that those who failed together do not come back together.
    pub fn pause<R: Rng + ?Sized>(&self, count: u32, rng: &mut R) -> Duration {
        let doubled = 1_u32 << count.saturating_sub(1).min(16);
        let longest = self.backoff * doubled.min(MAX_BACKOFF);
        longest.mul_f64(rng.random_range(0.0..1.0))
    }
}

/// Whether a request may be sent again although it may have been acted upon, because nothing
/// but a connection that was closed while it lay idle speaks against it (RFC 9110 9.2.2,
/// RFC 9112 9.3.1): its method allows it, and it has no body.
pub fn is_repeatable(method: &Method, has_body: bool) -> bool {
    !has_body && method.is_idempotent()
}

/// The time that a gRPC client gives a request (gRPC over HTTP/2, `grpc-timeout`): up to eight
/// digits and a unit. What is malformed is no bound.
pub fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// The same as text, in the finest unit that holds it.
pub fn write_grpc_timeout(time: Duration) -> String {
    const MOST: u128 = 99_999_999;
    for (number, unit) in [
        (time.as_micros(), 'u'),
        (time.as_millis(), 'm'),
        (u128::from(time.as_secs()), 'S'),
    ] {
        if number <= MOST {
            return format!("{number}{unit}");
        }
    }
    format!("{}H", (time.as_secs() / 3600).min(99_999_999))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    fn retry(attempts: u32, codes: &[u32], conditions: &[&str]) -> RetryPolicy {
        RetryPolicy::from_proto(&pb::Retry {
            attempts,
            codes: codes.to_vec(),
            conditions: conditions.iter().map(ToString::to_string).collect(),
            ..Default::default()
        })
    }

    #[test]
    fn what_is_repeated() {
        use Reached::{NotConnected, NotProcessed, Sent};
        let unrouted = RetryPolicy::unrouted();
        let codes = retry(1, &[500, 503], &[]);
        let server = retry(1, &[], &["5xx"]);
        let gateway = retry(1, &[], &["gateway-error,x", "gateway-error"]);
        let none = retry(0, &[503], &["5xx"]);
        for (policy, tried, expected) in [
            (&unrouted, Tried::Failed(NotConnected), true),
            (&unrouted, Tried::Failed(NotProcessed), true),
            (&unrouted, Tried::Failed(Sent), false),
            (&unrouted, Tried::Answered(503, None), false),
            (&unrouted, Tried::Answered(200, Some(14)), false),
            (&unrouted, Tried::TimedOut, false),
            (&codes, Tried::Failed(NotConnected), true),
            (&codes, Tried::Failed(Sent), false),
            (&codes, Tried::Answered(500, None), true),
            (&codes, Tried::Answered(502, None), false),
            (&codes, Tried::Answered(200, Some(14)), true),
            (&server, Tried::Answered(502, None), true),
            (&server, Tried::Answered(404, None), false),
            (&server, Tried::Failed(Sent), true),
            (&server, Tried::TimedOut, true),
            (&gateway, Tried::Answered(503, None), true),
            (&gateway, Tried::Answered(500, None), false),
            (&none, Tried::Failed(NotConnected), false),
            (&none, Tried::Answered(503, None), false),
        ] {
            assert_eq!(policy.repeats(tried, 1), expected, "{policy:?} {tried:?}");
            assert!(!policy.repeats(tried, policy.attempts + 1));
        }
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let policy = RetryPolicy::routed();
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        for count in 1..100 {
            let bound = BACKOFF * (1 << (count - 1_u32).min(10)).min(MAX_BACKOFF);
            assert!(policy.pause(count, &mut rng) <= bound, "{count}");
        }
    }

    #[test]
    fn grpc_timeouts_are_read_and_written() {
        for (text, time) in [
            ("1S", Some(Duration::from_secs(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("2H", Some(Duration::from_secs(7200))),
            ("S", None),
            ("1", None),
            ("-1S", None),
            ("123456789S", None),
            ("1x", None),
        ] {
            assert_eq!(grpc_timeout(text.as_bytes()), time, "{text}");
        }
        assert_eq!(write_grpc_timeout(Duration::from_millis(5)), "5000u");
        assert_eq!(write_grpc_timeout(Duration::from_secs(1000)), "1000000m");
    }
}
