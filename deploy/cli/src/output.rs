//! Tables, JSON and YAML.

use std::io::Write;

use anyhow::Context;
use clap::ValueEnum;
use serde::Serialize;
use tabwriter::TabWriter;

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table.
    Short,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Columns and rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) header: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn render(&self) -> anyhow::Result<String> {
        let mut writer = TabWriter::new(Vec::new()).minwidth(0).padding(5);
        writeln!(writer, "{}", self.header.join("\t"))?;
        for row in &self.rows {
            let cells = row.iter().map(|cell| match cell.is_empty() {
                true => "-".to_owned(),
                false => printable(cell),
            });
            writeln!(writer, "{}", cells.collect::<Vec<_>>().join("\t"))?;
        }
        let bytes = writer
            .into_inner()
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(String::from_utf8(bytes)?)
    }
}

/// What comes from elsewhere must not break the table, or the terminal.
fn printable(cell: &str) -> String {
    cell.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Prints a value as JSON or YAML.
pub(crate) fn print_value<T: Serialize>(value: &T, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Yaml => print!("{}", serde_yaml_ng::to_string(value).context("YAML")?),
        Format::Json | Format::Short => {
            println!("{}", serde_json::to_string_pretty(value).context("JSON")?);
        }
    }
    Ok(())
}

/// `println!` panics on a closed pipe; that is how a program under `head` should end, but
/// without a message.
pub(crate) fn end_quietly_on_closed_pipe() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload_as_str().unwrap_or_default();
        if text.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(info);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_cells_cannot_break_them() -> anyhow::Result<()> {
        let mut table = Table::new(&["NAME", "NODE"]);
        table.rows.push(vec!["a-long-name".into(), "n1".into()]);
        table
            .rows
            .push(vec!["b\nc\t\u{1b}[31m".into(), String::new()]);
        assert_eq!(
            table.render()?,
            "NAME            NODE\na-long-name     n1\nb c  [31m       -\n"
        );
        Ok(())
    }
}
