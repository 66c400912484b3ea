//! What happened to a connection, told once: one typed [`Event`] feeds the metrics, the
//! access log and whoever else listens, so they cannot disagree.
//!
//! A proxy calls [`Telemetry::open`] when it knows where a connection goes and counts
//! bytes on the [`OpenConnection`] it gets; label sets and metric handles are resolved
//! there, once. Everything else that happens is an [`Event`] given to
//! [`Telemetry::emit`].

mod access_log;
pub mod admin;
mod connection;
mod event;
pub mod http;
pub mod logging;
mod metrics;
mod pools;
mod readiness;
mod series;
mod writer;

pub use connection::{ConnectionCounters, OpenConnection, Telemetry};
pub use event::{
    ConnectionInfo, Event, EventSink, Failure, Origin, Rejection, Reporter, ResponseFlag,
    SecurityPolicy, ServiceLabels, TcpLabels, TerminationReason, Totals, WorkloadLabels,
};
pub use metrics::Metrics;
pub use pools::WorkerPools;
pub use readiness::{Readiness, ReadinessTask};
pub use series::{MAX_SERIES, TcpSeries};
pub use writer::LogWriter;
