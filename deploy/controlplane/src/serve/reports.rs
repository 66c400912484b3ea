//! What nodes report about the capture of their pods.

use adit_shared::proto::enrolment::PodEnrolment;

/// Keeps what the nodes report.
pub trait EnrolmentSink: Send + Sync {
    /// The state of all pods of `node`, which replaces what it reported before. The caller has
    /// been checked to be that node. Must not block.
    fn report(&self, node: &str, pods: Vec<PodEnrolment>);
}
