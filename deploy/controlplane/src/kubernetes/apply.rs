//! Writing to the API server: deadlines, what a refusal means, and how fast.

use std::future::Future;
use std::time::Duration;

use kube::core::Status;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

/// The field manager of what is written about objects of others.
pub const STATUS_MANAGER: &str = "adit-status";
/// The field manager of what is generated for Gateways.
pub const GATEWAY_MANAGER: &str = "adit-gateway";

/// A request that has no answer after so long is given up. Shorter than the time between
/// the end of one leader and the beginning of the next (`lease.rs`).
pub const DEADLINE: Duration = Duration::from_secs(5);

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The API server, or the way there.
    #[error("{0}")]
    Api(#[from] Box<kube::Error>),
    /// There was no answer.
    #[error("the API server has not answered within {0:?}")]
    Deadline(Duration),
}

impl From<kube::Error> for RequestError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// What a failed request means for whoever sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The object is another by now: read it again.
    Conflict,
    /// It is gone.
    Gone,
    /// It is refused, and will be until a person changes something.
    Refused,
    /// It may succeed later, at the earliest after so long.
    Later(Option<Duration>),
}

impl RequestError {
    /// What it means.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Deadline(_) => Failure::Later(None),
            Self::Api(error) => match &**error {
                kube::Error::Api(status) => of_status(status),
                kube::Error::BuildRequest(_) | kube::Error::SerdeError(_) => Failure::Refused,
                _ => Failure::Later(None),
            },
        }
    }
}

fn of_status(status: &Status) -> Failure {
    let asked = status
        .details
        .as_ref()
        .map(|details| details.retry_after_seconds);
    let asked = asked.filter(|seconds| *seconds > 0);
    match status.code {
        409 => Failure::Conflict,
        404 | 410 => Failure::Gone,
        400 | 401 | 403 | 405 | 406 | 415 | 422 => Failure::Refused,
        _ => Failure::Later(asked.map(|seconds| Duration::from_secs(seconds.into()))),
    }
}

/// Waits for the answer to a request, for at most [`DEADLINE`].
///
/// # Errors
/// The request's, and [`RequestError::Deadline`].
pub async fn request<T>(
    answer: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, RequestError> {
    match timeout(DEADLINE, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(RequestError::Deadline(DEADLINE)),
    }
}

/// Spreads requests over time: so many a second, and so many at once after a pause.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    burst: u32,
    /// When the bucket would be full again.
    full: Mutex<Option<Instant>>,
}

impl Pace {
    /// `rate` a second, at most `burst` at once; both at least one.
    pub fn new(rate: u32, burst: u32) -> Self {
        Self {
            interval: Duration::from_secs(1) / rate.max(1),
            burst: burst.max(1),
            full: Mutex::new(None),
        }
    }

    /// When the next request may be sent; the caller sends it then.
    fn take(&self, now: Instant) -> Instant {
        let mut full = self.full.lock();
        let next = full.map_or(now, |full| full.max(now)) + self.interval;
        *full = Some(next);
        (next - self.interval * self.burst.min(1 << 16)).max(now)
    }

    /// Waits until the next request may be sent.
    pub async fn wait(&self) {
        let at = self.take(Instant::now());
        sleep_until(at).await;
    }
}

/// How long to wait after so many failures in a row: from 100 ms, doubling, to a minute.
pub fn backoff(failures: u32) -> Duration {
    let base = Duration::from_millis(100) * 2_u32.pow(failures.saturating_sub(1).min(10));
    base.min(Duration::from_secs(60))
        .mul_f64(rand::random_range(0.8..1.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16) -> RequestError {
        kube::Error::Api(Status::failure("x", "y").with_code(code).boxed()).into()
    }

    #[test]
    fn failures_are_told_apart() {
        let table = [
            (api(409), Failure::Conflict),
            (api(404), Failure::Gone),
            (api(403), Failure::Refused),
            (api(422), Failure::Refused),
            (api(429), Failure::Later(None)),
            (api(500), Failure::Later(None)),
            (RequestError::Deadline(DEADLINE), Failure::Later(None)),
        ];
        for (error, expected) in table {
            assert_eq!(error.failure(), expected, "{error}");
        }
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_in_time() {
        let pace = Pace::new(10, 5);
        let now = Instant::now();
        let waits = |now: Instant, count: usize| -> Vec<u128> {
            let waits = (0..count).map(|_| pace.take(now) - now);
            waits.map(|wait| wait.as_millis()).collect()
        };
        assert_eq!(waits(now, 7), [0, 0, 0, 0, 0, 100, 200]);
        // A pause fills the bucket, and no more than that.
        let later = now + Duration::from_secs(3600);
        assert_eq!(waits(later, 6), [0, 0, 0, 0, 0, 100]);
    }

    #[test]
    fn waiting_grows_and_ends_growing() {
        assert!(backoff(1) < Duration::from_millis(150));
        assert!(backoff(3) > backoff(1));
        assert!(backoff(1000) <= Duration::from_secs(72));
    }
}
