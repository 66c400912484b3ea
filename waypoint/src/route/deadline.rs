//! `grpc-timeout`: the time that a gRPC caller allows, told from hop to hop
//! (gRPC over HTTP/2, "Timeout").

use std::time::Duration;

use http::header::HeaderValue;

/// A `grpc-timeout` that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrpcTimeoutError {
    /// the value is not one to eight digits and a unit
    #[error("grpc-timeout is not one to eight digits and a unit of H, M, S, m, u, n")]
    Syntax,
}

/// Most digits that a value may have.
const DIGITS: usize = 8;
/// First value that has more.
const LIMIT: u128 = 100_000_000;

/// The time that a `grpc-timeout` allows.
///
/// # Errors
///
/// The value is not one to eight digits and a unit.
pub fn parse_grpc_timeout(value: &HeaderValue) -> Result<Duration, GrpcTimeoutError> {
    let (unit, digits) = value
        .as_bytes()
        .split_last()
        .ok_or(GrpcTimeoutError::Syntax)?;
    if digits.is_empty() || digits.len() > DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return Err(GrpcTimeoutError::Syntax);
    }
    let amount = digits
        .iter()
        .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Ok(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return Err(GrpcTimeoutError::Syntax),
    })
}

/// The value that tells the next hop of so much time, rounded down to the finest unit that eight
/// digits allow: the next hop must not believe to have more than is left.
pub fn format_grpc_timeout(timeout: Duration) -> HeaderValue {
    let nanos = timeout.as_nanos();
    let units: [(u128, u8); 6] = [
        (1, b'n'),
        (1_000, b'u'),
        (1_000_000, b'm'),
        (1_000_000_000, b'S'),
        (60_000_000_000, b'M'),
        (3_600_000_000_000, b'H'),
    ];
    let fitting = units.iter().find(|(unit, _)| nanos / unit < LIMIT);
    // More than eleven thousand years is as good as that.
    let (amount, unit) = match fitting {
        Some((unit, letter)) => (nanos / unit, *letter),
        None => (LIMIT - 1, b'H'),
    };
    let mut text = [0; DIGITS + 1];
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(amount).as_bytes();
    text[..digits.len()].copy_from_slice(digits);
    text[digits.len()] = unit;
    // Digits and a letter.
    HeaderValue::from_bytes(&text[..=digits.len()]).unwrap_or(HeaderValue::from_static("0n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("10S", Some(Duration::from_secs(10))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("0n", Some(Duration::ZERO)),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("100000000n", None),
            ("1", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1.5S", None),
            ("1s", None),
            ("1 S", None),
        ] {
            let value = HeaderValue::from_static(text);
            assert_eq!(parse_grpc_timeout(&value).ok(), expected, "{text}");
        }
    }

    #[test]
    fn never_more_than_is_left() {
        for (timeout, text) in [
            (Duration::ZERO, "0n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_999), "100000u"),
            (Duration::from_millis(250), "250000u"),
            (Duration::from_secs(100), "100000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::MAX, "99999999H"),
        ] {
            let value = format_grpc_timeout(timeout);
            assert_eq!(value, text);
            let parsed = parse_grpc_timeout(&value).expect("parses");
            assert!(parsed <= timeout, "{text}");
        }
    }
}
