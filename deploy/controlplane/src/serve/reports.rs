//! What nodes report about the capture of their pods.

use std::sync::Arc;

use adit_shared::proto::enrolment::enrolment_service_server::EnrolmentService;
use adit_shared::proto::enrolment::{EnrolmentReport, EnrolmentReportResponse, PodEnrolment};
use tonic::{Request, Response, Status};
use tracing::{debug, warn};

use super::gate;
use super::metrics::Metrics;
use crate::auth::TrustedAccounts;

/// More pods than any node runs.
const MAX_PODS: usize = 10_000;

/// Keeps what the nodes report.
pub trait EnrolmentSink: Send + Sync {
    /// The state of all pods of `node`, which replaces what it reported before. The caller has
    /// been checked to be that node. Must not block.
    fn report(&self, node: &str, pods: Vec<PodEnrolment>);
}

pub(super) struct Reports {
    pub(super) trusted: TrustedAccounts,
    pub(super) sink: Arc<dyn EnrolmentSink>,
    pub(super) metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl EnrolmentService for Reports {
    async fn report_enrolment(
        &self,
        request: Request<EnrolmentReport>,
    ) -> Result<Response<EnrolmentReportResponse>, Status> {
        let (_, extensions, report) = request.into_parts();
        let caller = gate::caller(&extensions)?;
        let EnrolmentReport { node, pods } = report;
        if !self.trusted.contains(&caller) || node != caller.node {
            warn!(%caller, node, "enrolment report refused: not that node's proxy");
            return Err(Status::permission_denied(
                "only the proxy of a node reports for it",
            ));
        }
        if pods.len() > MAX_PODS {
            return Err(Status::invalid_argument(format!(
                "more than {MAX_PODS} pods in a report"
            )));
        }
        debug!(node, pods = pods.len(), "enrolment report");
        self.metrics.enrolment_reports.inc();
        self.sink.report(&node, pods);
        Ok(Response::new(EnrolmentReportResponse {}))
    }
}
