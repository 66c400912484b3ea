//! Handlers that every proxy has: workloads and services, and what is counted on the way.

use std::sync::Arc;

use prost::Message as _;
use tracing::warn;

use super::{Handler, Observer, Rejected, Resource, Termination};
use crate::model::{SharedModel, Update, address_from_resource};
use crate::proto::workload::Address;
use crate::telemetry::{Event, Telemetry, TerminationReason};

/// Workloads and services.
pub struct Addresses(pub Arc<SharedModel>);

impl Handler for Addresses {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut batch = Vec::with_capacity(updates.len() + removed.len());
        for resource in updates {
            let decoded = Address::decode(resource.body)
                .map_err(|e| e.to_string())
                .and_then(|a| address_from_resource(&resource.name, &a).map_err(|e| e.to_string()));
            match decoded {
                Ok(update) => batch.push(update),
                Err(reason) => rejected.push(Rejected {
                    name: resource.name,
                    reason,
                }),
            }
        }
        batch.extend(
            removed
                .into_iter()
                .map(|name| Update::RemoveAddress(name.into())),
        );
        self.0.apply(batch);
        log_rejected("address", &rejected);
        rejected
    }
}

/// Counts what happens on the xDS stream.
pub struct XdsEvents(pub Telemetry);

impl Observer for XdsEvents {
    fn connection_terminated(&self, reason: Termination) {
        let reason = match reason {
            Termination::ConnectionError => TerminationReason::ConnectionError,
            Termination::Error => TerminationReason::Error,
            Termination::Reconnect => TerminationReason::Reconnect,
            Termination::Complete => TerminationReason::Complete,
        };
        self.0.emit(&Event::XdsTerminated { reason });
    }

    fn message(&self, type_url: &str, bytes: usize) {
        self.0.emit(&Event::XdsMessage { type_url, bytes });
    }
}

/// Tells people what was rejected.
pub fn log_rejected(kind: &str, rejected: &[Rejected]) {
    for Rejected { name, reason } in rejected {
        warn!(target: "xds", kind, name, "resource rejected: {reason}");
    }
}
