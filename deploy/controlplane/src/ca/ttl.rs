//! How long certificates are valid.

use std::time::Duration;

/// Istio's `DEFAULT_WORKLOAD_CERT_TTL` and `MAX_WORKLOAD_CERT_TTL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TtlPolicy {
    /// For requests that ask for nothing.
    pub default: Duration,
    /// Whatever is asked for.
    pub max: Duration,
}

impl Default for TtlPolicy {
    fn default() -> Self {
        Self {
            default: Duration::from_secs(24 * 3600),
            max: Duration::from_secs(90 * 24 * 3600),
        }
    }
}

impl TtlPolicy {
    /// The validity for a request of so many seconds: what it asks for, else the default, and
    /// never more than the maximum.
    pub fn decide(&self, requested_seconds: i64) -> Duration {
        match u64::try_from(requested_seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            _ => self.default,
        }
        .min(self.max)
    }
}

/// A duration as Go and so Istio's settings write it: `24h`, `1h30m`, `90s`, `500ms`.
///
/// # Errors
/// [`DurationError`] for anything else, and for zero.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let wrong = || DurationError(text.to_owned());
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "h" => Duration::from_secs(3600),
            "m" => Duration::from_secs(60),
            "s" => Duration::from_secs(1),
            "ms" => Duration::from_millis(1),
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        total = unit
            .checked_mul(number)
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
    }
    if total.is_zero() {
        return Err(wrong());
    }
    Ok(total)
}

/// Not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration such as 24h, 1h30m or 90s")]
pub struct DurationError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_and_the_default_really_decide() {
        let hours = |h: u64| Duration::from_secs(h * 3600);
        let policy = TtlPolicy {
            default: hours(12),
            max: hours(20),
        };
        for (requested, expected) in [
            (0, hours(12)),
            (-1, hours(12)),
            (i64::MIN, hours(12)),
            (3600, hours(1)),
            (24 * 3600, hours(20)),
            (i64::MAX, hours(20)),
        ] {
            assert_eq!(policy.decide(requested), expected, "{requested}");
        }
        let inverted = TtlPolicy {
            default: hours(30),
            max: hours(20),
        };
        assert_eq!(inverted.decide(0), hours(20));
    }

    #[test]
    fn durations_are_gos() {
        for (text, seconds) in [
            ("24h", Some(86400)),
            ("1h30m", Some(5400)),
            ("90s", Some(90)),
            ("2160h", Some(90 * 86400)),
            ("1000ms", Some(1)),
            ("", None),
            ("0s", None),
            ("24", None),
            ("h", None),
            ("-1h", None),
            ("1d", None),
            ("99999999999h", None),
            ("1é", None),
        ] {
            assert_eq!(
                parse_duration(text).ok(),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }
}
