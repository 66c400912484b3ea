//! The hub that events go through, and the record of one open connection.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::access_log::AccessLog;
use super::event::{ConnectionInfo, Event, EventSink, Failure, ResponseFlag, Totals};
use super::{LogWriter, Metrics, TcpSeries};

/// Where events go. Clones are one hub; every worker has one.
#[derive(Clone)]
pub struct Telemetry {
    hub: Arc<Hub>,
}

struct Hub {
    metrics: Arc<Metrics>,
    access_log: Option<AccessLog>,
    sinks: Vec<Arc<dyn EventSink>>,
}

impl Telemetry {
    /// A hub that counts in `metrics`, writes the access log to `log` (none: no access
    /// log) and tells `sinks`.
    pub fn new(
        metrics: Arc<Metrics>,
        log: Option<LogWriter>,
        sinks: Vec<Arc<dyn EventSink>>,
    ) -> Self {
        Self {
            hub: Arc::new(Hub {
                metrics,
                access_log: log.map(AccessLog::new),
                sinks,
            }),
        }
    }

    /// The metrics that events are counted in.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.hub.metrics
    }

    /// Tells everybody of `event`. Connections are opened by [`Self::open`] instead.
    pub fn emit(&self, event: &Event<'_>) {
        self.hub.metrics.on_event(event);
        if let Some(log) = &self.hub.access_log {
            log.on_event(event);
        }
        for sink in &self.hub.sinks {
            sink.on_event(event);
        }
    }

    /// A connection's way is decided: resolves its series and starts its record.
    pub fn open(&self, info: ConnectionInfo) -> OpenConnection {
        let series = self.hub.metrics.tcp_series(&info.labels);
        let counters = Arc::new(ConnectionCounters {
            info,
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
            opened: Instant::now(),
        });
        series.count_opened();
        self.emit(&Event::ConnectionOpened {
            connection: &counters.info,
        });
        OpenConnection {
            telemetry: self.clone(),
            counters,
            series,
            ended: false,
        }
    }

    /// A connection failed before its way was decided.
    pub fn failed(
        &self,
        info: &ConnectionInfo,
        duration: Duration,
        flag: ResponseFlag,
        error: &dyn Display,
    ) {
        self.hub.metrics.tcp_series(&info.labels).count_failed(flag);
        self.emit(&Event::ConnectionFailed {
            connection: info,
            duration,
            failure: Failure { flag, error },
        });
    }
}

/// What can be read of an open connection from any thread, for the admin interface.
#[derive(Debug)]
pub struct ConnectionCounters {
    info: ConnectionInfo,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
    opened: Instant,
}

impl ConnectionCounters {
    /// What is known of the connection.
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// What it has carried so far.
    pub fn totals(&self) -> Totals {
        Totals {
            request_bytes: self.request_bytes.load(Relaxed),
            response_bytes: self.response_bytes.load(Relaxed),
            duration: self.opened.elapsed(),
        }
    }
}

/// The record of an open connection. Counting a chunk is two additions.
///
/// Ended by [`Self::close`] or [`Self::fail`]; one that is dropped instead was cut off
/// by a drain or a shutdown and is recorded as such.
pub struct OpenConnection {
    telemetry: Telemetry,
    counters: Arc<ConnectionCounters>,
    series: Arc<TcpSeries>,
    ended: bool,
}

impl OpenConnection {
    /// `bytes` went from client to server.
    pub fn count_request(&self, bytes: u64) {
        self.counters.request_bytes.fetch_add(bytes, Relaxed);
        self.series.count_received(bytes);
    }

    /// `bytes` went from server to client.
    pub fn count_response(&self, bytes: u64) {
        self.counters.response_bytes.fetch_add(bytes, Relaxed);
        self.series.count_sent(bytes);
    }

    /// What is known of the connection.
    pub fn info(&self) -> &ConnectionInfo {
        &self.counters.info
    }

    /// A handle to read the counters from elsewhere.
    pub fn counters(&self) -> &Arc<ConnectionCounters> {
        &self.counters
    }

    /// It ended well.
    pub fn close(mut self) {
        self.end(None);
    }

    /// It ended by an error.
    pub fn fail(mut self, flag: ResponseFlag, error: &dyn Display) {
        self.end(Some(Failure { flag, error }));
    }

    fn end(&mut self, failure: Option<Failure<'_>>) {
        self.ended = true;
        self.series
            .count_closed(failure.map_or(ResponseFlag::None, |f| f.flag));
        // An error without a flag came from the app's side or from a drain: the mesh did
        // not fail.
        if let Some(failure) = failure.filter(|f| f.flag != ResponseFlag::None) {
            self.series.count_failed(failure.flag);
        }
        self.telemetry.emit(&Event::ConnectionClosed {
            connection: &self.counters.info,
            totals: self.counters.totals(),
            failure,
        });
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Some(Failure {
                flag: ResponseFlag::None,
                error: &"connection closed: the proxy released it before both ends were done",
            }));
        }
    }
}
