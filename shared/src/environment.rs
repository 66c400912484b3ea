//! Reading a process's configuration from environment variables.
//!
//! A value that cannot be used stops the start with the variable's name: a proxy that
//! runs on a default nobody asked for is worse than one that does not run.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env;
use std::str::FromStr;
use std::time::Duration;

/// A variable that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A required variable is not set.
    #[error("{0} is required and not set")]
    Missing(&'static str),
    /// A value that does not parse or is out of range.
    #[error("{variable}={value:?}: {reason}")]
    Invalid {
        /// The variable's name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should have been.
        reason: String,
    },
}

/// The value of a variable that is set and not empty.
pub fn optional(name: &str) -> Option<String> {
    env::var(name).ok().filter(|v| !v.is_empty())
}

/// A text, or its default.
pub fn text(name: &str, default: &str) -> String {
    optional(name).unwrap_or_else(|| default.into())
}

/// A value that parses by its own `FromStr`.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn parsed<T>(variable: &'static str, default: T) -> Result<T, ConfigError>
where
    T: FromStr<Err: std::fmt::Display>,
{
    parsed_with(variable, default, |v| {
        v.parse().map_err(|e: T::Err| e.to_string())
    })
}

/// A value that `parse` reads.
///
/// # Errors
/// [`ConfigError::Invalid`] with what `parse` says.
pub fn parsed_with<T>(
    variable: &'static str,
    default: T,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, ConfigError> {
    match optional(variable) {
        None => Ok(default),
        Some(value) => parse(&value).map_err(|reason| ConfigError::Invalid {
            variable,
            value,
            reason,
        }),
    }
}

/// A time with its unit: `30s`, `24h`.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn duration(variable: &'static str, default: Duration) -> Result<Duration, ConfigError> {
    parsed_with(variable, default, |v| {
        humantime::parse_duration(v).map_err(|e| format!("{e}; write for example 30s or 24h"))
    })
}

/// Parser of a number of at least 1.
///
/// # Errors
/// What is needed.
pub fn positive(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("a whole number of at least 1 is needed".into()),
    }
}

/// A number of threads: a number, `n%` of the cores, or 0 for all.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn share_of_cores(variable: &'static str, default: usize) -> Result<usize, ConfigError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    parsed_with(variable, default, |v| {
        let wrong = |_| "a number, a percentage as 50%, or 0 for all cores is needed".to_string();
        let count = match v.strip_suffix('%') {
            Some(percent) => {
                let percent = percent.parse::<usize>().map_err(wrong)?;
                cores.saturating_mul(percent) / 100
            }
            None => match v.parse().map_err(wrong)? {
                0 => cores,
                n => n,
            },
        };
        Ok(count.clamp(1, 256))
    })
}

/// `CONNECTION_TERMINATION_DEADLINE`, else from `TERMINATION_GRACE_PERIOD_SECONDS`, else 5 s.
/// A grace period leaves room for the rest of the shutdown: 5 s, 1 s of a short one.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn termination_deadline() -> Result<Duration, ConfigError> {
    let default = Duration::from_secs(5);
    if optional("CONNECTION_TERMINATION_DEADLINE").is_some() {
        return duration("CONNECTION_TERMINATION_DEADLINE", default);
    }
    let grace: u64 = match optional("TERMINATION_GRACE_PERIOD_SECONDS") {
        None => return Ok(default),
        Some(_) => parsed("TERMINATION_GRACE_PERIOD_SECONDS", 0)?,
    };
    Ok(Duration::from_secs(grace.saturating_sub(if grace > 10 {
        5
    } else {
        1
    })))
}

/// `ISTIO_META_*` and `ISTIO_METAJSON_*`, for the node's metadata.
pub fn metadata() -> BTreeMap<String, serde_json::Value> {
    env::vars()
        .filter_map(|(name, value)| {
            if let Some(key) = name.strip_prefix("ISTIO_METAJSON_") {
                serde_json::from_str(&value).ok().map(|v| (key.into(), v))
            } else {
                let key = name.strip_prefix("ISTIO_META_")?;
                Some((key.into(), value.into()))
            }
        })
        .collect()
}

/// Serializes a value as it displays.
///
/// # Errors
/// Those of the serializer.
pub fn as_text<T: ToString, S: serde::Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&value.to_string())
}
