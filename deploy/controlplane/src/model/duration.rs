//! Lengths of time as Istio's resources write them: Go's, for example `1m30s` or `0.5s`.

use std::time::Duration;

use super::field::{At, FieldError};

/// A century: what is longer was not meant.
const MAX: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// Reads a length of time, or says what is wrong with it.
pub(super) fn duration(
    text: &str,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<prost_types::Duration> {
    let read = parse(text).filter(|duration| *duration <= MAX);
    if read.is_none() {
        errors.push(at.error(format!(
            "{text:?} is not a duration such as 1h, 1m30s, 500ms or 0s"
        )));
    }
    prost_types::Duration::try_from(read?).ok()
}

fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    if text.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(end);
        let number: f64 = number.parse().ok()?;
        let end = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        seconds += number
            * match unit {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = after;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, expected) in [
            ("5s", Some(5_000)),
            ("1m30s", Some(90_000)),
            ("0.5s", Some(500)),
            ("1h1ms", Some(3_600_001)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("1e999s", None),
            (".s", None),
        ] {
            let found = parse(text).map(|of| of.as_millis());
            assert_eq!(found, expected, "{text:?}");
        }
    }
}
