//! Serves the node proxies on port 15012: configuration (delta ADS), certificates, and the
//! enrolment reports that come back; and operators on 15014.

mod reports;
mod snapshot;

pub use reports::EnrolmentSink;
pub use snapshot::{NodeView, ResourceSnapshot, SnapshotBuilder};
