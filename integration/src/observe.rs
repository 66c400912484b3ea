//! What the proxies say: access log, metrics, configuration dump; and what is on the wire.

use std::collections::BTreeMap;

use adit_local::HttpAnswer;
use anyhow::{Context, bail};
use serde_json::Value;

use crate::mesh::TestMesh;

/// One line of a ztunnel's access log: its fields by name (`src.addr`, `dst.identity`, ...).
#[derive(Debug, Clone)]
pub struct AccessLine {
    /// `connection complete` or `connection failed`.
    pub message: String,
    fields: BTreeMap<String, String>,
}

impl AccessLine {
    /// A line of the log; `None` where it is not of the access log.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        // time, level, target, message, fields
        let mut parts = line.splitn(5, '\t');
        let target = parts.by_ref().nth(2)?;
        if target != "access" {
            return None;
        }
        let message = parts.next()?.to_owned();
        let mut rest = parts.next()?;
        let mut fields = BTreeMap::new();
        while let Some((name, after)) = rest.split_once('=') {
            let (value, next) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(' ').unwrap_or((after, "")),
            };
            fields.insert(name.trim().to_owned(), value.to_owned());
            rest = next;
        }
        Some(Self { message, fields })
    }

    /// A field's value; empty where it is missing.
    pub fn get(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

/// A scrape.
#[derive(Debug, Clone)]
pub struct Metrics(String);

impl Metrics {
    /// What a metrics port answered.
    pub(crate) fn read(answer: HttpAnswer) -> anyhow::Result<Self> {
        if answer.status != 200 {
            bail!("metrics: status {}", answer.status);
        }
        Ok(Self(String::from_utf8(answer.body)?))
    }

    /// What a metrics port answered, as text.
    pub(crate) fn from_text(text: String) -> Self {
        Self(text)
    }

    /// The sum of all series of `name` that have all `labels`.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.0
            .lines()
            .filter(|line| {
                let (series, _) = line.rsplit_once(' ').unwrap_or((line, ""));
                let (metric, rest) = series.split_once('{').unwrap_or((series, ""));
                metric == name
                    && labels
                        .iter()
                        .all(|(k, v)| rest.contains(&format!("{k}=\"{v}\"")))
            })
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl TestMesh {
    /// The access log of a node's ztunnel so far.
    ///
    /// # Errors
    /// There is no such node.
    pub fn access_log(&self, node: &str) -> anyhow::Result<Vec<AccessLine>> {
        let path = self.component_log(&format!("ztunnel-{node}"))?;
        let text = std::fs::read_to_string(path)?;
        Ok(text.lines().filter_map(AccessLine::parse).collect())
    }

    /// Waits for an access-log line that `wanted` says yes to.
    ///
    /// # Errors
    /// It does not come.
    pub fn access_line(
        &self,
        node: &str,
        wanted: impl Fn(&AccessLine) -> bool,
    ) -> anyhow::Result<AccessLine> {
        self.eventually("access log line", || {
            let lines = self.access_log(node)?;
            lines
                .iter()
                .rev()
                .find(|line| wanted(line))
                .cloned()
                .with_context(|| {
                    format!("not among {} lines; last {:?}", lines.len(), lines.last())
                })
        })
    }

    /// A ztunnel's metrics.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self, node: &str) -> anyhow::Result<Metrics> {
        let answer = self.get(node, 15020, "/metrics")?;
        Metrics::read(answer).with_context(|| format!("ztunnel of {node}"))
    }

    /// A ztunnel's configuration dump.
    ///
    /// # Errors
    /// It does not answer.
    pub fn config_dump(&self, node: &str) -> anyhow::Result<Value> {
        let answer = self.get(node, 15000, "/config_dump")?;
        serde_json::from_slice(&answer.body).context("config dump")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_lines_are_read() {
        let line = "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:5 \
                    src.workload=\"a b\" bytes_sent=72 duration=\"5ms\"";
        let line = AccessLine::parse(line).expect("a line");
        assert_eq!(line.get("src.addr"), "10.0.0.1:5");
        assert_eq!(line.get("src.workload"), "a b");
        assert_eq!(line.get("bytes_sent"), "72");
        assert_eq!(line.get("missing"), "");
    }

    #[test]
    fn series_are_summed_by_label() {
        let metrics =
            Metrics("# x\nm_total{a=\"1\",b=\"2\"} 3\nm_total{a=\"1\",b=\"3\"} 4\nn 1\n".into());
        assert_eq!(metrics.sum("m_total", &[("a", "1")]), 7.0);
        assert_eq!(metrics.sum("m_total", &[("b", "3")]), 4.0);
        assert_eq!(metrics.sum("n", &[]), 1.0);
    }
}
