//! One line for each connection, with ztunnel's fields in ztunnel's order
//! (`reference`: Istio's `proxy/metrics.rs`), so that existing log pipelines read it; behind a
//! waypoint `origin.*` beside `src.*`: the caller that it speaks for.
//!
//! The line is rendered here and handed to the [`LogWriter`]: going through `tracing`
//! would box and visit twenty fields. Whether lines are wanted is still `tracing`'s
//! decision: target `access` of the log filter.

use std::cell::RefCell;
use std::time::SystemTime;

use super::LogWriter;
use super::event::{ConnectionInfo, Event, EventSink, Failure, Reporter, SecurityPolicy, Totals};
use super::logging::{self, Format, LineFormat};

/// Renders connection events into lines.
pub(super) struct AccessLog {
    writer: LogWriter,
    format: LineFormat,
}

impl AccessLog {
    pub(super) fn new(writer: LogWriter) -> Self {
        Self {
            writer,
            format: logging::line_format(),
        }
    }

    #[cfg(test)]
    fn with_format(writer: LogWriter, format: LineFormat) -> Self {
        Self { writer, format }
    }

    fn line(
        &self,
        level: &'static str,
        message: &'static str,
        info: &ConnectionInfo,
        totals: Option<Totals>,
        error: Option<&dyn std::fmt::Display>,
    ) {
        thread_local! {
            static LINE: RefCell<String> = const { RefCell::new(String::new()) };
        }
        LINE.with_borrow_mut(|line| {
            line.clear();
            let now = SystemTime::now();
            let mut out = Format::begin(self.format, line, now, level, "access", message);
            connection_fields(&mut out, info, totals, error);
            out.end();
            self.writer.write_line(line.as_bytes());
        });
    }
}

/// The fields of Istio's ztunnel, in its order; unknown ones are left out.
fn connection_fields(
    out: &mut Format<'_>,
    info: &ConnectionInfo,
    totals: Option<Totals>,
    error: Option<&dyn std::fmt::Display>,
) {
    let labels = &info.labels;
    let mtls = labels.security == SecurityPolicy::MutualTls;
    let name = |pod: &str, service: &str| if pod.is_empty() { service } else { pod }.to_owned();

    let source = &labels.source;
    out.display("src.addr", &info.source_address);
    out.text(
        "src.workload",
        &name(&info.source_name, &source.canonical_service),
    );
    out.text("src.namespace", &source.namespace);
    if let (true, Some(identity)) = (mtls, &source.principal) {
        out.quoted("src.identity", identity);
    }
    out.text("src.cluster", &source.cluster);
    if let Some(origin) = &info.origin {
        match origin.address.port() {
            0 => out.display("origin.addr", &origin.address.ip()),
            _ => out.display("origin.addr", &origin.address),
        }
        out.quoted("origin.identity", &origin.identity);
    }

    let destination = &labels.destination;
    out.display("dst.addr", &info.destination_address);
    if let Some(authority) = &info.hbone_authority {
        out.display("dst.hbone_addr", authority);
    }
    out.text(
        "dst.service",
        labels.service.as_ref().map_or("", |s| &s.hostname),
    );
    out.text(
        "dst.workload",
        &name(&info.destination_name, &destination.canonical_service),
    );
    out.text("dst.namespace", &destination.namespace);
    if let (true, Some(identity)) = (mtls, &destination.principal) {
        out.quoted("dst.identity", identity);
    }
    out.text("dst.cluster", &destination.cluster);

    let outbound = labels.reporter == Reporter::Source;
    out.text("direction", if outbound { "outbound" } else { "inbound" });
    if let Some(totals) = totals {
        // The metrics take the server's view; the log takes that of the proxy's own side.
        let (sent, received) = match labels.reporter {
            Reporter::Source => (totals.request_bytes, totals.response_bytes),
            Reporter::Destination | Reporter::Waypoint => {
                (totals.response_bytes, totals.request_bytes)
            }
        };
        out.number("bytes_sent", sent);
        out.number("bytes_recv", received);
        let milliseconds = totals.duration.as_millis();
        out.quoted("duration", &format_args!("{milliseconds}ms"));
    }
    if let Some(error) = error {
        out.quoted("error", error);
    }
}

impl EventSink for AccessLog {
    fn on_event(&self, event: &Event<'_>) {
        use tracing::{Level, enabled};
        match *event {
            Event::ConnectionOpened { connection } => {
                if enabled!(target: "access", Level::DEBUG) {
                    self.line("debug", "connection opened", connection, None, None);
                }
            }
            Event::ConnectionClosed {
                connection,
                totals,
                failure: None,
            } => {
                if enabled!(target: "access", Level::INFO) {
                    self.line(
                        "info",
                        "connection complete",
                        connection,
                        Some(totals),
                        None,
                    );
                }
            }
            Event::ConnectionClosed {
                connection,
                totals,
                failure: Some(Failure { error, .. }),
            } => {
                if enabled!(target: "access", Level::ERROR) {
                    let totals = Some(totals);
                    self.line(
                        "error",
                        "connection complete",
                        connection,
                        totals,
                        Some(error),
                    );
                }
            }
            Event::ConnectionFailed {
                connection,
                failure: Failure { error, .. },
                ..
            } => {
                if enabled!(target: "access", Level::WARN) {
                    self.line("warn", "connection failed", connection, None, Some(error));
                }
            }
            Event::InboundRejected { peer, reason } => {
                if enabled!(target: "access", Level::WARN) {
                    let reason = reason.as_str();
                    tracing::warn!(target: "access", { src.addr = %peer, reason = reason }, "inbound rejected");
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
