//! The log of the process: plain (`time \t level \t target \t message \t k=v ...`) or
//! JSON (`LOG_FORMAT=json`), filtered by `RUST_LOG` at first and by the admin interface
//! later.

use std::fmt::{self, Display, Write as _};
use std::io;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, reload};

use super::LogWriter;

/// What is logged where `RUST_LOG` says nothing.
const DEFAULT_FILTER: &str = "info";

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFormat {
    /// Tab-separated, for people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// The format that `LOG_FORMAT` asks for.
pub(super) fn line_format() -> LineFormat {
    match std::env::var("LOG_FORMAT") {
        Ok(format) if format.eq_ignore_ascii_case("json") => LineFormat::Json,
        _ => LineFormat::Plain,
    }
}

static FILTER: OnceLock<FilterHandle> = OnceLock::new();

struct FilterHandle {
    reload: reload::Handle<EnvFilter, Registry>,
    initial: String,
}

/// Starts logging to standard output by `RUST_LOG` (default `info`) and `LOG_FORMAT`.
/// To be called once, first of all. The writer is for the access log and for
/// [`LogWriter::flush`] at the end.
///
/// # Errors
/// [`LoggingError`] when `RUST_LOG` is malformed, logging was started before, or no
/// thread can be had.
pub fn init() -> Result<LogWriter, LoggingError> {
    let initial = std::env::var(EnvFilter::DEFAULT_ENV)
        .ok()
        .filter(|filter| !filter.trim().is_empty())
        .unwrap_or_else(|| DEFAULT_FILTER.into());
    let filter = parse(&initial)?;
    let writer = LogWriter::start(io::stdout()).map_err(LoggingError::Thread)?;
    let (filter, reload) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Lines(line_format()))
        .with_writer(writer.clone());
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .try_init()
        .map_err(|_| LoggingError::Twice)?;
    // Whoever won the race for the subscriber is the first here too.
    let _ = FILTER.set(FilterHandle { reload, initial });
    Ok(writer)
}

/// Replaces the filter: `info`, or `access=debug,adit_shared::xds=warn`. Also takes the
/// form `target:level` which Istio's help promises. Gives the filter as it now is.
///
/// # Errors
/// [`LoggingError::Filter`] when the filter is malformed: it stays as it was.
pub fn set_filter(filter: &str) -> Result<String, LoggingError> {
    let handle = FILTER.get().ok_or(LoggingError::NotStarted)?;
    let filter = parse(&with_equal_signs(filter))?;
    let now = filter.to_string();
    handle
        .reload
        .reload(filter)
        .map_err(|_| LoggingError::NotStarted)?;
    Ok(now)
}

/// Puts the filter back to what `RUST_LOG` said at the start.
///
/// # Errors
/// [`LoggingError::NotStarted`].
pub fn reset() -> Result<String, LoggingError> {
    let handle = FILTER.get().ok_or(LoggingError::NotStarted)?;
    set_filter(&handle.initial)
}

/// The filter as it is.
///
/// # Errors
/// [`LoggingError::NotStarted`].
pub fn current_filter() -> Result<String, LoggingError> {
    let handle = FILTER.get().ok_or(LoggingError::NotStarted)?;
    handle
        .reload
        .with_current(ToString::to_string)
        .map_err(|_| LoggingError::NotStarted)
}

fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LoggingError::Filter {
            filter: filter.into(),
            source,
        })
}

/// Turns `target:level` into `target=level` and leaves `a::b=level` alone.
fn with_equal_signs(filter: &str) -> String {
    let directives = filter.split(',').map(|directive| {
        let Some((target, level)) = directive.rsplit_once(':') else {
            return directive.to_owned();
        };
        let single = !target.ends_with(':') && !directive.contains('=');
        if single
            && level
                .trim()
                .parse::<tracing::level_filters::LevelFilter>()
                .is_ok()
        {
            format!("{target}={level}")
        } else {
            directive.to_owned()
        }
    });
    directives.collect::<Vec<_>>().join(",")
}

/// Why the log is not as was asked.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// Not a filter.
    #[error("invalid log filter {filter:?}: {source}")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong.
        source: ParseError,
    },
    /// [`init`] was called before.
    #[error("logging was already started")]
    Twice,
    /// [`init`] was not called.
    #[error("logging was not started")]
    NotStarted,
    /// No thread for writing.
    #[error("cannot start the log thread: {0}")]
    Thread(io::Error),
}

/// Writes one line, field by field.
pub(super) struct Format<'a> {
    format: LineFormat,
    out: &'a mut dyn fmt::Write,
    first: bool,
}

impl<'a> Format<'a> {
    /// Begins a line with its fixed parts. Writing to a string or to a log line cannot
    /// fail, so errors are not looked at.
    pub(super) fn begin(
        format: LineFormat,
        out: &'a mut dyn fmt::Write,
        time: SystemTime,
        level: &str,
        target: &str,
        message: &str,
    ) -> Self {
        let time = Timestamp(time);
        let _ = match format {
            LineFormat::Plain => write!(out, "{time}\t{level}\t{target}\t{}", Unbroken(&message)),
            LineFormat::Json => write!(
                out,
                r#"{{"level":"{level}","time":"{time}","scope":{},"message":{}"#,
                Quoted(target),
                Quoted(message)
            ),
        };
        Self {
            format,
            out,
            first: true,
        }
    }

    fn key(&mut self, key: &str) {
        let _ = match (self.format, self.first) {
            (LineFormat::Json, _) => write!(self.out, ",{}:", Quoted(key)),
            (LineFormat::Plain, true) => write!(self.out, "\t{key}="),
            (LineFormat::Plain, false) => write!(self.out, " {key}="),
        };
        self.first = false;
    }

    /// A string in quotes, left out if empty.
    pub(super) fn text(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.quoted(key, &value);
        }
    }

    /// A value that is quoted in both formats.
    pub(super) fn quoted(&mut self, key: &str, value: &dyn Display) {
        self.key(key);
        let _ = write!(self.out, "{}", Quoted(value));
    }

    /// A value that is bare in the plain format, as `tracing`'s `%value` is.
    pub(super) fn display(&mut self, key: &str, value: &dyn Display) {
        self.key(key);
        let _ = match self.format {
            LineFormat::Plain => write!(self.out, "{}", Unbroken(value)),
            LineFormat::Json => write!(self.out, "{}", Quoted(value)),
        };
    }

    /// A number or a truth value: bare in both formats.
    pub(super) fn number(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.out, "{value}");
    }

    /// Ends the line.
    pub(super) fn end(self) {
        let _ = self.out.write_str(match self.format {
            LineFormat::Plain => "\n",
            LineFormat::Json => "}\n",
        });
    }
}

/// Shows a value as a JSON string; what a peer sent cannot break out of its line.
struct Quoted<T>(T);

impl<T: Display> Display for Quoted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        write!(Escape(f, true), "{}", self.0)?;
        f.write_char('"')
    }
}

/// Shows a value without quotes but on one line.
struct Unbroken<'a>(&'a dyn Display);

impl Display for Unbroken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escape(f, false), "{}", self.0)
    }
}

struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>, bool);

impl fmt::Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let Self(out, quotes) = self;
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            // U+2028 and U+2029 break lines in some viewers.
            let breaks = c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
            let quoted = *quotes && matches!(c, '"' | '\\');
            if !(breaks || quoted) {
                continue;
            }
            out.write_str(&text[plain..at])?;
            plain = at + c.len_utf8();
            match c {
                '"' => out.write_str("\\\"")?,
                '\\' => out.write_str("\\\\")?,
                '\n' => out.write_str("\\n")?,
                '\r' => out.write_str("\\r")?,
                '\t' => out.write_str("\\t")?,
                c => write!(out, "\\u{:04x}", c as u32)?,
            }
        }
        out.write_str(&text[plain..])
    }
}

/// RFC 3339 in UTC with microseconds.
struct Timestamp(SystemTime);

impl Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = since.as_secs();
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil_date(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let micros = since.subsec_micros();
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z"
        )
    }
}

/// Year, month and day of a day since 1970-01-01, by 400-year eras that begin in March
/// (Hinnant, "chrono-compatible low-level date algorithms").
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// Formats events of `tracing`.
struct Lines(LineFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut fields = Fields(Format::begin(
            self.0,
            &mut writer,
            SystemTime::now(),
            level,
            metadata.target(),
            &message.0,
        ));
        event.record(&mut fields);
        fields.0.end();
        Ok(())
    }
}

/// Picks the message out of an event.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.0, "{value:?}");
        }
    }
}

/// Writes all other fields of an event.
struct Fields<'a>(Format<'a>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() != "message" {
            self.0.display(field.name(), &format_args!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "message" {
            self.0.quoted(field.name(), &value);
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.number(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.number(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.number(field.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000007Z"),
            (951_782_399, "2000-02-28T23:59:59.000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000007Z"),
            (951_868_800, "2000-03-01T00:00:00.000007Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000007Z"),
            (1_767_225_600, "2026-01-01T00:00:00.000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000007Z"),
        ] {
            let time = UNIX_EPOCH + Duration::new(seconds, 7_999);
            assert_eq!(Timestamp(time).to_string(), text);
        }
    }

    #[test]
    fn takes_the_colon_that_istios_help_promises() {
        for (given, meant) in [
            ("info", "info"),
            ("access:debug", "access=debug"),
            ("access=debug", "access=debug"),
            ("adit_shared::xds=warn", "adit_shared::xds=warn"),
            ("adit_shared::xds:warn", "adit_shared::xds=warn"),
            ("a:info,b=warn,error", "a=info,b=warn,error"),
            // A module that is named like a level.
            ("adit::debug", "adit::debug"),
        ] {
            assert_eq!(with_equal_signs(given), meant);
        }
    }
}
