//! The connection to the control plane: what comes over xDS is put into force, what was
//! enrolled is reported.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::identity::{ControlPlaneEndpoint, TokenSource, TrustDomain};
use adit_shared::model::{SharedModel, Update};
use adit_shared::policy::Policy;
use adit_shared::proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use adit_shared::proto::enrolment::{Enrolment, EnrolmentReport};
use adit_shared::proto::security::Authorization;
use adit_shared::telemetry::{Event, ReadinessTask, Telemetry};
use adit_shared::xds::client::handlers::log_rejected;
pub use adit_shared::xds::client::handlers::{Addresses, XdsEvents};
use adit_shared::xds::client::{Handler, Rejected, Resource};
use prost::Message;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status};
use tracing::{error, warn};

use crate::enrolment::Wanted;
use crate::pod::PodSpec;

/// A report that has not changed is sent again so often: the control plane may have lost it.
const REPORT_INTERVAL: Duration = Duration::from_secs(30);
/// After a report that did not arrive.
const REPORT_RETRY: Duration = Duration::from_secs(1);
const REPORT_DEADLINE: Duration = Duration::from_secs(10);

/// Policies. One that is not understood is in force all the same: it fails closed.
pub struct Policies(pub Arc<SharedModel>);

impl Handler for Policies {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut batch = Vec::with_capacity(updates.len() + removed.len());
        for resource in updates {
            let (policy, told) = match Authorization::decode(resource.body) {
                // What the control plane has marked itself needs no rejection.
                Ok(wire) => (
                    Policy::from_resource(&resource.name, &wire),
                    !wire.invalid_reason.is_empty(),
                ),
                Err(e) => (Policy::unreadable(&resource.name, e.to_string()), false),
            };
            if let Some(reason) = policy.invalid.as_ref().filter(|_| !told) {
                let reason = reason.to_string();
                rejected.push(Rejected {
                    name: resource.name,
                    reason,
                });
            }
            batch.push(Update::UpsertPolicy(policy));
        }
        batch.extend(
            removed
                .into_iter()
                .map(|name| Update::RemovePolicy(name.into())),
        );
        self.0.apply(batch);
        log_rejected("authorization", &rejected);
        rejected
    }
}

/// Pods to enrol.
pub struct Enrolments {
    /// Where they are wanted.
    pub wanted: Arc<Wanted>,
    /// Of their identities.
    pub trust_domain: TrustDomain,
    /// Of their names in workload discovery.
    pub cluster: String,
}

impl Handler for Enrolments {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut specs = Vec::with_capacity(updates.len());
        for resource in updates {
            let decoded = Enrolment::decode(resource.body)
                .map_err(|e| e.to_string())
                .and_then(|e| {
                    PodSpec::new(&e, &self.trust_domain, &self.cluster).map_err(|e| e.to_string())
                });
            match decoded {
                Ok(spec) => specs.push(spec),
                Err(reason) => rejected.push(Rejected {
                    name: resource.name,
                    reason,
                }),
            }
        }
        self.wanted.update(specs, &removed);
        log_rejected("enrolment", &rejected);
        rejected
    }
}

/// Why a report was not taken.
enum ReportError {
    /// The control plane said no: this node's enrolments are for another account.
    Refused(String),
    /// It could not be asked.
    Unavailable(String),
}

impl From<Status> for ReportError {
    fn from(status: Status) -> Self {
        let text = format!("{:?}: {}", status.code(), status.message());
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => Self::Refused(text),
            _ => Self::Unavailable(text),
        }
    }
}

/// Tells the control plane what is enrolled: each change at once, and everything again from
/// time to time. Runs until dropped.
///
/// The first report that is taken makes `accepted` done: a proxy that the control plane does
/// not take for this node's gets an answer over xDS like any other, but no pods.
pub async fn report_enrolments(
    endpoint: ControlPlaneEndpoint,
    token: TokenSource,
    telemetry: Telemetry,
    mut accepted: ReadinessTask,
    mut reports: watch::Receiver<EnrolmentReport>,
) {
    let mut client = EnrolmentServiceClient::new(endpoint.channel());
    let mut complained = None;
    loop {
        let report = reports.borrow_and_update().clone();
        let sent = async {
            let mut request = Request::new(report);
            let bearer = token
                .authorization()
                .map_err(|e| ReportError::Unavailable(e.to_string()))?;
            request.metadata_mut().insert("authorization", bearer);
            client.report_enrolment(request).await?;
            Ok::<(), ReportError>(())
        };
        let late = |_| {
            let error = format!("no answer within {REPORT_DEADLINE:?}");
            Err(ReportError::Unavailable(error))
        };
        let error = match timeout(REPORT_DEADLINE, sent).await.unwrap_or_else(late) {
            Ok(()) => {
                accepted.done();
                complained = None;
                // The manager of enrolments is gone when the node leaves the mesh. There is nothing
                // more to report then, and the process lives on to remove what is captured.
                if let Ok(Err(_)) = timeout(REPORT_INTERVAL, reports.changed()).await {
                    std::future::pending::<()>().await;
                }
                continue;
            }
            Err(error) => error,
        };
        let refused = matches!(error, ReportError::Refused(_));
        telemetry.emit(&Event::ReportFailed { refused });
        // Once for each kind: they need different people.
        if complained.replace(refused) != Some(refused) {
            match error {
                ReportError::Refused(error) => error!(
                    target: "enrolment",
                    "the control plane does not accept this proxy for its node, which gets no pods \
                     to enrol (is its service account among the trusted node accounts?): {error}"
                ),
                ReportError::Unavailable(error) => warn!(
                    target: "enrolment",
                    "report not accepted, will be repeated: {error}"
                ),
            }
        }
        sleep(REPORT_RETRY).await;
    }
}
