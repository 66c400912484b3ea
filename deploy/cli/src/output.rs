//! What a command leaves behind: text on standard output that may be cut off at any time,
//! remarks on standard error, and an outcome.

use std::fmt;
use std::io::{self, BufWriter, Stdout, Write};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

/// What the exit status tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Exit status 0.
    Well,
    /// Exit status 1: the command worked, and what it found is not well.
    Findings,
}

impl Outcome {
    /// [`Outcome::Well`] if there is nothing to complain about.
    pub fn of(well: bool) -> Self {
        if well { Self::Well } else { Self::Findings }
    }

    /// Well if both are.
    pub fn and(self, other: Self) -> Self {
        Self::of(self == Self::Well && other == Self::Well)
    }
}

/// The command line cannot be obeyed as it stands: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// How a table's content is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// A table.
    #[default]
    Short,
    /// JSON with everything there is.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Standard output. Never locked between writes, so that other threads may print too.
#[derive(Debug)]
pub struct Output {
    inner: BufWriter<Stdout>,
    closed: bool,
}

impl Output {
    /// The process' own.
    pub fn stdout() -> Self {
        Self {
            inner: BufWriter::new(io::stdout()),
            closed: false,
        }
    }

    /// Whether the reader has gone. Every write fails then; nobody has to be told.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.closed |= matches!(&result, Err(e) if e.kind() == io::ErrorKind::BrokenPipe);
        result
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes);
        self.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.inner.flush();
        self.note(flushed)
    }
}

/// Prints `value` as JSON or YAML; `table` is for [`Format::Short`].
pub fn print(
    out: &mut Output,
    format: Format,
    value: &impl Serialize,
    table: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Short => table(),
        Format::Json => json(value)?,
        Format::Yaml => yaml(value)?,
    };
    out.write_all(text.as_bytes())
        .context("cannot write the output")
}

/// As indented JSON with a newline at its end.
pub fn json(value: &impl Serialize) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(value).context("cannot express this as JSON")?;
    text.push('\n');
    Ok(text)
}

/// As YAML.
pub fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    serde_yaml_ng::to_string(value).context("cannot express this as YAML")
}

/// An error and its causes in one line. Messages that already end with their cause do not
/// repeat it.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    text
}

/// Tells of an error on standard error.
pub fn complain_of(error: &anyhow::Error) {
    complain(format_args!("Error: {}", sentence(error)));
}

/// A line on standard error. One that is closed is nobody's loss.
pub fn complain(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let refused = || anyhow::anyhow!("refused");
        let told = refused().context("GET x: refused").context("n1 is silent");
        assert_eq!(sentence(&told), "n1 is silent: GET x: refused");
        assert_eq!(sentence(&refused().context("n1")), "n1: refused");
    }
}
