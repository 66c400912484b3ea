//! Whether a request that failed is sent again, and when: a decision over values.
//!
//! Gateway API HTTPRouteRetry: tries beyond the first are counted; 0 forbids them. Without
//! `conditions` of the user a request is sent again when it certainly was not processed (no
//! connection, a refused stream, gRPC UNAVAILABLE) or the response has a listed code. What may
//! have been processed (a reset after something was sent) is sent again only where the user
//! names a condition that says so; those are Envoy's `retry_on` words with Envoy's meaning.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::waypoint as proto;

use super::convert::read_duration;
use super::problem::Problems;

/// Envoy's base interval.
const BACKOFF: Duration = Duration::from_millis(25);
/// The longest pause is so many base intervals (Envoy).
const BACKOFF_CAP: u32 = 10;

/// When requests are sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries beyond the first; 0: never.
    pub attempts: u32,
    /// Response codes after which to try again, in order.
    pub codes: Box<[u16]>,
    /// What else to try again after.
    pub on: RetryOn,
    /// Base of the pause between tries.
    pub backoff: Duration,
    /// Limit of one try.
    pub per_try_timeout: Option<Duration>,
}

/// Envoy's `retry_on` words, a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn(u16);

/// What became of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// There was no connection: refused, timed out, TLS failure. Nothing was sent.
    ConnectFailed,
    /// The connection broke before anything of the request was sent.
    ResetBeforeRequest,
    /// The peer says that it did not process the request: REFUSED_STREAM, or GOAWAY with a
    /// smaller stream number.
    Refused,
    /// The stream or the connection broke after something was sent, without a response.
    Reset,
    /// The limit of one try has passed without a response.
    TimedOut,
    /// Response headers have come, and nothing of them has been passed on.
    Response {
        /// Their status.
        status: u16,
        /// `grpc-status`, where the headers carry it (a response without messages).
        grpc_status: Option<u32>,
    },
}

/// What to do after a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum RetryDecision {
    /// Try again, at another endpoint where there is one, after this pause.
    After(Duration),
    /// What came of the try is final: the policy does not mean it.
    NotRetriable,
    /// As many tries as the policy allows have been made.
    Exhausted,
    /// The request's body is gone.
    NotReplayable,
    /// The request's time would be over before the next try.
    NoTime,
}

impl RetryOn {
    /// 5xx, and no response at all.
    pub const SERVER_ERROR: Self = Self(1);
    /// 502, 503, 504, and no response at all.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// No response at all.
    pub const RESET: Self = Self(1 << 2);
    /// No response, and nothing was sent.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 3);
    /// No connection.
    pub const CONNECT_FAILURE: Self = Self(1 << 4);
    /// The peer did not process the request.
    pub const REFUSED_STREAM: Self = Self(1 << 5);
    /// 409.
    pub const RETRIABLE_4XX: Self = Self(1 << 6);
    /// gRPC CANCELLED.
    pub const CANCELLED: Self = Self(1 << 7);
    /// gRPC DEADLINE_EXCEEDED.
    pub const DEADLINE_EXCEEDED: Self = Self(1 << 8);
    /// gRPC INTERNAL.
    pub const INTERNAL: Self = Self(1 << 9);
    /// gRPC RESOURCE_EXHAUSTED.
    pub const RESOURCE_EXHAUSTED: Self = Self(1 << 10);
    /// gRPC UNAVAILABLE.
    pub const UNAVAILABLE: Self = Self(1 << 11);

    /// What holds where the user names no condition.
    pub const DEFAULT: Self =
        Self(Self::CONNECT_FAILURE.0 | Self::REFUSED_STREAM.0 | Self::UNAVAILABLE.0);

    /// Both sets.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the sets have a word in common.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The set of one word; `retriable-status-codes` says only that the codes count, which they
    /// always do.
    fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "5xx" => Self::SERVER_ERROR,
            "gateway-error" => Self::GATEWAY_ERROR,
            "reset" => Self::RESET,
            "reset-before-request" => Self::RESET_BEFORE_REQUEST,
            "connect-failure" => Self::CONNECT_FAILURE,
            "refused-stream" => Self::REFUSED_STREAM,
            "retriable-4xx" => Self::RETRIABLE_4XX,
            "retriable-status-codes" => Self::default(),
            "cancelled" => Self::CANCELLED,
            "deadline-exceeded" => Self::DEADLINE_EXCEEDED,
            "internal" => Self::INTERNAL,
            "resource-exhausted" => Self::RESOURCE_EXHAUSTED,
            "unavailable" => Self::UNAVAILABLE,
            _ => return None,
        })
    }
}

impl RetryPolicy {
    /// A policy outside a route (the mesh's default). What cannot be understood is left out: no
    /// retry is made for it.
    pub fn from_proto(policy: &proto::Retry) -> Result<Self, Arc<str>> {
        Self::read(policy, &mut Problems::default())
    }

    pub(super) fn read(policy: &proto::Retry, problems: &mut Problems) -> Result<Self, Arc<str>> {
        let mut codes = Vec::with_capacity(policy.codes.len());
        for code in &policy.codes {
            match u16::try_from(*code) {
                Ok(code @ 100..=999) => codes.push(code),
                _ => {
                    problems.within("codes", |p| p.add(format!("{code} is no status")));
                }
            }
        }
        let mut on = RetryOn::default();
        // Istio writes several words into one text, and codes among them.
        let words = policy.conditions.iter().flat_map(|words| words.split(','));
        for word in words.map(str::trim).filter(|word| !word.is_empty()) {
            match (RetryOn::from_word(word), word.parse::<u16>()) {
                (Some(set), _) => on = on.union(set),
                (None, Ok(code @ 100..=999)) => codes.push(code),
                (None, _) => {
                    problems.within("conditions", |p| p.add(format!("{word:?} is not known")));
                }
            }
        }
        if policy.conditions.is_empty() {
            on = RetryOn::DEFAULT;
        }
        codes.sort_unstable();
        codes.dedup();
        let backoff = problems.within("backoff", |p| read_duration(policy.backoff.as_ref(), p))?;
        let per_try = policy.per_try_timeout.as_ref();
        let per_try = problems.within("per_try_timeout", |p| read_duration(per_try, p))?;
        Ok(Self {
            attempts: policy.attempts,
            codes: codes.into(),
            on,
            backoff: backoff.unwrap_or(BACKOFF),
            per_try_timeout: per_try.filter(|timeout| !timeout.is_zero()),
        })
    }

    /// What to do after try number `made` (the first is 1). `replayable` says that the request
    /// can be sent as it was, `remaining` what is left of its time, and `random` is uniform over
    /// all values.
    pub fn decide(
        &self,
        attempt: Attempt,
        made: u32,
        replayable: bool,
        remaining: Option<Duration>,
        random: u64,
    ) -> RetryDecision {
        if !self.means(attempt) {
            return RetryDecision::NotRetriable;
        }
        if made > self.attempts {
            return RetryDecision::Exhausted;
        }
        if !replayable {
            return RetryDecision::NotReplayable;
        }
        let pause = self.pause(made, random);
        match remaining {
            Some(remaining) if remaining <= pause => RetryDecision::NoTime,
            _ => RetryDecision::After(pause),
        }
    }

    /// Whether a try that ended so is one to repeat, however many were made.
    pub fn means(&self, attempt: Attempt) -> bool {
        use RetryOn as On;
        // Envoy counts a missing response as a 5xx, since it would answer one.
        let no_response = On::SERVER_ERROR.union(On::GATEWAY_ERROR).union(On::RESET);
        let also = |set| self.on.intersects(no_response.union(set));
        match attempt {
            Attempt::ConnectFailed => also(On::CONNECT_FAILURE.union(On::RESET_BEFORE_REQUEST)),
            Attempt::ResetBeforeRequest => also(On::RESET_BEFORE_REQUEST),
            Attempt::Refused => also(On::REFUSED_STREAM),
            Attempt::Reset => also(On::default()),
            // The answer would be 504: who lists that code means it.
            Attempt::TimedOut => also(On::default()) || self.lists(504),
            Attempt::Response {
                status,
                grpc_status,
            } => self.means_status(status) || grpc_status.is_some_and(|s| self.means_grpc(s)),
        }
    }

    fn means_status(&self, status: u16) -> bool {
        let mut set = RetryOn::default();
        match status {
            409 => set = RetryOn::RETRIABLE_4XX,
            502..=504 => set = RetryOn::SERVER_ERROR.union(RetryOn::GATEWAY_ERROR),
            500..=599 => set = RetryOn::SERVER_ERROR,
            _ => {}
        }
        self.on.intersects(set) || self.lists(status)
    }

    fn means_grpc(&self, status: u32) -> bool {
        self.on.intersects(match status {
            1 => RetryOn::CANCELLED,
            4 => RetryOn::DEADLINE_EXCEEDED,
            8 => RetryOn::RESOURCE_EXHAUSTED,
            13 => RetryOn::INTERNAL,
            14 => RetryOn::UNAVAILABLE,
            _ => RetryOn::default(),
        })
    }

    fn lists(&self, status: u16) -> bool {
        self.codes.binary_search(&status).is_ok()
    }

    /// Full jitter over an interval that doubles: before retry n anything below
    /// min(2^n - 1, 10) base intervals, as in Envoy.
    fn pause(&self, made: u32, random: u64) -> Duration {
        let doubled = 1_u32.checked_shl(made).map_or(u32::MAX, |power| power - 1);
        let ceiling = self.backoff.saturating_mul(doubled.min(BACKOFF_CAP));
        let nanos = (ceiling.as_nanos().min(u64::MAX.into()) * u128::from(random)) >> 64;
        Duration::from_nanos(nanos as u64)
    }
}
